"""What a run of training looks like from outside: pictures it never learns from, restored and compared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .feed import Pairs
from .seeding import generator
from .trainee import Pair, Trainee

# Pictures that are equal would have no finite PSNR.
# Sampling steps of a validation picture: enough to follow progress, and cheap.
VALIDATION_STEPS = 8
LEAST_ERROR = 1e-10


def psnr(picture: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in 0..1, at most 100."""
    error = (picture.double().clamp(0, 1) - clean.double().clamp(0, 1)).square().mean()
    return float(-10 * error.clamp(min=LEAST_ERROR).log10())


def restore_each(trainee: Trainee, pairs: Pairs, number: int, seed: int, before_each: Callable[[], None]) -> list[tuple[Pair, Tensor]]:
    """Restore the validation pictures one by one.

    Args:
        trainee: attached to its models.
        pairs: where the pictures come from.
        number: how many.
        seed: of the run; a picture gets the same noise at every validation.
        before_each: called before each picture.

    Returns:
        Pairs with what the trainee made of them, (H, W, 3) in 0..1 on the CPU.
    """
    results = []
    for index in range(number):
        before_each()
        pair = pairs.validation(index)
        with torch.no_grad():
            restored = trainee.validate(pairs.collate([pair]), [generator(seed, "validation", index)])
        results.append((pair, restored[0].detach().float().cpu().clamp(0, 1)))
    return results


def sheet(results: Sequence[tuple[Pair, Tensor]]) -> Tensor:
    """Lay degraded, restored and clean side by side.

    Returns:
        (n, H, 3 W, 3) of uint8; smaller pictures have black to their right and below.
    """
    strips = [torch.cat([pair.degraded, restored, pair.clean], 1) for pair, restored in results]
    height, width = (max(strip.shape[side] for strip in strips) for side in (0, 1))
    page = torch.zeros(len(strips), height, width, 3)
    for place, strip in zip(page, strips):
        place[: strip.shape[0], : strip.shape[1]] = strip
    return (page.clamp(0, 1) * 255).round().to(torch.uint8)
