"""Restoration Adapters on tiny models, sampled as the host's nodes sample, and a spy that stands where they act."""

from functools import cache
from typing import NamedTuple

import torch

import comfy.sample
from mend.model_patches.adapter_patch import AdapterPatch, inference_patcher, new_weights
from mend.model_patches.anatomy import Site, anatomy_of
from mend.model_patches.host import free_key, load_with
from mend.model_patches.lq_condition import LatentCondition
from mend.tests.tiny_models import conditioning, latent_shape, model

NODE = "Apply Restoration Adapter"
FLOWS = ("sd3", "flux", "wan")


@cache
def base(family):
    """A tiny model that is shared; no test may change it."""
    return model(family)


def fresh(family, rank=4, size="full", seed=0):
    """An untrained adapter."""
    return new_weights(base(family).model, size, rank, seed)


def trained(family, spread=0.05, rank=4, size="full", seed=5):
    """An adapter whose last layers and up factors have values, as if something had been learned."""
    weights, generator = fresh(family, rank, size), torch.Generator().manual_seed(seed)
    for name, tensor in weights.tensors.items():
        if ".zero." in name:
            weights.tensors[name] = torch.randn(tensor.shape, generator=generator) * spread
        if name.endswith("lora_B.weight"):
            # Fused layers are packed block-wise; only what is not zero by construction is learned.
            weights.tensors[name] = torch.randn(tensor.shape, generator=generator) * spread * _learned(family, name, tensor, rank)
    return weights


def _learned(family, name, tensor, rank):
    parts = tensor.shape[1] // rank
    if parts == 1:
        return torch.ones_like(tensor)
    part = base(family).model.diffusion_model.hidden_size if name.endswith("linear1.lora_B.weight") else tensor.shape[0] // parts
    blocks = torch.block_diag(*[torch.ones(part, rank)] * parts)
    return torch.cat([blocks, torch.zeros(len(tensor) - len(blocks), tensor.shape[1])])


def applied(to, weights, c_lq, mask=None, **settings):
    """A clone with the adapters of `weights`, as the Apply node makes it, without their LoRA."""
    patched, anatomy = to.clone(), anatomy_of(to.model)
    network = inference_patcher(weights, anatomy)
    condition = LatentCondition(free_key(patched, "mend_adapter"), c_lq, mask, NODE)
    AdapterPatch(network.model, anatomy, condition, **settings).attach(patched)
    load_with(patched, condition.key, [network])
    return patched


def noise_of(family, seed=1, **size):
    """Seeded noise of the shape of a family's latents."""
    return torch.randn(latent_shape(family, **size), generator=torch.Generator().manual_seed(seed))


def lq(family, seed=7, **size):
    """A degraded latent."""
    return noise_of(family, seed, **size)


def sampled(patcher, family, steps=2, sampler="euler", cfg=3.0, seed=1, noise=None, positive=None, negative=None, **size):
    """Latents that the host samples from pure noise."""
    noise = noise_of(family, seed, **size) if noise is None else noise
    positive, negative = positive or conditioning(family), negative or conditioning(family, 2)
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(patcher, noise, steps, cfg, sampler, "simple", positive, negative, latent, disable_pbar=True, seed=seed)


class Visited(NamedTuple):
    """One adapter at work: the feature before and after it, and what it was given."""

    site: Site
    before: torch.Tensor
    after: torch.Tensor
    c_lq: torch.Tensor
    mask: torch.Tensor
    sigma: float

    @property
    def change(self):
        """What it added."""
        return self.after - self.before


def spy_on_visits(monkeypatch):
    """Collect what all adapters do from now on; for patches that are attached later."""
    seen, visit = [], AdapterPatch._visit

    def spy(self, site, x_t, emb, options):
        before = x_t.clone()
        after = visit(self, site, x_t, emb, options)
        evaluation = options[self.condition.key]
        # FLUX goes on to write into what it is given.
        seen.append(Visited(site, before, after.clone(), evaluation.c_lq, evaluation.mask, float(options["sigmas"][0])))
        return after

    monkeypatch.setattr(AdapterPatch, "_visit", spy)
    return seen


def placed(family, feature, height=8, width=8):
    """Features as (B, C, ..., h, w) of the picture, whatever the model keeps them in."""
    if feature.ndim == 4:
        return feature
    rows, columns = -(-height // 2), -(-width // 2)
    return feature.movedim(1, -1).reshape(*feature.shape[::2], -1, rows, columns)
