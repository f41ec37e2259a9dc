"""What Apply Restoration Adapter and Apply Degradation-Aware Fusion have in common, through the host's executor."""

import pytest
import torch

import comfy.sd
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.nodes.patch_prompts import ADAPTER, FUSION, GIVEN, node, plain, sampler
from mend.tests.nodes.restorations import latent, picture
from mend.tests.nodes.test_zero_shot import UNUSABLE, failure, live_tensors
from mend.tests.training.tiny_training import video_vae


def run_prompted(run_prompt, prompt, given):
    return latent(run_prompt(prompt, given=given))


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


# Pictures and videos under a VAE that takes several pictures for a video


def on_video_vae(run_prompt, patch, pictures, batch=1, frames=1, mask=None, outcome=run_prompted):
    """Sample a tiny WAN model with a patch that sees these pictures."""
    links = dict(degraded=["picture", 0], vae=["video", 0], latent=None, mask=None if mask is None else ["mask", 0])
    prompt = patch.prompt("wan", GIVEN, sample={"latent_image": ["frames", 0]}, **links)
    values = {"video": video_vae(), "frames": tiny_models.latent("wan", batch, frames=frames), "mask": mask}
    prompt |= {name: node("TestGiven", name=name) for name in values}
    return outcome(run_prompt, prompt, patch.given("wan", picture=pictures, **values))


@both
@pytest.mark.parametrize("count", [2, 5], ids=["fewer than a video of two latent frames has", "as many"])
def test_each_picture_of_a_batch_is_seen_alone(run_prompt, patch, count):
    pictures = picture(count, 64, 64, 3)
    together = on_video_vae(run_prompt, patch, pictures, batch=count)
    for row in {1, count - 1}:
        alone = on_video_vae(run_prompt, patch, pictures[row:row + 1], batch=count)
        torch.testing.assert_close(together[row], alone[row], atol=1e-5, rtol=1e-4)
    first = on_video_vae(run_prompt, patch, pictures[:1], batch=count)
    assert not torch.allclose(together[1], first[1], atol=1e-4)


@both
def test_each_picture_of_a_batch_has_its_mask(run_prompt, patch):
    pictures, masks = picture(2, 64, 64, 3), torch.stack([torch.zeros(64, 64), torch.ones(64, 64)])
    both_masks = on_video_vae(run_prompt, patch, pictures, batch=2, mask=masks)
    for row in range(2):
        alone = on_video_vae(run_prompt, patch, pictures, batch=2, mask=masks[row:row + 1])
        assert torch.equal(both_masks[row], alone[row])
    assert not torch.equal(both_masks[1], on_video_vae(run_prompt, patch, pictures, batch=2, mask=masks[:1])[1])


@both
def test_the_frames_of_a_video(run_prompt, patch):
    pictures = picture(5, 64, 64, 3)
    found = on_video_vae(run_prompt, patch, pictures, frames=2)
    other = on_video_vae(run_prompt, patch, torch.cat([pictures[:4], 1 - pictures[4:]]), frames=2)
    assert found.isfinite().all() and not torch.equal(found, other)


@both
@pytest.mark.parametrize(("count", "frames", "needed"), [(1, 2, 5), (3, 2, 5), (5, 3, 9), (9, 2, 5)])
def test_other_numbers_of_frames_are_refused(run_prompt, patch, count, frames, needed):
    message = on_video_vae(run_prompt, patch, picture(count, 64, 64, 3), frames=frames, outcome=failure)
    assert f"{patch.title}: 'degraded' holds {count} and the latent is a video of {needed} pictures. Give every frame of it." in message


# What is refused


@both
@pytest.mark.parametrize("bad", UNUSABLE)
def test_unusable_pictures(run_prompt, patch, bad):
    pictures, reason = UNUSABLE[bad]
    assert f"{patch.title}: 'degraded' {reason}" in failure(run_prompt, patch.prompt("sd15", GIVEN), patch.given(picture=pictures))


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


@both
def test_a_vae_that_gives_no_numbers_is_named(run_prompt, patch, monkeypatch):
    monkeypatch.setattr(comfy.sd.VAE, "encode", lambda vae, pixels: torch.full((len(pixels), 4, 8, 8), float("nan")))
    assert f"{patch.title}: 'vae' gives NaN or infinite values" in failure(run_prompt, patch.prompt("sd15", GIVEN), patch.given())
