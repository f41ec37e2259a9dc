"""MendNewFusion and MendApplyDegradationAwareFusion through the host's executor."""

import pytest
import torch

from mend.model_patches.lq_encoder import lq_encoder_tensors
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches import adapters
from mend.tests.model_patches.fusions import NODE, trained
from mend.tests.nodes.adapter_prompts import adapted
from mend.tests.nodes.fusion_prompts import fused, node, plain, sampler
from mend.tests.nodes.restorations import latent, picture, restoration
from mend.tests.nodes.test_zero_shot import UNUSABLE, failure, live_tensors

PICTURE = picture(1, 64, 64, 3)
GIVEN = ("weights", 0)
# Where something can break by family.
FAMILIES = ("sd15", "flux")
every_family = pytest.mark.parametrize("family", FAMILIES)


def given(family="sd15", weights=None, **changes):
    return {"picture": PICTURE, "weights": weights or trained(family, rank=2), "lq": {"samples": adapters.lq(family)}, **changes}


@every_family
@pytest.mark.parametrize("new", [{}, {"preset": "published", "lora_rank": 4, "train_encoder": True}], ids=["lite", "everything"])
def test_a_fresh_fusion_is_the_model_itself(run_prompt, family, new):
    assert torch.equal(latent(run_prompt(fused(family, new=new), given=given(family))), latent(run_prompt(plain(family))))


@every_family
def test_strength_zero_is_the_model_itself(run_prompt, family):
    off = run_prompt(fused(family, GIVEN, strength=0.0, lora_strength=1.5), given=given(family))
    assert torch.equal(latent(off), latent(run_prompt(plain(family))))
    assert not off.values["model"].patches and not off.values["model"].wrappers


@every_family
def test_a_trained_fusion_acts_as_it_is_told(run_prompt, family):
    base = latent(run_prompt(plain(family)))
    changes = ({}, {"strength": 0.5}, {"lora_strength": 0.0}, {"start_percent": 0.6}, {"end_percent": 0.4})
    results = [latent(run_prompt(fused(family, GIVEN, **change), given=given(family))) for change in changes]
    for index, result in enumerate(results):
        assert result.shape == base.shape and result.isfinite().all()
        assert not any(torch.equal(result, other) for other in (base, *results[:index]))
    assert torch.equal(latent(run_prompt(plain(family))), base)


def test_white_is_no_mask_and_black_is_the_model(run_prompt):
    masked = fused("sd15", GIVEN, mask=["mask", 0], lora_strength=0.0) | {"mask": node("TestGiven", name="mask")}
    whole = latent(run_prompt(fused("sd15", GIVEN, lora_strength=0.0), given=given()))
    assert torch.equal(latent(run_prompt(masked, given=given(mask=torch.ones(1, 64, 64)))), whole)
    assert torch.equal(latent(run_prompt(masked, given=given(mask=torch.zeros(64, 64)))), latent(run_prompt(plain())))


@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (1, 64, 64, 4), (1, 71, 67, 3), (3, 64, 64, 3)], ids=str)
def test_pictures_of_every_kind(run_prompt, shape):
    result = latent(run_prompt(fused("sd15", GIVEN, batch=3), given=given(picture=picture(*shape))))
    assert result.shape[0] == 3 and result.isfinite().all()


def test_both_starts_of_sampling(run_prompt):
    encoded = fused("sd15", GIVEN, sample={"latent_image": ["encoded", 0]})
    encoded["encoded"] = node("VAEEncode", pixels=["picture", 0], vae=["tiny", 3])
    found = latent(run_prompt(encoded, given=given()))
    assert found.isfinite().all() and not torch.equal(found, latent(run_prompt(fused("sd15", GIVEN), given=given())))


def test_the_same_seed_gives_the_same_bits(run_prompt):
    first = run_prompt(fused("sd15", GIVEN), given=given())
    run_prompt.executor.reset()
    second = run_prompt(fused("sd15", GIVEN), given=given())
    assert not second.cached and torch.equal(latent(first), latent(second))


# New


def new(run_prompt, family="sd15", values=None, **settings):
    prompt = {"tiny": node("TestTinyModel", family=family), "out": node("TestCapture", value=["new", 0])}
    prompt |= {"weights": node("TestGiven", name="weights")} if values else {}
    prompt["new"] = node("MendNewFusion", model=["tiny", 0], vae=["tiny", 3], **settings)
    run_prompt.executor.reset()
    return run_prompt(prompt, given=values or {}).values["out"]


@every_family
def test_new_weights_say_what_they_are(run_prompt, family):
    weights = new(run_prompt, family, lora_rank=3, seed=2**64 - 1)
    assert weights.kind == "fusion" and weights.config == {"preset": "lite", "features": 32, "single": True, "rank": 3}
    assert {name.split(".")[0] for name in weights.tensors} == {"fusion", "diffusion_model"}
    other, same = (new(run_prompt, family, seed=5) for _ in range(2))
    assert not torch.equal(weights.tensors["fusion.latent_in.weight"], other.tensors["fusion.latent_in.weight"])
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in other.tensors.items())


def test_the_second_stage_keeps_the_first(run_prompt):
    first = trained("sd15")
    second = new(run_prompt, values={"weights": first}, weights=["weights", 0], preset="published", lora_rank=3, train_encoder=True)
    assert second.config == first.config | {"rank": 3} and all(torch.equal(second.tensors[name], t) for name, t in first.tensors.items())
    assert any(name.startswith(ENCODER) for name in second.tensors)
    alike = latent(run_prompt(fused("sd15", GIVEN), given=given(weights=second)))
    assert torch.equal(alike, latent(run_prompt(fused("sd15", GIVEN), given=given(weights=first))))


def test_a_trained_encoder_is_looked_through(run_prompt):
    weights = trained("sd15")
    without = latent(run_prompt(fused("sd15", GIVEN), given=given(weights=weights)))
    copied = lq_encoder_tensors(tiny_models.vae())
    learned = Weights(weights.kind, weights.family, weights.config, weights.tensors | {name: t * 1.2 for name, t in copied.items()})
    assert not torch.equal(latent(run_prompt(fused("sd15", GIVEN), given=given(weights=learned))), without)
    assert torch.equal(latent(run_prompt(fused("sd15", GIVEN), given=given(weights=weights))), without), "the VAE is as it was"


def failed_new(run_prompt, values=None, **settings):
    prompt = {"tiny": node("TestTinyModel", family="sd15"), "out": node("TestCapture", value=["new", 0])}
    prompt |= {name: node("TestGiven", name=name) for name in values or {}}
    return failure(run_prompt, prompt | {"new": node("MendNewFusion", **{"model": ["tiny", 0], "vae": ["tiny", 3], **settings})}, values or {})


def test_what_new_refuses(run_prompt):
    message = failed_new(run_prompt, {"other": trained("sd3")}, weights=["other", 0])
    assert "New Fusion: the new fusion for SD3 of depth 2 was made for SD3 of depth 2, and 'model' is UNet 32." in message
    message = failed_new(run_prompt, {"other": trained("sd15", rank=2)}, weights=["other", 0], lora_rank=3)
    assert "New Fusion: the new fusion for UNet 32 has a LoRA of rank 2 already. Set the rank to that, or to 0" in message
    message = failed_new(run_prompt, {"unknown": tiny_models.model("flux", global_modulation=True)}, model=["unknown", 0])
    assert "New Fusion: 'model': models of the kind Flux (Flux) are not supported. Use SD1.5" in message


# What Apply refuses


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_pictures(run_prompt, name):
    bad, reason = UNUSABLE[name]
    assert f"{NODE}: degraded {reason}" in failure(run_prompt, fused("sd15", GIVEN), given(picture=bad))


def test_wrong_weights(run_prompt):
    message = failure(run_prompt, fused("sdxl", GIVEN), given(weights=trained("sd15")))
    assert f"{NODE}: the new fusion for UNet 32 was made for UNet 32, and 'model' is UNet 64. Load the model it was trained on" in message
    message = failure(run_prompt, fused("sd15", GIVEN), given(weights=adapters.trained("sd15")))
    assert f"{NODE}: the new adapter for UNet 32 is of the kind restoration adapter, and this node applies the kind fusion" in message


def test_wrong_vaes(run_prompt):
    weights = trained("sd15")
    tensors = {name: tensor for name, tensor in weights.tensors.items()} | {f"{ENCODER}taesd_encoder.0.weight": torch.zeros(3)}
    odd = Weights(weights.kind, weights.family, weights.config, tensors, "odd.safetensors")
    message = failure(run_prompt, fused("sd15", GIVEN), given(weights=odd))
    assert f"{NODE}: 'vae': odd.safetensors brings an encoder for another kind of VAE: taesd_encoder.0.weight does not fit" in message


def test_another_layout_of_vae(run_prompt, monkeypatch):
    prompt = fused("sd15", GIVEN, vae=["lab", 2]) | {"lab": node("MendLoadLabPrior", kind="unet")}
    message = failure(run_prompt, prompt, given())
    assert f"{NODE}: 'vae': the new fusion for UNet 32 was made for a VAE with 32 encoder features, and this one has 64. Connect the VAE it was" in message


def test_wrong_sizes_and_numbers_while_sampling(run_prompt):
    message = failure(run_prompt, fused("sd15", GIVEN), given(picture=picture(1, 64, 96, 3)))
    assert f"{NODE}: the encoded degraded picture is 1x32x8x12 and the one that is sampled 1x4x8x8. Encode the same picture" in message
    message = failure(run_prompt, fused("sd15", GIVEN, batch=3), given(picture=picture(2, 64, 64, 3)))
    assert f"{NODE}: 'degraded' holds 2 for a batch of 3. Give one for all, or one each." in message


# Runs after runs, and together


def test_a_changed_strength_loads_nothing(run_prompt):
    values = given()
    first = run_prompt(fused("sd15", GIVEN), given=values)
    second = run_prompt(fused("sd15", GIVEN, strength=0.5), given=values)
    assert {"tiny", "weights"} <= set(second.cached) and "apply" not in second.cached
    networks = [extra.model for result in (first, second) for extra in result.values["model"].get_additional_models()]
    assert len(networks) == 2 and networks[0] is networks[1]


def test_two_branches_of_one_workflow(run_prompt):
    one, other = trained("sd15", seed=5), trained("sd15", seed=6)
    prompt = fused("sd15", GIVEN)
    prompt["other weights"] = node("TestGiven", name="other")
    prompt["other"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "weights": ["other weights", 0]}}
    prompt |= {"other sample": sampler("other"), "plain sample": sampler("tiny")}
    prompt |= {f"{name} latent": node("TestCapture", value=[f"{name} sample", 0]) for name in ("other", "plain")}
    values = run_prompt(prompt, given=given(weights=one, other=other)).values
    run_prompt.executor.reset()
    alone = [latent(run_prompt(fused("sd15", GIVEN), given=given(weights=weights))) for weights in (one, other)]
    assert torch.equal(values["latent"]["samples"], alone[0]) and torch.equal(values["other latent"]["samples"], alone[1])
    assert torch.equal(values["plain latent"]["samples"], latent(run_prompt(plain()))) and not torch.equal(*alone)


def test_queueing_again_uses_no_more_memory(run_prompt):
    used, values = [], given()
    for seed in range(5):
        run_prompt(fused("sd15", GIVEN, strength=1 - seed / 10, sample={"seed": seed}), given=values)
        used.append(live_tensors())
    assert used[4][0] <= used[1][0] and used[4][1] <= used[1][1], f"(tensors, bytes) alive after each run: {used}"


def test_with_an_adapter_guidance_and_rounds(run_prompt):
    changes = dict(framed=False, guidance={"companion": True, "steps": 1}, rounds={"rounds": 1, "gamma": 0.3})
    adapter = adapted("sd15", ("adapter", 0))

    def chain(**settings):
        prompt = restoration(**changes) | {name: fused("sd15", GIVEN, **settings)[name] for name in ("apply", "weights", "picture", "new")}
        prompt |= {"lq": adapter["lq"], "adapter": node("TestGiven", name="adapter"), "adapted": adapter["apply"]}
        prompt["apply"]["inputs"]["model"] = ["adapted", 0]
        prompt["guidance"]["inputs"]["model"] = ["apply", 0]
        return prompt

    values = given(adapter=adapters.trained("sd15"))
    off, found = (latent(run_prompt(chain(strength=strength), given=values)) for strength in (0.0, 1.0))
    assert found.isfinite().all() and not torch.equal(found, off)
