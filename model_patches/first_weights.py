"""The numbers that untrained networks start from. The host's layers leave their weights empty."""

from collections.abc import Iterable

import torch
from torch import nn


def fill(module: nn.Module, generator: torch.Generator, zero: Iterable[str] = ("zero",), one: Iterable[str] = ("norm",)) -> None:
    """Fill weights as torch's own layers start, uniform within 1 / sqrt(inputs), but biases with zero.

    Args:
        module: changed.
        generator: draws them in the order of the module's parameters.
        zero, one: names of layers, or of parameters, that start at zero and at one instead.
    """
    zeros, ones = {"bias", *zero}, set(one)
    with torch.no_grad():
        for name, p in module.named_parameters():
            names = set(name.split(".")[-2:])
            if names & zeros:
                p.zero_()
            elif names & ones:
                p.fill_(1)
            else:
                bound = p[0].numel() ** -0.5
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
