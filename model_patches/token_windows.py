"""Attention over all tokens of a large picture costs too much: it is done in overlapping windows, blended so that no seam shows."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_windows(run: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, window: int) -> Tensor:
    """Return run(a, b), window by window where there are more than window * window places.

    Args:
        run: of (B, C, h, w) and (B, D, h, w); keeps height and width.
        a, b: of one size.
        window: side of a window; neighbours overlap by half of it or more.
    """
    height, width = a.shape[-2:]
    if height * width <= window * window:
        return run(a, b)
    total, weights = None, a.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top, tall in _spans(height, window):
        for left, wide in _spans(width, window):
            place = (..., slice(top, top + tall), slice(left, left + wide))
            weight = _bell(tall, a.device)[:, None] * _bell(wide, a.device)
            part = run(a[place], b[place]).float() * weight  # half precision cannot hold the weights at corners
            total = part.new_zeros(*part.shape[:2], height, width) if total is None else total
            total[place] += part
            weights[place] += weight
    return (total / weights).to(a)


def _spans(size: int, window: int) -> list[tuple[int, int]]:
    """Return first place and length of the windows along one axis, evenly spread."""
    if size <= window:
        return [(0, size)]
    count = -(-(size - window) // (window // 2)) + 1
    return [(round(index * (size - window) / (count - 1)), window) for index in range(count)]


def _bell(length: int, device: torch.device) -> Tensor:
    """Weights that fall towards both ends, nowhere to zero."""
    return torch.sin((torch.arange(length, device=device) + 0.5) * (torch.pi / length)).square()
