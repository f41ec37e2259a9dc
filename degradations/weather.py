"""Haze, rain and snow. Pictures are (B, H, W, 3) in 0..1."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .blur import convolve

RAIN_COVER, SNOW_COVER = 0.4, 0.1
FLAKES = (1.0, 0.6, 0.35)


def haze(
    pictures: Tensor, generators: Sequence[torch.Generator], density: float = 1.2, airlight: float = 0.85, depth: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Scatter light as air does: J t + A (1 - t) with t = exp(-density * depth).

    Args:
        pictures: J, (B, H, W, 3).
        generators: one per picture; used where there is no depth.
        density: of the haze.
        airlight: A, the brightness of the haze itself.
        depth: (1 or B, H, W, 1), 0 near to 1 far; None for `generated_depth`.
    """
    if depth is None:
        depth = torch.stack([generated_depth(pictures.shape[1], pictures.shape[2], generator) for generator in generators])
    transmission = torch.exp(-density * depth).to(pictures)
    return pictures * transmission + airlight * (1 - transmission)


def generated_depth(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return (H, W, 1) in 0..1.5 for an unknown scene: far at the top, near at the bottom, with smooth hills."""
    ramp = torch.linspace(1, 0, height)[:, None]
    hills = F.interpolate(torch.randn(1, 1, 5, 5, generator=generator), (height, width), mode="bicubic", align_corners=True)[0, 0]
    return (ramp + 0.15 * hills).clamp(0, 1.5)[..., None]


def rain(
    pictures: Tensor, generators: Sequence[torch.Generator], rain: float = 0.5, streak_length: float = 25.0, streak_angle: float = 75.0
) -> Tensor:  # fmt: skip
    """Lay bright streaks over a picture: sparse noise, smeared along the angle (degrees, counter-clockwise from horizontal)."""
    if rain <= 0:
        return pictures
    length = max(3, kernels.odd(streak_length))
    share = rain * RAIN_COVER / length
    drops = torch.stack([_sparse(pictures, share, generator) for generator in generators])
    return _screen(pictures, 0.8 * length * convolve(drops, kernels.line(length, streak_angle)))


def snow(pictures: Tensor, generators: Sequence[torch.Generator], snow: float = 0.5, flake_size: float = 3.0) -> Tensor:
    """Lay soft white discs over a picture, the largest of a radius of `flake_size` pixels, more of them the smaller they are."""
    if snow <= 0:
        return pictures
    for part in FLAKES:
        radius = max(0.5, part * flake_size)
        flake = kernels.disc(radius, softness=1.2 * radius + 0.5).to(pictures)
        share = min(1.0, snow * SNOW_COVER / (math.pi * radius**2))
        centres = torch.stack([_sparse(pictures, share, generator) for generator in generators])
        pictures = _screen(pictures, 1.2 * convolve(centres, flake / flake.amax()))
    return pictures


def _sparse(pictures: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return (H, W, 1): 0 but for this share of the pixels, which are anything up to 1."""
    draws = torch.rand(*pictures.shape[1:3], 1, generator=generator)
    return ((draws - (1 - share)) / share).clamp(min=0).to(pictures)


def _screen(pictures: Tensor, light: Tensor) -> Tensor:
    return 1 - (1 - pictures) * (1 - light.clamp(0, 1))
