"""Prompts that restore a picture on a tiny model, with the nodes wired as the shared workflows wire them."""

from types import ModuleType

import torch

import mend.nodes

FILES = [module for module in vars(mend.nodes).values() if isinstance(module, ModuleType) and hasattr(module, "NODES")]
CLASSES = {node.define_schema().node_id: node for file in FILES for node in file.NODES}
STEPS = 3


def node(kind, /, **inputs):
    """A node of a prompt; widgets of the pack's own that are not given have the defaults of the schema, and inputs of None are left out."""
    schema = CLASSES[kind].define_schema() if kind in CLASSES else None
    defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None} if schema else {}
    return {"class_type": kind, "inputs": {name: value for name, value in {**defaults, **inputs}.items() if value is not None}}


def restoration(family="sd15", framed=True, encoded=True, guided=True, batch=1, **changes):
    """Restore the given "picture"; `values` of the result: latent, and picture where the family's VAE can decode.

    Args:
        family: of the tiny model.
        framed: Frame Image and Unframe Image at the ends.
        encoded: sample from the encoded First Guess instead of the tiny model's own latent of 8 x 8.
        guided: sample the guided model instead of the plain one.
        batch: of the tiny model's own latent.
        changes: inputs by node, for example guidance={"strength": 0.0}.
    """
    source = ["frame" if framed else "given", 0]
    model = ["guidance" if guided else "tiny", 0]
    prompt = {
        "tiny": node("TestTinyModel", family=family, batch=batch),
        "given": node("TestGiven", name="picture"),
        "frame": node("MendFrameImage", image=["given", 0]),
        "alignment": node("MendFPAMAlignment", crop=32, warmup=1),
        "quality": node("MendQualityPrior"),
        "guess": node("MendFirstGuess", degraded=source, alignment=["alignment", 0], quality=["quality", 0]),
        "encode": node("VAEEncode", pixels=["guess", 0], vae=["tiny", 3]),
        "guidance": node(
            "MendApplyPosteriorGuidance", model=["tiny", 0], vae=["tiny", 3], degraded=source, alignment=["alignment", 0],
            quality=["quality", 0],
        ),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "rounds": node("MendRecurrentRenoising", sampler=["euler", 0], rounds=0),
        "sigmas": node("BasicScheduler", model=["tiny", 0], scheduler="normal", steps=STEPS, denoise=1.0),
        "sample": node(
            "SamplerCustom", model=model, add_noise=True, noise_seed=1, cfg=2.0, positive=["tiny", 1], negative=["tiny", 2],
            sampler=["rounds", 0], sigmas=["sigmas", 0], latent_image=["encode", 0] if encoded else ["tiny", 4],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["tiny", 3]),
        "unframe": node("MendUnframeImage", image=["decode", 0], frame=["frame", 1]),
        "latent": node("TestCapture", value=["sample", 0]),
    }  # fmt: skip
    if family != "wan":
        prompt["picture"] = node("TestCapture", value=["unframe" if framed else "decode", 0])
    for name, inputs in changes.items():
        prompt[name]["inputs"].update(inputs)
    return prompt


def picture(*shape, seed=0):
    """A seeded IMAGE."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def latent(result):
    """The samples that a restoration ended with."""
    return result.values["latent"]["samples"]
