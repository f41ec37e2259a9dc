"""Sampling in the degradation space (Defusion, arXiv 2506.16960): the damage is sampled, and what comes out is the picture without it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import comfy.samplers

from ..model_patches.degraded_picture import ATTACHMENT, Degradation, Space
from ..model_patches.host import WrappersMP, interrupt_point
from .guided_model import NODE as POSTERIOR
from .guided_model import GuidedModel
from .recurrence import NODE as RENOISING
from .recurrence import RecurrentSampler, of_round, round_noise

NODE = "Degradation Space Sampler"
# Keeps the seeds of samples apart from those of rounds of Recurrent Re-noising around them, which count the same seed up.
SALT = 0x9D2C_5680_EFC6_0000
# (a sampler, what picture latents are where it samples) -> the sampler to use in its place.
Around = Callable[[comfy.samplers.Sampler, Callable[[Tensor], Tensor]], comfy.samplers.Sampler]


# Keys of what has learned on pictures, as they begin among a model's wrappers, and the nodes that put it there.
PICTURE_PATCHES = {
    "mend_adapter": "Apply Restoration Adapter", "mend_fusion": "Apply Degradation-Aware Fusion", "mend_prompt": "a learned prompt",
}  # fmt: skip


class DegradationSpaceSampler(comfy.samplers.Sampler):
    """Runs another sampler on the degradation of the picture that Apply Degradation Diffusion has given to the model.

    At full noise the damage is sampled from noise alone, whatever the latent holds. At less noise, damage that is already missing from the
    latent counts as found. Both work on latents of pictures, not of videos.

    Args:
        inner: any host sampler.
        samples: how many samples of the damage are averaged. A schedule that stops while noise is left gets one: the mean of several noisy
            states would have too little noise.
    """

    def __init__(self, inner: comfy.samplers.Sampler, samples: int = 1) -> None:
        self.inner, self.samples = inner, samples
        self.around: Around | None = None

    def guided(self, around: Around) -> "DegradationSpaceSampler":
        """Return a copy whose inner sampler is guided by somebody who knows pictures only; later guidance goes inside of earlier."""
        made, earlier = copy.copy(self), self.around
        made.around = around if earlier is None else lambda inner, place: earlier(around(inner, place), place)
        return made

    @torch.no_grad()
    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Callable | None, noise: Tensor,
               latent_image: Tensor | None = None, denoise_mask: Tensor | None = None, disable_pbar: bool = False) -> Tensor:
        """Sample as the host's Sampler.sample does; the callback is shown restored pictures and counts steps across all samples.

        Raises:
            ValueError: when the model knows no degraded picture.
        """
        space = degradation_of(model_wrap.model_patcher).space(model_wrap.inner_model, noise)
        inner = self.inner if self.around is None else self.around(self.inner, space.residual)
        start, found, seed = self._start(model_wrap, sigmas, space, noise, latent_image), torch.zeros_like(noise), extra_args.get("seed")
        samples = 1 if sigmas[-1] > 0 else self.samples
        for index in range(samples):
            interrupt_point()
            shown = _showing(callback, space, found, index, samples)
            own, args = noise, extra_args
            if index:
                # Where the first sample was given no noise the others get none: they start at the same place.
                salted = (seed or 0) ^ (index * SALT % 2**64)
                own = round_noise(noise, salted, 0) * (noise != 0)
                args = of_round({**extra_args, "seed": None if seed is None else salted}, sigmas, 0)
            found = found + inner.sample(model_wrap, sigmas, args, shown, own, start.clone(), denoise_mask, disable_pbar)
        return space.picture(found / samples)

    def _start(self, model_wrap: Any, sigmas: Tensor, space: Space, noise: Tensor, latent_image: Tensor | None) -> Tensor:
        """Return y0 where sampling begins. The host takes a latent of zeros for none, and not for a picture that lost everything."""
        if latent_image is None or not latent_image.any() or self.max_denoise(model_wrap, sigmas):
            return torch.zeros_like(noise)
        return space.residual(latent_image.to(noise))


def degradation_of(patcher: Any, node: str = NODE) -> Degradation:
    """Return what a MODEL knows of the degradation.

    Raises:
        ValueError: when that is nothing.
    """
    degradation = patcher.get_attachment(ATTACHMENT)
    if degradation is None:
        raise ValueError(f"{node}: 'model' knows no degraded picture. Connect the model from Apply Degradation Diffusion.")
    return degradation


def samples_degradation(sampler: Any) -> bool:
    """Tell whether a sampler is one of these, or runs one."""
    if isinstance(sampler, DegradationSpaceSampler):
        return True
    return any(samples_degradation(part) for part in vars(sampler).values() if isinstance(part, comfy.samplers.Sampler))


def check_inner(sampler: Any) -> None:
    """Raise a ValueError for samplers that cannot run on damage: one that does so itself, and one that takes its results for pictures."""
    if samples_degradation(sampler):
        raise ValueError(f"{NODE}: 'sampler' already comes from {NODE}. Connect the sampler itself, such as KSamplerSelect.")
    if _reencodes(sampler):
        raise ValueError(f"{NODE}: 'sampler' is {RENOISING} with a VAE, which would decode the damage as if it were a picture. Disconnect 'vae' "
                         f"of {RENOISING}, or put {RENOISING} behind {NODE}.")


def _reencodes(sampler: Any) -> bool:
    if isinstance(sampler, RecurrentSampler) and sampler.vae is not None:
        return True
    return any(_reencodes(part) for part in vars(sampler).values() if isinstance(part, comfy.samplers.Sampler))


def demand_degradation_space(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Tensor:
    """SAMPLER_SAMPLE wrapper: a model that predicts damage gives garbage to samplers and guidance that take it for a picture.

    Raises:
        ValueError: when that would happen.
    """
    if any(isinstance(getattr(wrapper, "__self__", None), GuidedModel) for wrapper in guider.model_patcher.get_all_wrappers(WrappersMP.OUTER_SAMPLE)):
        raise ValueError(f"Apply Degradation Diffusion: {POSTERIOR} is on this model too. This model predicts damage, and {POSTERIOR} would "
                         f"decode it as a picture. Take {POSTERIOR} off the way from the model to the sampler.")
    keys = guider.model_patcher.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {})
    others = {node for prefix, node in PICTURE_PATCHES.items() for key in keys if str(key).startswith(prefix)}
    if others:
        raise ValueError(f"Apply Degradation Diffusion: {' and '.join(sorted(others))} is on this model too. This model predicts damage, and "
                         "that has learned on pictures. Use each on a model of its own, one after the other.")
    if not samples_degradation(executor.class_obj):
        raise ValueError("Apply Degradation Diffusion: this model predicts damage, and the sampler takes it for a picture. Put Degradation "
                         "Space Sampler behind the sampler, and sample with SamplerCustom or SamplerCustomAdvanced.")
    return executor(guider, *args, **kwargs)


def _showing(callback: Callable | None, space: Space, found: Tensor, index: int, samples: int) -> Callable | None:
    """A callback for one of several samples, which shows their mean so far.

    The inner sampler reports how many steps one sample takes; it may walk more than once.

    Args:
        found: the sum of the samples before this one.
    """
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step + index * total, space.picture((found + x0) / (index + 1)), x, total * samples)
