"""MendBridgeSampler and MendBridgeSigmas through the host's sampling nodes."""

import pytest
import torch

import comfy.model_management
from mend.nodes.bridge import BridgeSampler
from mend.tests.tiny_models import latent

FAMILIES = ("sd15", "sd3", "flux", "wan")


def prompt(family="sd3", steps=3, t0=0.4, degraded=False, **inputs):
    """A tiny model on the bridge, by the host's SamplerCustomAdvanced at cfg 1."""
    defaults = {entry.id: entry.default for entry in BridgeSampler.define_schema().inputs if getattr(entry, "default", None) is not None}
    link = {"degraded": ["degraded", 0]} if degraded else {}
    return {
        "tiny": {"class_type": "TestTinyModel", "inputs": {"family": family}},
        "latent": {"class_type": "TestGiven", "inputs": {"name": "latent"}},
        **({"degraded": {"class_type": "TestGiven", "inputs": {"name": "degraded"}}} if degraded else {}),
        "guider": {"class_type": "BasicGuider", "inputs": {"model": ["tiny", 0], "conditioning": ["tiny", 1]}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "bridge": {"class_type": "MendBridgeSampler", "inputs": {**defaults, **link, **inputs}},
        "sigmas": {"class_type": "MendBridgeSigmas", "inputs": {"model": ["tiny", 0], "t0": t0, "steps": steps}},
        "sample": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["bridge", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0],
        }},
        "end": {"class_type": "TestCapture", "inputs": {"value": ["sample", 0]}},
    }  # fmt: skip


@pytest.fixture
def run(run_prompt):
    """The samples of one prompt."""

    def call(family="sd3", given=None, **changes):
        values = {"latent": latent(family, seed=4)} if given is None else given
        return run_prompt(prompt(family, degraded="degraded" in values, **changes), given=values)

    return call


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_video_walk_the_bridge(run, family):
    given = {"latent": latent(family, seed=4, frames=3)}
    result = run(family, given)
    found = result.values["end"]["samples"]
    assert found.shape == given["latent"]["samples"].shape and found.isfinite().all()
    assert [(event["value"], event["max"]) for event in result.of("progress")][-1] == (3, 3)
    # Little noise, little change.
    near = run(family, given, t0=0.05).values["end"]["samples"]
    change, little = ((each - given["latent"]["samples"]).square().mean() for each in (found, near))
    assert 0 < little < change


def test_every_input_acts(run):
    plain = run().values["end"]["samples"]
    for changes in ({"estimator": "E-Bridge"}, {"noise": "kept"}, {"fixed_noise": True}, {"steps": 5}):
        assert not torch.equal(run(**changes).values["end"]["samples"], plain), changes
    fixed = [run(fixed_noise=True, fixed_seed=seed).values["end"]["samples"] for seed in (42, 42, 7)]
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(fixed[0], fixed[2])
    other = run(given={"latent": latent("sd3"), "degraded": latent("sd3", seed=4)}).values["end"]["samples"]
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


def test_windows_on_a_video(run):
    given = {"latent": latent("wan", frames=9, seed=4)}
    whole, parts = (run("wan", given, window=window, overlap=8).values["end"]["samples"] for window in (0, 17))
    assert whole.shape == parts.shape and not torch.equal(whole, parts)


def test_a_noise_mask_holds(run):
    mask = torch.ones(1, 64, 64)
    mask[..., :32] = 0
    given = {"latent": {**latent("sd15", seed=4), "noise_mask": mask}}
    found = run("sd15", given).values["end"]["samples"]
    torch.testing.assert_close(found[..., :3], given["latent"]["samples"][..., :3], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[..., 5:], given["latent"]["samples"][..., 5:])


def test_cancel_comes_within_a_step(run_prompt):
    graph, steps = prompt(steps=6), []

    def cancel(event, data):
        if event == "progress":
            steps.append(data["value"])
            comfy.model_management.interrupt_current_processing()

    result = run_prompt(graph, given={"latent": latent("sd3", seed=4)}, on_event=cancel, check=False)
    assert not result.success and len(steps) <= 2


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("sd15", {"t0": 0.97}, "Bridge Sigmas: t0 is 0.97, and this model knows times above 0 and up to 0.936"),
    ("sd3", {"window": 16, "overlap": 16}, "Bridge Sampler: 'overlap' is 16 frames and 'window' 16; the overlap has to be shorter"),
])  # fmt: skip
def test_what_cannot_be_is_said(run_prompt, family, changes, message):
    result = run_prompt(prompt(family, **changes), given={"latent": latent(family, seed=4)}, check=False)
    assert message in result.error_text()


def test_sizes_are_compared(run_prompt):
    given = {"latent": latent("sd3", seed=4), "degraded": latent("sd3", height=20, seed=5)}
    result = run_prompt(prompt(degraded=True), given=given, check=False)
    assert "Bridge Sampler: the degraded latent is 1x16x20x8 and the one that is sampled 1x16x8x8" in result.error_text()
