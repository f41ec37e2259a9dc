"""Prompts that sample a tiny model with a Restoration Adapter, wired as an artist would wire them."""

from mend.nodes import adapter, weights
from mend.tests.nodes.restorations import node as other_node

CLASSES = {node.define_schema().node_id: node for node in (*adapter.NODES, *weights.NODES)}
STEPS = 2


def node(kind, /, **inputs):
    """A node of a prompt; widgets that are not given have the defaults of the schema, and inputs of None are left out."""
    schema = CLASSES[kind].define_schema() if kind in CLASSES else None
    defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None} if schema else {}
    return other_node(kind, **{name: value for name, value in {**defaults, **inputs}.items() if value is not None})


def adapted(family="sd15", weights=("new", 0), batch=1, sample=None, new=None, **apply):
    """Apply an adapter to a tiny model and sample it; `values` of the result: latent, model and weights.

    Args:
        family: of the tiny model.
        weights: the link that brings the adapter: a fresh one, or ("weights", 0) for the given one.
        batch: of latents.
        sample, new: changes to the inputs of KSampler and New Restoration Adapter.
        apply: changes to the inputs of Apply Restoration Adapter.
    """
    video = family == "wan"  # whose tiny model has no VAE of its own kind
    seen = {"latent": ["lq", 0]} if video else {"degraded": ["picture", 0], "vae": ["tiny", 3]}
    return {
        "tiny": node("TestTinyModel", family=family, batch=batch),
        "picture": node("TestGiven", name="picture"),
        "lq": node("TestGiven", name="lq"),
        "weights": node("TestGiven", name="weights"),
        "new": node("MendNewRestorationAdapter", model=["tiny", 0], lora_rank=4, **(new or {})),
        "apply": node("MendApplyRestorationAdapter", **{"model": ["tiny", 0], "weights": list(weights), **seen, **apply}),
        "sample": sampler("apply", **(sample or {})),
        "latent": node("TestCapture", value=["sample", 0]),
        "model": node("TestCapture", value=["apply", 0]),
    }


def plain(family="sd15", batch=1, **changes):
    """The same without an adapter."""
    prompt = {"tiny": node("TestTinyModel", family=family, batch=batch), "sample": sampler("tiny", **changes)}
    return prompt | {"latent": node("TestCapture", value=["sample", 0])}


def sampler(model, **changes):
    """KSampler on the model of a node."""
    settings = dict(model=[model, 0], seed=1, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                    positive=["tiny", 1], negative=["tiny", 2], latent_image=["tiny", 4])
    return node("KSampler", **{**settings, **changes})
