"""What Apply Restoration Adapter and Apply Degradation-Aware Fusion have in common, through the host's executor."""

import pytest
import torch

from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.nodes.patch_prompts import ADAPTER, FUSION, GIVEN, node, plain, sampler
from mend.tests.nodes.restorations import latent, picture
from mend.tests.nodes.test_zero_shot import UNUSABLE, failure, live_tensors

PATCHES = {"adapter": ADAPTER, "fusion": FUSION}
both = pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
on_every_family = pytest.mark.parametrize(
    ("patch", "family"), [pytest.param(patch, family, id=f"{name}-{family}") for name, patch in PATCHES.items() for family in patch.families]
)


@on_every_family
def test_fresh_weights_leave_the_model_itself(run_prompt, patch, family):
    assert torch.equal(latent(run_prompt(patch.prompt(family), given=patch.given(family))), latent(run_prompt(plain(family))))


@on_every_family
def test_strength_zero_is_the_model_itself(run_prompt, patch, family):
    off = run_prompt(patch.prompt(family, GIVEN, strength=0.0, lora_strength=1.5), given=patch.given(family))
    assert torch.equal(latent(off), latent(run_prompt(plain(family))))
    assert not off.values["model"].patches and not off.values["model"].wrappers


@on_every_family
def test_trained_weights_and_their_lora_act(run_prompt, patch, family):
    base = latent(run_prompt(plain(family)))
    changes = ({}, {"strength": 0.5}, {"lora_strength": 0.0}, {"lora_strength": -1.0}, {"start_percent": 0.6}, {"end_percent": 0.4})
    results = [latent(run_prompt(patch.prompt(family, GIVEN, **change), given=patch.given(family))) for change in changes]
    for index, result in enumerate(results):
        assert result.shape == base.shape and result.isfinite().all()
        assert not any(torch.equal(result, other) for other in (base, *results[:index]))
    assert torch.equal(latent(run_prompt(plain(family))), base)


@both
def test_white_is_no_mask_and_black_is_the_model(run_prompt, patch):
    masked = patch.prompt("sd15", GIVEN, mask=["mask", 0], lora_strength=0.0) | {"mask": node("TestGiven", name="mask")}
    whole = latent(run_prompt(patch.prompt("sd15", GIVEN, lora_strength=0.0), given=patch.given()))
    assert torch.equal(latent(run_prompt(masked, given=patch.given(mask=torch.ones(1, 64, 64)))), whole)
    assert torch.equal(latent(run_prompt(masked, given=patch.given(mask=torch.zeros(64, 64)))), latent(run_prompt(plain())))


@both
@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (1, 64, 64, 4), (1, 71, 67, 3), (3, 64, 64, 3)], ids=str)
def test_pictures_of_every_kind(run_prompt, patch, shape):
    result = latent(run_prompt(patch.prompt("sd15", GIVEN, batch=3), given=patch.given(picture=picture(*shape))))
    assert result.shape[0] == 3 and result.isfinite().all()


@both
def test_the_same_seed_gives_the_same_bits(run_prompt, patch):
    first = run_prompt(patch.prompt("sd15", GIVEN), given=patch.given())
    run_prompt.executor.reset()
    second = run_prompt(patch.prompt("sd15", GIVEN), given=patch.given())
    assert not second.cached and torch.equal(latent(first), latent(second))


# What is refused


@both
@pytest.mark.parametrize("bad", UNUSABLE)
def test_unusable_pictures(run_prompt, patch, bad):
    pictures, reason = UNUSABLE[bad]
    assert f"{patch.title}: degraded {reason}" in failure(run_prompt, patch.prompt("sd15", GIVEN), patch.given(picture=pictures))


@both
def test_weights_for_another_family(run_prompt, patch):
    message = failure(run_prompt, patch.prompt("sdxl", GIVEN), patch.given("sdxl", weights=patch.trained("sd15")))
    assert f"{patch.title}: {patch.fresh} for UNet 32 was made for UNet 32, and 'model' is UNet 64. Load the model it was trained on" in message


@both
def test_a_model_that_is_not_known(run_prompt, patch):
    unknown = {"unknown": tiny_models.model("flux", global_modulation=True)}
    message = failure(run_prompt, patch.new_alone(given=unknown, **patch.new | {"model": ["unknown", 0]}), unknown)
    assert f"{patch.new_title}: 'model': models of the kind Flux (Flux) are not supported. Use SD1.5" in message
    prompt = patch.prompt("sd15", GIVEN, model=["unknown", 0]) | {"unknown": node("TestGiven", name="unknown")}
    assert f"{patch.title}: 'model': models of the kind Flux" in failure(run_prompt, prompt, patch.given(**unknown))


@both
def test_wrong_sizes_and_numbers_while_sampling(run_prompt, patch):
    message = failure(run_prompt, patch.prompt("sd15", GIVEN), patch.given(picture=picture(1, 64, 96, 3)))
    assert f"{patch.title}: {patch.shown} and the one that is sampled 1x4x8x8. Encode the same picture" in message
    message = failure(run_prompt, patch.prompt("sd15", GIVEN, batch=3), patch.given(picture=picture(2, 64, 64, 3)))
    assert f"{patch.title}: 'degraded' holds 2 for a batch of 3. Give one for all, or one each." in message


@both
def test_an_encoder_of_another_vae(run_prompt, patch):
    weights = patch.trained("sd15")
    tensors = weights.tensors | {f"{ENCODER}taesd_encoder.0.weight": torch.zeros(3)}
    odd = Weights(weights.kind, weights.family, weights.config, tensors, "odd.safetensors")
    message = failure(run_prompt, patch.prompt("sd15", GIVEN), patch.given(weights=odd))
    assert f"{patch.title}: 'vae': odd.safetensors brings an encoder for another kind of VAE: taesd_encoder.0.weight does not fit" in message


# Runs after runs


@on_every_family
def test_a_changed_strength_loads_nothing(run_prompt, patch, family):
    values = patch.given(family)
    first = run_prompt(patch.prompt(family, GIVEN), given=values)
    second = run_prompt(patch.prompt(family, GIVEN, strength=0.5), given=values)
    assert {"tiny", "weights"} <= set(second.cached) and "apply" not in second.cached
    networks = [extra.model for result in (first, second) for extra in result.values["model"].get_additional_models()]
    assert len(networks) == 2 and networks[0] is networks[1]
    assert first.values["model"].model is second.values["model"].model


@both
def test_two_branches_of_one_workflow(run_prompt, patch):
    one, other = patch.trained("sd15", seed=5), patch.trained("sd15", seed=6)
    prompt = patch.prompt("sd15", GIVEN)
    prompt["other weights"] = node("TestGiven", name="other")
    prompt["other"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "weights": ["other weights", 0]}}
    prompt |= {"other sample": sampler("other"), "plain sample": sampler("tiny")}
    prompt |= {f"{branch} latent": node("TestCapture", value=[f"{branch} sample", 0]) for branch in ("other", "plain")}
    values = run_prompt(prompt, given=patch.given(weights=one, other=other)).values
    run_prompt.executor.reset()
    alone = [latent(run_prompt(patch.prompt("sd15", GIVEN), given=patch.given(weights=weights))) for weights in (one, other)]
    assert torch.equal(values["latent"]["samples"], alone[0]) and torch.equal(values["other latent"]["samples"], alone[1])
    assert torch.equal(values["plain latent"]["samples"], latent(run_prompt(plain()))) and not torch.equal(*alone)


@pytest.mark.parametrize(("patch", "family"), [(ADAPTER, "sd15"), (ADAPTER, "flux"), (FUSION, "sd15")], ids=["adapter-sd15", "adapter-flux", "fusion-sd15"])
def test_queueing_again_uses_no_more_memory(run_prompt, patch, family):
    used, values = [], patch.given(family)
    for seed in range(5):
        prompt = patch.prompt(family, GIVEN, strength=1 - seed / 10, sample={"seed": seed})
        assert "sample" not in run_prompt(prompt, given=values).cached
        used.append(live_tensors())
    assert used[4][0] <= used[1][0] and used[4][1] <= used[1][1], f"(tensors, bytes) alive after each run: {used}"
