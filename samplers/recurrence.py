"""Recurrent refinement (LD-RPS, section 3.4): noise the result to gamma T and sample again, a round at a time."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import comfy.samplers

from ..model_patches.host import interrupt_point, keep_loaded
from ..model_patches.host_vae import check_latent_channels
from .posterior_guidance import row_seed

if TYPE_CHECKING:
    from comfy.sd import VAE

NODE = "Recurrent Re-noising"
log = logging.getLogger(__name__)


class RecurrentSampler(comfy.samplers.Sampler):
    """A sampler that runs another one, then `rounds` more times from a lower noise level.

    Args:
        inner: any host sampler.
        rounds: extra passes; 0 is the inner sampler alone.
        gamma: fraction of the schedule, as the host's percent counts it from the end, that each extra pass goes back.
        vae: when given, every round decodes and re-encodes its start, as the paper words it; otherwise the latent itself is re-noised, as
            the reference code does.
    """

    def __init__(self, inner: comfy.samplers.Sampler, rounds: int, gamma: float, vae: "VAE | None" = None) -> None:
        self.inner, self.rounds, self.gamma, self.vae = inner, rounds, gamma, vae

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Callable | None, noise: Tensor,
               latent_image: Tensor | None = None, denoise_mask: Tensor | None = None, disable_pbar: bool = False) -> Tensor:
        """Sample as the host's Sampler.sample does; the callback counts steps across all rounds.

        Raises:
            ValueError: for a VAE of another model, before anything is sampled.
        """
        base = model_wrap.inner_model
        if self.vae is not None:
            check_latent_channels(self.vae, base, NODE)
        later = round_sigmas(sigmas, float(base.model_sampling.percent_to_sigma(1 - self.gamma)))
        if self.rounds and len(later) > 1 and float(sigmas[-1]) > 0:
            # What comes out is still noisy, and would be noised again as if it were clean.
            log.warning("%s: the sigmas end at %.3f, above 0, so that there are no extra passes. Give it the end of the schedule.", NODE,
                        float(sigmas[-1]))
            later = sigmas[-1:]
        total = len(sigmas) - 1 + self.rounds * (len(later) - 1)
        x = self.inner.sample(model_wrap, sigmas, extra_args, counting(callback, 0, total), noise, latent_image, denoise_mask, disable_pbar)
        for index in range(self.rounds if len(later) > 1 else 0):
            interrupt_point()
            done = len(sigmas) - 1 + index * (len(later) - 1)
            start = x if self.vae is None else self._reencode(base, x, denoise_mask)
            if self.vae is not None:
                keep_loaded(model_wrap, x.shape)
            fresh = round_noise(noise, extra_args.get("seed") or 0, index)
            args, shown = of_round(extra_args, later, index), counting(callback, done, total)
            x = self.inner.sample(model_wrap, later, args, shown, fresh, start, denoise_mask, disable_pbar)
        return x

    def _reencode(self, base: Any, x: Tensor, denoise_mask: Tensor | None) -> Tensor:
        """Decode and encode picture by picture, since a video VAE takes a batch for frames; what a noise mask holds stays as it is."""
        rows = []
        for raw in base.process_latent_out(x).split(1):
            picture = self.vae.decode(raw[:, :, 0] if raw.ndim == 5 and self.vae.latent_dim == 2 else raw)
            rows.append(self.vae.encode(picture.reshape(-1, *picture.shape[-3:])).reshape(raw.shape))
        again = base.process_latent_in(torch.cat(rows).to(x))
        return again if denoise_mask is None else torch.lerp(x, again, denoise_mask.to(x))


def round_sigmas(sigmas: Tensor, start: float) -> Tensor:
    """The part of a schedule below `start`, begun at `start` itself: the same steps per unit of noise as the first pass.

    Args:
        sigmas: (n + 1,) falling.
        start: sigma of gamma T.
    """
    start = min(start, float(sigmas[0]))
    below = sigmas[sigmas < start * (1 - 1e-4)]
    return torch.cat([sigmas.new_tensor([start]), below])


def round_noise(noise: Tensor, seed: int, index: int) -> Tensor:
    """Noise of an extra round, one generator a picture so that batches equal single runs.

    A first pass without noise begins at a picture that brings its own; what comes out of it is clean and is noised again all the same.
    """
    def drawn(row: Tensor) -> Tensor:
        return torch.randn(row.shape, generator=torch.Generator().manual_seed(row_seed(seed + index + 1, row))).to(row)

    return torch.stack([drawn(row) for row in noise])


def of_round(extra_args: dict, sigmas: Tensor, index: int) -> dict:
    """The round's own schedule where patches look for it, and its own seed for samplers that add noise at every step."""
    model_options = dict(extra_args["model_options"])
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), "sample_sigmas": sigmas}
    seed = extra_args.get("seed")
    return {**extra_args, "model_options": model_options, "seed": None if seed is None else (seed + index + 1) % 2**64}


def counting(callback: Callable | None, done: int, total: int) -> Callable | None:
    """A callback for one part of a run, which counts steps on from those that are done."""
    if callback is None:
        return None
    return lambda step, x0, x, _: callback(step + done, x0, x, total)
