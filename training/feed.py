"""The next batches of a run, made ahead of time in threads; what comes out does not depend on their timing."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from typing import Protocol

import torch

from .seeding import Plan, generator
from .trainee import Batch, Pair

# Batches that are ready or in the making beside the one in use.
AHEAD = 2
MOST_THREADS = 8


class Pairs(Protocol):
    """Paired data, as training/pairs.py makes it; `pair` is called from several threads.

    Attributes:
        validation_count: how many different pairs there are to validate with.
    """

    validation_count: int

    def __len__(self) -> int:
        """Return how many samples there are."""

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """Return sample `index`; what is random in it comes from the generator."""

    def validation(self, index: int) -> Pair:
        """Return a pair to validate with, the same whenever it is asked for."""

    def fingerprint(self) -> str:
        """Return a text that differs for other data."""

    def with_charts(self, side: int) -> "Pairs":
        """Return the same pairs with test charts; asked for by trainees that want charts only."""

    def collate(self, pairs: list[Pair]) -> Batch:
        """Make one batch."""


class Feed:
    """Hands out the batches of the steps from `start` to `stop`, each with the generators of its samples.

    Args:
        pairs: where samples come from.
        plan: which sample goes where.
        start, stop: steps.
    """

    def __init__(self, pairs: Pairs, plan: Plan, start: int, stop: int, pool: ThreadPoolExecutor) -> None:
        self.pairs, self.plan, self.pool = pairs, plan, pool
        self.parts = product(range(start, stop), range(plan.accumulate))
        self.waiting: deque[tuple[int, int, list[Future[Pair]]]] = deque()

    def next(self) -> tuple[Batch, list[torch.Generator]]:
        """Return the next batch of this process; waits if it is not ready."""
        while len(self.waiting) <= AHEAD and (place := next(self.parts, None)) is not None:
            self.waiting.append((*place, [self._loading(place[0], row) for row in self.plan.rows(place[1])]))
        step, part, futures = self.waiting.popleft()
        batch = self.pairs.collate([future.result() for future in futures])
        return batch, [generator(self.plan.seed, "loss", step, row) for row in self.plan.rows(part)]

    def _loading(self, step: int, row: int) -> Future[Pair]:
        return self.pool.submit(self._load, self.plan.sample(step, row), generator(self.plan.seed, "data", step, row))

    @torch.no_grad()
    def _load(self, index: int, own: torch.Generator) -> Pair:
        return self.pairs.pair(index, own)


@contextmanager
def feeding(pairs: Pairs, plan: Plan, start: int, stop: int) -> Iterator[Feed]:
    """Offer a Feed for as long as the context is open; samples that nobody waits for any more are dropped."""
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="mend-pairs")
    try:
        yield Feed(pairs, plan, start, stop, pool)
    finally:
        pool.shutdown(cancel_futures=True)
