"""The one training loop. It knows no diffusion: what is learned, and how it hangs on the user's models, is the trainee's."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp import autocast

from ..model_patches.errors import telling
from ..model_patches.host import INTERRUPTED, for_training, interrupt_point, weights_fingerprint
from ..model_patches.host_checkpoints import checkpointed_blocks
from ..model_patches.host_gradients import gradients
from .checkpoint import Checkpoint, RunFolder
from .feed import Feed, Pairs, feeding
from .processes import ALONE, Processes
from .seeding import Plan
from .settings import Settings
from .state import State, Validation
from .trainee import NODE, Models, Trainee
from .validation import psnr, restore_each, sheet

# Saving may take this part of the time at most, however large the weights are.
MOST_TIME_SAVING = 0.05


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        step, steps: taken, and to be taken.
        loss: of the step.
        figures: what the trainee wanted to have said.
        rate: learning rate.
        seconds_left: by the pace since the start or the last resumption.
    """

    step: int
    steps: int
    loss: float
    figures: dict[str, float]
    rate: float
    seconds_left: float


class Observer(Protocol):
    """Who watches a run."""

    def stepped(self, progress: Progress) -> None:
        """Called after every step, in every process."""

    def validated(self, validation: Validation, page: Tensor) -> None:
        """Called after every validation, in the first process; page: (n, H, 3 W, 3) of uint8, degraded | restored | clean."""

    def stop(self) -> bool:
        """Asked after every step: whether all processes shall end the run here, to be gone on with another time."""


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        tensors: the trained weights, or their moving average where there is one; on the CPU.
        finished: whether all steps were taken.
        step: steps taken.
        losses: of all steps, the lost ones left out.
        validations: all of them, earliest first.
        page: pictures of the last validation, (n, H, 3 W, 3) of uint8; None without one, and in processes other than the first.
        seconds: spent in all, over all resumptions.
    """

    tensors: dict[str, Tensor]
    finished: bool
    step: int
    losses: list[float]
    validations: list[Validation]
    page: Tensor | None
    seconds: float


def describe_run(trainee: Trainee, pairs: Pairs, models: Models, settings: Settings, processes: Processes = ALONE) -> dict[str, Any]:
    """Return, for open_run, what two runs must share for one to go on where the other stopped: first weights, data, models, settings."""
    given = {"model": models.model, "clip": models.clip and models.clip.patcher, "vae": models.vae and models.vae.patcher}
    return {
        "kind": trainee.kind,
        "config": trainee.config,
        "start": _digest(trainee.state_dict()),
        "data": pairs.fingerprint(),
        "models": {name: weights_fingerprint(patcher) for name, patcher in given.items() if patcher is not None},
        "settings": settings.identity(processes.count),
    }


def train(trainee: Trainee, pairs: Pairs, models: Models, settings: Settings, run: RunFolder | None, observer: Observer,
          processes: Processes = ALONE) -> Result:
    """Train, going on from the last checkpoint of the run.

    The same settings, data and start give the same weights bit for bit on a CPU, however often the run was interrupted; how a step's
    samples are spread over batches and processes changes roundings only.

    Args:
        trainee: trained in place.
        pairs: what it learns from.
        models: what it is trained on; they stay as they are.
        settings: of the run.
        run: where checkpoints and pictures go; None in processes other than the first, and to leave nothing on disk.
        observer: told how it goes.
        processes: who else trains the same weights.

    Raises:
        ValueError: when there is no data, or models are missing or do not fit.
        TrainingError: when checkpoints cannot be written, somebody else trains in the same folder, or the loss is not finite time and
            again.
    """
    if len(pairs) == 0:
        raise ValueError("there are no pairs to train with.")
    side = getattr(trainee, "wants_charts", 0)
    pairs = pairs.with_charts(side) if side else pairs
    with gradients(), nullcontext() if run is None else run.alone():
        saved = processes.same(run.load() if run is not None else None)
        if models.model is not None:
            # Once for the whole run: training and validation work on the same weights.
            with telling(f"{NODE}:"):
                models = replace(models, model=for_training(models.model))
            if settings.checkpointing:
                models = replace(models, model=checkpointed_blocks(models.model))
        finished, page = _finished(saved, pairs, settings, run)
        if processes.same(finished):
            state = State(trainee, settings)
            state.restore(saved)
            return _result(state, settings, page)
        with trainee.attach(models):
            if saved is None and hasattr(trainee, "prepare"):
                trainee.prepare(pairs, settings.seed)
            session = _Session(trainee, pairs, models, settings, run, observer, processes, saved)
            try:
                session.go()
            except INTERRUPTED:
                session.take_back()
                session.save()
                raise
            return _result(session.state, settings, session.page)


def _finished(saved: Checkpoint | None, pairs: Pairs, settings: Settings, run: RunFolder | None) -> tuple[bool, Tensor | None]:
    """Tell whether nothing is left to do, with the pictures of the last validation."""
    if saved is None or run is None or saved.step < settings.steps:
        return False, None
    page = run.pictures(saved.step, _validation_pictures(pairs, settings)) if settings.validate_every else None
    return page is not None or not settings.validate_every, page


def _validation_pictures(pairs: Pairs, settings: Settings) -> int:
    return min(settings.validation_pictures, pairs.validation_count)


def _result(state: State, settings: Settings, page: Tensor | None) -> Result:
    with state.averaged():
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.trainee.state_dict().items()}
    losses = [loss for loss in state.losses if math.isfinite(loss)]
    return Result(tensors, state.step >= settings.steps, state.step, losses, state.validations, page, state.seconds)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Session:
    """A run from its start or last checkpoint to its end or next interruption."""

    def __init__(self, trainee: Trainee, pairs: Pairs, models: Models, settings: Settings, run: RunFolder | None, observer: Observer,
                 processes: Processes, saved: Checkpoint | None) -> None:
        self.trainee, self.pairs, self.settings = trainee, pairs, settings
        self.run, self.observer, self.processes = run, observer, processes
        self.state = State(trainee, settings)
        if saved is not None:
            self.state.restore(saved)
        self._start_alike()
        device = models.model.load_device if models.model is not None else self.state.parameters[0].device
        self.precision = autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        self.at_step: Callable[[int], None] = getattr(trainee, "at_step", lambda step: None)
        self.statistics: Callable[[], Iterable[Tensor]] = getattr(trainee, "statistics", tuple)
        self.statistics_before: list[Tensor] = []
        self.page: Tensor | None = None
        self.first_step, self.seconds_before, self.begun = self.state.step, self.state.seconds, time.monotonic()
        self.saved_at, self.saving_took = time.monotonic(), 0.0

    def go(self) -> None:
        """Take the remaining steps, or those until the observer wants to stop, and leave a checkpoint."""
        state, settings = self.state, self.settings
        plan = Plan(settings.seed, len(self.pairs), settings.batch, settings.accumulate, self.processes.rank, self.processes.count)
        with feeding(self.pairs, plan, state.step, settings.steps) as feed:
            self._validate_when_due()
            while state.step < settings.steps and not self._step(feed):
                self._validate_when_due()
                if time.monotonic() - self.saved_at > max(settings.save_every, self.saving_took / MOST_TIME_SAVING):
                    self.save()
        self.save()

    def take_back(self) -> None:
        """Undo what a step that did not come to its end has measured."""
        with torch.no_grad():
            for statistic, before in zip(self.statistics(), self.statistics_before):
                statistic.copy_(before)

    def save(self) -> None:
        """Write a checkpoint where there is a folder for it."""
        start = time.monotonic()
        self.state.seconds = self.seconds_before + start - self.begun
        if self.run is not None:
            self.run.save(self.state.checkpoint())
        self.saved_at = time.monotonic()
        self.saving_took = self.saved_at - start

    def _step(self, feed: Feed) -> bool:
        """Take a step; returns whether to stop before the last one."""
        losses, figures = 0.0, {}
        self.statistics_before = [statistic.clone() for statistic in self.statistics()]
        self.at_step(self.state.step)
        for _ in range(self.settings.accumulate):
            interrupt_point()
            batch, generators = feed.next()
            with self.precision:
                loss, seen = self.trainee.loss(batch, generators)
            self.state.backward(loss / self.settings.accumulate)
            losses += float(loss.detach())
            figures |= seen
        loss, stops = self._average(losses / self.settings.accumulate)
        self.state.update(loss)
        self.statistics_before = []
        self.observer.stepped(self._progress(loss, figures))
        return stops > 0 and self.state.step < self.settings.steps

    def _average(self, loss: float) -> tuple[float, float]:
        """Average gradients, what the trainee measures as it learns, loss and the wish to stop over the processes."""
        self.state.unscale()
        shared = [*(p.grad for p in self.state.parameters), *self.statistics()]
        loss, stops = self.processes.average(shared, [loss, float(self.observer.stop())])
        return loss, stops

    def _start_alike(self) -> None:
        """Give all processes the first one's weights."""
        weights = self.processes.same([p.detach().cpu() for p in self.state.parameters]) if self.processes.count > 1 else []
        with torch.no_grad():
            for p, value in zip(self.state.parameters, weights):
                p.copy_(value)

    def _validate_when_due(self) -> None:
        step, every = self.state.step, self.settings.validate_every
        due = every > 0 and (step % every == 0 or step == self.settings.steps)
        known = any(validation.step == step for validation in self.state.validations)
        if self.processes.rank > 0 or not due or (known and (step < self.settings.steps or self.page is not None)):
            return
        with self.state.averaged():
            number = _validation_pictures(self.pairs, self.settings)
            results = restore_each(self.trainee, self.pairs, number, self.settings.seed, interrupt_point)
        degraded = sum(psnr(pair.degraded, pair.clean) for pair, _ in results) / len(results)
        restored = sum(psnr(picture, pair.clean) for pair, picture in results) / len(results)
        validation = Validation(step, degraded, restored)
        self.page = sheet(results)
        if self.run is not None:
            self.run.save_pictures(step, self.page)
        if not known:
            self.state.validations.append(validation)
        self.observer.validated(validation, self.page)

    def _progress(self, loss: float, figures: dict[str, float]) -> Progress:
        state, steps = self.state, self.settings.steps
        pace = (time.monotonic() - self.begun) / (state.step - self.first_step)
        return Progress(state.step, steps, loss, figures, state.schedule.get_last_lr()[0], pace * (steps - state.step))
