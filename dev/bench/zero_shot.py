"""Restoring one picture through the host's own sampling functions, counting the work."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

import comfy.sample
import comfy.samplers
import comfy.utils

from ...lab.prior import load_lab_prior
from ...samplers.alignment import Alignment
from ...samplers.first_guess import first_guess, known_degradation
from ...samplers.guided_model import GuidedModel
from ...samplers.matched_start import MatchedStart, latent_noise
from ...samplers.posterior_guidance import Counters, Posterior
from ...samplers.quality import Quality
from ...samplers.recurrence import RecurrentSampler
from ...samplers.returned_detail import coded, returned_detail
from .kept_run import KeptRun


@dataclass(frozen=True)
class Recipe:
    """Everything one restoration depends on; what the workflow's widgets hold.

    Attributes:
        alignment, quality, posterior: as the nodes make them; posterior None is the host's img2img.
        sampler, scheduler, steps, cfg, denoise: of the host.
        rounds, gamma: of Recurrent Re-noising.
        text: use the caption.
        guess: start from First Guess instead of the damaged picture.
        matched: start at the noise that the picture has, and at no less than `denoise` as a share of noise; otherwise denoise is the
            host's.
        detail: give back what the VAE drops from the picture that sampling started at.
    """

    alignment: Alignment = field(default_factory=Alignment)
    quality: Quality | None = None
    posterior: Posterior | None = field(default_factory=lambda: Posterior(every=2))
    sampler: str = "euler"
    scheduler: str = "normal"
    steps: int = 4
    cfg: float = 1.5
    denoise: float = 0.1
    rounds: int = 0
    gamma: float = 0.3
    text: bool = True
    guess: bool = True
    matched: bool = True
    detail: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Work:
    """Seconds and counts of one restoration."""

    seconds: float
    model_calls: int
    decodes: int
    decoder_backwards: int
    updates: int

    def row(self) -> dict[str, float]:
        """Return the counts under the names of the table."""
        return {"seconds": self.seconds, "model_calls": self.model_calls, "decodes": self.decodes, "decoder_backwards": self.decoder_backwards,
                "fpam_updates": self.updates}


class Prior:
    """The lab prior of a kind, loaded once."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.model, self.clip, self.vae = load_lab_prior(kind)

    def encode(self, text: str) -> list:
        """CLIPTextEncode."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


def restore(prior: Prior, degraded: Tensor, caption: str, recipe: Recipe, seed: int, kept: KeptRun | None = None) -> tuple[Tensor, Work]:
    """Restore (1, H, W, 3) as the shared workflow does.

    Args:
        kept: samples in place of the recipe's sampler, and may go on with an earlier run.

    Returns:
        (restored picture in 0..1, work done).
    """
    comfy.utils.set_progress_bar_enabled(False)
    begun, counters, calls = (kept.begun if kept else time.perf_counter()), Counters(), (kept.calls if kept else [0])
    start = guessed(degraded, recipe) if recipe.guess else degraded
    model = _counted(prior.model, calls)
    if recipe.posterior is not None:
        guided = kept.guided if kept else GuidedModel
        model = guided(recipe.posterior, recipe.alignment, recipe.quality, prior.vae, degraded, on_finish=lambda done: _add(counters, done)).attach(model)
    latent = prior.vae.encode(start)
    sampling = model.get_model_object("model_sampling")
    if recipe.matched:
        matched = MatchedStart.of([latent_noise(prior.model, prior.vae, start)], recipe.denoise, seed)
        noise, sigmas = matched.generate_noise({"samples": latent}), matched.sigmas(sampling, recipe.steps)
    else:
        total = recipe.steps if recipe.denoise >= 1 else int(recipe.steps / recipe.denoise)
        noise = comfy.sample.prepare_noise(latent, seed)
        sigmas = comfy.samplers.calculate_sigmas(sampling, recipe.scheduler, total)[-(recipe.steps + 1):]
    sampler = kept.sampler() if kept else comfy.samplers.sampler_object(recipe.sampler)
    if recipe.rounds:
        sampler = RecurrentSampler(sampler, recipe.rounds, recipe.gamma)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prior.encode(caption if recipe.text else ""), prior.encode(""))
    guider.set_cfg(recipe.cfg)
    sampled = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)
    picture = prior.vae.decode(sampled).float()
    if recipe.detail:
        picture = returned_detail(picture, start, coded(prior.vae, start))
    work = Work(time.perf_counter() - begun, calls[0], counters.decodes + 1, counters.decoder_backwards, counters.updates)
    return picture, work


def guessed(degraded: Tensor, recipe: Recipe) -> Tensor:
    """First Guess at (1, H, W, 3), which needs no model."""
    y = degraded.movedim(-1, 1)
    return first_guess(y, known_degradation(y, recipe.quality, recipe.alignment.grid, recipe.alignment.grey)).movedim(1, -1)


def img2img(recipe: Recipe, denoise: float) -> Recipe:
    """The host's own img2img on the same prior: no guidance, no first guess, no rounds."""
    return replace(recipe, posterior=None, guess=False, matched=False, rounds=0, denoise=denoise, steps=20)


def _counted(model: Any, calls: list[int]) -> Any:
    """Count the samples that the denoiser evaluates."""
    counted = model.clone()

    def count(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += len(x)
        return executor(x, *args, **kwargs)

    counted.add_wrapper_with_key("apply_model", "mend_bench", count)
    return counted


def _add(total: Counters, done: Counters) -> None:
    total.decodes += done.decodes
    total.decoder_backwards += done.decoder_backwards
    total.updates += done.updates
