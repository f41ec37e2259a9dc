"""MendNewDegradationModel, MendApplyDegradationDiffusion, MendDegradationSpaceSampler and MendRemoveDegradation through the host's executor."""

import dataclasses

import pytest
import torch

from comfy.nested_tensor import NestedTensor
from mend.model_patches.degradation_model import DEVIATION
from mend.model_patches.degraded_picture import ATTACHMENT
from mend.nodes import visual_instruction
from mend.tests.model_patches.degradation_models import codes, fresh, instruction, trained
from mend.tests.nodes.restorations import node, picture
from mend.tests.nodes.test_zero_shot import failure

STEPS = 2


def restoration(family="sd15", weights=("weights", 0), batch=1, told=("instruction", 0), encoded=True, new=None, sampler=None, sample=None, **apply):
    """Restore the given picture as an artist would wire it: `values` of the result are image, latent and model."""
    settings = dict(model=["tiny", 0], weights=list(weights), instruction=list(told), degraded=["picture", 0], vae=["tiny", 3])
    return {
        "tiny": node("TestTinyModel", family=family, batch=batch),
        "picture": node("TestGiven", name="picture"),
        "weights": node("TestGiven", name="weights"),
        "codes": node("TestGiven", name="codes"),
        "instruction": node("TestGiven", name="instruction"),
        "new": node("MendNewDegradationModel", model=["tiny", 0], tokenizer=["codes", 0], lora_rank=4, size="small", **(new or {})),
        "apply": node("MendApplyDegradationDiffusion", **{**settings, **apply}),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "space": node("MendDegradationSpaceSampler", sampler=["euler", 0], **(sampler or {})),
        "sigmas": node("BasicScheduler", model=["tiny", 0], scheduler="simple", steps=STEPS, denoise=1.0),
        "encode": node("VAEEncode", pixels=["picture", 0], vae=["tiny", 3]),
        "sample": node("SamplerCustom", **{
            "model": ["apply", 0], "add_noise": True, "noise_seed": 1, "cfg": 1.0, "positive": ["tiny", 1], "negative": ["tiny", 2],
            "sampler": ["space", 0], "sigmas": ["sigmas", 0], "latent_image": ["encode" if encoded else "tiny", 0 if encoded else 4], **(sample or {})}),
        "remove": node("MendRemoveDegradation", model=["apply", 0], samples=["sample", 0]),
        "image": node("TestCapture", value=["remove", 0]),
        "latent": node("TestCapture", value=["sample", 0]),
        "model": node("TestCapture", value=["apply", 0]),
    }  # fmt: skip


def given(weights=None, shown=None, **changes):
    shown = picture(1, 64, 64, 3) if shown is None else shown
    return {"picture": shown, "weights": weights or trained("sd15"), "codes": codes(), "instruction": instruction(), **changes}


def untrained(run_prompt, family="sd15", **new):
    """A new model, once the picture came back from it, and what it predicted was what its base predicts."""
    made = {"made": node("TestCapture", value=["new", 0])}
    values = run_prompt(restoration(family, ("new", 0), new={"form": "pixel", **new}) | made, given=given()).values
    weights = values["made"]
    assert torch.equal(values["image"], picture(1, 64, 64, 3)) and weights.tensors[DEVIATION] == 0, "nothing was measured yet"
    # With a deviation its predictions are seen.
    measured = dataclasses.replace(weights, tensors={**weights.tensors, DEVIATION: torch.tensor(0.5)})
    restored = run_prompt(restoration(family, encoded=False), given=given(measured)).values
    alone = run_prompt(restoration(family, encoded=False, sample={"model": ["tiny", 0], "sampler": ["euler", 0]}), given=given(measured)).values
    model = restored["model"].model
    space = restored["model"].get_attachment(ATTACHMENT).space(model, restored["latent"]["samples"])
    y0, expected = (model.process_latent_in(values["latent"]["samples"]) for values in (restored, alone))
    torch.testing.assert_close(space.residual(y0), expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(restored["image"], picture(1, 64, 64, 3))
    return weights


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_an_untrained_one_returns_the_picture_in_the_pixel_form(run_prompt, family):
    assert untrained(run_prompt, family).config["form"] == "pixel"


def test_a_fine_tune_takes_the_place_of_the_lora(run_prompt):
    made = untrained(run_prompt, fine_tune=True)
    changes = [name for name in made.tensors if name.startswith("diffusion_model.")]
    assert made.config["fine_tune"] and changes and all(name.endswith((".diff", ".diff_b")) for name in changes)


@pytest.mark.parametrize("form", ["latent", "pixel"])
@pytest.mark.parametrize("size", [(64, 64), (51, 74)])
def test_the_result_has_the_size_of_the_picture(run_prompt, form, size):
    values = given(trained("sd15", form), picture(2, *size, 3))
    image = run_prompt(restoration(batch=2), given=values).values["image"]
    assert image.shape == (2, *size, 3) and 0 <= image.min() and image.max() <= 1 and image.isfinite().all()
    assert not torch.equal(image, values["picture"])


def on_pixels(**changes):
    """The restoration with the lab's model of pixels and its VAE in place of the tiny ones."""
    prompt = restoration(weights=("new", 0), **changes) | {"tiny": node("MendLoadLabPrior", kind="pixel"), "nothing": node("CLIPTextEncode", clip=["tiny", 1], text="")}
    for name in ("encode", "apply"):
        prompt[name]["inputs"]["vae"] = ["tiny", 2]
    prompt["sample"]["inputs"] |= {"positive": ["nothing", 0], "negative": ["nothing", 0]}
    return prompt


@pytest.mark.parametrize("fine_tune", [False, True])
def test_on_a_model_of_pixels_the_latent_form_passes_no_vae(run_prompt, fine_tune):
    values = given(shown=picture(2, 51, 74, 3)) | {"codes": codes()}
    new = {"form": "latent", "fine_tune": fine_tune}
    measured = run_prompt(on_pixels(new=new) | {"made": node("TestCapture", value=["new", 0])}, given=values).values["made"]
    assert measured.config["cell"] == 1
    values["weights"] = dataclasses.replace(measured, tensors={**measured.tensors, DEVIATION: torch.tensor(0.5)})
    images = {strength: run_prompt(on_pixels(new=new, strength=strength) | {"new": node("TestGiven", name="weights")}, given=values).values["image"]
              for strength in (0.0, 1.0)}
    # Up to the rounding of 2x - 1 and back: nothing else stands between the picture and the result.
    torch.testing.assert_close(images[0.0], values["picture"], atol=1e-6, rtol=0)
    assert images[1.0].shape == (2, 51, 74, 3) and images[1.0].isfinite().all() and not torch.equal(*images.values())


def test_an_empty_latent_serves_as_well(run_prompt):
    values = given()
    one, other = (run_prompt(restoration(encoded=encoded), given=values).values["image"] for encoded in (True, False))
    assert torch.equal(one, other)


def test_every_setting_acts_and_seeds_reproduce(run_prompt):
    values, mask = given(), torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    changes = ({}, {"strength": 0.5}, {"instruction_cfg": 2.0}, {"end_percent": 0.4}, {"sampler": {"samples": 2}}, {"mask": ["mask", 0]})
    images = []
    for change in changes:
        prompt = {**restoration(**change), "mask": node("TestGiven", name="mask")}
        images.append(run_prompt(prompt, given={**values, "mask": mask}).values["image"])
        assert not any(torch.equal(images[-1], other) for other in images[:-1])
    assert torch.equal(images[-1][:, 40:], values["picture"][:, 40:])
    assert torch.equal(images[0], run_prompt(restoration(), given=values).values["image"])
    values = given(trained("sd15", "pixel"))
    removed = {strength: run_prompt(restoration(strength=strength), given=values).values["image"] for strength in (0.0, 0.1)}
    assert torch.equal(removed[0.0], values["picture"]) and not torch.equal(removed[0.1], values["picture"])


def test_from_chart_to_picture(run_prompt):
    prompt = restoration(told=("encoded", 0)) | {
        "ground": node("MendVisualGround", seed=1, size=64),
        "damage": node("TestGiven", name="chart"),
        "encoded": node("MendEncodeVisualInstruction", weights=["codes", 0], degraded=["damage", 0], clean=["ground", 0]),
    }
    clean = visual_instruction.VisualGround.execute(1, 64).args[0]
    images = [run_prompt(prompt, given=given(chart=chart)).values["image"] for chart in (clean, clean * 0.3)]
    assert not torch.equal(*images)
    nothing = given(instruction=instruction(64, spread=0.0))
    assert torch.equal(images[0], run_prompt(restoration(), given=nothing).values["image"]), "two equal charts say: nothing"


def test_a_model_brings_the_tokenizer_for_its_instructions(run_prompt):
    prompt = {"ground": node("MendVisualGround", seed=1, size=64), "damage": node("TestGiven", name="picture")}
    for name in ("weights", "codes"):
        prompt |= {name: node("TestGiven", name=name), f"by {name}": node("TestCapture", value=[f"encoded {name}", 0]),
                   f"encoded {name}": node("MendEncodeVisualInstruction", weights=[name, 0], degraded=["damage", 0], clean=["ground", 0])}
    values = run_prompt(prompt, given=given()).values
    one, other = values["by weights"], values["by codes"]
    assert torch.equal(one.tokens, other.tokens) and one.tokens.any() and one.codebook == other.codebook


def test_two_of_them_may_share_weights_in_one_graph(run_prompt):
    """Of one model, on two pictures."""
    one, other = given(), given(shown=1 - picture(1, 64, 64, 3))
    second = {"picture": "picture2", "instruction": "instruction2", "encode": "encode2", "apply": "apply2", "sigmas": "sigmas2",
              "sample": "sample2", "remove": "remove2", "image": "image2"}

    def renamed(value):
        return [second.get(value[0], value[0]), value[1]] if isinstance(value, list) else value

    prompt = restoration()
    for name, copied in second.items():
        prompt[copied] = {**prompt[name], "inputs": {key: renamed(value) for key, value in prompt[name]["inputs"].items()}}
    prompt["picture2"], prompt["instruction2"] = (node("TestGiven", name=name) for name in ("picture2", "instruction2"))
    told = instruction(9, seed=6)
    alone = [run_prompt(restoration(), given=values).values["image"] for values in (one, {**other, "instruction": told})]
    both = run_prompt(prompt, given={**one, "picture2": other["picture"], "instruction2": told}).values
    assert torch.equal(both["image"], alone[0]) and torch.equal(both["image2"], alone[1]) and not torch.equal(*alone)


def test_the_model_that_went_in_is_not_changed(run_prompt):
    run_prompt(restoration(), given=given())
    prompt = {"tiny": node("TestTinyModel", family="sd15"), "model": node("TestCapture", value=["tiny", 0])}
    assert run_prompt(prompt).values["model"].get_attachment("mend_degradation") is None


@pytest.mark.parametrize(("changes", "values", "message"), [
    ({"weights": ("codes", 0)}, {}, "is of the kind degradation tokenizer"),
    ({}, {"weights": fresh("sd3")}, "was made for SD3 of depth 2, and 'model' is UNet 32"),
    ({}, {"instruction": dataclasses.replace(instruction(), codebook="ffff")}, "made with another tokenizer"),
    ({}, {"instruction": instruction(batch=2)}, "'instruction' is for 2 pictures"),
    ({"sample": {"sampler": ["euler", 0]}}, {}, "Put Degradation Space Sampler"),
    ({"sample": {"model": ["tiny", 0]}}, {}, "Degradation Space Sampler: 'model' knows no degraded picture"),
    ({"model": ["again", 0]}, {}, "already comes from Apply Degradation Diffusion"),
    ({}, {"shown": torch.full((1, 64, 64, 3), torch.nan)}, "NaN or infinite"),
    ({"mask": ["mask", 0]}, {}, "'mask' holds no pixels"),
    ({}, {"shown": picture(1, 64, 96, 3)}, "belongs to a picture of"),
])  # fmt: skip
def test_what_does_not_fit_is_said(run_prompt, changes, values, message):
    prompt = restoration(**changes, encoded="shown" not in values)
    prompt["again"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "model": ["tiny", 0]}}
    prompt["mask"] = node("TestGiven", name="mask")
    assert message in failure(run_prompt, prompt, given={**given(mask=torch.zeros(0, 8, 8)), **given(**values), "mask": torch.zeros(0, 8, 8)})


def test_removing_what_was_not_found_is_refused(run_prompt):
    prompt = restoration()
    prompt["remove"]["inputs"]["model"] = ["tiny", 0]
    assert "Remove Degradation: 'model' knows no degraded picture" in failure(run_prompt, prompt, given=given())
    prompt = restoration()
    prompt["remove"]["inputs"]["samples"] = ["nested", 0]
    prompt["nested"] = node("TestGiven", name="nested")
    nested = {"samples": NestedTensor([torch.zeros(1, 4, 8, 8)] * 2)}
    assert "holds several things at once" in failure(run_prompt, prompt, given=given(nested=nested))


def test_a_new_one_wants_a_tokenizer(run_prompt):
    prompt = restoration(weights=("new", 0))
    prompt["new"]["inputs"]["tokenizer"] = ["weights", 0]
    message = failure(run_prompt, prompt, given=given())
    assert "New Degradation Model: " in message
    assert "is of the kind degradation model, and this node applies the kind degradation tokenizer" in message
