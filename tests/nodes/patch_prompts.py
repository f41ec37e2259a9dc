"""Prompts that sample a tiny model with an adapter or a fusion, wired as an artist would wire them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches import adapters, fusions
from mend.tests.nodes.restorations import node, picture

STEPS = 2
PICTURE = picture(1, 64, 64, 3)
# The link to the given weights.
GIVEN = ("weights", 0)


class Patch(NamedTuple):
    """A patch that reads the damaged picture.

    Attributes:
        new_node, apply_node: ids of its nodes.
        new_title, title: what these are called.
        fresh, shown: what messages call weights from its New node, and what the model is shown of a picture of 96 x 64 pixels.
        new: inputs of its New node, besides those with defaults.
        seen: family -> the inputs of its Apply node that bring the damaged picture.
        trained: family -> weights as if something had been learned.
        families: on which something can break.
    """

    new_node: str
    apply_node: str
    new_title: str
    title: str
    fresh: str
    shown: str
    new: dict[str, Any]
    seen: Callable[[str], dict[str, Any]]
    trained: Callable[..., Weights]
    families: tuple[str, ...]

    def prompt(self, family="sd15", weights=("new", 0), batch=1, sample=None, new=None, **apply):
        """Apply it to a tiny model and sample that; `values` of the result: latent and model.

        Args:
            family: of the tiny model.
            weights: the link that brings the weights: fresh ones, or GIVEN.
            batch: of latents.
            sample, new: changes to the inputs of KSampler and of the New node.
            apply: changes to the inputs of the Apply node.
        """
        inputs = {"model": ["tiny", 0], "weights": list(weights), **self.seen(family), **apply}
        return {
            **{name: node("TestGiven", name=name) for name in ("picture", "lq", "weights")},
            "tiny": node("TestTinyModel", family=family, batch=batch),
            "new": node(self.new_node, **{"model": ["tiny", 0], **self.new, **(new or {})}),
            "apply": node(self.apply_node, **inputs),
            "sample": sampler("apply", **(sample or {})),
            "latent": node("TestCapture", value=["sample", 0]),
            "model": node("TestCapture", value=["apply", 0]),
        }

    def given(self, family="sd15", weights=None, **changes):
        """What the prompt needs."""
        return {"picture": PICTURE, "lq": {"samples": adapters.lq(family)}, "weights": weights or self.trained(family), **changes}

    def new_alone(self, family="sd15", given=(), **inputs):
        """Make new weights; `values` of the result: out. There is a node for each name in `given`."""
        prompt = {name: node("TestGiven", name=name) for name in given} | {"tiny": node("TestTinyModel", family=family)}
        return prompt | {"new": node(self.new_node, **{"model": ["tiny", 0], **inputs}), "out": node("TestCapture", value=["new", 0])}


def _degraded(family):
    return {"degraded": ["picture", 0], "vae": ["tiny", 3]}


def _degraded_or_latent(family):
    return {"latent": ["lq", 0]} if family == "wan" else _degraded(family)  # whose tiny model has no VAE of its own kind


def _trained_fusion(family, **settings):
    return fusions.trained(family, **{"rank": 2, **settings})


ADAPTER = Patch(
    "MendNewRestorationAdapter", "MendApplyRestorationAdapter", "New Restoration Adapter", "Apply Restoration Adapter", "the new adapter",
    "the degraded latent is 1x4x8x12", {"lora_rank": 4}, _degraded_or_latent, adapters.trained, tuple(tiny_models.FAMILIES),
)  # fmt: skip
FUSION = Patch(
    "MendNewFusion", "MendApplyDegradationAwareFusion", "New Fusion", "Apply Degradation-Aware Fusion", "the new fusion",
    "the encoded degraded picture is 1x32x8x12", {"vae": ["tiny", 3]}, _degraded, _trained_fusion, ("sd15", "flux"),
)  # fmt: skip
adapted, fused = ADAPTER.prompt, FUSION.prompt


def plain(family="sd15", batch=1, **changes):
    """The same without a patch."""
    prompt = {"tiny": node("TestTinyModel", family=family, batch=batch), "sample": sampler("tiny", **changes)}
    return prompt | {"latent": node("TestCapture", value=["sample", 0])}


def sampler(model, **changes):
    """KSampler on the model of a node."""
    settings = dict(model=[model, 0], seed=1, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                    positive=["tiny", 1], negative=["tiny", 2], latent_image=["tiny", 4])
    return node("KSampler", **{**settings, **changes})
