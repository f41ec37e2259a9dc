"""Training of detail experts, UniLDiff's second stage (arXiv 2507.23685): decoding latents as restorers leave them.

L = L1 + 0.2 (1 - SSIM) + perceptual + 0.01 balance; the VAE stays as it is. The paper takes latents that its first stage has sampled; here
experts must serve any restorer, so the latents are those of the clean picture with some of the damage left in its fine structure. Light and
colour are the restorer's: with latents anywhere between clean and degraded, nothing tells a dark picture from a latent that is still dark.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import autocast

from ..model_patches import folders
from ..model_patches.config_values import whole_number
from ..model_patches.daem import SIZES, DetailExperts
from ..model_patches.detail_decoder import MEMORY_FACTOR, ExpertRun
from ..model_patches.detail_experts import DAEM, LARGEST_WINDOW, LATENTS, SIGNATURE, WINDOW_STEP, check_fit, known_settings, new_weights
from ..model_patches.errors import telling
from ..model_patches.experts import KERNELS, balance
from ..model_patches.host import make_room, trained_operations
from ..model_patches.host_vae import BACKWARD_FACTOR, float_copy
from ..model_patches.perceptual import Perceptual, vgg16_weights
from ..model_patches.vae_sites import skips
from ..model_patches.weights_file import Weights, part_of
from ..model_patches.window_grid import Windows
from .trainee import NODE, Batch, Models

SSIM_WEIGHT, BALANCE_WEIGHT, SSIM_WINDOW = 0.2, 0.01, 11
# Latents are never quite clean: a restorer's differ by noise of up to this part of their deviation.
LATENT_NOISE = 0.1
# What a mix leaves in at most, and the cells about each that its fine structure is told apart from.
MOST_LEFT, AROUND = 0.5, 5
DEFAULTS = {"size": "lite", "window": 128, "seed": 0, "latents": "mix", "perceptual": 0.5}


def new_experts(models: Models, config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"size", "window", "seed", "latents", "perceptual"}, of which all may be left out.

    Raises:
        ValueError: for other entries or values, and without a VAE.
    """
    given = DEFAULTS | dict(config)
    if given.keys() - DEFAULTS.keys() or not known_settings(given) or not whole_number(given["seed"]):
        raise ValueError(f"new detail experts take size ({', '.join(SIZES)}), window (0 to {LARGEST_WINDOW} in steps of {WINDOW_STEP}), "
                         f"seed (from 0), latents ({', '.join(LATENTS)}) and perceptual (from 0, which leaves it out); found {dict(config)}.")
    if models.vae is None:
        raise ValueError("new detail experts need a VAE.")
    return new_weights(models.vae, **given)


class DetailExpertsTrainee:
    """Experts learn behind the frozen decoder.

    Args:
        weights: of the kind detail_experts.
        models: VAE.

    Raises:
        ValueError: when there is no VAE or the weights do not fit it.
    """

    def __init__(self, weights: Weights, models: Models) -> None:
        if models.vae is None:
            raise ValueError(f"{NODE}: 'vae' is not connected. Detail experts learn on the VAE they will decode with.")
        self.anatomy = check_fit(weights, models.vae, NODE)
        self.kind, self.family, self.config = weights.kind, weights.family, weights.config
        self.signature = weights.tensors[SIGNATURE]
        self.network = DetailExperts(self.anatomy.sites, self.config["size"], self.config["window"], trained_operations)
        self.load_state_dict(weights.tensors)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the experts' parameters."""
        yield from self.network.parameters()

    def statistics(self) -> Iterator[Tensor]:
        """Yield what routers take for usual, which follows the pictures that each process sees."""
        yield from self.network.buffers()

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Make a copy of the VAE that gradients flow through; the user's is only read."""
        self.vae, self.device, self.room = models.vae, models.vae.device, 0.0
        module = float_copy(models.vae)
        make_room(self.device, sum(tensor.nbytes for part in (module, self.network) for tensor in part.state_dict().values()))
        self.module = module.to(self.device)
        self.network.to(self.device)
        self.perceptual = self._perceptual() if self.config["perceptual"] else None
        try:
            yield
        finally:
            del self.module, self.perceptual

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Decode latents as restorers leave them, and compare with the clean picture.

        The balance of experts is that of the whole batch, and so is what routers take for usual: how samples are spread over batches and
        processes counts a little, but all processes go on from the same.
        """
        self._make_room(batch.clean.shape)
        clean = self._pixels(batch.clean)
        with torch.no_grad():
            latents = self.latents(batch, generators)
        restored, run = self.decode(latents, batch.degraded, generators)
        aside = torch.stack([balance(routed) for routed in run.routed.values()]).mean()
        with autocast(self.device.type, enabled=False):  # SSIM subtracts squares that are nearly equal
            loss, figures = self._distance(restored.float(), clean)
        return loss + BALANCE_WEIGHT * aside, {**figures, "balance": float(aside.detach())}

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Decode latents as in training, drawn by the generators."""
        self._make_room(batch.clean.shape)
        return self.restored(self.latents(batch, generators), batch.degraded).cpu()

    def latents(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Return what is decoded, (B, C, h, w): clean latents with a little noise; in a mix half of them with fine damage left in."""
        clean, degraded = self.encode(batch.clean), self.encode(batch.degraded)
        kind, rows = self.config["latents"], []
        for near, far, generator in zip(clean, degraded, generators):
            moved, part, noise = torch.rand(3, generator=generator).tolist()
            left = {"clean": 0.0, "degraded": 1.0, "mix": MOST_LEFT * part if moved < 0.5 else 0.0}[kind]
            damage = far - near if kind == "degraded" else _fine(far - near)
            grain = torch.randn(near.shape, generator=generator).to(near)
            rows.append(near + left * damage + grain * (noise * LATENT_NOISE * near.std()))
        return torch.stack(rows)

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1 to latents as the VAE gives them."""
        with torch.no_grad():
            return self.module.encode(self.vae.process_input(self._pixels(pictures)))

    def restored(self, latents: Tensor, degraded: Tensor) -> Tensor:
        """Decode latents with the experts as they are now, (B, H, W, 3) in 0..1."""
        return self.decode(latents, degraded)[0].movedim(1, -1).clamp(0, 1)

    def decode(self, latents: Tensor, degraded: Tensor, generators: Sequence[torch.Generator] | None = None) -> tuple[Tensor, ExpertRun]:
        """Return unclamped pictures (B, 3, H, W) and who worked on them; with generators, routing is as random as in training."""
        with torch.no_grad():
            seen = skips(self.module, self.vae.process_input(self._pixels(degraded)))
        run = ExpertRun(self.network, seen, noise=None if generators is None else _noise(generators, self.device))
        with run.behind(self.module, self.anatomy.sites):
            return self.module.decode(latents) / 2 + 0.5, run

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        return {DAEM + name: tensor for name, tensor in self.network.state_dict().items()} | {SIGNATURE: self.signature}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.network.load_state_dict(part_of(tensors, DAEM))

    def _distance(self, restored: Tensor, clean: Tensor) -> tuple[Tensor, dict[str, float]]:
        from kornia.metrics import ssim

        error, unlike = F.l1_loss(restored, clean), 1 - ssim(restored, clean, SSIM_WINDOW).mean()
        loss, figures = error + SSIM_WEIGHT * unlike, {"l1": float(error.detach()), "ssim": 1 - float(unlike.detach())}
        if self.perceptual is not None:
            distance = self._unlikeness(restored, clean)
            loss, figures["perceptual"] = loss + self.config["perceptual"] * distance, float(distance.detach())
        return loss, figures

    def _unlikeness(self, restored: Tensor, clean: Tensor) -> Tensor:
        """The perceptual distance relative to the mean square of the clean pictures' features, since each VAE's latents have a scale of their own."""
        with torch.no_grad():
            target = self.perceptual.features(clean)
        return self.perceptual.to_features(restored, target) / target.square().mean()

    def _make_room(self, shape: torch.Size) -> None:
        """Have the host give way to a step on pictures (B, H, W, 3); it knows nothing of what is computed here."""
        cell = self.vae.spacial_compression_decode()
        one = self.vae.memory_used_decode((1, self.vae.latent_channels, shape[1] // cell, shape[2] // cell), torch.float32)
        size = shape[0] * BACKWARD_FACTOR * MEMORY_FACTOR * one
        if size > self.room:
            make_room(self.device, size)
            self.room = size

    def _perceptual(self) -> Perceptual:
        folders.register()  # where no nodes are loaded nobody has
        with telling(f"{NODE}:"):
            return Perceptual(_Encoder(self), vgg16_weights())

    def _pixels(self, pictures: Tensor) -> Tensor:
        return pictures[..., :3].movedim(-1, 1).to(self.device, torch.float32)


def _fine(x: Tensor) -> Tensor:
    """What each cell of (C, h, w) differs from those about it by."""
    return x - F.avg_pool2d(x, AROUND, 1, AROUND // 2, count_include_pad=False)


class _Encoder:
    """The VAE's encoder, as the perceptual distance wants it."""

    def __init__(self, trainee: DetailExpertsTrainee) -> None:
        self.trainee, self.cell = trainee, trainee.vae.spacial_compression_encode()

    def __call__(self, x: Tensor) -> Tensor:
        return self.trainee.module.encode(self.trainee.vae.process_input(x))


def _noise(generators: Sequence[torch.Generator], device: torch.device) -> Any:
    """The routers' noise, each sample's from its own generator."""

    def draw(_: str, windows: Windows) -> Tensor:
        shape = (len(KERNELS), windows.rows, windows.columns)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    return draw
