"""A guided sampling run that survives being stopped: the published schedule takes hours without a GPU."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import comfy.samplers
from comfy.k_diffusion.sampling import sample_euler

from ...samplers.guided_model import GuidedModel
from ...samplers.posterior_guidance import Counters, PosteriorRun, Row

LEARNERS = ("psi", "d1", "d2", "psi_optimizer", "d1_optimizer", "d2_optimizer")


class KeptRun:
    """The host's Euler sampler (DDIM, without noise), with all that a run has learned written to a file every few steps.

    Args:
        file: of the unfinished run; one that is there is gone on with.
        every: steps between two writes.
    """

    def __init__(self, file: Path, every: int = 20) -> None:
        self.file, self.every = file, every
        # Optimisers go on with the very tensors they are given, and change them in place.
        with torch.inference_mode(False):
            self.saved = torch.load(file, weights_only=True) if file.exists() else None
        self.calls = [self.saved["calls"] if self.saved else 0]
        self.begun = time.perf_counter() - (self.saved["seconds"] if self.saved else 0.0)
        self.passes = 0
        self.run: PosteriorRun | None = None

    def sampler(self) -> comfy.samplers.KSAMPLER:
        """The host's SAMPLER of this run."""
        return comfy.samplers.KSAMPLER(self._sample)

    def guided(self, *args: Any, **kwargs: Any) -> GuidedModel:
        """A GuidedModel whose run this one keeps; arguments as for GuidedModel."""
        return _KeptGuidance(self, *args, **kwargs)

    def opened(self, run: PosteriorRun) -> None:
        """Take a new run's state into keeping, and bring it to where the file left off."""
        self.run = run
        if self.saved is None:
            return
        run.started, run.counters = self.saved["started"], Counters(**self.saved["counters"])
        for row, state in zip(run.rows, self.saved["rows"], strict=True):
            _set_row(row, state)

    def _sample(self, model: Any, x: Tensor, sigmas: Tensor, **settings: Any) -> Tensor:
        index, first, last = self.passes, 0, len(sigmas) - 1
        self.passes += 1
        if self.saved is not None and index < self.saved["pass"]:
            return x
        if self.saved is not None and index == self.saved["pass"]:
            x, first = self.saved["x"].to(x), self.saved["step"]
        for step in range(first, last, self.every):
            following = step + self.every
            x = sample_euler(model, x, sigmas[step:following + 1], **settings)
            # After the last step of a pass there is nothing left of it to save.
            if following < last:
                self._keep(index, following, x)
        return x

    def _keep(self, index: int, step: int, x: Tensor) -> None:
        state = {"pass": index, "step": step, "x": x, "started": self.run.started, "counters": vars(self.run.counters), "calls": self.calls[0],
                 "seconds": time.perf_counter() - self.begun, "rows": [_row_state(row) for row in self.run.rows]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.file)


class _KeptGuidance(GuidedModel):
    def __init__(self, kept: KeptRun, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = kept

    def start(self, *args: Any, **kwargs: Any) -> PosteriorRun:
        """As GuidedModel's, gone on with where the file left off."""
        run = super().start(*args, **kwargs)
        with torch.inference_mode(False):
            self.kept.opened(run)
        return run


def _row_state(row: Row) -> dict:
    learned = {name: getattr(row.alignment, name).state_dict() for name in LEARNERS}
    return {**learned, "updates": row.alignment.updates, "generator": row.alignment.generator.get_state(), "correction": row.correction,
            "correction_variance": row.correction_variance}


def _set_row(row: Row, state: dict) -> None:
    for name in LEARNERS:
        getattr(row.alignment, name).load_state_dict(state[name])
    row.alignment.updates = state["updates"]
    row.alignment.generator.set_state(state["generator"])
    row.correction, row.correction_variance = state["correction"], state["correction_variance"]
