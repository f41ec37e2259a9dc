"""What changes while a run goes on: weights, optimiser, schedule, moving average, figures; how it becomes a checkpoint and comes back."""

import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model_patches.weights_file import part_of
from .checkpoint import Checkpoint, TrainingError
from .settings import Settings
from .trainee import Trainee

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

# Losses are scaled by 2 to this power for the backward pass, less one for each lost step: in models that compute in fp16, gradients of a mean
# over a whole picture would vanish. Other precisions see no difference.
LOSS_EXPONENT = 14
# Steps in a row whose gradient is not finite, after which going on is of no use.
MOST_LOST_STEPS = 10


@dataclass(frozen=True)
class Validation:
    """PSNR in dB, averaged over the validation pictures, of what went in and of what came out after `step` steps."""

    step: int
    degraded: float
    restored: float


class State:
    """The state of a run on its way.

    Args:
        trainee: whose parameters are trained; on the device they stay on.
        settings: of the run.

    Raises:
        ValueError: when there is nothing to train.
        TrainingError: when diffusers is not installed.
    """

    def __init__(self, trainee: Trainee, settings: Settings) -> None:
        self.trainee, self.settings = trainee, settings
        self.parameters = list(trainee.parameters())
        if not self.parameters:
            raise ValueError(f"the {trainee.kind.replace('_', ' ')} has no weights to train.")
        groups = _groups(self.parameters, _rate_factors(trainee, self.parameters), settings.rate)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas, weight_decay=settings.weight_decay)
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        get_scheduler = _of_diffusers("optimization").get_scheduler
        self.schedule = get_scheduler(name, self.optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps)
        self.average = _average(self.parameters, settings.ema)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.lost = 0
        self.validations: list[Validation] = []

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that the parameters have, at a scale that lasts until `unscale`."""
        (loss * self._scale).backward()

    def unscale(self) -> None:
        """Bring gradients to their true size; parameters that had no part in the loss get zeros."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(self._scale)

    @property
    def _scale(self) -> float:
        return 2.0 ** max(0, LOSS_EXPONENT - self.lost)

    def update(self, loss: float) -> None:
        """Take one step with the gradients that the parameters have; where they are not finite the weights stay what they are.

        Args:
            loss: of this step, for the record.

        Raises:
            TrainingError: when that has happened too often in a row.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            self.optimizer.step()
            if self.average is not None:
                self.average.step(self.parameters)
        else:
            self.lost += 1
            logging.warning("Mend: the gradient of step %d is not finite; the weights stay as they are", self.step + 1)
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss if finite else math.nan)
        self.step += 1
        recent = self.losses[-MOST_LOST_STEPS:]
        if len(recent) == MOST_LOST_STEPS and all(map(math.isnan, recent)):
            raise TrainingError(
                f"the last {MOST_LOST_STEPS} gradients up to step {self.step} were not finite. "
                "Use a smaller learning rate, or precision fp32 instead of bf16."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the moving average, where there is one, in the place of the weights for as long as the context is open."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def checkpoint(self) -> Checkpoint:
        """Return everything that is needed to go on from here."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"weights.{name}": tensor for name, tensor in self.trainee.state_dict().items()}
        tensors |= {f"optimizer.{index}.{name}": tensor for index, own in optimizer["state"].items() for name, tensor in own.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        facts: dict[str, Any] = {"groups": optimizer["param_groups"], "seconds": self.seconds}
        facts["validations"] = [astuple(validation) for validation in self.validations]
        facts["schedule"] = {name: value for name, value in self.schedule.state_dict().items() if name != "lr_lambdas"}
        if self.average is not None:
            own = self.average.state_dict()
            tensors |= {f"average.{index}": tensor for index, tensor in enumerate(own.pop("shadow_params"))}
            facts["average"] = own
        return Checkpoint(self.step, tensors, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back what `checkpoint` returned."""
        tensors, facts = checkpoint.tensors, checkpoint.facts
        self.trainee.load_state_dict(part_of(tensors, "weights."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part_of(tensors, "optimizer.").items():
            index, _, own = name.partition(".")
            state.setdefault(int(index), {})[own] = tensor
        groups = [{**group, "betas": tuple(group["betas"])} for group in facts["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.schedule.load_state_dict({**self.schedule.state_dict(), **facts["schedule"]})
        if self.average is not None:
            shadow = part_of(tensors, "average.")
            self.average.load_state_dict(facts["average"])
            self.average.shadow_params = [shadow[str(index)].to(p) for index, p in enumerate(self.parameters)]
        self.step, self.seconds = checkpoint.step, facts["seconds"]
        self.losses = tensors["losses"].tolist()
        self.lost = sum(map(math.isnan, self.losses))
        self.validations = [Validation(*values) for values in facts["validations"]]


def _average(parameters: list[torch.nn.Parameter], decay: float) -> "EMAModel | None":
    if decay == 0:
        return None
    return _of_diffusers("training_utils").EMAModel(parameters, decay=decay)


def _of_diffusers(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"diffusers.{module}")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise TrainingError(
            "the Python package diffusers is not installed, and training needs it. Run 'pip install diffusers' with the Python that runs "
            "ComfyUI, then start ComfyUI and this training again."
        ) from error


def _rate_factors(trainee: Trainee, parameters: list[torch.nn.Parameter]) -> list[float]:
    factors = getattr(trainee, "rate_factors", None)
    return [1.0] * len(parameters) if factors is None else list(factors())


def _groups(parameters: list[torch.nn.Parameter], factors: list[float], rate: float) -> list[dict[str, Any]]:
    """Part the parameters, in their order, where the factor of the learning rate changes."""
    groups: list[dict[str, Any]] = []
    for p, factor in zip(parameters, factors, strict=True):
        if not groups or groups[-1]["lr"] != rate * factor:
            groups.append({"params": [], "lr": rate * factor})
        groups[-1]["params"].append(p)
    return groups
