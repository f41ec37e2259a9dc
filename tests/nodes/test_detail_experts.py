"""MendNewDetailExperts and MendDecodeWithDetailExperts through the host's executor."""

import pytest
import torch

from mend.tests.model_patches.detail_experts import pictures, trained
from mend.tests.nodes.restorations import node
from mend.tests.nodes.test_zero_shot import failure
from mend.tests.tiny_models import vae as tiny_vae
from mend.tests.training.tiny_training import video_vae

GIVEN = ("weights", 0)


def decoding(family="sd15", experts=("new", 0), new=None, **decode):
    """Encode the clean picture and decode it with experts that see the other, and without."""
    return {
        "tiny": node("TestTinyModel", family=family),
        "clean": node("TestGiven", name="clean"),
        "picture": node("TestGiven", name="picture"),
        "weights": node("TestGiven", name="weights"),
        "new": node("MendNewDetailExperts", vae=["tiny", 3], window=64, **(new or {})),
        "encode": node("VAEEncode", pixels=["clean", 0], vae=["tiny", 3]),
        "decode": node("MendDecodeWithDetailExperts", **{"samples": ["encode", 0], "vae": ["tiny", 3], "weights": list(experts),
                                                         "degraded": ["picture", 0], **decode}),
        "host": node("VAEDecode", samples=["encode", 0], vae=["tiny", 3]),
        "image": node("TestCapture", value=["decode", 0]),
        "map": node("TestCapture", value=["decode", 1]),
        "plain": node("TestCapture", value=["host", 0]),
    }


def given(picture=None, learned=None):
    picture = pictures() if picture is None else picture
    return {"picture": picture, "clean": pictures(*picture.shape[:3], seed=4), "weights": learned or trained(tiny_vae(4))}


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_fresh_experts_are_vae_decode(run_prompt, family):
    values = run_prompt(decoding(family), given=given()).values
    assert torch.equal(values["image"], values["plain"]) and values["map"].shape == values["image"].shape


def test_strength(run_prompt):
    results = [run_prompt(decoding("sd15", GIVEN, strength=strength), given=given()).values for strength in (0.0, 0.5, 1.0)]
    assert torch.equal(results[0]["image"], results[0]["plain"]) and not results[0]["map"].any()
    assert not torch.equal(results[1]["image"], results[2]["image"]) and results[2]["map"].any()
    assert all(torch.equal(result["plain"], results[0]["plain"]) for result in results)


@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (1, 64, 64, 4), (2, 71, 67, 3)], ids=str)
def test_pictures_of_every_kind(run_prompt, shape):
    picture = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    values = run_prompt(decoding("sd15", GIVEN), given=given(picture)).values
    assert values["image"].shape == values["plain"].shape == (shape[0], 64, 64, 3) and values["image"].isfinite().all()


def test_saved_experts_are_the_same(run_prompt, base_folder):
    prompt = {"weights": node("TestGiven", name="weights"),
              "save": node("MendSaveWeights", weights=["weights", 0], filename_prefix="detail", precision="full (fp32)")}
    learned = given()["weights"]
    text = run_prompt(prompt, given={"weights": learned}).outputs["save"]["text"][0]
    file = text.removeprefix("models/mend/")
    prompt = decoding("sd15", ("load", 0)) | {"load": node("MendLoadWeights", file=file)}
    loaded = run_prompt(prompt, given=given()).values["image"]
    assert torch.equal(loaded, run_prompt(decoding("sd15", GIVEN), given=given(learned=learned)).values["image"])


def test_new_weights_say_what_they_are(run_prompt):
    prompt = decoding("sd15", new={"size": "lite", "seed": 2**64 - 1, "latents": "clean", "perceptual": 0.0})
    prompt = {name: prompt[name] for name in ("tiny", "new")} | {"out": node("TestCapture", value=["new", 0])}
    made = run_prompt(prompt).values["out"]
    assert made.kind == "detail_experts" and made.config == {"size": "lite", "window": 64, "latents": "clean", "perceptual": 0.0}


def test_what_does_not_fit_is_named(run_prompt):
    message = failure(run_prompt, decoding("sd15", GIVEN), given(learned=trained(tiny_vae(4, seed=8))))
    assert "Decode with Detail Experts: the new detail experts for AutoencoderKL of 4 channels" in message and "another VAE of the same layout" in message
    other = decoding("sd15", GIVEN, degraded=["other", 0]) | {"other": node("TestGiven", name="other")}
    message = failure(run_prompt, other, {**given(), "other": pictures(1, 96, 64)})
    assert "Decode with Detail Experts: 'degraded' is 64 x 96 but the latent belongs to a picture of 64 x 64" in message
    message = failure(run_prompt, other, {**given(), "other": pictures() * float("nan")})
    assert "Decode with Detail Experts: 'degraded' has NaN or infinite pixels" in message


def test_a_video_vae_is_refused(run_prompt):
    prompt = {"vae": node("TestGiven", name="vae"), "new": node("MendNewDetailExperts", vae=["vae", 0]), "out": node("TestCapture", value=["new", 0])}
    assert "New Detail Experts: 'vae': video VAEs are not supported" in failure(run_prompt, prompt, {"vae": video_vae()})
