"""The quality prior Q of LD-RPS: what a good photograph looks like, whatever it shows.

Exposure and chroma are the paper's (from Zero-DCE). Clarity is ours: without haze every neighbourhood has a pixel that is dark in some
channel (He et al., Single Image Haze Removal Using Dark Channel Prior).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DARK_CHANNEL_RADIUS = 7


@dataclass(frozen=True)
class Quality:
    """Weights and active ranges of the constraints; a weight of 0 switches a constraint off.

    Attributes:
        exposure: weight of the brightness constraint.
        exposure_target: mean brightness of a well exposed neighbourhood, 0..1.
        exposure_patch: side of that neighbourhood in pixels.
        exposure_below: model time (fraction of the schedule) under which it acts.
        chroma: weight of the grey-world constraint.
        chroma_below: model time under which it acts.
        clarity: weight of the dark channel constraint.
        clarity_below: model time under which it acts.
    """

    exposure: float = 0.001
    exposure_target: float = 0.45
    exposure_patch: int = 128
    exposure_below: float = 0.1
    chroma: float = 0.0
    chroma_below: float = 0.1
    clarity: float = 0.0
    clarity_below: float = 0.15

    def active(self, time: float) -> bool:
        """Tell whether any constraint acts at a model time."""
        constraints = ((self.exposure, self.exposure_below), (self.chroma, self.chroma_below), (self.clarity, self.clarity_below))
        return any(weight > 0 and time < below for weight, below in constraints)


def exposure_loss(x: Tensor, target: float, patch: int) -> Tensor:
    """Mean squared distance of every patch's brightness from `target`; x (B, 3, H, W) in 0..1."""
    patch = min(patch, *x.shape[-2:])
    patches = F.avg_pool2d(x.mean(1, keepdim=True), patch, ceil_mode=True, count_include_pad=False)
    return (patches - target).square().mean()


def chroma_loss(x: Tensor) -> Tensor:
    """Distance of the mean colour from grey: sqrt(Drg^2 + Drb^2 + Dgb^2) with D the squared differences of channel means."""
    red, green, blue = x.mean((-2, -1)).unbind(1)
    differences = torch.stack([(red - green) ** 2, (red - blue) ** 2, (green - blue) ** 2])
    return (differences.square().sum(0) + 1e-12).sqrt().mean()


def dark_channel(x: Tensor, radius: int = DARK_CHANNEL_RADIUS) -> Tensor:
    """Darkest value of any channel within `radius` pixels: (B, 1, H, W) of (B, 3, H, W)."""
    return -F.max_pool2d(-x.amin(1, keepdim=True), 2 * radius + 1, 1, radius)


def clarity_loss(x: Tensor) -> Tensor:
    """Mean dark channel: what haze adds to a picture."""
    return dark_channel(x).clamp(min=0).mean()


def quality_loss(x: Tensor, quality: Quality, time: float) -> Tensor:
    """Sum of the constraints active at a model time (1 = pure noise, 0 = clean).

    Args:
        x: (B, 3, H, W) predicted restored picture, 0..1.
        quality: weights and ranges.
        time: model time of the current sigma as a fraction of the schedule.
    """
    loss = x.new_zeros(())
    if quality.exposure > 0 and time < quality.exposure_below:
        loss = loss + quality.exposure * exposure_loss(x, quality.exposure_target, quality.exposure_patch)
    if quality.chroma > 0 and time < quality.chroma_below:
        loss = loss + quality.chroma * chroma_loss(x)
    if quality.clarity > 0 and time < quality.clarity_below:
        loss = loss + quality.clarity * clarity_loss(x)
    return loss
