"""Forward hooks that layers of a model have during one evaluation, and again while its gradients are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Variable

Install = Callable[[], list[Any]]


class EvaluationHooks:
    """The hooks of one use of something on a model.

    Nothing stays in the model between evaluations, so that two clones of it can take turns within a step. Blocks that keep no activations
    are run again during the backward pass, long after their evaluation: for that time the hooks are put back. A backward pass that breaks
    off, by an error or because memory runs out, leaves them there: whoever opened the run calls `clear` at its end.
    """

    def __init__(self) -> None:
        self.put_back: list[Any] = []

    def evaluate(self, install: Install, evaluate: Callable[[], Tensor]) -> Tensor:
        """Return what `evaluate` returns, with the hooks that `install` makes and returns the handles of."""
        self.clear()
        with installed(install):
            out = evaluate()
        if out.requires_grad:
            out.register_hook(lambda _: self._backward(install))
        return out

    def _backward(self, install: Install) -> None:
        """The backward pass of an evaluation begins; that of a later one, if both are part of one pass, is over."""
        self.clear()
        self.put_back = install()
        Variable._execution_engine.queue_callback(self.clear)

    def clear(self) -> None:
        """Take away what was put back."""
        while self.put_back:
            self.put_back.pop().remove()


@contextmanager
def installed(install: Install) -> Iterator[None]:
    """Have hooks in place for as long as the context is open."""
    handles = install()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
