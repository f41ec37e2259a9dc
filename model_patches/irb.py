"""The Image Restoration Bridge (Defusion, arXiv 2506.16960): a light pyramid of the degraded picture that bends a denoiser's features.

At every block, with f the pyramid's feature of that resolution and e the denoiser's timestep embedding:

    scale, shift = conv1x1(silu(f + time(silu(e))));   h <- h + scale norm(h) + shift

The paper says AdaLN-Zero and no more. In DiT (arXiv 2212.09748) that is h + gate F((1 + scale) norm(h) + shift) around an attention or a
perceptron F, of which the gate keeps the rest from learning at first. Here nothing stands between, and the three are two: gate (1 + scale)
and gate shift. Both are learned as they are, start at zero, and have a gradient from the first step on.

The degraded latent joins the pyramid where it has come down to latent cells, which spares it learning the VAE's encoder again. Up to there
the pyramid has no norms, since they would take away how dark a picture is and how strong its noise; its first weights keep the pixels as
large as the latent beside them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import PATCH, Site
from .first_weights import fill
from .residual_block import ResidualBlock

GROUPS = 32
# 1 / rms of pixels that are evenly spread over -1..1, and of silu(x) of normal x.
PIXEL_GAIN, SILU_GAIN = 3**0.5, 1.676


@dataclass(frozen=True)
class Measures:
    """How large a pyramid is.

    Attributes:
        stem: channels of the first layers.
        share: width of a level relative to the UNet's there.
        tokens: width of a transformer's one level at most.
        blocks: residual blocks at each level.
    """

    stem: int
    share: float
    tokens: int
    blocks: int


SIZES = {"full": Measures(64, 1.0, 256, 2), "small": Measures(32, 0.5, 128, 1)}


class Pyramid(nn.Module):
    """The degraded picture at the resolutions of a denoiser.

    Args:
        widths: channels by scale (latent cells to a side), finest first.
        measures: of its size.
        cell: pixels to a side of a latent cell, a power of 2.
        latent_channels: of the degraded latent.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, widths: dict[int, int], measures: Measures, cell: int, latent_channels: int, operations: Any,
                 **factory: Any) -> None:
        super().__init__()
        stem = measures.stem
        self.stem = operations.Conv2d(3, stem, 3, padding=1, **factory)
        self.stages = nn.ModuleList(operations.Conv2d(stem, stem, 3, stride=2, padding=1, **factory) for _ in range(int(math.log2(cell))))
        self.joins, self.levels, before, channels = nn.ModuleList(), nn.ModuleDict(), 1, stem + latent_channels
        for scale, width in widths.items():
            self.joins.append(operations.Conv2d(channels, width, 3, stride=scale // before, padding=1, **factory))
            self.levels[str(scale)] = nn.Sequential(*(ResidualBlock(width, GROUPS, operations, **factory) for _ in range(measures.blocks)))
            before, channels = scale, width

    def forward(self, pixels: Tensor, c_lq: Tensor) -> dict[int, Tensor]:
        """Return features by scale of pixels (B, 3, H, W) in -1..1 and their latent (B, C, h, w)."""
        x, features = torch.cat([self.cells(pixels), c_lq], 1), {}
        for join, (scale, level) in zip(self.joins, self.levels.items()):
            x = level(join(x))
            features[int(scale)] = x
        return features

    def cells(self, pixels: Tensor) -> Tensor:
        """Return what is seen of pixels (B, 3, H, W) in each latent cell, (B, stem, h, w)."""
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(F.silu(x))
        return x


class Bridge(nn.Module):
    """What one block is told: starts as nothing."""

    def __init__(self, width: int, channels: int, tokens: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.tokens, self.groups = tokens, math.gcd(GROUPS, channels)
        layer = operations.Linear if tokens else partial(operations.Conv2d, kernel_size=1)
        self.modulate = layer(width, 2 * channels, **factory)

    def forward(self, h: Tensor, feature: Tensor, time: Tensor) -> Tensor:
        """Return what is added to h, (B, N, C) or (B, C, h, w).

        Args:
            h: a feature of the denoiser.
            feature: (B / n, width, ...) of the pyramid, for n conds alike.
            time: (B, width).
        """
        told = feature.repeat(len(h) // len(feature), 1, 1, 1) + time[..., None, None]
        if self.tokens:
            told = told.flatten(2).transpose(1, 2)
        elif told.shape[-2:] != h.shape[-2:]:
            told = F.interpolate(told, h.shape[-2:], mode="nearest")
        scale, shift = self.modulate(F.silu(told)).chunk(2, -1 if self.tokens else 1)
        normed = F.layer_norm(h, h.shape[-1:]) if self.tokens else F.group_norm(h, self.groups)
        return scale * normed + shift


class ImageRestorationBridge(nn.Module):
    """Pyramid and bridges of a model.

    Args:
        sites: the places after the denoiser's blocks.
        size: one of SIZES.
        tokens: whether the denoiser is a transformer.
        cell: pixels to a side of a latent cell.
        latent_channels: of the model.
        emb: width of its timestep embedding.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, sites: tuple[Site, ...], size: str, tokens: bool, cell: int, latent_channels: int, emb: int, operations: Any,
                 **factory: Any) -> None:
        super().__init__()
        measures = SIZES[size]
        widths = level_widths(sites, measures, tokens)
        self.pyramid = Pyramid(widths, measures, cell, latent_channels, operations, **factory)
        self.times = nn.ModuleDict({str(scale): operations.Linear(emb, width, **factory) for scale, width in widths.items()})
        bridges = {site.name: Bridge(widths[site.scale], site.channels, tokens, operations, **factory) for site in sites}
        self.bridges = nn.ModuleDict(bridges)

    def forward(self, site: Site, h: Tensor, features: dict[int, Tensor], emb: Tensor) -> Tensor:
        """Return what is added to the feature after a block, given the timestep embedding (B, emb)."""
        return self.bridges[site.name](h, features[site.scale], self.times[str(site.scale)](F.silu(emb)))


class Concatenation(nn.Module):
    """The degraded latent as further input channels of a UNet, for comparison: what a wider first convolution adds, nothing at first."""

    def __init__(self, sites: tuple[Site, ...], latent_channels: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.first = sites[0].name
        self.zero = operations.Conv2d(latent_channels, sites[0].channels, 3, padding=1, **factory)

    def forward(self, site: Site, h: Tensor, c_lq: Tensor, emb: Tensor) -> Tensor:
        """Return what is added to the feature after a block: something after the first only, at any time the same."""
        return self.zero(c_lq).repeat(len(h) // len(c_lq), 1, 1, 1) if site.name == self.first else torch.zeros_like(h)


def level_widths(sites: tuple[Site, ...], measures: Measures, tokens: bool) -> dict[int, int]:
    """Return the pyramid's channels by scale."""
    if tokens:
        return {PATCH: min(sites[0].channels, measures.tokens)}
    widest: dict[int, int] = {}
    for site in sites:
        widest[site.scale] = max(widest.get(site.scale, 0), site.channels)
    return {scale: max(GROUPS, int(width * measures.share)) for scale, width in sorted(widest.items())}


def initialise_bridge(module: nn.Module, generator: torch.Generator) -> None:
    """Fill the weights, which the host's layers leave empty: with zero what would change the denoiser, and what tells the time."""
    fill(module, generator, zero=("zero", "modulate"), one=("norm1", "norm2"))
    if not isinstance(module, ImageRestorationBridge):
        return
    pyramid = module.pyramid
    _keep_size([pyramid.stem], PIXEL_GAIN, generator)
    _keep_size(pyramid.stages, SILU_GAIN, generator)
    _keep_size(pyramid.joins, 1, generator)
    with torch.no_grad():
        for layer in module.times.values():
            layer.weight.zero_()


def _keep_size(layers: Iterable[nn.Module], gain: float, generator: torch.Generator) -> None:
    """Give layers normal weights after which what had a root mean square of 1 / gain has one of 1."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * gain * layer.weight[0].numel() ** -0.5)
