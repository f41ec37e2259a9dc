"""Restoration guidance (Diffusion Restoration Adapter, section 3.3): after every step the state is moved towards the degraded latent.

    z_t = z'_t + w g(t, T; a) (c_lq - z'_t)                        (1)
    g(t, T; a) = (t / T - a) / (1 - a) where t / T > a, else 0      (2)

The paper writes this for T = 100 steps of a variance preserving z. Here a step of any schedule is weighted by the model time it stands for.
In the noise-matched form c_lq carries the noise of z'_t, so that the move is that of the picture alone.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import comfy.samplers

from ..model_patches.host import WrappersMP, add_run_wrappers, continue_with, is_flow, model_time, signal_level, state_use
from .degraded_latent import NODE, DegradedLatent, cell_mask
from .guided_model import RUN_KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PAPER_STEPS = 100
# How near a sampler's sigma must be to the schedule's to be taken for it.
SAME_SIGMA = 2e-5
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restoration:
    """Settings of the guidance.

    Attributes:
        weight: w, the paper's weight of one step of 100; 0 leaves the model alone.
        onset: a, the model time (0..1) under which states are left alone.
        literal: mix in c_lq without noise, as equation 1 is written.
    """

    weight: float = 0.05
    onset: float = 0.8
    literal: bool = False


def ramp(time: float, onset: float) -> float:
    """g of equation 2: 0 up to the onset a, from there straight up to 1 at pure noise."""
    return (time - onset) / (1 - onset) if time > onset else 0.0


def schedule_times(model_sampling: Any, sigmas: list[float]) -> list[float]:
    """Return the model times of a schedule, in 0..1."""
    return [min(1.0, max(0.0, model_time(model_sampling, sigma))) for sigma in sigmas]


def step_weights(times: list[float], weight: float, onset: float) -> list[float]:
    """Share of c_lq in the state that each step reaches, 1 - (1 - w g)^(100 dtau): w g itself at 100 even steps.

    A state stands for the share dtau of the model time that is nearer to it than to its neighbours, and for the paper's steps in there: g
    is their mean. The start stands for nothing, as it does at 100 steps (0 < t < T). So the moves of any schedule add up to the same.

    Args:
        times: (n + 1) model times of a schedule, falling.
        weight, onset: w and a.

    Returns:
        n + 1 weights; the first is 0.
    """
    half = 0.5 / PAPER_STEPS
    edges = [times[0] - half, *((upper + lower) / 2 for upper, lower in zip(times[1:], times[2:])), times[-1] - half]
    weights = [0.0]
    for upper, lower in zip(edges, edges[1:]):
        upper, share = min(upper, edges[0]), max(0.0, min(upper, edges[0]) - lower)
        mean = _mean_ramp(lower, upper, onset) if share > 0 else 0.0
        weights.append(1 - (1 - weight * mean) ** (PAPER_STEPS * share))
    return weights


def _mean_ramp(lower: float, upper: float, onset: float) -> float:
    """Mean of g over the paper's steps in a span of model time; a step reaches half a hundredth to both sides of its time."""
    total = 0.0
    for step in range(1, PAPER_STEPS):
        inside = min(upper, (step + 0.5) / PAPER_STEPS) - max(lower, (step - 0.5) / PAPER_STEPS)
        total += max(0.0, inside) * ramp(step / PAPER_STEPS, onset)
    return total / (upper - lower)


@dataclass(frozen=True)
class Target:
    """Where a run is moved to.

    Attributes:
        latent: (1 or B, C, ...) c_lq as the model sees latents.
        mask: (1 or B, 1, ...) in 0..1, or None.
        rows: how many of the batch are moved; those after them are companions of other guidance.
    """

    latent: Tensor
    mask: Tensor | None
    rows: int


class Pull:
    """The moves of one walk down a schedule.

    Args:
        settings: of the guidance.
        target: of the run.
        model_sampling: the host's.
        sigmas: (n + 1,) the schedule.
        held: the host's denoise mask, 0 where the picture is kept, or None.
    """

    def __init__(self, settings: Restoration, target: Target, model_sampling: Any, sigmas: Tensor, held: Tensor | None) -> None:
        self.literal, self.target, self.model_sampling, self.held = settings.literal, target, model_sampling, held
        self.flow = is_flow(model_sampling)
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.weights = step_weights(schedule_times(model_sampling, self.sigmas), settings.weight, settings.onset)
        self.due = set(range(1, len(self.sigmas)))
        self.x0: Tensor | None = None

    def index(self, sigma: Tensor) -> int | None:
        """Place of an evaluation's sigma in the schedule, None if it lies between."""
        value = float(sigma.flatten()[0])
        index = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - value))
        return index if abs(self.sigmas[index] - value) <= SAME_SIGMA * value else None

    def shift(self, index: int, x: Tensor, x0: Tensor) -> Tensor:
        """The move of state x at a place of the schedule, given a prediction of its clean latent.

        With n = (x - s x0) / sigma the noise-matched target is s c + sigma n, so x moves by W s (c - x0).
        """
        sigma, weight = self.sigmas[index], self.weights[index]
        if self.literal:
            return self._toward(weight, self._spread(sigma), x)
        return self._toward(weight * signal_level(self.model_sampling, sigma), 1.0, x0)

    def move(self, index: int, x: Tensor) -> None:
        """Move a state in place."""
        if self.weights[index] and self.x0 is not None:
            x.add_(self.shift(index, x, self.x0))
        self.due.discard(index)

    def moved_prediction(self, index: int, x: Tensor, x0: Tensor) -> Tensor:
        """The prediction at a place that makes an Euler step, x' = r x + (1 - r) x0, arrive at the moved state."""
        if index + 1 >= len(self.sigmas):
            return x0
        self.due.discard(index + 1)
        if not self.weights[index + 1]:
            return x0
        ratio = self.sigmas[index + 1] / self.sigmas[index]
        return x0 + self.shift(index + 1, torch.lerp(x0, x, ratio), x0) / max(1 - ratio, 1e-3)

    def finish(self, x: Tensor) -> Tensor:
        """The result with the moves that no evaluation could make: that of the last state, and all of them for samplers off the schedule.

        A move of a noisy state is worth as much at the end as its part of the picture in the variance preserving z.
        """
        left = 1.0
        for index in self.due:
            sigma = self.sigmas[index]
            left *= 1 - self.weights[index] * (1.0 if self.literal else signal_level(self.model_sampling, sigma) / self._total(sigma))
        if left == 1:
            return x
        last = self.sigmas[-1]
        if self.literal:
            return x + self._toward(1 - left, self._spread(last), x)
        x0 = x if last == 0 or self.x0 is None else self.x0
        return x + self._toward((1 - left) * self._total(last), 1.0, x0)

    def _total(self, sigma: float) -> float:
        """Deviation of x at a sigma, for latents of deviation 1."""
        return (signal_level(self.model_sampling, sigma) ** 2 + sigma**2) ** 0.5

    def _spread(self, sigma: float) -> float:
        """What makes a clean latent one of x in the literal form: x of flow models is the paper's z, of others sqrt(1 + sigma^2) z."""
        return 1.0 if self.flow else self._total(sigma)

    def _toward(self, weight: float, scale: float, x: Tensor) -> Tensor:
        rows = self.target.rows
        step = weight * (scale * self.target.latent.to(x) - x[:rows])
        for mask in (self.target.mask, None if self.held is None else self.held[:rows]):
            step = step if mask is None else step * mask.to(x)
        return torch.cat([step, torch.zeros_like(x[rows:])])


class PulledModel:
    """Stands in for the denoiser that a sampler calls.

    Args:
        inner: the denoiser.
        pull: the moves.
        use: what the sampler does with the states it hands out.
    """

    def __init__(self, inner: Any, pull: Pull, use: str) -> None:
        self.inner, self.pull, self.use = inner, pull, use
        self.before: int | None = None
        self.started = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Predict x0; on the way the state is moved in place, or the prediction instead where the sampler walks on from another tensor."""
        # Some begin a little below the schedule's first sigma.
        index = self.pull.index(sigma) if self.started else 0
        if index and self._is_state(index):
            self.pull.move(index, x)
        self.before, self.started = index, True
        x0 = self.inner(x, sigma, *args, **kwargs)
        self.pull.x0 = x0
        return self.pull.moved_prediction(index, x, x0) if self.use == "copied" and index is not None else x0

    def _is_state(self, index: int) -> bool:
        """Tell a state from the guess of it that samplers which look ahead evaluate first, and from tensors that are dropped."""
        return self.use == "kept" or self.use == "ahead" and (self.before is None or self.before >= index)


class RestorationGuidance:
    """The inputs of one Restoration Guidance; everything a run changes is made for that run.

    Args:
        settings: of the guidance.
        degraded: the picture to stay near.
        mask: (M, H, W) in 0..1, where to; None for everywhere.
    """

    def __init__(self, settings: Restoration, degraded: DegradedLatent, mask: Tensor | None = None) -> None:
        self.settings, self.degraded, self.mask = settings, degraded, mask

    def attach(self, model: "ModelPatcher") -> "ModelPatcher":
        """Return a clone of `model` under guidance; at weight 0 a clone that samples as the model itself."""
        patched = model.clone()
        if self.settings.weight:
            add_run_wrappers(patched, "mend_restoration", {WrappersMP.OUTER_SAMPLE: self._outer_sample})
        return patched

    def _outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Open a run: encode the degraded picture while the model is not yet loaded, and guide whatever sampler is called."""
        guider = executor.class_obj
        latent = self.degraded.fitted(guider.model_patcher, noise.shape)
        mask = None if self.mask is None else cell_mask(self.mask, noise.shape)
        run = _Run(self.settings, latent, self.degraded.name, mask)
        wrappers = guider.model_options["transformer_options"].setdefault("wrappers", {}).setdefault(WrappersMP.SAMPLER_SAMPLE, {})
        key = f"mend_restoration_run_{id(run)}"
        wrappers[key] = [run]
        try:
            return executor(noise, *args, **kwargs)
        finally:
            wrappers.pop(key, None)


class _Run:
    """The SAMPLER_SAMPLE wrapper of one run."""

    def __init__(self, settings: Restoration, latent: Tensor, name: str, mask: Tensor | None) -> None:
        self.settings, self.latent, self.name, self.mask = settings, latent, name, mask

    def __call__(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Callable | None, noise: Tensor, *args: Any,
                 **kwargs: Any) -> Tensor:
        rows = _pictures(guider, noise)
        for name, given in ((self.name, self.latent), ("mask", self.mask)):
            if given is not None and len(given) not in (1, rows):
                raise ValueError(f"{NODE}: '{name}' is for {len(given)} pictures but the latent batch has {rows}. Give one, or as many as "
                                 "there are latents.")
        times = schedule_times(guider.inner_model.model_sampling, sigmas.tolist())
        if len(times) > 1 and not any(step_weights(times, self.settings.weight, self.settings.onset)):
            log.warning("%s does nothing in this run: it acts above model time %g ('onset'), and the run begins at %.2f. Lower 'onset', or begin "
                        "with more noise ('at_least' of Noise-Matched Start).", NODE, self.settings.onset, times[0])
        sampler = guided_sampler(executor.class_obj, self.settings, Target(self.latent, self.mask, rows))
        return continue_with(executor, sampler, guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _pictures(guider: Any, noise: Tensor) -> int:
    """Rows of the batch that the user asked for: Apply Posterior Guidance may have appended a companion each."""
    groups = guider.model_options["transformer_options"]["wrappers"].get(WrappersMP.PREDICT_NOISE, {})
    asked = [len(run.noise) for key, runs in groups.items() if str(key).startswith(RUN_KEY) for run in runs]
    return min([len(noise), *asked])


def guided_sampler(sampler: comfy.samplers.Sampler, settings: Restoration, target: Target) -> comfy.samplers.Sampler:
    """Return a sampler that samples as the given one does, with every state moved; the given one is not touched.

    A sampler that runs another one (in its attribute `inner`) runs the guided other one. One with a loop of its own has its predictions
    moved.
    """
    guided = copy.copy(sampler)
    if hasattr(sampler, "sampler_function"):
        guided.sampler_function = pulled_function(sampler.sampler_function, settings, target)
    elif hasattr(sampler, "guided"):
        # It samples something else than pictures, and knows only in a run where the degraded one lies there.
        guided = sampler.guided(lambda inner, place: guided_sampler(inner, settings, replace(target, latent=place(target.latent))))
    elif isinstance(getattr(sampler, "inner", None), comfy.samplers.Sampler):
        guided.inner = guided_sampler(sampler.inner, settings, target)
    else:
        guided = _ForeignSampler(sampler, settings, target)
    return guided


def pulled_function(function: Callable, settings: Restoration, target: Target) -> Callable:
    """Return a sampler function that walks as `function` does, with every state moved. All that changes lives in the call."""

    @wraps(function)
    def sample(model: Any, x: Tensor, sigmas: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held = (kwargs.get("extra_args") or {}).get("denoise_mask")
        pull = Pull(settings, target, model.inner_model.inner_model.model_sampling, sigmas, held)
        return pull.finish(function(PulledModel(model, pull, state_use(function)), x, sigmas, *args, **kwargs))

    return sample


class _ForeignSampler(comfy.samplers.Sampler):
    """A sampler of unknown kind, whose predictions are moved."""

    def __init__(self, sampler: comfy.samplers.Sampler, settings: Restoration, target: Target) -> None:
        self.sampler, self.settings, self.target = sampler, settings, target

    def sample(self, model_wrap: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pull = Pull(self.settings, self.target, model_wrap.inner_model.model_sampling, sigmas, None)
        return self.sampler.sample(PulledModel(model_wrap, pull, "copied"), sigmas, *args, **kwargs)
