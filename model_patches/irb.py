"""The Image Restoration Bridge (Defusion, arXiv 2506.16960): a light pyramid of the degraded picture that bends a denoiser's features.

At every block, with f the pyramid's feature of that resolution:

    scale, shift, gate = conv1x1(silu(f));   h <- h + gate ((1 + scale) norm(h) + shift)

The paper says AdaLN-Zero and no more. Only the gate and the scale start at zero: if the shift did too, gate and shift would each wait for
the other. The degraded latent joins the pyramid where it has come down to latent cells, which spares it learning the VAE's encoder again.
"""

import math
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
        x = F.silu(self.stem(pixels))
        for stage in self.stages:
            x = F.silu(stage(x))
        x, features = torch.cat([x, c_lq], 1), {}
        for join, (scale, level) in zip(self.joins, self.levels.items()):
            x = level(join(x))
            features[int(scale)] = x
        return features


class Bridge(nn.Module):
    """What one block is told: starts as nothing."""

    def __init__(self, width: int, channels: int, tokens: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.tokens, self.groups = tokens, math.gcd(GROUPS, channels)
        layer = operations.Linear if tokens else partial(operations.Conv2d, kernel_size=1)
        self.modulate = layer(width, 3 * channels, **factory)

    def forward(self, h: Tensor, feature: Tensor) -> Tensor:
        """Return what is added to h, (B, N, C) or (B, C, h, w); the feature (B / n, width, ...) is repeated n times."""
        if self.tokens:
            feature = feature.flatten(2).transpose(1, 2)
        elif feature.shape[-2:] != h.shape[-2:]:
            feature = F.interpolate(feature, h.shape[-2:], mode="nearest")
        told = self.modulate(F.silu(feature))
        scale, shift, gate = told.repeat(len(h) // len(told), *[1] * (told.ndim - 1)).chunk(3, -1 if self.tokens else 1)
        normed = F.layer_norm(h, h.shape[-1:]) if self.tokens else F.group_norm(h, self.groups)
        return gate * ((1 + scale) * normed + shift)


class ImageRestorationBridge(nn.Module):
    """Pyramid and bridges of a model.

    Args:
        sites: the places after the denoiser's blocks.
        size: one of SIZES.
        tokens: whether the denoiser is a transformer.
        cell: pixels to a side of a latent cell.
        latent_channels: of the model.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, sites: tuple[Site, ...], size: str, tokens: bool, cell: int, latent_channels: int, operations: Any,
                 **factory: Any) -> None:
        super().__init__()
        measures = SIZES[size]
        widths = level_widths(sites, measures, tokens)
        self.scales = {site.name: site.scale for site in sites}
        self.pyramid = Pyramid(widths, measures, cell, latent_channels, operations, **factory)
        bridges = {site.name: Bridge(widths[site.scale], site.channels, tokens, operations, **factory) for site in sites}
        self.bridges = nn.ModuleDict(bridges)

    def forward(self, site: Site, h: Tensor, features: dict[int, Tensor]) -> Tensor:
        """Return what is added to the feature after a block."""
        return self.bridges[site.name](h, features[site.scale])


class Concatenation(nn.Module):
    """The degraded latent as further input channels of a UNet, for comparison: what a wider first convolution adds, nothing at first."""

    def __init__(self, sites: tuple[Site, ...], latent_channels: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.first = sites[0].name
        self.zero = operations.Conv2d(latent_channels, sites[0].channels, 3, padding=1, **factory)

    def forward(self, site: Site, h: Tensor, c_lq: Tensor) -> Tensor:
        """Return what is added to the feature after a block: something after the first only."""
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
    """Fill the weights, which the host's layers leave empty: as torch would, but gates and scales are zero."""
    fill(module, generator, one=("norm1", "norm2"))
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.split(".")[-2] == "modulate":
                third = len(p) // 3
                p[:third].zero_()
                p[2 * third:].zero_()
