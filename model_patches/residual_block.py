"""A residual block of convolutions: twice GroupNorm, SiLU and a convolution."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))))))

    Args:
        channels: in and out.
        groups: of the norms, fewer where the channels do not divide by it.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, channels: int, groups: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = (operations.GroupNorm(math.gcd(groups, channels), channels, **factory) for _ in range(2))
        self.conv1, self.conv2 = (operations.Conv2d(channels, channels, 3, padding=1, **factory) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same."""
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
