"""Posterior guidance on the tiny models, sampled as the host's nodes do."""

from functools import cache

import torch

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
from mend.model_patches.host_vae import LatentEncoder, PixelDecoder
from mend.samplers.alignment import Alignment
from mend.samplers.guided_model import GuidedModel
from mend.samplers.posterior_guidance import Posterior, PosteriorRun
from mend.samplers.quality import Quality
from mend.tests import tiny_models

SIDE = 6
CELL = 8
KINDS = (*tiny_models.FAMILIES, "v")
# Small crops keep F-PAM quick; the second step of any schedule is already guided.
ALIGNMENT = Alignment(crop=32, warmup=1)
STILL = Alignment(crop=32, warmup=0, updates=0, residual=0.0)
QUALITY = Quality(exposure_below=1.0, chroma_below=1.0, clarity=0.01, clarity_below=1.0)
EARLY = dict(guide_below=0.99)


def family(kind):
    """The family whose shapes a kind has."""
    return "sd15" if kind == "v" else kind


def new_model(kind):
    """A tiny model made as the host makes one while it executes a prompt, so that its weights are inference tensors."""
    with torch.inference_mode():
        if kind != "v":
            return tiny_models.model(kind)
        config = tiny_models.ready(comfy.supported_models.SD15(tiny_models.unet_config(32, 1, linear=False)))
        inner = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.V_PREDICTION)
        tiny_models.initialise(inner.diffusion_model)
        return comfy.model_patcher.ModelPatcher(inner, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


@cache
def model(kind):
    """The same, shared by tests that leave it as it is."""
    return new_model(kind)


@cache
def vae(channels):
    """A tiny VAE that is shared."""
    with torch.inference_mode():
        return tiny_models.vae(channels)


def vae_of(kind):
    """The tiny VAE that belongs to a kind."""
    return vae(tiny_models.CHANNELS[family(kind)])


def pictures(batch=1, side=SIDE, seed=3):
    """IMAGEs that belong to latents of a side."""
    return torch.rand(batch, side * CELL, side * CELL, 3, generator=torch.Generator().manual_seed(seed))


def guided(kind, alignment=ALIGNMENT, quality=QUALITY, base=None, degraded=None, mask=None, on_finish=None, **settings):
    """The tiny model of a kind under guidance."""
    degraded = pictures() if degraded is None else degraded
    given = GuidedModel(Posterior(**{**EARLY, **settings}), alignment, quality, vae_of(kind), degraded, mask, None, on_finish)
    return given.attach(base or model(kind))


def sample(patcher, kind, *, steps=3, sampler="euler", seed=1, batch=1, side=SIDE, latent=None, mask=None, callback=None, batch_index=None,
           sigmas=None):
    """Sample a patcher the way SamplerCustom does; `steps` of the schedule unless sigmas are given."""
    with torch.inference_mode():
        shape = tiny_models.latent_shape(family(kind), batch, side, side)
        latent = torch.zeros(shape) if latent is None else latent
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(tiny_models.conditioning(family(kind), 1), tiny_models.conditioning(family(kind), 2))
        guider.set_cfg(2.0)
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
        noise = comfy.sample.prepare_noise(latent, seed, batch_index)
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        return guider.sample(noise, latent, sampler, sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=seed)


def posterior_run(kind="sd15", *, alignment=STILL, quality=None, y=None, mask=None, decoder=None, batch=1, side=SIDE, **settings):
    """A PosteriorRun of its own, outside any sampling."""
    base = model(kind).model
    given = vae_of(kind)
    shape = tiny_models.latent_shape(family(kind), batch, side, side)
    y = pictures(batch, side).movedim(-1, 1) if y is None else y
    sigmas = torch.linspace(0.9, 0, 4)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return PosteriorRun(Posterior(**settings), alignment, quality, y, mask, decoder or PixelDecoder(given, base), LatentEncoder(given, base), None,
                        base.model_sampling, sigmas, 0, noise)
