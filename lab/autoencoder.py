"""The lab's VAE: the host's TAESD layout with 16 latent channels, trained for reconstruction with latents of unit deviation."""

import numpy as np
import torch
from torch import Tensor, nn

CROP, BATCH = 96, 8
LATENT_NOISE = 0.05


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
    for module in model.modules():
        if isinstance(module, Block):
            module.conv[-1].weight.data.mul_(0.2)
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


def autoencoder_loss(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square error, per picture and over the batch (busy pictures weigh more there), with latents kept centred and of unit
    deviation; returns (loss, mean PSNR)."""
    z = model.taesd_encoder(x)
    flat = z.float().transpose(0, 1).flatten(1)
    spread = flat.mean(1).square().mean() + (flat.std(1) - 1).square().mean()
    y = model.taesd_decoder(z + LATENT_NOISE * torch.randn_like(z))
    error = (y.float() - x).square().flatten(1).mean(1)
    return 0.3 * (error + 1e-6).sqrt().mean() + 0.7 * (error.mean() + 1e-6).sqrt() + 0.01 * spread, (-10 * error.detach().log10()).mean()
