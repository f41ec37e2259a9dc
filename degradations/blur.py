"""Blur by kernels: bells, sinc, motion and defocus. Pictures are (B, H, W, C)."""

import math

import torch.nn.functional as F
from torch import Tensor

from . import kernels

LARGEST = 61
SINC_SIZE = 21


def convolve(pictures: Tensor, kernel: Tensor) -> Tensor:
    """Filter (B, H, W, C) by (1, k, k), or by (B, k, k) with one kernel each, over a border that mirrors the picture."""
    from kornia.filters import filter2d

    padded = _mirror(pictures.movedim(-1, 1), kernel.shape[-1] // 2)
    return filter2d(padded, kernel.to(pictures), padding="valid").movedim(1, -1)


def bell_blur(
    pictures: Tensor, width: float = 2.0, width_across: float = 0.0, blur_angle: float = 0.0, profile: str = "gaussian", beta: float = 1.0
) -> Tensor:  # fmt: skip
    """Blur by `kernels.bell` of deviations `width` and `width_across`, 0 for the same; a `width` of 0 changes nothing."""
    if width <= 0:
        return pictures
    across = width_across if width_across > 0 else width
    size = min(LARGEST, 2 * math.ceil((3 if profile == "gaussian" else 4) * max(width, across)) + 1)
    return convolve(pictures, kernels.bell(size, width, across, blur_angle, profile, beta))


def sinc_filter(pictures: Tensor, cutoff: float = 0.5) -> Tensor:
    """Cut off all detail finer than this fraction of what the pixels can hold, with ringing; 1 lets nearly everything pass."""
    return convolve(pictures, kernels.sinc(SINC_SIZE, cutoff * math.pi))


def motion_blur(pictures: Tensor, length: float = 15.0, motion_angle: float = 0.0) -> Tensor:
    """Smear along a line of the nearest odd length and an angle in degrees; a length below 2 changes nothing."""
    size = kernels.odd(length)
    return pictures if size < 3 else convolve(pictures, kernels.line(size, motion_angle))


def defocus_blur(pictures: Tensor, radius: float = 4.0) -> Tensor:
    """Average over a disc, as a lens out of focus; a radius of 0 changes nothing."""
    return pictures if radius <= 0 else convolve(pictures, kernels.disc(radius))


def _mirror(padded: Tensor, margin: int) -> Tensor:
    """Pad (B, C, H, W) by reflection, repeating the last pixels along a side too short to reflect."""
    height, width = padded.shape[2:]
    for sides, length in (((0, 0, margin, margin), height), ((margin, margin, 0, 0), width)):
        padded = F.pad(padded, sides, mode="reflect" if margin < length else "replicate")
    return padded
