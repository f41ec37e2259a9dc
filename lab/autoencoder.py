"""The lab's VAE: the host's TAESD layout with 16 latent channels, trained for reconstruction with latents of unit deviation."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

CROP, BATCH = 64, 8
LATENT_NOISE = 0.05
# Blocks join from coarse to fine: (share of the steps before which this holds, finest scale whose Blocks run, in pixels to a cell). Those of the
# encoder that are finer than ENCODER_FINEST stay closed, and those of the decoder's last scale are left to the part that trains it alone.
STAGES = ((0.913, 4), (1.0, 2))
ENCODER_FINEST = 4


def build_autoencoder() -> nn.Module:
    """Return an initialised TAESD with 16 latent channels (about 2.5 M parameters)."""
    from comfy.taesd.taesd import TAESD, Block

    torch.manual_seed(0)
    model = TAESD(latent_channels=16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layers, scale in ((model.taesd_encoder, 1), (model.taesd_decoder, 8)):
        for layer, at in _scales(layers, scale):
            if isinstance(layer, Block):
                layer.conv[-1].weight.data.mul_(0.2 if at >= STAGES[0][1] else 0.0)
    for last in (model.taesd_encoder[-1], model.taesd_decoder[-1]):
        last.weight.data.mul_(0.3)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    return model


def crops(store: np.ndarray, step: int, batch: int = BATCH, size: int = CROP) -> Tensor:
    """Return (batch, 3, size, size) random crops in 0..1, a function of the step alone; half of them halved in size, the busier preferred.

    Photographs at native resolution are busier than most of the training pictures, and busy places are where a VAE loses most.
    """
    rng = np.random.default_rng((1, step))
    rows = []
    for index in rng.integers(len(store), size=3 * batch):
        factor = 2 if rng.random() < 0.5 else 1
        top, left = rng.integers(0, store.shape[1] - factor * size + 1, 2)
        row = store[index, top:top + factor * size, left:left + factor * size].astype(np.float32) / 255
        rows.append(row.reshape(size, factor, size, factor, 3).mean((1, 3)))
    busyness = [np.abs(np.diff(row, axis=0)).mean() + np.abs(np.diff(row, axis=1)).mean() for row in rows]
    order = np.argsort(busyness)[::-1]
    chosen = np.concatenate([order[:batch * 3 // 4], rng.permutation(order[batch * 3 // 4:])[:batch - batch * 3 // 4]])
    return torch.from_numpy(np.stack([rows[index] for index in chosen])).permute(0, 3, 1, 2)


def finest_scale(step: int, steps: int) -> int:
    """Return the finest scale, in pixels to a cell, whose Blocks run at this step: most is learned at a sixteenth of the cost of the last stage."""
    return next(scale for share, scale in STAGES if step < share * steps)


def autoencoder_loss(model: nn.Module, x: Tensor, finest: int = 1) -> tuple[Tensor, Tensor]:
    """Root mean square error, per picture and over the batch (busy pictures weigh more there), with whitened latents.

    Unit deviation alone lets all channels code the same small picture; decorrelated ones cannot.

    Args:
        model: from build_autoencoder.
        x: (B, 3, H, W) in 0..1, sides divisible by 8.
        finest: Blocks of finer scales than this are passed over.

    Returns:
        (loss, mean PSNR).
    """
    z = encode(model, x)
    flat = z.float().transpose(0, 1).flatten(1)
    mean = flat.mean(1, keepdim=True)
    covariance = (flat - mean) @ (flat - mean).T / flat.shape[1]
    spread = mean.square().mean() + (covariance - torch.eye(len(flat), device=x.device)).square().sum() / len(flat)
    y = _run(model.taesd_decoder, z + LATENT_NOISE * torch.randn_like(z), 8, finest)
    error = (y.float() - x).square().flatten(1).mean(1)
    return 0.3 * (error + 1e-6).sqrt().mean() + 0.7 * (error.mean() + 1e-6).sqrt() + 0.01 * spread, (-10 * error.detach().log10()).mean()


def encode(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the whole encoder returns, without running its closed Blocks."""
    return _run(model.taesd_encoder, x, 1, ENCODER_FINEST)


def _scales(layers: nn.Sequential, scale: int) -> Iterator[tuple[nn.Module, float]]:
    """Pair every layer with the pixels to a cell of what it takes in."""
    for layer in layers:
        yield layer, scale
        if isinstance(layer, nn.Upsample):
            scale //= 2
        elif isinstance(layer, nn.Conv2d):
            scale *= layer.stride[0]


def _run(layers: nn.Sequential, x: Tensor, scale: int, finest: int) -> Tensor:
    """Run the layers; a Block whose last filter is zero would only take the positive part, so that stands for Blocks that have not joined."""
    from comfy.taesd.taesd import Block

    for layer, at in _scales(layers, scale):
        x = x.relu() if isinstance(layer, Block) and at < finest else layer(x)
    return x
