"""What is random in training follows from (seed, step, sample) alone: it does not matter who draws it, when, and after how many interruptions."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor


def mixed(seed: int, purpose: str, *numbers: int) -> int:
    """Return 64 bits that differ in all places when any argument differs."""
    text = "/".join([purpose, *map(str, (seed, *numbers))])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU of its own for a purpose and a place, such as ("loss", step, row)."""
    return torch.Generator().manual_seed(mixed(seed, purpose, *numbers))


@dataclass
class Plan:
    """Which sample goes where.

    Every pass over the data is in an order of its own. The rows of a step are numbered over all batches and processes: batch `part` of process
    `rank` has the rows from (part * processes + rank) * batch on.

    Attributes:
        seed: of the run.
        count: samples there are.
        batch: samples that go through at once, in each process.
        accumulate: batches that make one step.
        rank, processes: which process this is of how many.
    """

    seed: int
    count: int
    batch: int
    accumulate: int = 1
    rank: int = 0
    processes: int = 1
    _order: tuple[int, Tensor] | None = field(default=None, repr=False)

    def rows(self, part: int) -> range:
        """Return the rows of one batch of this process."""
        first = (part * self.processes + self.rank) * self.batch
        return range(first, first + self.batch)

    def sample(self, step: int, row: int) -> int:
        """Return the number of the sample that is row `row` of a step."""
        epoch, place = divmod(step * self.batch * self.accumulate * self.processes + row, self.count)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(self.count, generator=generator(self.seed, "order", epoch))
        return int(self._order[1][place])
