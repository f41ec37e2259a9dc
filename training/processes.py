"""Several processes that train the same weights: who there is, and what they tell each other."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# The first process validates while the others wait for it.
PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Processes:
    """This process and its peers.

    Attributes:
        rank: number of this process; the first one, 0, writes and validates.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def same(self, value: Any) -> Any:
        """Return the first process's value in all of them."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def average(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
        """Average tensors in place and numbers over all processes.

        Args:
            tensors: of one floating-point kind and on one device.
            numbers: go with them.

        Returns:
            The averaged numbers.
        """
        if self.count == 1:
            return list(numbers)
        together = torch.cat([*(tensor.reshape(-1).float() for tensor in tensors), torch.tensor(numbers, device=tensors[0].device)])
        torch.distributed.all_reduce(together)
        together /= self.count
        *averaged, last = together.split([*(tensor.numel() for tensor in tensors), len(numbers)])
        for tensor, value in zip(tensors, averaged):
            tensor.copy_(value.reshape(tensor.shape))
        return last.tolist()


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun or `accelerate launch` has started, as their environment variables say; alone where there are none."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.distributed.is_nccl_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
