"""MendLoadLabPrior: what it hands out works in the host like any other MODEL, CLIP and VAE."""

import pytest
import torch

import comfy.model_patcher
import comfy.sd
from mend.lab.prior import KINDS
from mend.model_patches.host import is_flow
from mend.tests.nodes.restorations import latent, node, picture, restoration

GIVEN = {"picture": picture(1, 60, 75, 4)}


def on_lab(kind, words="red round", **changes):
    """The restoration of tests/nodes/restorations.py with the lab prior in place of the tiny model."""
    lab = {
        "lab": node("MendLoadLabPrior", kind=kind),
        "words": node("CLIPTextEncode", clip=["lab", 1], text=words),
        "no words": node("CLIPTextEncode", clip=["lab", 1], text=""),
    }
    for name in ("encode", "guidance", "decode"):
        changes[name] = {**changes.get(name, {}), "vae": ["lab", 2]}
    for name in ("guidance", "sigmas"):
        changes[name] = {**changes.get(name, {}), "model": ["lab", 0]}
    changes["sample"] = {**changes.get("sample", {}), "positive": ["words", 0], "negative": ["no words", 0]}
    prompt = restoration(**changes) | lab
    return {name: entry for name, entry in prompt.items() if name != "tiny"}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_hosts_own_types(run_prompt, kind):
    prompt = {"lab": node("MendLoadLabPrior", kind=kind)} | {str(slot): node("TestCapture", value=["lab", slot]) for slot in range(3)}
    model, clip, vae = (value for _, value in sorted(run_prompt(prompt).values.items()))
    assert isinstance(model, comfy.model_patcher.ModelPatcher) and isinstance(clip, comfy.sd.CLIP) and isinstance(vae, comfy.sd.VAE)
    assert is_flow(model.get_model_object("model_sampling")) == (kind != "unet")
    assert model.get_model_object("latent_format").latent_channels == vae.latent_channels == (3 if kind == "pixel" else 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_restored_in_its_size(run_prompt, kind):
    result = run_prompt(on_lab(kind), given=GIVEN)
    restored = result.values["picture"]
    assert restored.shape == (1, 60, 75, 4) and restored.isfinite().all()
    assert torch.equal(restored[..., 3], GIVEN["picture"][..., 3])
    run_prompt.executor.reset()
    assert torch.equal(latent(run_prompt(on_lab(kind), given=GIVEN)), latent(result))


@pytest.mark.parametrize("kind", KINDS)
def test_words_matter_and_strength_zero_does_not(run_prompt, kind):
    red = latent(run_prompt(on_lab(kind), given=GIVEN))
    assert not torch.equal(latent(run_prompt(on_lab(kind, words="blue"), given=GIVEN)), red)
    off = latent(run_prompt(on_lab(kind, guidance={"strength": 0.0}), given=GIVEN))
    plain = latent(run_prompt(on_lab(kind, sample={"model": ["lab", 0]}), given=GIVEN))
    assert torch.equal(off, plain)


def test_an_unknown_kind_is_refused(run_prompt):
    prompt = {"lab": node("MendLoadLabPrior", kind="transformer"), "out": node("TestCapture", value=["lab", 0])}
    result = run_prompt(prompt, check=False)
    assert not result.success and "node lab (MendLoadLabPrior): Value not in list: kind: 'transformer'" in result.error_text()
