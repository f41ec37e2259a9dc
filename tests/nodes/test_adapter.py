"""MendNewRestorationAdapter and MendApplyRestorationAdapter through the host's executor, on every family."""

import pytest
import torch

from comfy.nested_tensor import NestedTensor
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import NODE, lq, trained
from mend.tests.nodes.patch_prompts import ADAPTER, GIVEN, adapted, node, plain
from mend.tests.nodes.restorations import latent, restoration
from mend.tests.nodes.test_zero_shot import failure

every_family = pytest.mark.parametrize("family", tiny_models.FAMILIES)
given = ADAPTER.given


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


# New


def new(run_prompt, family="sd15", vae=False, **settings):
    run_prompt.executor.reset()
    return run_prompt(ADAPTER.new_alone(family, vae=["tiny", 3] if vae else None, **settings)).values["out"]


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


def test_nothing_to_train_is_refused(run_prompt):
    message = failure(run_prompt, ADAPTER.new_alone(size="LoRA only", lora_rank=0), {})
    assert "New Restoration Adapter: with size 'LoRA only' and lora_rank 0 there is nothing to train. Raise lora_rank" in message
    message = failure(run_prompt, ADAPTER.new_alone(size="LoRA only", vae=["tiny", 3]), {})
    assert "New Restoration Adapter: 'vae' is connected, but with size 'LoRA only' nothing looks at the damaged picture" in message


# What Apply refuses


@pytest.mark.parametrize(("links", "message"), [
    (dict(degraded=None, vae=None), "'degraded' is not connected. Connect the damaged picture and the model's VAE, or its latent instead."),
    (dict(vae=None), "'vae' is not connected. Connect the damaged picture and the model's VAE"),
    (dict(degraded=None), "'degraded' is not connected."),
    (dict(latent=["lq", 0]), "both 'latent' and 'degraded' are connected. Disconnect one of them."),
])  # fmt: skip
def test_what_is_connected(run_prompt, links, message):
    assert f"Apply Restoration Adapter: {message}" in failure(run_prompt, adapted("sd15", GIVEN, **links), given())


@pytest.mark.parametrize(("samples", "found"), [
    (lq("sd3"), "of 16 channels"), (NestedTensor([lq("sd15"), torch.zeros(1, 2, 3)]), "of several parts"),
])  # fmt: skip
def test_latents_of_another_model(run_prompt, samples, found):
    prompt = adapted("sd15", GIVEN, degraded=None, vae=None, latent=["lq", 0])
    message = failure(run_prompt, prompt, given(lq={"samples": samples}))
    assert f"Apply Restoration Adapter: the degraded latent is {found}, and UNet 32 has 4 channels. Use the VAE of this model." in message


def test_weights_of_another_kind(run_prompt):
    message = failure(run_prompt, adapted("sd15", GIVEN), given(weights=Weights("learned_prompt", "UNet 32", {}, {}, "words.safetensors")))
    assert f"{NODE}: words.safetensors is of the kind learned prompt, and this node applies the kind restoration adapter" in message


# Together


def test_two_on_one_model(run_prompt):
    prompt = adapted("sd15", GIVEN)
    prompt["first"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "weights": ["new", 0]}}
    prompt["apply"]["inputs"]["model"] = ["first", 0]
    alone = latent(run_prompt(adapted("sd15", GIVEN), given=given()))
    assert torch.equal(latent(run_prompt(prompt, given=given())), alone), "the one below is fresh"
    prompt["first"]["inputs"]["weights"] = ["weights", 0]
    assert not torch.equal(latent(run_prompt(prompt, given=given())), alone)


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
