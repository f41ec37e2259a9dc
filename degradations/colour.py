"""Brightness, fading and loss of colour. Pictures are (B, H, W, 3) in 0..1."""

import torch
from torch import Tensor

from .evaluation import REC709

OLD_PAPER = (1.0, 0.88, 0.68)
FADED_BLACK, FADED_WHITE = 0.25, 0.85


def luma(pictures: Tensor) -> Tensor:
    """Return the Rec. 709 brightness, (B, H, W, 1)."""
    return (pictures * pictures.new_tensor(REC709)).sum(-1, keepdim=True)


def fade(pictures: Tensor, fading: float = 0.7, tint: float = 0.5) -> Tensor:
    """Mix a picture with a pale print of it that has no colour of its own and, with `tint`, that of old paper."""
    paper = torch.lerp(torch.ones(3), torch.tensor(OLD_PAPER), tint).to(pictures)
    print_ = (FADED_BLACK + (FADED_WHITE - FADED_BLACK) * luma(pictures)) * paper
    return torch.lerp(pictures, print_, fading)


def lose_colour(pictures: Tensor, greyness: float = 1.0) -> Tensor:
    """Mix a picture with its brightness; at 1 it is grey."""
    return torch.lerp(pictures, luma(pictures).expand_as(pictures), greyness)
