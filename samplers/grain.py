"""How much grain a picture has, and how coarse it is.

White noise is read off the finest detail. An enlarged picture has none there, and its grain would pass for detail. It is then read off the
smoothest places, after a plane is fitted to each: what is left is about equal everywhere if it is grain, and not if it is content.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Places that are looked at for coarse grain: their side in pixels, how many at most, and how few of middle brightness, where nothing clips, will do.
PLACE, PLACES, ENOUGH = 16, 4000, 0.1
MIDDLE = (0.2, 0.8)
# Coarse grain is so many times the white noise, and at least as large as this.
FACTOR, LEAST = 1.5, 2 / 255
# How much more may be left in the fifth of places that are smoothest than in the smoothest of all. Enlarged noise was seen up to 1.2, photographs
# mostly about 2, a few in a hundred below.
ALIKE = 1.4
SIZES = (2, 4, 8)


@dataclass(frozen=True)
class Grain:
    """The grain of a picture.

    Attributes:
        deviation: of pixel values of 0..1.
        size: side of a grain in pixels, a power of two; 1 for white noise.
    """

    deviation: float
    size: int = 1


def grain_of(y: Tensor) -> Grain:
    """Measure the grain of (1, 3, H, W) in 0..1."""
    white = noise_level(y)
    if min(y.shape[-2:]) < PLACE * (SIZES[0] + 1):
        return Grain(white)
    least, common, most = _unevenness(y)
    if common < max(FACTOR * white, LEAST) or most > ALIKE * least:
        return Grain(white)
    return Grain(common, max(SIZES, key=lambda size: noise_level(F.avg_pool2d(y, size))))


def noise_level(y: Tensor) -> float:
    """Deviation of white noise in (1, 3, H, W), from the median of the diagonal Haar details (Donoho's estimate)."""
    if min(y.shape[-2:]) < 4:
        return 0.0
    height, width = (side // 2 * 2 for side in y.shape[-2:])
    a, b = y[..., 0:height:2, 0:width:2], y[..., 0:height:2, 1:width:2]
    c, d = y[..., 1:height:2, 0:width:2], y[..., 1:height:2, 1:width:2]
    return float(((a - b - c + d) / 2).abs().flatten().median() / 0.6745)


def grain_like(grain: Grain, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw noise (B, H, W, C) of unit deviation that is as coarse as a grain."""
    if grain.size == 1:
        return torch.randn(shape, generator=generator)
    batch, height, width, channels = shape
    coarse = torch.randn(batch, channels, -(-height // grain.size), -(-width // grain.size), generator=generator)
    drawn = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (drawn / drawn.std()).movedim(1, -1)


def _unevenness(y: Tensor) -> tuple[float, float, float]:
    """Residual of a plane fitted to the smoothest places of (1, 3, H, W): deviations of the smoothest 2 %, 10 % and 20 %."""
    height, width = y.shape[-2:]
    stride = max(PLACE // 2, round((height * width / PLACES) ** 0.5))
    places = F.unfold(y[0, :, None], PLACE, stride=stride)
    line = torch.linspace(-1, 1, PLACE).to(y)
    plane = torch.stack([torch.ones_like(y[0, 0, :PLACE, :PLACE]), line[:, None].expand(PLACE, PLACE), line.expand(PLACE, PLACE)]).flatten(1)
    across = F.normalize(plane, dim=1)  # constant, rows and columns are orthogonal
    left = places - across.T @ (across @ places)
    deviations = (left.square().sum(1) / (PLACE**2 - len(plane))).mean(0).sqrt()
    brightness = places.mean((0, 1))
    middle = deviations[(brightness > MIDDLE[0]) & (brightness < MIDDLE[1])]
    chosen = middle if len(middle) >= ENOUGH * len(deviations) else deviations
    return tuple(torch.quantile(chosen, torch.tensor([0.02, 0.1, 0.2]).to(y)).tolist())
