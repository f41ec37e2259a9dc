"""Degradation-aware feature fusion on tiny models, sampled as the host's nodes sample, and a spy that stands where it acts."""

from typing import NamedTuple

import torch

from mend.model_patches.anatomy import anatomy_of
from mend.model_patches.fusion_patch import FUSION, FusionPatch, grown, inference_patcher, new_fusion
from mend.model_patches.host import free_key, load_with
from mend.model_patches.lq_condition import FeatureCondition
from mend.tests.model_patches.adapters import base
from mend.tests.tiny_models import latent_shape, vae

NODE = "Apply Degradation-Aware Fusion"
FEATURES = 32
# One UNet, and the three ways in which transformers take their tokens.
FAMILIES = ("sdxl", "sd3", "flux", "wan")


def fresh(family, preset="lite", rank=0, seed=0, single=True):
    """An untrained fusion."""
    weights = new_fusion(base(family).model, FEATURES, preset, seed, single)
    return grown(weights, base(family).model, vae(), rank, False, seed) if rank else weights


def trained(family, spread=0.05, seed=5, **settings):
    """A fusion of which all that starts at zero has values, as if something had been learned."""
    weights, generator = fresh(family, **settings), torch.Generator().manual_seed(seed)
    for name, tensor in weights.tensors.items():
        if ".zero." in f".{name}" or "modulation." in name or name.endswith("lora_B.weight"):
            weights.tensors[name] = torch.randn(tensor.shape, generator=generator) * spread
    return weights


def seen(family, seed=7, **size):
    """Features of a degraded picture."""
    shape = latent_shape(family, **size)
    return torch.randn(shape[0], FEATURES, *shape[2:], generator=torch.Generator().manual_seed(seed))


def applied(to, weights, features, mask=None, **settings):
    """A clone with a fusion, as the Apply node makes it, without its LoRA."""
    patched, anatomy = to.clone(), anatomy_of(to.model)
    network = inference_patcher(weights, anatomy)
    condition = FeatureCondition(free_key(patched, "mend_fusion"), features, mask, NODE, network.model.embed)
    FusionPatch(network.model, anatomy, condition, **settings).attach(patched)
    load_with(patched, condition.key, [network])
    return patched


class Visited(NamedTuple):
    """A fusion at work: the feature before and after it, and what it was given."""

    before: torch.Tensor
    after: torch.Tensor
    e: torch.Tensor
    mask: torch.Tensor
    time: torch.Tensor

    @property
    def change(self):
        """What it added."""
        return self.after - self.before


def spy_on_visits(monkeypatch):
    """Collect what all fusions do from now on; for patches that are attached later."""
    visits, visit = [], FusionPatch._visit

    def spy(self, x, options):
        before, after, evaluation = x.clone(), visit(self, x, options), options[self.condition.key]
        visits.append(Visited(before, after.clone(), evaluation.e, evaluation.mask, evaluation.time))
        return after

    monkeypatch.setattr(FusionPatch, "_visit", spy)
    return visits


def tensors_of(weights):
    """The fusion's own part of a file, by the names in its network."""
    return {name.removeprefix(FUSION): tensor for name, tensor in weights.tensors.items() if name.startswith(FUSION)}
