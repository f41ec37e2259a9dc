"""Which models are known, where their adapters go, and how everything else is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Identity

import comfy.ldm.aura.mmdit
import comfy.model_base
from comfy.latent_formats import SD3
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from mend.dev.bench.full_size import FULL_SIZE, META, SD15_UNET, Model
from mend.lab.denoisers import DIT, UNET
from mend.model_patches.adapter_patch import check_fit, new_weights
from mend.model_patches.anatomy import anatomy_of, self_attention
from mend.model_patches.restoration_adapter import RestorationAdapter, adapter_sites
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import base, trained

NODE = "Apply Restoration Adapter"


def places(model):
    return [(site.name, site.channels, site.scale) for site in adapter_sites(anatomy_of(model))]


# Full size, on meta tensors


@pytest.mark.parametrize(("name", "expected"), [
    # As the paper lists them for SDXL: after every block but the last.
    ("SDXL", [("down0", 320, 2), ("down1", 640, 4), ("down2", 1280, 4), ("middle", 1280, 4), ("up0", 1280, 2), ("up1", 640, 1)]),
    ("SD1.5", [("down0", 320, 2), ("down1", 640, 4), ("down2", 1280, 8), ("down3", 1280, 8), ("middle", 1280, 8), ("up0", 1280, 4),
               ("up1", 1280, 2), ("up2", 640, 1)]),
    # After every four blocks of 24.
    ("SD3 medium", [(f"double{index}", 1536, 2) for index in (3, 7, 11, 15, 19, 23)]),
    # Six of 19 double and 38 single blocks, evenly spaced.
    ("FLUX.1", [(name, 3072, 2) for name in ("double8", "double18", "single8", "single18", "single27", "single37")]),
])  # fmt: skip
def test_full_size_models(name, expected):
    model = FULL_SIZE[name].build()
    assert anatomy_of(model).family == name
    assert places(model) == expected


@pytest.mark.parametrize(("name", "details"), [
    ("SDXL", {"up0": "down0", "up1": "stem"}), ("SD1.5", {"up0": "down1", "up1": "down0", "up2": "stem"}), ("SD3 medium", {}),
])  # fmt: skip
def test_detail_comes_from_the_same_resolution(name, details):
    network = RestorationAdapter(anatomy_of(FULL_SIZE[name].build()), "full", **META)
    assert network.details == details
    if details:
        assert {up for up, adapter in network.adapters.items() if adapter.fine is not None} == details.keys()


def sd2():
    """Stable Diffusion 2, whose UNet differs from SD1.5's in the width of its text."""
    return Model(UNetModel(**{**SD15_UNET, "context_dim": 1024}, **META), SimpleNamespace(latent_channels=4))


def test_sd2_is_not_sd15():
    assert anatomy_of(sd2()).family == "SD2"


@pytest.mark.parametrize(("name", "layers", "parts"), [
    ("SDXL", 70 * 4, 70 * 4), ("SD1.5", 16 * 4, 16 * 4),
    # The last block's qkv of the picture and its projection are there too: only the text stream ends early.
    ("SD3 medium", 24 * 2, 24 * 4), ("FLUX.1", 19 * 2 + 38, 19 * 4 + 38 * 3),
])  # fmt: skip
def test_self_attention_of_full_size_models(name, layers, parts):
    found = self_attention(FULL_SIZE[name].build())
    assert len(found) == layers and sum(map(len, found.values())) == parts


# Tiny ones


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_transformers_of_up_to_six_blocks_have_all(family):
    anatomy = anatomy_of(base(family).model)
    assert adapter_sites(anatomy) == list(anatomy.sites)
    assert len(anatomy.sites) == {"sd15": 4, "sdxl": 4, "flux": 4}.get(family, 2)


@pytest.mark.parametrize("depth", [7, 9])
def test_deeper_ones_have_six_and_the_last_block_is_among_them(depth):
    model = tiny_models.flux_model(depth=depth - 2)
    sites = adapter_sites(anatomy_of(model))
    assert len(sites) == 6 and sites[-1].name == "single1" and len(set(sites)) == 6


@pytest.mark.parametrize(("network", "config", "kind"), [(UNetModel, UNET, "unet"), (OpenAISignatureMMDITWrapper, DIT, "sd3")])
def test_the_lab_is_known(network, config, kind):
    model = Model(network(**config, **META), SD3())
    anatomy = anatomy_of(model)
    assert anatomy.kind == kind and anatomy.latent_channels == 16
    assert len(adapter_sites(anatomy)) >= 4 and self_attention(model)


# Refused


def aura():
    """AuraFlow, whose class shares SD3's name in the host."""
    network = comfy.ldm.aura.mmdit.MMDiT(in_channels=4, out_channels=4, patch_size=2, dim=64, n_layers=2, n_double_layers=1, n_heads=2,
                                         cond_seq_dim=32, max_seq=64, **META)
    return Model(network, SimpleNamespace(latent_channels=4))


UNKNOWN = {
    "Identity": lambda: Model(Identity(), SimpleNamespace(latent_channels=4)),
    "MMDiT": aura,
    "Flux": lambda: tiny_models.flux_model(global_modulation=True),
    "WanModel": lambda: tiny_models.wan_model(in_dim_ref_conv=16),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_models_are_refused_by_name(name):
    message = f"models of the kind {name} .* are not supported. Use SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN."
    with pytest.raises(ValueError, match=message):
        anatomy_of(UNKNOWN[name]())
    with pytest.raises(ValueError, match=f"{NODE}: 'model': {message}"):
        check_fit(trained("sd15"), UNKNOWN[name](), NODE)


# Weights of other models


def test_another_kind_is_refused():
    weights = Weights("learned_prompt", "SD1.5", {}, {}, "words.safetensors")
    with pytest.raises(ValueError, match=f"{NODE}: words.safetensors is of the kind learned prompt, and this node applies the kind restoration"):
        check_fit(weights, base("sd15").model, NODE)


@pytest.mark.parametrize(("family", "other"), [("sd15", "sdxl"), ("sd3", "flux"), ("flux", "wan"), ("wan", "sd15")])
def test_another_family_is_refused(family, other):
    weights = trained(family)
    names = [anatomy_of(base(each).model).family for each in (family, other)]
    with pytest.raises(ValueError, match=f"{NODE}: {weights.name} was made for {names[0]}, and 'model' is {names[1]}. Load the model"):
        check_fit(weights, base(other).model, NODE)


def test_another_family_is_refused_even_where_all_shapes_agree():
    sd15 = FULL_SIZE["SD1.5"].build()
    weights = new_weights(base("sd15").model, "full", 0, 0)
    with torch.device("meta"):
        given = Weights(weights.kind, "SD1.5", weights.config, new_weights(sd15, "full", 0, 0).tensors, "sd15.safetensors")
    check_fit(given, sd15, NODE)
    with pytest.raises(ValueError, match="sd15.safetensors was made for SD1.5, and 'model' is SD2"):
        check_fit(given, sd2(), NODE)


def changed(change):
    weights = trained("sd15")
    change(weights.tensors)
    return weights


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.pop("adapter.stem.bias"), "adapter.stem.bias is missing, expected 32"),
    (lambda tensors: tensors.update({"adapter.stem.bias": torch.zeros(3)}), "adapter.stem.bias is 3, expected 32"),
    (lambda tensors: tensors.update({"adapter.stem.other": torch.zeros(3, 4)}), "adapter.stem.other is 3x4, expected missing"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    weights = changed(change)
    with pytest.raises(ValueError) as caught:
        check_fit(weights, base("sd15").model, NODE)
    assert str(caught.value).startswith(f"{NODE}: {weights.name} does not fit 'model' (UNet 32): ") and message in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"size": "huge", "rank": 4}, {"size": "full"}, {"size": "full", "rank": "4"}], ids=str)
def test_a_config_of_some_other_pack_is_refused(config):
    weights = trained("sd15")
    given = Weights(weights.kind, weights.family, config, weights.tensors, "odd.safetensors")
    with pytest.raises(ValueError, match=f"{NODE}: odd.safetensors describes itself as .*, and a size"):
        check_fit(given, base("sd15").model, NODE)
