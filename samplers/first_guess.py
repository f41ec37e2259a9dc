"""A first guess at the picture from the quality prior alone, and the degradation that it implies.

LD-RPS leaves F-PAM to find the degradation from nothing over hundreds of steps. Where the quality prior already says how bright or how clear
a good picture is, the degradation has a closed form; F-PAM starts from it and the guess is where sampling starts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..degradations.evaluation import REC709
from ..model_patches.fpam import upsample_grid
from .grain import Grain, grain_of
from .quality import Quality, dark_channel

CURVE_POINTS = 257
LEVELS = 0.005
LEAST_RANGE = 0.02
CLARITY_SHARE = 0.95
LEAST_TRANSMISSION = 0.15
# Grain is averaged away before a tone curve is read off a picture or turned round, which would amplify it where the picture is dark.
POOL = 8
GRAIN_WINDOW, GRAIN_RADIUS, GRAIN_RANGE = 9, 2.0, 3.0
LEAST_GRAIN = 0.002
BAND = 64


@dataclass(frozen=True)
class KnownDegradation:
    """psi(x) = A + t * (mix @ curve(x) - A), the degradation that F-PAM starts as.

    Attributes:
        curve: (n,) tone curve at even steps over 0..1.
        mix: (3, 3) colour matrix.
        airlight: (3,) A.
        transmission: (1, 1, g, g) t on a coarse grid.
        grain: of the picture.
    """

    curve: Tensor
    mix: Tensor
    airlight: Tensor
    transmission: Tensor
    grain: Grain

    @property
    def changes(self) -> bool:
        """Whether tone or clarity is changed at all."""
        line = torch.linspace(0, 1, CURVE_POINTS).to(self.curve)
        return not (torch.equal(self.curve, line) and bool((self.transmission == 1).all()))


def known_degradation(y: Tensor, quality: Quality | None, grid: int, grey: bool) -> KnownDegradation:
    """Estimate the degradation of one picture from what the quality prior asks for.

    Args:
        y: (1, 3, H, W) degraded picture in 0..1.
        quality: constraints that name the look to undo; None leaves tone and clarity as they are.
        grid: rows and columns of the transmission map.
        grey: the picture has lost its colours.
    """
    airlight, transmission = y.new_zeros(3), y.new_ones(1, 1, grid, grid)
    if quality is not None and quality.clarity > 0:
        airlight, transmission = _haze(y, grid)
    curve = torch.linspace(0, 1, CURVE_POINTS).to(y)
    if quality is not None and quality.exposure > 0:
        curve = _tone_curve(_local_means(_clear(y, airlight, transmission)), quality.exposure_target)
    luma = y.new_tensor(REC709).expand(3, 3)
    return KnownDegradation(curve, luma if grey else torch.eye(3).to(y), airlight, transmission, grain_of(y))


def first_guess(y: Tensor, known: KnownDegradation) -> Tensor:
    """Undo a known degradation: (1, 3, H, W) in 0..1. Where a tone curve or haze is undone grain is smoothed first, which keeps edges; a
    picture with neither is left as it is. Lost detail and colours stay for the model to mend."""
    if known.changes:
        y = _without_grain(y, known.grain)
    clear = _clear(y, known.airlight, known.transmission).clamp(known.curve[0].item(), known.curve[-1].item())
    position = torch.searchsorted(known.curve.contiguous(), clear.contiguous()).clamp(1, CURVE_POINTS - 1)
    low, high = known.curve[position - 1], known.curve[position]
    return ((position - 1 + (clear - low) / (high - low).clamp(min=1e-6)) / (CURVE_POINTS - 1)).clamp(0, 1)


def _local_means(y: Tensor) -> Tensor:
    return F.avg_pool2d(y, min(POOL, *y.shape[-2:]))


def _without_grain(y: Tensor, grain: Grain) -> Tensor:
    """Smooth grain away at the size it has, and leave what is finer."""
    if grain.size == 1:
        return _bilateral(y, grain.deviation)
    shrunk = F.avg_pool2d(y, grain.size, ceil_mode=True, count_include_pad=False)
    found = shrunk - _bilateral(shrunk, grain.deviation)
    return y - F.interpolate(found, scale_factor=grain.size, mode="bilinear", align_corners=False)[..., :y.shape[-2], :y.shape[-1]]


def _bilateral(y: Tensor, noise: float) -> Tensor:
    """Bilateral smoothing, a band of rows at a time: kornia keeps a whole window for every pixel."""
    from kornia.filters import bilateral_blur

    window = min(GRAIN_WINDOW, 2 * min(y.shape[-2:]) - 3)
    if noise < LEAST_GRAIN or window < 3:
        return y
    reach, height = window // 2, y.shape[-2]
    padded = F.pad(y, (reach, reach, reach, reach), mode="reflect")
    bands = []
    for top in range(0, height, BAND):
        band = padded[..., top:min(top + BAND, height) + 2 * reach, :]
        smooth = bilateral_blur(band, (window, window), GRAIN_RANGE * noise, (GRAIN_RADIUS, GRAIN_RADIUS))
        bands.append(smooth[..., reach:-reach, reach:-reach])
    return torch.cat(bands, -2)


def _clear(y: Tensor, airlight: Tensor, transmission: Tensor) -> Tensor:
    if transmission.shape[-1] == 1:
        t = transmission
    else:
        t = upsample_grid(transmission, *y.shape[-2:]).clamp(LEAST_TRANSMISSION, 1)
    light = airlight.view(1, 3, 1, 1)
    return ((y - light) / t + light).clamp(0, 1)


def _haze(y: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Airlight and transmission by the dark channel prior (He et al. 2009), smoothed by its coarse grid."""
    dark = dark_channel(y)
    brightest = dark >= torch.quantile(_sample(dark), 0.99)
    airlight = (y * brightest).sum((0, 2, 3)) / brightest.sum().clamp(min=1)
    # One brightness for all channels: the brightest haze of a small picture is too few pixels to name a colour.
    airlight = airlight.mean().clamp(0.5, 1).expand(3)
    veil = dark_channel(y / airlight.view(1, 3, 1, 1))
    transmission = 1 - CLARITY_SHARE * F.adaptive_avg_pool2d(veil, grid)
    return airlight, transmission.clamp(LEAST_TRANSMISSION, 1)


def _tone_curve(y: Tensor, target: float) -> Tensor:
    """Levels and a power: the curve c with mean(c^-1(y)) = target, as values of c over 0..1."""
    values = _sample(y)
    low, high = torch.quantile(values, LEVELS), torch.quantile(values, 1 - LEVELS)
    if high - low < LEAST_RANGE:
        low, high = torch.zeros_like(low), torch.ones_like(high)
    stretched = ((values - low) / (high - low).clamp(min=1e-3)).clamp(0, 1)
    shortest, longest = 0.2, 5.0
    for _ in range(30):
        power = (shortest * longest) ** 0.5
        if stretched.pow(1 / power).mean() < target:
            shortest = power
        else:
            longest = power
    return low + (high - low) * torch.linspace(0, 1, CURVE_POINTS).to(y).pow(power)


def _sample(values: Tensor, most: int = 200_000) -> Tensor:
    """Evenly thin a tensor to at most about `most` values: quantiles of huge pictures need no more."""
    flat = values.flatten()
    return flat[:: max(1, len(flat) // most)]
