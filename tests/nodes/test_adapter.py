"""MendNewRestorationAdapter and MendApplyRestorationAdapter through the host's executor, on every family."""

import pytest
import torch

from comfy.nested_tensor import NestedTensor
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import NODE, lq, trained
from mend.tests.nodes.adapter_prompts import adapted, node, plain, sampler
from mend.tests.nodes.restorations import latent, picture, restoration
from mend.tests.nodes.test_zero_shot import UNUSABLE, failure, live_tensors

PICTURE = picture(1, 64, 64, 3)
GIVEN = ("weights", 0)
every_family = pytest.mark.parametrize("family", tiny_models.FAMILIES)


def given(family="sd15", weights=None, **changes):
    values = {"picture": PICTURE, "lq": {"samples": lq(family)}, "weights": weights or trained(family)}
    return {**values, **changes}


@every_family
def test_a_fresh_adapter_is_the_model_itself(run_prompt, family):
    assert torch.equal(latent(run_prompt(adapted(family), given=given(family))), latent(run_prompt(plain(family))))


@every_family
def test_strength_zero_is_the_model_itself(run_prompt, family):
    off = run_prompt(adapted(family, GIVEN, strength=0.0, lora_strength=1.5), given=given(family))
    assert torch.equal(latent(off), latent(run_prompt(plain(family))))
    assert not off.values["model"].patches and not off.values["model"].wrappers


@every_family
def test_a_trained_adapter_and_its_lora_act(run_prompt, family):
    base = latent(run_prompt(plain(family)))
    changes = ({}, {"strength": 0.5}, {"lora_strength": 0.0}, {"lora_strength": -1.0}, {"start_percent": 0.6}, {"end_percent": 0.4})
    results = [latent(run_prompt(adapted(family, GIVEN, **change), given=given(family))) for change in changes]
    for index, result in enumerate(results):
        assert result.shape == base.shape and result.isfinite().all()
        assert not any(torch.equal(result, other) for other in (base, *results[:index]))
    assert torch.equal(latent(run_prompt(plain(family))), base)


@every_family
def test_lora_alone_needs_no_picture(run_prompt, family):
    prompt = adapted(family, new={"size": "LoRA only"}, degraded=None, vae=None, latent=None)
    assert torch.equal(latent(run_prompt(prompt, given=given(family))), latent(run_prompt(plain(family))))
    prompt = adapted(family, GIVEN, degraded=None, vae=None, latent=None)
    learned = trained(family, size="none")
    assert not torch.equal(latent(run_prompt(prompt, given=given(family, learned))), latent(run_prompt(plain(family))))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_latent_serves_as_well_as_a_picture(run_prompt, family):
    prompt = adapted(family, GIVEN, degraded=None, vae=None, latent=["encoded", 0])
    prompt["encoded"] = node("VAEEncode", pixels=["picture", 0], vae=["tiny", 3])
    assert torch.equal(latent(run_prompt(prompt, given=given(family))), latent(run_prompt(adapted(family, GIVEN), given=given(family))))


def test_white_is_no_mask_and_black_is_the_model(run_prompt):
    masked = adapted("sd15", GIVEN, mask=["mask", 0], lora_strength=0.0) | {"mask": node("TestGiven", name="mask")}
    whole = latent(run_prompt(adapted("sd15", GIVEN, lora_strength=0.0), given=given()))
    assert torch.equal(latent(run_prompt(masked, given=given(mask=torch.ones(1, 64, 64)))), whole)
    assert torch.equal(latent(run_prompt(masked, given=given(mask=torch.zeros(64, 64)))), latent(run_prompt(plain())))


@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (1, 64, 64, 4), (1, 71, 67, 3), (3, 64, 64, 3)], ids=str)
def test_pictures_of_every_kind(run_prompt, shape):
    result = latent(run_prompt(adapted("sd15", GIVEN, batch=3), given=given(picture=picture(*shape))))
    assert result.shape[0] == 3 and result.isfinite().all()


def test_the_same_seed_gives_the_same_bits(run_prompt):
    first = run_prompt(adapted("sd15", GIVEN), given=given())
    run_prompt.executor.reset()
    second = run_prompt(adapted("sd15", GIVEN), given=given())
    assert not second.cached and torch.equal(latent(first), latent(second))


# New


def new(run_prompt, family="sd15", vae=False, **settings):
    prompt = {"tiny": node("TestTinyModel", family=family), "out": node("TestCapture", value=["new", 0])}
    prompt["new"] = node("MendNewRestorationAdapter", model=["tiny", 0], vae=["tiny", 3] if vae else None, **settings)
    run_prompt.executor.reset()
    return run_prompt(prompt).values["out"]


@every_family
def test_new_weights_say_what_they_are(run_prompt, family):
    weights = new(run_prompt, family, lora_rank=3, seed=2**64 - 1)
    assert weights.kind == "restoration_adapter" and weights.config == {"size": "full", "rank": 3}
    assert {name.split(".")[0] for name in weights.tensors} == {"adapter", "diffusion_model"}
    other, same = (new(run_prompt, family, lora_rank=3, seed=5) for _ in range(2))
    assert not torch.equal(weights.tensors["adapter.stem.weight"], other.tensors["adapter.stem.weight"])
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in other.tensors.items())


def test_sizes(run_prompt):
    made = {size: new(run_prompt, size=size, lora_rank=2) for size in ("full", "small", "LoRA only")}
    count = {size: sum(t.numel() for t in weights.tensors.values()) for size, weights in made.items()}
    assert count["full"] > count["small"] > count["LoRA only"] > 0
    assert not any(name.startswith("diffusion_model") for name in new(run_prompt, lora_rank=0).tensors)


def test_a_vae_brings_a_copy_of_its_encoder(run_prompt):
    weights = new(run_prompt, vae=True)
    names = {name for name in weights.tensors if name.startswith(ENCODER)}
    assert names and not any("decoder" in name for name in names)
    assert weights.tensors.keys() - names == new(run_prompt).tensors.keys()


def test_an_untrained_encoder_changes_nothing(run_prompt):
    prompt = adapted("sd15", new={"vae": ["tiny", 3]})
    assert torch.equal(latent(run_prompt(prompt, given=given())), latent(run_prompt(plain())))


def test_a_trained_encoder_is_looked_through(run_prompt):
    weights = trained("sd15")
    without = latent(run_prompt(adapted("sd15", GIVEN), given=given()))
    copied = {name: t.detach().clone() for name, t in new(run_prompt, vae=True).tensors.items() if name.startswith(ENCODER)}
    same = Weights(weights.kind, weights.family, weights.config, weights.tensors | copied)
    assert torch.equal(latent(run_prompt(adapted("sd15", GIVEN), given=given(weights=same))), without)
    other = Weights(weights.kind, weights.family, weights.config, weights.tensors | {name: t * 1.2 for name, t in copied.items()})
    assert not torch.equal(latent(run_prompt(adapted("sd15", GIVEN), given=given(weights=other))), without)
    assert torch.equal(latent(run_prompt(adapted("sd15", GIVEN), given=given())), without), "the VAE is as it was"


def failed_new(run_prompt, **settings):
    prompt = {"tiny": node("TestTinyModel", family="sd15"), "out": node("TestCapture", value=["new", 0])}
    return failure(run_prompt, prompt | {"new": node("MendNewRestorationAdapter", **{"model": ["tiny", 0], **settings})}, {})


def test_nothing_to_train_is_refused(run_prompt):
    message = failed_new(run_prompt, size="LoRA only", lora_rank=0)
    assert "New Restoration Adapter: with size 'LoRA only' and lora_rank 0 there is nothing to train. Raise lora_rank" in message
    message = failed_new(run_prompt, size="LoRA only", vae=["tiny", 3])
    assert "New Restoration Adapter: 'vae' is connected, but with size 'LoRA only' nothing looks at the damaged picture" in message


def test_a_model_that_is_not_known_is_refused(run_prompt):
    unknown = tiny_models.model("flux", global_modulation=True)
    prompt = {"given": node("TestGiven", name="unknown"), "out": node("TestCapture", value=["new", 0])}
    message = failure(run_prompt, prompt | {"new": node("MendNewRestorationAdapter", model=["given", 0])}, {"unknown": unknown})
    assert "New Restoration Adapter: 'model': models of the kind Flux (Flux) are not supported. Use SD1.5" in message
    prompt = {name: node("TestGiven", name=name) for name in ("unknown", "weights")} | {"out": node("TestCapture", value=["apply", 0])}
    prompt["apply"] = node("MendApplyRestorationAdapter", model=["unknown", 0], weights=["weights", 0])
    assert "Apply Restoration Adapter: 'model': models of the kind Flux" in failure(run_prompt, prompt, given(unknown=unknown))


# What Apply refuses


@pytest.mark.parametrize(("links", "message"), [
    (dict(degraded=None, vae=None), "'degraded' is not connected. Connect the damaged picture and the model's VAE, or its latent instead."),
    (dict(vae=None), "'vae' is not connected. Connect the damaged picture and the model's VAE"),
    (dict(degraded=None), "'degraded' is not connected."),
    (dict(latent=["lq", 0]), "both 'latent' and 'degraded' are connected. Disconnect one of them."),
])  # fmt: skip
def test_what_is_connected(run_prompt, links, message):
    assert f"Apply Restoration Adapter: {message}" in failure(run_prompt, adapted("sd15", GIVEN, **links), given())


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_pictures(run_prompt, name):
    bad, reason = UNUSABLE[name]
    assert f"Apply Restoration Adapter: degraded {reason}" in failure(run_prompt, adapted("sd15", GIVEN), given(picture=bad))


@pytest.mark.parametrize(("samples", "found"), [
    (lq("sd3"), "of 16 channels"), (NestedTensor([lq("sd15"), torch.zeros(1, 2, 3)]), "of several parts"),
])  # fmt: skip
def test_latents_of_another_model(run_prompt, samples, found):
    prompt = adapted("sd15", GIVEN, degraded=None, vae=None, latent=["lq", 0])
    message = failure(run_prompt, prompt, given(lq={"samples": samples}))
    assert f"Apply Restoration Adapter: the degraded latent is {found}, and UNet 32 has 4 channels. Use the VAE of this model." in message


def test_wrong_weights(run_prompt):
    message = failure(run_prompt, adapted("sdxl", GIVEN), given(weights=trained("sd15")))
    assert f"{NODE}: the new adapter for UNet 32 was made for UNet 32, and 'model' is UNet 64. Load the model it was trained on" in message
    message = failure(run_prompt, adapted("sd15", GIVEN), given(weights=Weights("learned_prompt", "UNet 32", {}, {}, "words.safetensors")))
    assert f"{NODE}: words.safetensors is of the kind learned prompt, and this node applies the kind restoration adapter" in message


def test_wrong_sizes_and_numbers_while_sampling(run_prompt):
    message = failure(run_prompt, adapted("sd15", GIVEN), given(picture=picture(1, 64, 96, 3)))
    assert f"{NODE}: the degraded latent is 1x4x8x12 and the one that is sampled 1x4x8x8. Encode the same picture" in message
    message = failure(run_prompt, adapted("sd15", GIVEN, batch=3), given(picture=picture(2, 64, 64, 3)))
    assert "Apply Restoration Adapter: 'degraded' holds 2 for a batch of 3. Give one for all, or one each." in message


def test_an_encoder_of_another_vae(run_prompt):
    weights = trained("sd15")
    tensors = weights.tensors | {f"{ENCODER}taesd_encoder.0.weight": torch.zeros(3)}
    odd = Weights(weights.kind, weights.family, weights.config, tensors, "odd.safetensors")
    message = failure(run_prompt, adapted("sd15", GIVEN), given(weights=odd))
    assert f"{NODE}: 'vae': odd.safetensors brings an encoder for another kind of VAE: taesd_encoder.0.weight does not fit" in message


# Runs after runs


@every_family
def test_a_changed_strength_loads_nothing(run_prompt, family):
    values = given(family)
    first = run_prompt(adapted(family, GIVEN), given=values)
    second = run_prompt(adapted(family, GIVEN, strength=0.5), given=values)
    assert {"tiny", "weights"} <= set(second.cached) and "apply" not in second.cached
    networks = [extra.model for result in (first, second) for extra in result.values["model"].get_additional_models()]
    assert len(networks) == 2 and networks[0] is networks[1]
    assert first.values["model"].model is second.values["model"].model


def test_two_branches_of_one_workflow(run_prompt):
    one, other = trained("sd15", seed=5), trained("sd15", seed=6)
    prompt = adapted("sd15", GIVEN)
    prompt["other weights"] = node("TestGiven", name="other")
    prompt["other"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "weights": ["other weights", 0]}}
    prompt |= {"other sample": sampler("other"), "plain sample": sampler("tiny")}
    prompt |= {name: node("TestCapture", value=[f"{name} sample", 0]) for name in ("other", "plain") if name != "other"}
    prompt["other latent"] = node("TestCapture", value=["other sample", 0])
    values = run_prompt(prompt, given=given(weights=one, other=other)).values
    run_prompt.executor.reset()
    alone = [latent(run_prompt(adapted("sd15", GIVEN), given=given(weights=weights))) for weights in (one, other)]
    assert torch.equal(values["latent"]["samples"], alone[0]) and torch.equal(values["other latent"]["samples"], alone[1])
    assert torch.equal(values["plain"]["samples"], latent(run_prompt(plain()))) and not torch.equal(*alone)


def test_two_on_one_model(run_prompt):
    prompt = adapted("sd15", GIVEN)
    prompt["first"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "weights": ["new", 0]}}
    prompt["apply"]["inputs"]["model"] = ["first", 0]
    alone = latent(run_prompt(adapted("sd15", GIVEN), given=given()))
    assert torch.equal(latent(run_prompt(prompt, given=given())), alone), "the one below is fresh"
    prompt["first"]["inputs"]["weights"] = ["weights", 0]
    assert not torch.equal(latent(run_prompt(prompt, given=given())), alone)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_queueing_again_uses_no_more_memory(run_prompt, family):
    used, values = [], given(family)
    for seed in range(5):
        prompt = adapted(family, GIVEN, strength=1 - seed / 10, sample={"seed": seed})
        assert "sample" not in run_prompt(prompt, given=values).cached
        used.append(live_tensors())
    assert used[4][0] <= used[1][0] and used[4][1] <= used[1][1], f"(tensors, bytes) alive after each run: {used}"


def test_with_posterior_guidance_and_rounds(run_prompt):
    changes = dict(framed=False, guidance={"companion": True, "steps": 1}, rounds={"rounds": 1, "gamma": 0.3})

    def chain(**settings):
        apply = adapted("sd15", GIVEN, **settings)
        prompt = restoration(**changes) | {name: apply[name] for name in ("apply", "weights", "picture", "new")}
        prompt["guidance"]["inputs"]["model"] = ["apply", 0]
        return prompt

    plain_chain = latent(run_prompt(restoration(**changes), given=given()))
    off = latent(run_prompt(chain(strength=0.0), given=given()))
    found = latent(run_prompt(chain(), given=given()))
    assert torch.equal(off, plain_chain) and found.isfinite().all() and not torch.equal(found, plain_chain)
