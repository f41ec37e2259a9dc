"""Learned prompts on tiny models, and what they should do there written down by hand."""

from contextlib import contextmanager
from functools import cache

import torch

from mend.model_patches.learned_prompt import KIND, LearnedPrompt, attention_modules, new_prompt
from mend.model_patches.learned_prompt_patch import attach_blend, attach_prompt
from mend.model_patches.weights_file import Weights
from mend.tests.tiny_models import conditioning, model

NODE = "Apply Learned Prompt"
# As many as the tiny models' texts, which FLUX wants; sd15 and wan also meet longer and shorter ones.
LENGTHS = {"sd15": 77, "sdxl": 77, "sd3": 20, "flux": 7, "wan": 7}
EVERY = ("sd15", "sdxl", "sd3", "flux", "wan")


@cache
def base(family):
    """A tiny model that is shared; no test may change it."""
    return model(family)


def fresh(family, length=None, seed=0):
    """An untrained prompt."""
    return new_prompt(base(family).model, length or LENGTHS[family], seed)


def trained(family, length=None, seed=5, spread=1.0):
    """A prompt as if something had been learned: all alphas differ."""
    weights = fresh(family, length, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    tensors = {"prompts": torch.randn(weights.tensors["prompts"].shape, generator=generator),
               "alphas": spread * torch.randn(weights.tensors["alphas"].shape, generator=generator)}
    return Weights(KIND, weights.family, weights.config, tensors, "prompt.safetensors")


def applied(to, weights, **settings):
    """A clone with a prompt, as the Apply node makes it."""
    patched = to.clone()
    attach_prompt(patched, LearnedPrompt.of(weights), **settings)
    return patched


def blended(to, weights, shares, mode, **settings):
    """A clone with several prompts, as the Blend node makes it."""
    patched = to.clone()
    attach_blend(patched, [(LearnedPrompt.of(each), share) for each, share in zip(weights, shares)], mode, **settings)
    return patched


def told(family, guidance=1.0):
    """The tiny model's conditioning; FLUX's at the guidance of learned prompts."""
    return [[text, {**options, **({"guidance": guidance} if family == "flux" else {})}] for text, options in conditioning(family)]


@contextmanager
def by_hand(to, weights, family, only=None):
    """Rewrite the attention of a tiny model of one's own as the method says, for as long as the context is open."""
    modules = [to.model.diffusion_model.get_submodule(path) for path in attention_modules(to.model)]
    for index, (module, alpha) in enumerate(zip(modules, weights.tensors["alphas"])):
        if only is None or index == only:
            module.forward = _rewritten(module, family, weights.tensors["prompts"], float(alpha))
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _rewritten(module, family, bank, alpha):
    plain, width, length = module.forward, bank.shape[2], bank.shape[1]

    def with_prompt(tokens):
        rows = min(length, tokens.shape[1])
        changed = tokens.clone()
        changed[:, :rows] += alpha * bank[:, :rows]
        return changed

    def linear(x):
        # The MLP behind q, k and v in FLUX's single blocks reads what it always read.
        return torch.cat([plain(with_prompt(x))[..., :3 * width], plain(x)[..., 3 * width:]], -1)

    def cross_attention(x, context, **kwargs):
        rows = min(length, context.shape[1])
        changed = context.clone()
        changed[:, :rows] += bank[:, :rows]
        return plain(x, context, **kwargs) + alpha * plain(x, changed, **kwargs)

    def unet_attention(x, context=None, value=None, **kwargs):
        return plain(x, context=with_prompt(context), value=None if value is None else with_prompt(value), **kwargs)

    return {"sd3": linear, "flux": linear, "wan": cross_attention}.get(family, unet_attention)
