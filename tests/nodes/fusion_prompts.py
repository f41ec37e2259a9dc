"""Prompts that sample a tiny model with a fusion, wired as an artist would wire them."""

from mend.nodes import fusion
from mend.tests.nodes.adapter_prompts import node as other_node
from mend.tests.nodes.adapter_prompts import plain, sampler

CLASSES = {node.define_schema().node_id: node for node in fusion.NODES}
__all__ = ["fused", "node", "plain", "sampler"]


def node(kind, /, **inputs):
    """A node of a prompt; widgets that are not given have the defaults of the schema, and inputs of None are left out."""
    schema = CLASSES[kind].define_schema() if kind in CLASSES else None
    defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None} if schema else {}
    return other_node(kind, **{**defaults, **inputs})


def fused(family="sd15", weights=("new", 0), batch=1, sample=None, new=None, **apply):
    """Apply a fusion to a tiny model and sample it; `values` of the result: latent, model and weights.

    Args:
        family: of the tiny model; not wan, whose tiny model has no VAE of its own kind.
        weights: the link that brings the fusion: a fresh one, or ("weights", 0) for the given one.
        batch: of latents.
        sample, new: changes to the inputs of KSampler and New Fusion.
        apply: changes to the inputs of Apply Degradation-Aware Fusion.
    """
    given = {"model": ["tiny", 0], "weights": list(weights), "degraded": ["picture", 0], "vae": ["tiny", 3]}
    return {
        "tiny": node("TestTinyModel", family=family, batch=batch),
        "picture": node("TestGiven", name="picture"),
        "weights": node("TestGiven", name="weights"),
        "new": node("MendNewFusion", **{"model": ["tiny", 0], "vae": ["tiny", 3], **(new or {})}),
        "apply": node("MendApplyDegradationAwareFusion", **{**given, **apply}),
        "sample": sampler("apply", **(sample or {})),
        "latent": node("TestCapture", value=["sample", 0]),
        "model": node("TestCapture", value=["apply", 0]),
    }
