"""Gaussian and Poisson noise, in colour or grey. Pictures are (B, H, W, 3) in 0..1; results are not clipped."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .colour import luma

WHITE_COUNT = 256


def gaussian_noise(pictures: Tensor, generators: Sequence[torch.Generator], sigma: float = 25.0, grey_noise: bool = False) -> Tensor:
    """Add white noise of deviation sigma/255; with `grey_noise` the same to all three channels."""
    shape = (*pictures.shape[1:3], 1 if grey_noise else pictures.shape[3])
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return pictures + sigma / 255 * noise.to(pictures)


def poisson_noise(pictures: Tensor, generators: Sequence[torch.Generator], shot: float = 1.0, grey_noise: bool = False) -> Tensor:
    """Add shot noise: the error of counting WHITE_COUNT photons at white, times `shot`.

    Its variance is shot^2 * x / WHITE_COUNT at brightness x. With `grey_noise` the brightness is counted once for all channels.
    """
    light = (luma(pictures) if grey_noise else pictures).detach().clamp(0, 1)
    counts = [torch.poisson(WHITE_COUNT * row, generator=generator) for row, generator in zip(light.float().cpu(), generators, strict=True)]
    return pictures + shot * (torch.stack(counts).to(pictures) / WHITE_COUNT - light)
