"""The nodes of learned prompts through the host's executor: MendNewLearnedPrompt, MendApplyLearnedPrompt, MendBlendLearnedPrompts and
MendLearnedPromptConditioning, and MendLoadWeights with published files."""

import shutil

import pytest
import torch

import folder_paths
from mend.model_patches import folders
from mend.model_patches.prompt_conditioning import new_conditioning
from mend.nodes import learned_prompt
from mend.tests.model_patches.learned_prompts import base, told, trained
from mend.tests.model_patches.test_published_prompt import content
from mend.tests.nodes.restorations import latent, node
from mend.tests.nodes.test_zero_shot import failure

FAMILIES = pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])


def prompted(family, model="apply", positive=("text", 0), **nodes):
    """Sample a tiny model as learned prompts want it; `nodes` are those in between."""
    return {
        "tiny": node("TestTinyModel", family=family),
        "text": node("TestGiven", name="text"),
        **nodes,
        "sample": node("KSampler", model=[model, 0], seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                       positive=list(positive), negative=["tiny", 2], latent_image=["tiny", 4]),
        "latent": node("TestCapture", value=["sample", 0]),
        "model": node("TestCapture", value=[model, 0]),
    }


def applied(weights="given", **changes):
    return {"given": node("TestGiven", name="one"), "new": node("MendNewLearnedPrompt", model=["tiny", 0], length=7),
            "apply": node("MendApplyLearnedPrompt", model=["tiny", 0], weights=[weights, 0], **changes)}


def blended(**changes):
    given = {name: node("TestGiven", name=name) for name in ("one", "two", "three")}
    settings = {"prompt_1": ["one", 0], "prompt_2": ["two", 0], "weight_3": None, "weight_4": None, **changes}
    return {**given, "apply": node("MendBlendLearnedPrompts", model=["tiny", 0], **settings)}


def given(family):
    return {"text": told(family), "one": trained(family, seed=5), "two": trained(family, seed=6), "three": trained(family, seed=7)}


@FAMILIES
def test_a_fresh_prompt_and_strength_zero_are_the_model_itself(run_prompt, family):
    plain = latent(run_prompt(prompted(family, model="tiny"), given=given(family)))
    fresh = run_prompt(prompted(family, **applied("new")), given=given(family))
    off = run_prompt(prompted(family, **applied(strength=0.0)), given=given(family))
    assert torch.equal(latent(fresh), plain) and torch.equal(latent(off), plain)
    assert not off.values["model"].wrappers and not fresh.values["model"].wrappers


@FAMILIES
def test_a_trained_prompt_acts(run_prompt, family):
    plain = latent(run_prompt(prompted(family, model="tiny"), given=given(family)))
    results = [latent(run_prompt(prompted(family, **applied(**change)), given=given(family)))
               for change in ({}, {"strength": 0.5}, {"start_percent": 0.4}, {"end_percent": 0.4})]
    for index, result in enumerate(results):
        assert result.isfinite().all() and not any(torch.equal(result, other) for other in (plain, *results[:index]))
    assert torch.equal(latent(run_prompt(prompted(family, **applied()), given=given(family))), results[0])


def test_blends(run_prompt):
    settings = [{}, {"mode": "sum"}, {"weight_2": 0.5}, {"strength": 0.5}, {"prompt_3": ["three", 0]}, {"prompt_3": ["three", 0], "weight_3": 2.0}]
    results = [latent(run_prompt(prompted("sd3", **blended(**change)), given=given("sd3"))) for change in settings]
    for index, result in enumerate(results):
        assert result.isfinite().all() and not any(torch.equal(result, other) for other in results[:index])
    alone = latent(run_prompt(prompted("sd3", **applied()), given=given("sd3")))
    for mode in ("average", "sum"):
        assert torch.equal(latent(run_prompt(prompted("sd3", **blended(mode=mode, weight_2=0.0)), given=given("sd3"))), alone)


@pytest.mark.parametrize("kind", ["apply", "blend"])
def test_a_prompt_for_another_model_is_refused(run_prompt, kind):
    nodes = applied() if kind == "apply" else blended()
    values = given("sd3") | {"one" if kind == "apply" else "two": trained("flux")}
    message = failure(run_prompt, prompted("sd3", **nodes), values)
    name = {"apply": "Apply Learned Prompt", "blend": "Blend Learned Prompts"}[kind]
    assert f"{name}: prompt.safetensors was made for FLUX of width 32, and 'model' is SD3 of depth 2." in message


def test_too_short_a_text_for_flux_is_named(run_prompt):
    values = given("flux") | {"one": trained("flux", 12)}
    message = failure(run_prompt, prompted("flux", **applied()), values)
    assert "the prompt holds 12 tokens and the text 7. Put T5 Tokenizer Options with min_length 12" in message


# The plain form


def plain_form(**changes):
    return {"new": node("MendNewLearnedPrompt", model=["tiny", 0], form="in place of the text", length=7),
            "tell": node("MendLearnedPromptConditioning", weights=["new", 0], **changes), "told": node("TestCapture", value=["tell", 0])}


@FAMILIES
def test_the_plain_form_takes_the_place_of_a_text(run_prompt, family):
    prompt = prompted(family, model="tiny", positive=("tell", 0), **plain_form(model=["tiny", 0]))
    result = run_prompt(prompt, given=given(family))
    assert latent(result).isfinite().all() and result.values["told"][0][0].shape[1] == 7
    assert not torch.equal(latent(result), latent(run_prompt(prompted(family, model="tiny"), given=given(family))))


def test_the_plain_form_behind_a_text(run_prompt):
    prompt = prompted("sd3", model="tiny", positive=("tell", 0), **plain_form(conditioning=["text", 0]))
    result = run_prompt(prompt, given=given("sd3"))
    (text, options), = told("sd3")
    (both, kept), = result.values["told"]
    assert both.shape[1] == text.shape[1] + 7 and torch.equal(both[:, :text.shape[1]], text) and torch.equal(kept["pooled_output"], options["pooled_output"])
    message = failure(run_prompt, prompt, given("sd3") | {"text": told("flux")})
    assert "Learned Prompt Conditioning: 'conditioning' has width 48, and the new prompt conditioning for SD3 of depth 2" in message


def test_the_forms_are_not_mixed_up(run_prompt):
    wrong = {**plain_form(), "apply": node("MendApplyLearnedPrompt", model=["tiny", 0], weights=["new", 0])}
    message = failure(run_prompt, prompted("sd3", **wrong), given("sd3"))
    assert "is of the kind learned prompt conditioning, and this node applies the kind learned prompt." in message


# Published files


@pytest.fixture
def models(base_folder, host_nodes):
    """models/mend, empty before and after."""
    folder = base_folder / "models" / "mend"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)
    folder_paths.filename_list_cache.pop(folders.MEND, None)


def test_published_files_are_listed_loaded_and_saved_as_files_of_the_pack(run_prompt, models):
    torch.save(content("wan"), models / "wan_blur.pt")
    folder_paths.filename_list_cache.pop(folders.MEND, None)
    assert "wan_blur.pt" in folders.weights_files()
    prompt = {"load": node("MendLoadWeights", file="wan_blur.pt"), "out": node("TestCapture", value=["load", 0]),
              "save": node("MendSaveWeights", weights=["load", 0], filename_prefix="blur", precision="full (fp32)")}
    result = run_prompt(prompt)
    found = result.values["out"]
    assert (found.kind, found.family, found.tensors["prompts"].shape) == ("learned_prompt", "WAN 1.3B", (1, 226, 1536))
    assert (models / "learned_prompt" / "blur_00001_.safetensors").is_file()


def test_other_pt_files_are_refused_by_name(run_prompt, models):
    torch.save({"state_dict": {"out.weight": torch.zeros(1)}}, models / "unet.pt")
    folder_paths.filename_list_cache.pop(folders.MEND, None)
    message = failure(run_prompt, {"load": node("MendLoadWeights", file="unet.pt"), "out": node("TestCapture", value=["load", 0])}, {})
    assert "Load Mend Weights: unet.pt is not a published learned prompt: it holds out.weight, and" in message


@pytest.mark.parametrize(("told_too", "guidance"), [({}, 1.0), ({"guidance": 3.5}, 3.5)])
def test_a_text_without_guidance_gets_the_prompts(told_too, guidance):
    made = new_conditioning(base("flux").model, 7)
    (both, options), = learned_prompt.LearnedPromptConditioning.execute(made, conditioning=[[torch.zeros(1, 3, 48), told_too]]).result[0]
    assert both.shape == (1, 10, 48) and options == {"guidance": guidance}
