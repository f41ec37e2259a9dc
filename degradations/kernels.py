"""Blur kernels. Each is (1, size, size) with an odd size and sums to 1; angles are in degrees, counter-clockwise from horizontal."""

import math

import torch
from torch import Tensor

SHAPES = ("gaussian", "generalised", "plateau")


def bell(size: int, sigma: float, across: float | None = None, angle: float = 0.0, shape: str = "gaussian", beta: float = 1.0) -> Tensor:
    """Return a bell-shaped kernel of q = x^T S^-1 x (Real-ESRGAN, arXiv 2107.10833, section 3.1).

    Args:
        size: odd side in pixels.
        sigma: deviation along the angle, in pixels.
        across: deviation across it; None for an isotropic kernel.
        angle: direction of `sigma`.
        shape: gaussian exp(-q/2), generalised exp(-q^beta/2) or plateau 1/(1 + q^beta).
        beta: form of the last two: above 1 flatter on top and steeper at the edge.

    Raises:
        ValueError: for an even size, a deviation that is not positive, or an unknown shape.
    """
    across = sigma if across is None else across
    if min(sigma, across) <= 0:
        raise ValueError(f"a kernel cannot have the deviations {sigma:g} and {across:g}; both must be above 0")
    if shape not in SHAPES:
        raise ValueError(f"unknown kernel shape {shape!r}; choose one of {', '.join(SHAPES)}")
    down, right = _offsets(size)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along_it, across_it = right * cosine - down * sine, right * sine + down * cosine
    q = (along_it / sigma) ** 2 + (across_it / across) ** 2
    if shape == "gaussian":
        return _normalised(torch.exp(-q / 2))
    return _normalised(torch.exp(-(q**beta) / 2) if shape == "generalised" else 1 / (1 + q**beta))


def sinc(size: int, cutoff: float) -> Tensor:
    """Return the ideal circular low-pass filter, which leaves ringing and overshoot (Real-ESRGAN, section 3.3).

    Args:
        size: odd side in pixels.
        cutoff: highest frequency that passes, in radians per pixel, above 0 and up to pi.
    """
    down, right = _offsets(size)
    distance = torch.hypot(down, right)
    ripples = cutoff * torch.special.bessel_j1(cutoff * distance) / (2 * math.pi * distance)
    return _normalised(torch.where(distance == 0, cutoff**2 / (4 * math.pi), ripples))


def disc(radius: float, softness: float = 1.0) -> Tensor:
    """Return a disc: 1 inside, falling to 0 over `softness` pixels around the radius."""
    down, right = _offsets(2 * math.ceil(radius + softness / 2) + 1)
    return _normalised(((radius - torch.hypot(down, right)) / softness + 0.5).clamp(0, 1))


def line(length: int, angle: float) -> Tensor:
    """Return a line through the centre, of an odd length of at least 3 pixels."""
    from kornia.filters import get_motion_kernel2d

    return get_motion_kernel2d(length, angle, 0.0, mode="bilinear").float()


def odd(length: float) -> int:
    """Return the nearest odd whole number, the larger of two, at least 1."""
    return 2 * max(0, int(length / 2)) + 1


def _offsets(size: int) -> tuple[Tensor, Tensor]:
    if size % 2 == 0:
        raise ValueError(f"a kernel cannot have {size} pixels a side; use an odd number")
    line_ = torch.arange(size, dtype=torch.float64) - size // 2
    return line_[:, None].expand(size, size), line_.expand(size, size)


def _normalised(kernel: Tensor) -> Tensor:
    return (kernel / kernel.sum()).float()[None]
