"""MendRestorationGuidance through the host: any sampler of it, what the help page says of them, and what the node refuses."""

import re
from pathlib import Path

import pytest
import torch

import comfy.samplers
from mend.model_patches.host import state_use
from mend.nodes.restoration_guidance import RestorationGuidance

PAGE = Path(__file__).resolve().parents[2] / "web" / "docs" / "MendRestorationGuidance.md"
# How each row of the help page begins, by what samplers do with their states.
WORDS = {"kept": "The state", "ahead": "The state", "copied": "The prediction (x0)", "apart": "The result only"}
GUESSES = "guesses of"


def prompt(family="sd15", given=(), batch=1, **inputs):
    """A tiny model under guidance towards what is given, sampled by the host's KSampler."""
    defaults = {entry.id: entry.default for entry in RestorationGuidance.define_schema().inputs if getattr(entry, "default", None) is not None}
    links = {name: [name, 0] for name in given}
    return {
        "tiny": {"class_type": "TestTinyModel", "inputs": {"family": family, "batch": batch}},
        **{name: {"class_type": "TestGiven", "inputs": {"name": name}} for name in given},
        "guidance": {"class_type": "MendRestorationGuidance", "inputs": {"model": ["tiny", 0], **defaults, **links, **inputs}},
        "sample": {"class_type": "KSampler", "inputs": {
            "model": ["guidance", 0], "seed": 1, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            "positive": ["tiny", 1], "negative": ["tiny", 2], "latent_image": ["tiny", 4],
        }},
        "end": {"class_type": "TestCapture", "inputs": {"value": ["sample", 0]}},
    }  # fmt: skip


def picture(batch=1, side=64):
    return torch.rand(batch, side, side, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def run(run_prompt):
    """The samples of one prompt, each unlike the ones before it: the host runs nothing twice."""

    def call(values, **changes):
        return run_prompt(prompt(given=values, **changes), given=values).values["end"]["samples"]

    return call


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_a_picture_guides_every_family_through_the_host(run, family):
    values, vae = {"degraded": picture()}, {"vae": ["tiny", 3]}
    free = run(values, family=family, weight=0.0, **vae)
    one = run(values, family=family, weight=0.3, **vae)
    assert one.shape == free.shape and torch.isfinite(one).all() and not torch.equal(one, free)
    assert not torch.equal(one, run(values, family=family, weight=0.3, form="literal", **vae))
    assert torch.equal(run(values | {"mask": torch.zeros(1, 9, 9)}, family=family, weight=0.3, **vae), free)


def test_weight_zero_is_no_node_at_all(run_prompt):
    with_node = prompt(given=["degraded"], vae=["tiny", 3], weight=0.0)
    without = prompt(given=["degraded"], vae=["tiny", 3])
    without["sample"]["inputs"]["model"] = ["tiny", 0]
    first, second = (run_prompt(graph, given={"degraded": picture()}).values["end"]["samples"] for graph in (with_node, without))
    assert torch.equal(first, second)


def test_a_latent_takes_the_place_of_the_picture(run_prompt):
    by_picture = prompt(given=["degraded"], vae=["tiny", 3], weight=0.3)
    by_latent = prompt(weight=0.3) | {
        "degraded": {"class_type": "TestGiven", "inputs": {"name": "degraded"}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["degraded", 0], "vae": ["tiny", 3]}},
    }
    by_latent["guidance"]["inputs"]["latent"] = ["encode", 0]
    first, second = (run_prompt(graph, given={"degraded": picture()}).values["end"]["samples"] for graph in (by_picture, by_latent))
    torch.testing.assert_close(first, second)


def test_a_changed_weight_reloads_nothing(run_prompt):
    values = {"degraded": picture()}
    run_prompt(prompt(given=["degraded"], vae=["tiny", 3], weight=0.2), given=values)
    result = run_prompt(prompt(given=["degraded"], vae=["tiny", 3], weight=0.3), given=values)
    assert "tiny" in result.cached and "guidance" not in result.cached


def test_progress_and_previews_go_on(run_prompt):
    result = run_prompt(prompt(given=["degraded"], vae=["tiny", 3]), given={"degraded": picture()})
    values = [data["value"] for data in result.of("progress") if data["node"] == "sample"]
    assert values == sorted(values) and values[-1] == 4


def test_grey_and_transparent_pictures_are_taken(run):
    for channels in (1, 4):
        assert torch.isfinite(run({"degraded": picture()[..., :1].expand(-1, -1, -1, channels)}, vae=["tiny", 3])).all()


@pytest.mark.parametrize(("values", "inputs", "message"), [
    ({}, {}, "nothing says where to stay near; connect 'degraded' and 'vae', or 'latent'"),
    ({"degraded": picture()}, {}, "'degraded' needs 'vae' to encode it"),
    ({"degraded": picture(), "latent": {"samples": torch.zeros(1, 4, 8, 8)}}, {"vae": ["tiny", 3]}, "both 'latent' and 'degraded' are connected"),
    ({"degraded": picture(side=80)}, {"vae": ["tiny", 3]}, "'degraded' is 80 x 80 but the latent belongs to a picture of 64 x 64"),
    ({"degraded": picture(3)}, {"vae": ["tiny", 3], "batch": 2}, "'degraded' is for 3 pictures but the latent batch has 2"),
    ({"degraded": picture()[..., :2]}, {"vae": ["tiny", 3]}, "'degraded' has 2 channels"),
    ({"degraded": picture() * float("nan")}, {"vae": ["tiny", 3]}, "'degraded' has NaN or infinite"),
    ({"degraded": picture(), "mask": torch.zeros(0, 8, 8)}, {"vae": ["tiny", 3]}, "'mask' holds no pixels"),
    ({"degraded": picture(), "mask": torch.full((1, 8, 8), float("nan"))}, {"vae": ["tiny", 3]}, "'mask' has NaN or infinite"),
])  # fmt: skip
def test_what_cannot_be_used_is_said(run_prompt, values, inputs, message):
    result = run_prompt(prompt(given=values, **inputs), given=values, check=False)
    assert not result.success and f"Restoration Guidance: {message}" in result.error_text()


# The help page


def rows():
    """The table of samplers: what is moved, and which."""
    section = re.search(r"^## Samplers\n(.*?)(?=^## )", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and "`" in line]
    return [(moved, re.findall(r"`([^`]+)`", names)) for moved, names, *_ in cells]


def test_the_help_page_names_every_sampler_of_the_host_once():
    listed = [name for _, names in rows() for name in names]
    assert sorted(set(listed)) == sorted(listed)
    assert set(comfy.samplers.SAMPLER_NAMES) <= set(listed)


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_the_help_page_says_what_becomes_of_a_sampler(name):
    moved, = (moved for moved, names in rows() if name in names)
    use = state_use(comfy.samplers.sampler_object(name).sampler_function)
    assert moved.startswith(WORDS[use]) and (GUESSES in moved) == (use == "ahead")
