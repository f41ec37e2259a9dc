"""The nodes of nodes/zero_shot.py in prompts on tiny models, through the host's executor."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import comfy.model_management
from comfy.cli_args import args
from mend.nodes.zero_shot import FPAMAlignment, QualityPrior
from mend.samplers.presets import ALIGNMENTS
from mend.samplers.quality import Quality
from mend.tests import tiny_models
from mend.tests.nodes.restorations import STEPS, latent, node, picture, restoration

SQUARE = picture(1, 64, 64, 3)
# Pictures that no node can work on, and why.
UNUSABLE = {
    "nan": (torch.full((1, 64, 64, 3), float("nan")), "has NaN or infinite pixels in picture 1 of 1"),
    "infinite": (torch.stack([SQUARE[0], SQUARE[0] / 0]), "has NaN or infinite pixels in picture 2 of 2"),
    "empty batch": (torch.zeros(0, 64, 64, 3), "holds no pixels"),
    "no height": (torch.zeros(1, 0, 64, 3), "holds no pixels"),
    "two channels": (torch.zeros(1, 64, 64, 2), "has 2 channels"),
    "no batch": (torch.zeros(64, 64, 3), "has the shape"),
}


def one_node(kind, given, **inputs):
    """A prompt that captures the first output of one node; the inputs named in `given` come from the test."""
    prompt = {name: node("TestGiven", name=name) for name in given}
    prompt["node"] = node(kind, **{name: [name, 0] for name in given}, **inputs)
    return prompt | {"out": node("TestCapture", value=["node", 0])}


def output(run_prompt, kind, given=None, **inputs):
    """The first output of one node in the host."""
    given = given or {}
    return run_prompt(one_node(kind, given, **inputs), given=given).values["out"]


def failure(run_prompt, prompt, given):
    """The host's words for why a prompt failed."""
    result = run_prompt(prompt, given=given, check=False)
    assert not result.success
    return result.error_text()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_guidance_acts_on_every_family(run_prompt, family):
    guided = latent(run_prompt(restoration(family, encoded=False), given={"picture": SQUARE}))
    plain = latent(run_prompt(restoration(family, encoded=False, guided=False), given={"picture": SQUARE}))
    assert guided.shape == plain.shape == tiny_models.latent_shape(family)
    assert guided.isfinite().all() and not torch.equal(guided, plain)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_strength_zero_is_no_patch(run_prompt, family):
    off = latent(run_prompt(restoration(family, guidance={"strength": 0.0}), given={"picture": SQUARE}))
    plain = latent(run_prompt(restoration(family, guided=False), given={"picture": SQUARE}))
    assert torch.equal(off, plain)


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize("options", [{}, {"companion": True}, {"gradient": "through model"}, {"update": "published"}], ids=str)
def test_the_same_seed_gives_the_same_bits(run_prompt, family, options):
    prompt = restoration(family, guidance=options)
    first = run_prompt(prompt, given={"picture": SQUARE})
    run_prompt.executor.reset()
    second = run_prompt(prompt, given={"picture": SQUARE})
    assert not second.cached
    assert torch.equal(latent(first), latent(second))
    other = run_prompt(restoration(family, guidance=options, sample={"noise_seed": 2}), given={"picture": SQUARE})
    assert not torch.equal(latent(first), latent(other))


def test_the_model_is_as_it_was_after_a_guided_run(run_prompt):
    plain = restoration(guided=False)
    before = run_prompt(plain, given={"picture": SQUARE})
    run_prompt(restoration(), given={"picture": SQUARE})
    after = run_prompt(plain, given={"picture": SQUARE})
    assert "tiny" in after.cached and "sample" not in after.cached
    assert torch.equal(latent(before), latent(after))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 7, 513, 3), (1, 33, 50, 1), (1, 33, 50, 4), (2, 20, 31, 3)], ids=str)
def test_framed_pictures_come_back_in_their_size(run_prompt, shape):
    given = picture(*shape)
    result = run_prompt(restoration(), given={"picture": given}).values["picture"]
    assert result.shape == (*shape[:3], max(3, shape[3])) and result.isfinite().all()
    assert shape[3] != 4 or torch.equal(result[..., 3], given[..., 3])


@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (1, 64, 64, 4), (1, 71, 67, 3), (1, 8, 513, 4)], ids=str)
def test_pictures_without_a_frame(run_prompt, shape):
    result = run_prompt(restoration(framed=False), given={"picture": picture(*shape)}).values["picture"]
    assert result.shape == (1, *(side // 8 * 8 for side in shape[1:3]), 3) and result.isfinite().all()


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_pictures_are_refused_by_the_first_node(run_prompt, name):
    bad, reason = UNUSABLE[name]
    assert f"Frame Image: 'image' {reason}" in failure(run_prompt, restoration(), {"picture": bad})
    assert f"First Guess: 'degraded' {reason}" in failure(run_prompt, restoration(framed=False, guided=False), {"picture": bad})
    assert f"Apply Posterior Guidance: 'degraded' {reason}" in failure(run_prompt, restoration(framed=False, encoded=False), {"picture": bad})


@pytest.mark.parametrize("size", [(1, 1), (7, 513), (64, 72), (128, 128)])
def test_a_latent_of_another_size_is_refused(run_prompt, size):
    prompt = restoration(framed=False, encoded=False)
    message = failure(run_prompt, prompt, {"picture": picture(1, *size, 3)})
    assert f"Apply Posterior Guidance: 'degraded' is {size[1]} x {size[0]} but the latent belongs to a picture of 64 x 64" in message


def test_a_wrong_number_of_pictures_is_refused(run_prompt):
    prompt = restoration(encoded=False, batch=3)
    message = failure(run_prompt, prompt, {"picture": picture(2, 64, 64, 3)})
    assert "Apply Posterior Guidance: 'degraded' holds 2 pictures but the latent batch has 3" in message
    assert len(latent(run_prompt(prompt, given={"picture": SQUARE}))) == 3


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 1, 1), (1, 7, 513), (64, 64)], ids=str)
def test_masks_of_any_size(run_prompt, shape):
    prompt = restoration(guidance={"mask": ["mask", 0]}) | {"mask": node("TestGiven", name="mask")}
    white = run_prompt(prompt, given={"picture": SQUARE, "mask": torch.ones(shape)})
    without = run_prompt(restoration(), given={"picture": SQUARE})
    # White everywhere is no mask, except that a resized white may be off by a rounding: float32, three steps.
    torch.testing.assert_close(latent(white), latent(without), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mask", "reason"), [
    (torch.ones(2, 64, 64), "'mask' holds 2 masks but the latent batch has 1"),
    (torch.ones(0, 64, 64), "'mask' holds no pixels"),
    (torch.ones(1, 0, 64), "'mask' holds no pixels"),
    (torch.full((1, 64, 64), float("nan")), "'mask' has NaN or infinite pixels"),
], ids=["two", "none", "no height", "nan"])  # fmt: skip
def test_unusable_masks_are_refused(run_prompt, mask, reason):
    prompt = restoration(guidance={"mask": ["mask", 0]}) | {"mask": node("TestGiven", name="mask")}
    message = failure(run_prompt, prompt, {"picture": SQUARE, "mask": mask})
    assert f"Apply Posterior Guidance: {reason}" in message


def test_guidance_names_a_vae_of_another_model(run_prompt):
    prompt = restoration("sd15") | {"other": node("TestTinyModel", family="flux")}
    prompt["guidance"]["inputs"]["vae"] = ["other", 3]
    result = run_prompt(prompt, given={"picture": SQUARE}, check=False)
    assert not result.success and result.error["node_id"] == "guidance"
    assert "Apply Posterior Guidance: 'vae' gives latents of 16 channels and the model works on 4" in result.error_text()


@pytest.mark.parametrize("preset", ALIGNMENTS)
def test_presets_pass_unless_overridden(run_prompt, preset):
    # The host has loaded the pack once more under its own name: objects are compared by what they hold.
    assert vars(output(run_prompt, "MendFPAMAlignment", preset=preset)) == vars(ALIGNMENTS[preset])


@pytest.mark.parametrize("entry", FPAMAlignment.define_schema().inputs[1:-1], ids=lambda entry: entry.id)
def test_each_override_sets_its_own_value(run_prompt, entry):
    value = output(run_prompt, "MendFPAMAlignment", preset="haze", **{entry.id: entry.max})
    changed = {name for name, kept in vars(ALIGNMENTS["haze"]).items() if getattr(value, name) != kept}
    assert changed == {entry.id} and getattr(value, entry.id) == entry.max
    zero = output(run_prompt, "MendFPAMAlignment", preset="noise", **{entry.id: 0})
    assert getattr(zero, entry.id) == (1 if entry.id in ("crop", "grid") else 0)


def test_random_start(run_prompt):
    alignment = output(run_prompt, "MendFPAMAlignment", preset="noise", start="random")
    # h2 on means over pixels is ours: what is said to be as published has none.
    assert (alignment.start, alignment.coarse) == ("random", 1)


@pytest.mark.parametrize(("start", "least"), [("random", 1), ("aligned", 0)])
def test_only_what_begins_at_a_known_damage_may_go_without_learning(run_prompt, start, least):
    alignment = output(run_prompt, "MendFPAMAlignment", preset="noise", start=start, updates=0, warmup=0)
    assert (alignment.updates, alignment.warmup) == (least, least)
    more = output(run_prompt, "MendFPAMAlignment", preset="noise", start=start, updates=2, warmup=3)
    assert (more.updates, more.warmup) == (2, 3)


@pytest.mark.parametrize("preset", ALIGNMENTS)
def test_every_preset_guides(run_prompt, preset):
    prompt = restoration(alignment={"preset": preset}, quality={"exposure": 0.01, "chroma": 0.01, "clarity": 0.01})
    assert latent(run_prompt(prompt, given={"picture": SQUARE})).isfinite().all()


def test_quality_prior_passes_its_values(run_prompt):
    given = dict(exposure=0.1, exposure_target=0.2, chroma=0.3, clarity=0.4, exposure_patch=50)
    timesteps = dict(exposure_below=600, chroma_below=700, clarity_below=800)
    expected = Quality(**given, exposure_below=0.6, chroma_below=0.7, clarity_below=0.8)
    assert vars(output(run_prompt, "MendQualityPrior", **given, **timesteps)) == vars(expected)
    assert {entry.id for entry in QualityPrior.define_schema().inputs} == vars(Quality()).keys()


def test_first_guess_without_a_quality_prior_is_the_picture(run_prompt):
    given = {"degraded": picture(2, 7, 513, 4), "alignment": ALIGNMENTS["blind"]}
    # Through the straight tone curve and back, in float32.
    torch.testing.assert_close(output(run_prompt, "MendFirstGuess", given), given["degraded"][..., :3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 7, 513, 3), (1, 40, 300, 1), (2, 40, 300, 4)], ids=str)
def test_first_guess_brightens_what_is_dark(run_prompt, shape):
    dark = torch.linspace(0, 0.2, shape[2]).view(1, 1, -1, 1).expand(shape) / torch.arange(1, shape[0] + 1).view(-1, 1, 1, 1)
    given = {"degraded": dark, "alignment": ALIGNMENTS["low light"], "quality": Quality(exposure=0.01, exposure_target=0.45)}
    guess = output(run_prompt, "MendFirstGuess", given)
    assert guess.shape == (*shape[:3], 3) and guess.min() >= 0 and guess.max() <= 1
    # The curve is read off some forty local means along the ramp, one of which is 0.025 of it; a single pixel has no range to stretch.
    assert shape[1] == 1 or (guess.mean((1, 2, 3)) - 0.45).abs().max() < 0.05
    alone = output(run_prompt, "MendFirstGuess", {**given, "degraded": dark[-1:]})
    assert torch.equal(guess[-1:], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_first_guess_takes_half_precision(run_prompt, dtype):
    given = {"degraded": (0.2 * picture(2, 40, 60, 3)).to(dtype), "alignment": ALIGNMENTS["haze"]}
    given["quality"] = Quality(exposure=0.01, exposure_target=0.45, clarity=0.01)
    guess = output(run_prompt, "MendFirstGuess", given)
    assert torch.equal(guess, output(run_prompt, "MendFirstGuess", {**given, "degraded": given["degraded"].float()}))


def test_no_rounds_is_the_sampler_alone(run_prompt):
    alone = run_prompt(restoration(sample={"sampler": ["euler", 0]}), given={"picture": SQUARE})
    none = run_prompt(restoration(rounds={"rounds": 0}), given={"picture": SQUARE})
    assert torch.equal(latent(alone), latent(none))


@pytest.mark.parametrize("vae", [{}, {"vae": ["tiny", 3]}], ids=["latent", "re-encoded"])
@pytest.mark.parametrize("guided", [True, False])
def test_two_rounds_count_their_steps(run_prompt, vae, guided):
    once = run_prompt(restoration(guided=guided), given={"picture": SQUARE})
    result = run_prompt(restoration(guided=guided, rounds={"rounds": 2, "gamma": 0.5, **vae}), given={"picture": SQUARE})
    counts = [data["value"] for data in result.of("progress") if data["node"] == "sample"]
    totals = {data["max"] for data in result.of("progress") if data["node"] == "sample"}
    # The host leaves out progress that follows too soon.
    assert counts == sorted(set(counts)) and totals == {counts[-1]} and counts[-1] > STEPS
    assert latent(result).isfinite().all() and not torch.equal(latent(result), latent(once))


@pytest.mark.parametrize("options", [{}, {"companion": True}, {"gradient": "through model"}], ids=str)
def test_cancel_stops_within_a_step_and_the_next_prompt_runs(run_prompt, options):
    vae, decodes = tiny_models.vae(), []
    vae.first_stage_model.decoder.register_forward_pre_hook(lambda *_: decodes.append(cancelled.copy()))
    cancelled = []

    def cancel(event, data):
        if event == "progress" and data["node"] == "sample" and not cancelled:
            cancelled.append(data["value"])
            comfy.model_management.interrupt_current_processing()

    given = {"picture": SQUARE, "vae": vae}
    prompt = restoration(guidance={**options, "vae": ["vae", 0]}, sample={"noise_seed": 7}) | {"vae": node("TestGiven", name="vae")}
    stopped = run_prompt(prompt, given=given, on_event=cancel, check=False)
    assert not stopped.success and stopped.error["node_id"] == "sample" and "exception_message" not in stopped.error
    assert cancelled == [1] and [] in decodes, "it was cancelled while it guided"
    assert [1] not in decodes, "no work is begun after the cancellation"
    after = run_prompt(prompt, given=given)
    run_prompt.executor.reset()
    assert torch.equal(latent(after), latent(run_prompt(prompt, given=given)))


def live_tensors():
    """How many tensors are alive and how many bytes of storage they share."""
    gc.collect()
    # Tests of torch.compile leave fake tensors behind, which hold nothing.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"companion": True}, {"gradient": "through model"}], ids=str)
def test_queueing_again_uses_no_more_memory(run_prompt, options):
    used = []
    for seed in range(5):
        prompt = restoration(guidance=options, rounds={"rounds": 1}, sample={"noise_seed": seed})
        assert "sample" not in run_prompt(prompt, given={"picture": SQUARE}).cached
        used.append(live_tensors())
    assert used[4][0] <= used[1][0] and used[4][1] <= used[1][1], f"(tensors, bytes) alive after each run: {used}"


def test_a_changed_strength_reloads_nothing(run_prompt):
    run_prompt(restoration(), given={"picture": SQUARE})
    again = run_prompt(restoration(guidance={"strength": 0.5}), given={"picture": SQUARE})
    assert {"tiny", "frame", "alignment", "quality", "guess", "encode"} <= set(again.cached)


def test_the_log_says_whose_features_are_compared(run_prompt, caplog):
    with caplog.at_level("INFO"):
        run_prompt(restoration(), given={"picture": SQUARE})
    assert "perceptual features come from the VAE encoder" in caplog.text


def matched(family="sd15", **inputs):
    """The prompt of the shared workflow: start, schedule and noise from the picture itself."""
    prompt = restoration(family)
    prompt["start"] = node("MendNoiseMatchedStart", model=["tiny", 0], vae=["tiny", 3], image=["guess", 0], **inputs)
    prompt["guider"] = node("CFGGuider", model=["guidance", 0], positive=["tiny", 1], negative=["tiny", 2], cfg=2.0)
    prompt["sample"] = node("SamplerCustomAdvanced", noise=["start", 0], guider=["guider", 0], sampler=["rounds", 0], sigmas=["start", 1],
                            latent_image=["encode", 0])  # fmt: skip
    prompt["share"] = node("TestCapture", value=["start", 2])
    del prompt["sigmas"]
    return prompt


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("at_least", [0.05, 0.8])
def test_a_noise_matched_start_samples_on_every_family(run_prompt, family, at_least):
    result = run_prompt(matched(family, at_least=at_least, steps=2), given={"picture": picture(2, 33, 50, 3)})
    assert result.values["picture"].shape == (2, 33, 50, 3) and result.values["picture"].isfinite().all()
    assert at_least * 0.999 <= result.values["share"] < 1


def test_the_seed_of_the_start_decides_what_is_added(run_prompt):
    def restored(seed):
        run_prompt.executor.reset()
        return latent(run_prompt(matched(at_least=0.9, noise_seed=seed), given={"picture": SQUARE}))

    first = restored(1)
    assert torch.equal(first, restored(1)) and not torch.equal(first, restored(2))


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_noise_matched_start_names_what_is_wrong_with_a_picture(run_prompt, name):
    given, reason = UNUSABLE[name]
    prompt = {"tiny": node("TestTinyModel", family="sd15"), "given": node("TestGiven", name="image")}
    prompt["node"] = node("MendNoiseMatchedStart", model=["tiny", 0], vae=["tiny", 3], image=["given", 0])
    prompt["out"] = node("TestCapture", value=["node", 1])
    message = failure(run_prompt, prompt, {"image": given})
    assert "Noise-Matched Start: 'image'" in message and reason in message


@pytest.mark.parametrize(("name", "value"), [("at_least", 1.0), ("at_least", 0.0), ("at_least", float("nan")), ("steps", 0)])
def test_a_noise_matched_start_names_linked_numbers_that_it_cannot_use(run_prompt, name, value):
    prompt = {"tiny": node("TestTinyModel", family="sd15"), "given": node("TestGiven", name="image")}
    prompt["number"] = node("TestGiven", name="number")
    prompt["node"] = node("MendNoiseMatchedStart", model=["tiny", 0], vae=["tiny", 3], image=["given", 0], **{name: ["number", 0]})
    prompt["out"] = node("TestCapture", value=["node", 1])
    message = failure(run_prompt, prompt, {"image": SQUARE, "number": value})
    assert "Noise-Matched Start: 'at_least' is" in message and f"{value:g}" in message


def test_a_noise_matched_start_names_a_vae_of_another_model(run_prompt):
    prompt = matched("sd15") | {"other": node("TestTinyModel", family="flux")}
    prompt["start"]["inputs"]["vae"] = ["other", 3]
    message = failure(run_prompt, prompt, {"picture": SQUARE})
    assert "Noise-Matched Start: 'vae' gives latents of 16 channels and the model works on 4" in message


def test_a_host_with_half_precision_intermediates(run_prompt, monkeypatch):
    monkeypatch.setattr(args, "fp16_intermediates", True)
    prompt = matched(steps=2) | {"mask": node("TestGiven", name="mask")}
    prompt["guidance"]["inputs"]["mask"] = ["mask", 0]
    prompt["rounds"]["inputs"].update(rounds=1, vae=["tiny", 3])
    prompt["detail"] = node("MendReturnDetail", restored=["decode", 0], start=["guess", 0], vae=["tiny", 3])
    prompt["unframe"]["inputs"]["image"] = ["detail", 0]
    prompt["decoded"] = node("TestCapture", value=["decode", 0])
    result = run_prompt(prompt, given={"picture": picture(1, 33, 50, 4).half(), "mask": torch.ones(1, 33, 50).half()})
    assert result.values["decoded"].dtype == torch.float16
    assert result.values["picture"].shape == (1, 33, 50, 4) and result.values["picture"].isfinite().all()
