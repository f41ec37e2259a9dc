"""The tiny models run under the host's sampler and executor."""

import pytest
import torch

import comfy.sample
import comfy.samplers
from mend.tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_finite_and_repeats(tiny, family):
    def sample():
        noise = tiny.latent(family, seed=4)["samples"]
        return comfy.sample.sample(
            tiny.model(family),
            noise,
            2,
            2.0,
            "euler",
            "simple",
            tiny.conditioning(family, 1),
            tiny.conditioning(family, 2),
            torch.zeros_like(noise),
            seed=5,
        )

    first = sample()
    assert first.shape == tiny.latent_shape(family)
    assert torch.isfinite(first).all()
    assert torch.equal(first, sample())


@pytest.mark.parametrize("channels", [4, 16])
def test_vae_goes_there_and_back(tiny, channels):
    vae = tiny.vae(channels)
    latent = vae.encode(torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0)))
    assert latent.shape == (1, channels, 8, 6)
    assert vae.decode(latent).shape == (1, 64, 48, 3)


def sampling_prompt(seed=1):
    return {
        "1": {"class_type": "TestTinyModel", "inputs": {"family": "sd15"}},
        "2": {
            "class_type": "KSampler",
            "inputs": {"model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 4], "seed": seed, "steps": 2,
                       "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        },
        "3": {"class_type": "TestCapture", "inputs": {"value": ["2", 0]}},
    }  # fmt: skip


def test_prompt_runs_and_caches(run_prompt):
    first = run_prompt(sampling_prompt())
    assert first.values["3"]["samples"].shape == (1, 4, 8, 8)
    assert [data["value"] for data in first.of("progress")] == [1, 2]
    assert "1" in run_prompt(sampling_prompt(seed=2)).cached


def test_prompt_errors_name_the_node(run_prompt):
    prompt = sampling_prompt()
    prompt["2"]["inputs"]["steps"] = 0
    with pytest.raises(AssertionError, match="KSampler.*steps"):
        run_prompt(prompt)
    broken = run_prompt({"1": {"class_type": "TestGiven", "inputs": {"name": "x"}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}},
                        given={"x": "no image"}, check=False)  # fmt: skip
    assert not broken.success and "PreviewImage" in broken.error_text()
