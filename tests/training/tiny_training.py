"""Tiny models to train on, made as the host makes them while it executes a prompt, and pairs for them."""

import torch

import comfy.model_management
import comfy.sd
from comfy.ldm.wan.vae import WanVAE
from mend.model_patches.host import evaluate, model_conds
from mend.model_patches.robust_encoder import encoder_tensors
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import trained
from mend.training.trainee import Batch, Models

SIDE = 64


class Words:
    """Stands where a CLIP is expected: every text has a conditioning of its own, and a "long" one is of a length that goes with no other."""

    patcher = None

    def __init__(self, family):
        self.family, self.encoded = family, []

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        self.encoded.append(text)
        tokens, extra = tiny_models.conditioning(self.family, seed=sum(map(ord, text)) + 1)[0]
        if "long" in text:
            tokens = torch.cat([tokens] * 5 + [tokens[:, :1]], 1)
        return [[tokens, extra]]


def video_vae():
    """The host's causal video VAE, at eight channels."""
    weights = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
    tiny_models.initialise(weights, 3, spread=0.2)
    return comfy.sd.VAE(sd=weights.state_dict())


def models(family, seed=0):
    """MODEL, CLIP and VAE of a family; the weights are inference tensors."""
    with torch.inference_mode():
        vae = video_vae() if family == "wan" else tiny_models.vae(tiny_models.CHANNELS[family])
        return Models(tiny_models.model(family, seed), Words(family), vae)


def batch(count=1, seed=3, words="noisy", captions=("a red house", "a green tree")):
    """Pairs whose degraded pictures are noisy."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, SIDE, SIDE, 3, generator=generator)
    degraded = (clean + torch.randn(clean.shape, generator=generator) * 0.2).clamp(0, 1)
    return Batch(clean, degraded, captions[:count], (words,) * count)


def generators(count=1, seed=0):
    """One for each sample."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def started(family, given, robust=False, **settings):
    """Weights that all have values, so that each has a gradient."""
    weights = trained(family, **settings)
    if robust:
        weights = Weights(weights.kind, weights.family, weights.config, weights.tensors | encoder_tensors(given.vae), weights.name)
    return weights


def evaluated(patcher, conditioning, x, sigma, extra):
    """x0 of a model as a sampler evaluates it."""
    with torch.no_grad():
        comfy.model_management.load_models_gpu([patcher, *patcher.get_nested_additional_models()])
        return evaluate(patcher, x, sigma, {k: v.cond for k, v in model_conds(patcher.model, conditioning, x).items()} | extra)
