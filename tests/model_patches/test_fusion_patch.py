"""Degradation-aware feature fusion on models: a fresh one changes nothing, a trained one acts where and when it is told, and none leaves a trace."""

import pytest
import torch

import comfy.samplers
from mend.model_patches.diffusion_adapter import lora_of
from mend.model_patches.fusion_patch import check_fit
from mend.model_patches.host_lora import with_lora
from mend.model_patches.weights_file import Weights
from mend.tests.model_patches import adapters
from mend.tests.model_patches.adapters import base, placed, sampled
from mend.tests.model_patches.fusions import FAMILIES, NODE, applied, fresh, seen, spy_on_visits, trained
from mend.tests.tiny_models import conditioning, model

every_family = pytest.mark.parametrize("family", FAMILIES)
SIZES = [dict(), dict(height=7, width=9), dict(batch=2)]


@pytest.fixture
def visits(monkeypatch):
    return spy_on_visits(monkeypatch)


def run(family, mask=None, size=None, weights=None, **settings):
    size = size or {}
    return sampled(applied(base(family), weights or trained(family), seen(family, **size), mask, **settings), family, **size)


@pytest.mark.parametrize("family", (*FAMILIES, "sd15"))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_fresh_fusion_changes_nothing(visits, family, size):
    weights = fresh(family, rank=2)
    check_fit(weights, base(family).model, NODE)
    assert lora_of(weights) == {}
    assert torch.equal(run(family, None, size, weights), sampled(base(family), family, **size)) and visits


@pytest.mark.parametrize("settings", [dict(preset="published"), dict(single=False), dict(preset="published", single=False)], ids=str)
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_every_layout(family, settings):
    plain, size = sampled(base(family), family, height=7, width=9), dict(height=7, width=9)
    assert torch.equal(run(family, None, size, fresh(family, **settings)), plain)
    check_fit(trained(family, **settings), base(family).model, NODE)
    found = run(family, None, size, trained(family, **settings))
    assert found.isfinite().all() and not torch.equal(found, plain)


@every_family
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_trained_fusion_acts_and_leaves_nothing_behind(family, size):
    weights, plain = trained(family), sampled(base(family), family, **size)
    patched = applied(base(family), weights, seen(family, **size))
    first = sampled(patched, family, **size)
    assert first.isfinite().all() and (first - plain).abs().max() > 1e-3
    assert torch.equal(sampled(patched, family, **size), first)
    assert not torch.equal(sampled(applied(base(family), weights, seen(family, 8, **size)), family, **size), first), "the degraded picture must matter"
    assert torch.equal(run(family, None, size, weights, strength=0.0), plain)
    assert torch.equal(sampled(base(family), family, **size), plain)


@every_family
def test_it_stands_right_after_the_first_layer(visits, family):
    run(family)
    width = {"sdxl": 64, "sd3": 128, "flux": 32, "wan": 48}[family]
    assert len(visits) == 2, "two steps, both prompts at once"
    for visit in visits:
        assert visit.before.shape == ((2, width, 8, 8) if family == "sdxl" else (2, 16, width)) and visit.change.any()
    assert visits[0].time == pytest.approx(torch.full((2,), 1000.0)) and visits[1].time.max() < 900


@every_family
def test_masks_act_where_it_stands(visits, family):
    plain = sampled(base(family), family)
    assert torch.equal(run(family, torch.zeros(1, 64, 64)), plain) and not any(visit.change.any() for visit in visits)
    whole = run(family)
    assert torch.equal(run(family, torch.ones(64, 64)), whole)
    half = torch.zeros(1, 64, 64)
    half[..., 32:] = 1
    visits.clear()
    halved = run(family, half)
    assert not torch.equal(halved, whole) and not torch.equal(halved, plain)
    change = placed(family, visits[0].change)
    assert not change[..., : change.shape[-1] // 2].any() and change[..., change.shape[-1] // 2 :].flatten(-2).any(-1).all()
    assert torch.equal(run(family, torch.full((1, 8, 8), 0.5)), run(family, strength=0.5))


def test_each_picture_has_its_own_mask(visits):
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    run("sd3", masks, dict(batch=2))
    assert not visits[0].change[0::2].any() and visits[0].change[1::2].any()


def test_tokens_of_reference_pictures_stay(visits):
    given, lq = [], torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    for seed in (1, 2):
        given.append([[tokens, {**extra, "reference_latents": [lq]}] for tokens, extra in conditioning("flux", seed)])
    sampled(applied(base("flux"), trained("flux"), seen("flux")), "flux", positive=given[0], negative=given[1])
    assert visits[0].before.shape[1] == 16 + 4
    assert visits[0].change[:, :16].any(-1).all() and not visits[0].change[:, 16:].any()


def test_videos_are_fused_frame_by_frame(visits):
    size = dict(frames=3)
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8), torch.zeros(8, 8)])
    run("wan", masks, size)
    change = placed("wan", visits[0].change)
    assert not change[:, :, 0].any() and change[:, :, 1].any() and not change[:, :, 2].any()


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize(("start", "end"), [(0.3, 0.6), (0.5, 1.0), (1.0, 1.0)])
def test_it_acts_in_its_part_of_the_schedule(visits, family, start, end):
    patched = applied(base(family), trained(family), seen(family), start_percent=start, end_percent=end)
    found = sampled(patched, family, 10)
    sampling = patched.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)[:-1]
    assert len(visits) == sum(last <= float(sigma) <= first for sigma in sigmas)
    assert torch.equal(found, sampled(base(family), family, 10)) == (not visits)


# Areas


def test_areas_see_their_own_part(visits):
    features = torch.arange(8.0).expand(1, 32, 8, 8).clone()
    weights = trained("sdxl")
    area = [[tokens, {**extra, "area": (8, 4, 0, 4)}] for tokens, extra in conditioning("sdxl")]
    patched = applied(base("sdxl"), weights, features)
    result = sampled(patched, "sdxl", positive=area, negative=conditioning("sdxl", 2))
    assert result.isfinite().all()
    whole = next(visit.e for visit in visits if visit.e.shape[-1] == 8)
    cut = next(visit.e for visit in visits if visit.e.shape[-1] == 4)
    assert torch.equal(cut[0], whole[0, ..., 4:])


def test_the_condition_is_embedded_once_a_run(monkeypatch):
    weights = trained("sdxl")
    patched = applied(base("sdxl"), weights, seen("sdxl"))
    network, calls = patched.get_additional_models()[0].model, []
    embedding = network.embedding.forward
    monkeypatch.setattr(network.embedding, "forward", lambda features: (calls.append(1), embedding(features))[1])
    sampled(patched, "sdxl", 6)
    assert len(calls) == 1


# Together


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_with_an_adapter_in_any_order(visits, family):
    adapter, lq = adapters.trained(family), adapters.lq(family)
    first = sampled(applied(adapters.applied(base(family), adapter, lq), trained(family), seen(family)), family)
    second = sampled(adapters.applied(applied(base(family), trained(family), seen(family)), adapter, lq), family)
    assert torch.equal(first, second)
    alone = (run(family), sampled(adapters.applied(base(family), adapter, lq), family))
    assert not any(torch.equal(first, other) for other in alone)
    fused = applied(adapters.applied(base(family), adapter, lq), fresh(family), seen(family))
    assert torch.equal(sampled(fused, family), alone[1]), "a fresh one leaves an adapter as it is"


def test_two_fusions_and_a_lora():
    weights = trained("sdxl", rank=2)
    twice = applied(applied(base("sdxl"), weights, seen("sdxl")), weights, seen("sdxl"))
    assert not torch.equal(sampled(twice, "sdxl"), run("sdxl", weights=weights))
    assert len(twice.get_additional_models()) == 2
    both = with_lora(applied(base("sdxl"), weights, seen("sdxl")), lora_of(weights), 1.0)
    assert not torch.equal(sampled(both, "sdxl"), run("sdxl", weights=weights))


def test_the_seed_fixes_fresh_weights():
    one, same, other = fresh("sdxl", rank=2), fresh("sdxl", rank=2), fresh("sdxl", rank=2, seed=1)
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in one.tensors.items())
    assert not torch.equal(one.tensors["fusion.latent_in.weight"], other.tensors["fusion.latent_in.weight"])


def test_half_precision_files_act_alike():
    weights = trained("sdxl")
    halved = Weights(weights.kind, weights.family, weights.config, {name: t.half() for name, t in weights.tensors.items()})
    effect = (run("sdxl") - sampled(base("sdxl"), "sdxl")).abs().max()
    # Half precision keeps three digits.
    assert (run("sdxl", weights=halved) - run("sdxl")).abs().max() < 1e-2 * effect


# What is refused


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="the new fusion for UNet 64 was made for UNet 64, and 'model' is SD3 of depth 2. Load the model"):
        check_fit(trained("sdxl"), base("sd3").model, NODE)
    with pytest.raises(ValueError, match="is of the kind restoration adapter, and this node applies the kind fusion"):
        check_fit(adapters.fresh("sdxl"), base("sdxl").model, NODE)
    with pytest.raises(ValueError, match="models of the kind Flux"):
        check_fit(trained("flux"), model("flux", global_modulation=True).model, NODE)


@pytest.mark.parametrize("config", [{"preset": "huge"}, {"features": "many"}, {"features": 0}, {"rank": True}, {"single": 1}, {"rank": None}, {"fine_tune": 1}, {"fine_tune": True, "rank": 4}], ids=str)
def test_descriptions_that_make_no_sense(config):
    weights = fresh("sdxl")
    odd = Weights(weights.kind, weights.family, {**weights.config, **config}, weights.tensors, "odd.safetensors")
    with pytest.raises(ValueError, match=f"{NODE}: odd.safetensors describes itself as .* expected. Update the pack"):
        check_fit(odd, base("sdxl").model, NODE)


@pytest.mark.parametrize("change", [{"fusion.zero.bias": None}, {"fusion.zero.bias": torch.zeros(3)}, {"fusion.more": torch.zeros(1)}], ids=str)
def test_files_that_are_incomplete(change):
    weights = fresh("sdxl")
    tensors = {name: tensor for name, tensor in (weights.tensors | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"does not fit 'model' .UNet 64.: {next(iter(change))} is .* The file is incomplete"):
        check_fit(Weights(weights.kind, weights.family, weights.config, tensors), base("sdxl").model, NODE)


def test_pictures_of_another_size():
    with pytest.raises(ValueError, match=f"{NODE}: the encoded degraded picture is 1x32x8x12 and the one that is sampled 1x4x8x8. Encode the same"):
        sampled(applied(base("sdxl"), trained("sdxl"), seen("sdxl", width=12)), "sdxl")
    with pytest.raises(ValueError, match="'degraded' holds 2 for a batch of 3"):
        sampled(applied(base("sdxl"), trained("sdxl"), seen("sdxl", batch=2)), "sdxl", batch=3)
