"""Random numbers that depend on nothing but the seed: drawn on the CPU, each picture of a batch from its own generator."""

from collections.abc import Sequence
from typing import TypeVar

import torch

Option = TypeVar("Option")


def generators(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator per picture: picture b of a batch uses seed + b, around the end of 64 bits."""
    return [torch.Generator().manual_seed((seed + index) % 2**64) for index in range(count)]


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw from low..high."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def chance(generator: torch.Generator, probability: float) -> bool:
    """Draw True with this probability."""
    return uniform(generator, 0, 1) < probability


def choice(generator: torch.Generator, options: Sequence[Option], weights: Sequence[float] | None = None) -> Option:
    """Draw one of the options, all equally likely unless there are weights."""
    chances = torch.ones(len(options)) if weights is None else torch.tensor(weights)
    return options[int(torch.multinomial(chances, 1, generator=generator))]
