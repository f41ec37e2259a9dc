"""The lab prior loads through the host's classes and is used like any other model."""

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open

import comfy.model_management
import comfy.model_patcher
import latent_preview
from comfy.cli_args import LatentPreviewMethod
from mend.lab.denoisers import position_codes
from mend.lab.prior import KINDS, WEIGHTS, load_lab_prior
from mend.lab.train import LATENT_SCALE, LATENT_SHIFT
from mend.lab.vocabulary import LENGTH
from mend.model_patches.host import is_flow

FILES = {"vae": "lab_vae", "unet": "lab_unet", "dit": "lab_dit", "pixel": "lab_pixel"}
# Channels and pixels to a cell of what each samples.
LATENTS = {"unet": (16, 8), "dit": (16, 8), "pixel": (3, 1)}


@cache
def loaded(kind):
    with torch.inference_mode():
        return load_lab_prior(kind)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def encoded(host_nodes, clip, text):
    with torch.inference_mode():
        return host_nodes.CLIPTextEncode().encode(clip, text)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind):
    model, _, vae = loaded(kind)
    network = model.model.diffusion_model
    # Position codes of the dit are fixed, so they do not count.
    least, most = {"unet": (6e6, 8e6), "dit": (9e6, 10e6), "pixel": (1e6, 1.5e6)}[kind]
    assert least <= parameters(network) <= most
    assert kind == "pixel" or 2.2e6 < parameters(vae.first_stage_model) < 2.8e6
    assert is_flow(model.model.model_sampling) == (kind != "unet")
    assert (vae.latent_channels, vae.spacial_compression_encode()) == LATENTS[kind]
    assert (model.model.latent_format.latent_channels, model.model.latent_format.spacial_downscale_ratio) == LATENTS[kind]


def test_memory_is_estimated_for_what_a_model_samples():
    """A pixel is not as much work as a latent cell of 64."""
    pixels, cells = (loaded(kind)[0].model.memory_required([1, *shape]) for kind, shape in (("pixel", (3, 256, 256)), ("unet", (16, 32, 32))))
    assert cells < pixels < 10 * cells


def test_position_codes_are_made_when_the_dit_is_loaded():
    codes = loaded("dit")[0].model.diffusion_model.pos_embed
    assert codes.shape == (1, 64 * 64, 256) and torch.equal(codes.float(), position_codes().half().float())
    with safe_open(WEIGHTS / "dit.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "pos_embed" in name]


def test_the_weights_fit_into_the_repository():
    assert {path.name for path in WEIGHTS.glob("*.safetensors")} == {f"{name}.safetensors" for name in FILES}
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 40e6


@pytest.mark.parametrize("name", FILES)
def test_weights_are_halves_that_say_what_they_are(name):
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        assert metadata["mend.kind"] == FILES[name] and metadata["mend.version"] == "1" and int(metadata["mend.lab.steps"]) > 0
        for key in file.keys():
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.float16 and torch.isfinite(tensor).all(), key


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_that_fetch_weights_on_demand_can_load_it_anew(kind):
    """They do to train on it (`clone(disable_dynamic=True)`), and for each further device."""
    model, _, vae = loaded(kind)
    # Pixels' VAE holds nothing, and the host offers no way to load it anew.
    for patcher in (model,) if kind == "pixel" else (model, vae.patcher):
        factory, arguments = patcher.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        assert type(again) is comfy.model_patcher.ModelPatcher and again.model is not patcher.model
        assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), patcher.model.state_dict().values(), strict=True))
    again = model.cached_patcher_init[0](kind, disable_dynamic=True).model
    assert type(again.latent_format) is type(model.model.latent_format)
    assert again.latent_format.latent_rgb_factors == model.model.latent_format.latent_rgb_factors
    assert is_flow(again.model_sampling) == is_flow(model.model.model_sampling)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_conditioning(host_nodes, kind):
    clip = loaded(kind)[1]
    one, other, again = (encoded(host_nodes, clip, text)[0] for text in ("red, bright", "blue dark", "red, bright"))
    assert one[0].shape == (1, LENGTH, 64) and one[1]["pooled_output"].shape == (1, 64)
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    assert not torch.equal(one[1]["pooled_output"], other[1]["pooled_output"])
    empty = encoded(host_nodes, clip, "")[0]
    assert torch.isfinite(empty[0]).all() and not empty[1]["pooled_output"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_words_in_the_mean_does_not_matter(host_nodes, kind):
    pooled = [encoded(host_nodes, loaded(kind)[1], text)[0][1]["pooled_output"] for text in ("red bright round", "round red bright")]
    torch.testing.assert_close(*pooled)


def sampled(host_nodes, kind, text, side=4):
    model, clip, vae = loaded(kind)
    with torch.inference_mode():
        channels, cell = LATENTS[kind]
        latent = {"samples": torch.zeros(1, channels, side * 8 // cell, side * 8 // cell)}
        positive, negative = encoded(host_nodes, clip, text), encoded(host_nodes, clip, "")
        out = host_nodes.KSampler().sample(model, 1, 2, 4.0, "euler", "simple", positive, negative, latent)[0]
        return out["samples"], host_nodes.VAEDecode().decode(vae, out)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_hosts_nodes_sample_it(host_nodes, kind):
    latent, image = sampled(host_nodes, kind, "red bright")
    channels, cell = LATENTS[kind]
    assert latent.shape == (1, channels, 32 // cell, 32 // cell) and image.shape == (1, 32, 32, 3)
    assert torch.isfinite(latent).all() and torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
    assert torch.equal(latent, sampled(host_nodes, kind, "red bright")[0])
    assert not torch.allclose(latent, sampled(host_nodes, kind, "blue dark")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_go_through_the_vae_and_back(host_nodes, kind):
    model, _, vae = loaded(kind)
    image = torch.linspace(0.2, 0.8, 64).view(1, 1, 64, 1).expand(1, 48, 64, 3)
    with torch.inference_mode():
        latent = vae.encode(image)
        again = vae.decode(latent)
    channels, cell = LATENTS[kind]
    assert latent.shape == (1, channels, 48 // cell, 64 // cell) and again.shape == (1, 48, 64, 3)
    if kind == "pixel":
        # Up to the rounding of 2x - 1 and back.
        torch.testing.assert_close(again, image, atol=1e-6, rtol=0)
        assert latent.min() < 0 and torch.equal(model.model.latent_format.process_in(latent), latent)
        return
    assert (again - image).abs().mean() < 0.1
    # Latents as the denoiser sees them have about unit deviation over natural pictures; the format is the one that training used.
    latent_format = model.model.latent_format
    torch.testing.assert_close(latent_format.process_in(latent), (latent - LATENT_SHIFT) * LATENT_SCALE)
    torch.testing.assert_close(latent_format.process_out(latent_format.process_in(latent)), latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_previewed(monkeypatch, kind):
    model = loaded(kind)[0]
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    image = previewer.decode_latent_to_preview(torch.randn(1, LATENTS[kind][0], 6, 8, device=comfy.model_management.intermediate_device()))
    assert image.size == (8, 6)


def test_previews_fitted_to_the_vae_are_used():
    with safe_open(WEIGHTS / "vae.safetensors", "pt") as file:
        fitted = file.metadata().get("mend.preview")
    if fitted is None:
        pytest.skip("these weights carry no preview colours")
    factors, bias = json.loads(fitted)
    latent_format = loaded("unet")[0].model.latent_format
    assert (latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias) == (factors, bias)
    assert len(factors) == 16 and len(factors[0]) == len(bias) == 3
