"""Degradation models on tiny models, applied as their node applies them and sampled as the host's nodes sample."""

from functools import cache

import torch

import comfy.sample
import comfy.samplers
from mend.degradations.visual_ground import visual_ground
from mend.model_patches import degradation_model, degradation_tokenizer
from mend.model_patches.degradation_model import DEVIATION
from mend.model_patches.degraded_picture import ATTACHMENT
from mend.model_patches.weights_file import Weights
from mend.nodes.degradation_space import ApplyDegradationDiffusion
from mend.samplers.degradation_space import DegradationSpaceSampler
from mend.tests import tiny_models
from mend.tests.training.tiny_training import video_vae

SIDE, WIDTH = 64, 64
STEPS = 2


@cache
def base(family):
    """A tiny model that is shared; no test may change it."""
    return tiny_models.model(family)


@cache
def vae(family):
    """Its VAE."""
    return video_vae() if family == "wan" else tiny_models.vae(tiny_models.CHANNELS[family])


@cache
def codes():
    """An untrained tokenizer."""
    return degradation_tokenizer.new_weights("lab", torch.cat([visual_ground(seed, 128) for seed in range(3)]))


def fresh(family, form="latent", size="small", rank=4, **variant):
    """An untrained model, but for a measured deviation."""
    weights = degradation_model.new_weights(base(family).model, codes(), form, size, rank, 0, **variant)
    weights.tensors[DEVIATION] = torch.tensor(0.5)
    return weights


def trained(family, form="latent", spread=0.3, **settings):
    """Weights whose gates have values, as if something had been learned."""
    weights, generator = fresh(family, form, **settings), torch.Generator().manual_seed(5)
    for name, tensor in weights.tensors.items():
        if name.endswith((".gate", "modulate.weight", "zero.weight")) or ".times." in name:
            weights.tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) * spread
    return weights


def without_lora(weights):
    """The same, with a LoRA that changes nothing left out."""
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("diffusion_model.")}
    return Weights(weights.kind, weights.family, {**weights.config, "rank": 0}, tensors, weights.name)


def instruction(count=16, batch=1, seed=2, spread=1.0):
    """Tokens of a chart; spread 0 says that nothing is wrong."""
    tokens = torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread
    return degradation_tokenizer.Instruction(tokens, degradation_tokenizer.fingerprint(codes()), "noisy")


def pictures(batch=1, height=SIDE, width=SIDE, seed=7):
    """Degraded pictures."""
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def applied(family, weights, degraded=None, told=None, strength=1.0, cfg=1.0, mask=None, to=None, **percents):
    """The model from Apply Degradation Diffusion."""
    degraded, told = pictures() if degraded is None else degraded, told or instruction()
    return ApplyDegradationDiffusion.execute(to or base(family), weights, told, degraded, vae(family), strength, cfg, mask, **percents).args[0]


def sampled(patcher, family, sampler=None, steps=STEPS, seed=1, cfg=1.0, denoise=1.0, latent=None, batch=1, height=8, width=8, noise_mask=None,
            callback=None, noisy=True, sigmas=None):  # fmt: skip
    """LATENT samples, as SamplerCustom makes them; not `noisy` is its add_noise switched off."""
    shape = tiny_models.latent_shape(family, batch, height, width)
    latent = torch.zeros(shape) if latent is None else latent
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * noisy
    sigmas = schedule(patcher, round(steps / denoise))[-steps - 1:] if sigmas is None else sigmas
    positive, negative = tiny_models.conditioning(family), tiny_models.conditioning(family, 2)
    sampler = sampler or DegradationSpaceSampler(comfy.samplers.sampler_object("euler"))
    return comfy.sample.sample_custom(patcher, noise, cfg, sampler, sigmas, positive, negative, latent, noise_mask=noise_mask, callback=callback,
                                      disable_pbar=True, seed=seed)


def schedule(patcher, steps, name="simple"):
    """The host's sigmas of that many steps."""
    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), name, steps)


def removed(patcher, latent):
    """The picture from Remove Degradation."""
    return patcher.get_attachment(ATTACHMENT).removed(patcher, latent)


def plain(family, **settings):
    """What the base model itself samples, in the space of its own latents."""
    return sampled(base(family), family, comfy.samplers.sampler_object("euler"), **settings)
