"""Decode latents with detail experts: the user's own VAE, with experts behind some of its layers for as long as one call lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .daem import DetailExperts
from .detail_experts import check_fit, inference_patcher
from .evaluation_hooks import installed
from .experts import KERNELS, Routed
from .framing import check_covers, pad_to
from .host_vae import decode_with
from .vae_sites import VaeSite, decoder_layer, skips
from .weights_file import Weights
from .window_grid import Windows

if TYPE_CHECKING:
    from comfy.sd import VAE

# The host's own tiles, in cells.
TILE, OVERLAP = 64, 16
# What experts and the encoder's features need on top of a plain decode; generous, as the host's own estimate is.
MEMORY_FACTOR = 1.5
# Colours of the experts with kernels of 3, 5, 7 and 9.
COLOURS = ((0.16, 0.44, 0.82), (0.20, 0.66, 0.42), (0.95, 0.71, 0.16), (0.82, 0.26, 0.30))
# (name of a site, its map of windows) -> standard normal (B, experts, rows, columns).
Noise = Callable[[str, Windows], Tensor]


class ExpertRun:
    """Experts at work on one batch.

    Args:
        network: the experts.
        seen: the encoder's features of the degraded pictures, by the names of sites.
        strength: of what they add.
        noise: for the routers, in training.
    """

    def __init__(self, network: DetailExperts, seen: dict[str, Tensor], strength: float = 1.0, noise: Noise | None = None) -> None:
        self.network, self.seen, self.strength, self.noise = network, seen, strength, noise
        self.routed: dict[str, Routed] = {}

    @contextmanager
    def behind(self, module: nn.Module, sites: tuple[VaeSite, ...]) -> Iterator[None]:
        """Stand behind the layers of a first stage model for as long as the context is open."""
        with installed(lambda: [decoder_layer(module, site).register_forward_hook(self._hook(site.name)) for site in sites]):
            yield

    def _hook(self, name: str) -> Callable:
        def add(_: nn.Module, args: tuple, x: Tensor) -> Tensor:
            daem = self.network.sites[name]
            noise = None if self.noise is None else self.noise(name, Windows(daem.window, (x.shape[2], x.shape[3])))
            x, self.routed[name] = daem(x, self.seen[name], self.strength, noise)
            return x

        return add

    def shares(self, size: tuple[int, int]) -> Tensor:
        """Return (B, experts, H, W): what part of the modules had each expert at work, for a picture of this size."""
        chosen = torch.stack([routed.chosen for routed in self.routed.values()]).mean(0)
        return Windows(self.network.window, size).spread(chosen).expand(-1, -1, *size)


def decode_with_experts(vae: "VAE", weights: Weights, latent: Tensor, degraded: Tensor, strength: float, tile: int, overlap: int,
                        node: str) -> tuple[Tensor, Tensor]:
    """Decode latents, with the detail of the degraded pictures that experts think is right.

    Args:
        vae: the user's; as it was, afterwards, whatever happens.
        weights: of the kind detail_experts.
        latent: (B, C, h, w); of (B, C, T, h, w) the first frame, as the host has it.
        degraded: (N, H, W, 3) in 0..1, one for all latents, or one each.
        strength: of what experts add; 0 is the host's own decode.
        tile: side of tiles in pixels, rounded up to a multiple of two windows; 0 for none unless memory runs out.
        overlap: of tiles in pixels, rounded up to windows.
        node: whom messages name.

    Returns:
        pictures (B, H, W, 3), and (B, H, W, 3) where each expert has a colour.

    Raises:
        ValueError: for weights of another VAE, and pictures that do not fit the latent.
    """
    anatomy = check_fit(weights, vae, node)
    latent = latent[:, :, 0] if latent.ndim == 5 else latent
    if latent.ndim != 4 or latent.shape[1] != vae.latent_channels:
        raise ValueError(f"{node}: 'samples' is a latent of {_size(latent)}, and 'vae' takes {vae.latent_channels} channels. "
                         "Use the VAE of the model that made it.")
    cell = vae.spacial_compression_decode()
    pixels = fitted_pictures(degraded, latent.shape, cell, node)
    tiling = window_tiling(tile // cell if tile else TILE, overlap // cell if tile else OVERLAP, max(1, weights.config["window"] // cell))
    if strength == 0:
        picture = vae.decode_tiled(latent, *(tiling[0], tiling[0], tiling[1])) if tile else vae.decode(latent)
        return picture, torch.zeros_like(picture)
    patcher = inference_patcher(weights, anatomy)
    channels = latent.shape[1]

    def decode(both: Tensor) -> Tensor:
        run = ExpertRun(patcher.model, skips(vae.first_stage_model, F.pixel_shuffle(both[:, channels:], cell)), strength)
        with run.behind(vae.first_stage_model, anatomy.sites):
            picture = vae.first_stage_model.decode(both[:, :channels])
        return torch.cat([picture, run.shares((picture.shape[2], picture.shape[3])).to(picture)], 1)

    seen = F.pixel_unshuffle(vae.process_input(pixels.movedim(-1, 1)), cell)
    both = torch.cat([latent, seen.to(latent)], 1)
    picture, shares = decode_with(vae, patcher, both, decode, 3 + len(KERNELS), MEMORY_FACTOR, tiling, bool(tile))
    return picture.movedim(1, -1), shares.movedim(1, -1) @ shares.new_tensor(COLOURS)


def window_tiling(tile: int, overlap: int, window: int) -> tuple[int, int]:
    """Return (tile, overlap) in cells, at least these, so that all of the host's three tilings begin where windows do."""
    overlap = max(1, -(-overlap // window)) * window
    return max(-(-tile // (2 * window)) * 2 * window, 4 * overlap), overlap


def fitted_pictures(degraded: Tensor, shape: torch.Size, cell: int, node: str) -> Tensor:
    """Return (B, H, W, 3) of the size that latents (B, C, h, w) decode to.

    Less than a cell missing is mirrored; less than a cell too much is cropped, as in VAE Encode.

    Raises:
        ValueError: for other sizes or numbers; the message names the input, both sizes and what to do.
    """
    height, width = degraded.shape[1:3]
    advice = "Connect the picture that the latent restores, at the same size (Frame Image pads both alike)."
    tall, wide = check_covers((height, width), (shape[2], shape[3]), cell, node, advice)
    if shape[0] % len(degraded):
        raise ValueError(f"{node}: 'degraded' holds {len(degraded)} for a batch of {shape[0]}. Give one for all, or one each.")
    padded = pad_to(degraded, (max(tall, height), max(wide, width)))
    top, left = (max(0, height - tall) // 2, max(0, width - wide) // 2)
    return padded[:, top:top + tall, left:left + wide].repeat(shape[0] // len(degraded), 1, 1, 1)


def _size(latent: Tensor) -> str:
    return "x".join(str(side) for side in latent.shape)
