"""Pictures taken in too little light."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import gaussian_noise, poisson_noise


def low_light(
    pictures: Tensor, generators: Sequence[torch.Generator], exposure: float = 0.25, gamma: float = 2.2, shot: float = 0.5, grain: float = 5.0
) -> Tensor:  # fmt: skip
    """Darken to exposure * x^gamma and add the noise of a dark exposure.

    Args:
        pictures: (B, H, W, 3) in 0..1.
        generators: one per picture.
        exposure: brightness that white keeps.
        gamma: above 1, shadows sink further than lights.
        shot: strength of the Poisson noise, as in `noise.poisson_noise`.
        grain: deviation of the Gaussian noise, in levels of 255.

    Returns:
        (B, H, W, 3), not clipped.
    """
    dark = exposure * pictures**gamma
    if shot:
        dark = poisson_noise(dark, generators, shot)
    return gaussian_noise(dark, generators, grain)
