"""MendNewFusion and MendApplyDegradationAwareFusion through the host's executor."""

import pytest
import torch

from mend.model_patches.lq_encoder import lq_encoder_tensors
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches import adapters
from mend.tests.model_patches.fusions import NODE, trained
from mend.tests.nodes.patch_prompts import FUSION, GIVEN, adapted, fused, node, plain
from mend.tests.nodes.restorations import latent, restoration
from mend.tests.nodes.test_zero_shot import failure

every_family = pytest.mark.parametrize("family", FUSION.families)
given = FUSION.given


@every_family
def test_with_all_its_parts_a_fresh_fusion_is_the_model_itself(run_prompt, family):
    prompts = [fused(family, new={"preset": "published", "lora_rank": 4, "train_encoder": True, "fine_tune": tuned}) for tuned in (False, True)]
    alone = latent(run_prompt(plain(family)))
    assert all(torch.equal(latent(run_prompt(prompt, given=given(family))), alone) for prompt in prompts)


def test_both_starts_of_sampling(run_prompt):
    encoded = fused("sd15", GIVEN, sample={"latent_image": ["encoded", 0]})
    encoded["encoded"] = node("VAEEncode", pixels=["picture", 0], vae=["tiny", 3])
    found = latent(run_prompt(encoded, given=given()))
    assert found.isfinite().all() and not torch.equal(found, latent(run_prompt(fused("sd15", GIVEN), given=given())))


# New


def new(run_prompt, family="sd15", values=None, **settings):
    run_prompt.executor.reset()
    return run_prompt(FUSION.new_alone(family, values or (), vae=["tiny", 3], **settings), given=values).values["out"]


@every_family
def test_new_weights_say_what_they_are(run_prompt, family):
    weights = new(run_prompt, family, lora_rank=3, seed=2**64 - 1)
    assert weights.kind == "fusion" and weights.config == {"preset": "lite", "features": 32, "single": True, "rank": 3}
    assert {name.split(".")[0] for name in weights.tensors} == {"fusion", "diffusion_model"}
    tuned = new(run_prompt, family, lora_rank=3, fine_tune=True)
    assert tuned.config == weights.config | {"rank": 0, "fine_tune": True} and any(name.endswith(".diff") for name in tuned.tensors)
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


def failed_new(run_prompt, values, **settings):
    return failure(run_prompt, FUSION.new_alone("sd15", values, vae=["tiny", 3], **settings), values)


def test_what_new_refuses(run_prompt):
    message = failed_new(run_prompt, {"other": trained("sd3")}, weights=["other", 0])
    assert "New Fusion: the new fusion for SD3 of depth 2 was made for SD3 of depth 2, and 'model' is UNet 32." in message
    message = failed_new(run_prompt, {"other": trained("sd15", rank=2)}, weights=["other", 0], lora_rank=3)
    assert "New Fusion: the new fusion for UNet 32 has a LoRA of rank 2 already. Set the rank to that, or to 0" in message
    message = failed_new(run_prompt, {"other": trained("sd15", rank=2)}, weights=["other", 0], fine_tune=True)
    assert "New Fusion: the new fusion for UNet 32 has a LoRA of rank 2, and fine_tune would stand in its place." in message


# What Apply refuses


def test_weights_of_another_kind(run_prompt):
    message = failure(run_prompt, fused("sd15", GIVEN), given(weights=adapters.trained("sd15")))
    assert f"{NODE}: the new adapter for UNet 32 is of the kind restoration adapter, and this node applies the kind fusion" in message


def test_another_layout_of_vae(run_prompt):
    prompt = fused("sd15", GIVEN, vae=["lab", 2]) | {"lab": node("MendLoadLabPrior", kind="unet")}
    message = failure(run_prompt, prompt, given())
    assert f"{NODE}: 'vae': the new fusion for UNet 32 was made for a VAE with 32 encoder features, and this one has 64. Connect the VAE it was" in message


# Together


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
