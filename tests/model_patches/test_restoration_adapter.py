"""Restoration Adapters on every family: a fresh one changes nothing, a trained one acts, several keep apart, and none leaves a trace."""

import copy

import pytest
import torch

import comfy.memory_management
from mend.model_patches.adapter_patch import check_fit, expected_tensors, inference_patcher
from mend.model_patches.anatomy import anatomy_of
from mend.model_patches.diffusion_adapter import lora_of
from mend.model_patches.host_lora import with_lora
from mend.model_patches.restoration_adapter import adapter_sites
from mend.tests.model_patches.adapters import NODE, applied, base, fresh, lq, sampled, trained
from mend.tests.tiny_models import FAMILIES, model

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("size", [dict(), dict(height=7, width=9), dict(batch=2)], ids=str)
def test_a_fresh_adapter_changes_nothing(family, size):
    weights = fresh(family)
    check_fit(weights, base(family).model, NODE)
    plain = sampled(base(family), family, **size)
    assert lora_of(weights) == {}
    assert torch.equal(sampled(applied(base(family), weights, lq(family, **size)), family, **size), plain)
    assert torch.equal(sampled(base(family), family, **size), plain)


@every_family
def test_a_trained_adapter_acts_and_leaves_nothing_behind(family):
    weights = trained(family)
    check_fit(weights, base(family).model, NODE)
    plain = sampled(base(family), family)
    patched = applied(base(family), weights, lq(family))
    first = sampled(patched, family)
    assert (first - plain).abs().max() > 1e-3
    assert torch.equal(sampled(patched, family), first)
    assert not torch.equal(sampled(applied(base(family), weights, lq(family, 8)), family), first), "the degraded latent must matter"
    assert torch.equal(sampled(applied(base(family), weights, lq(family), strength=0.0), family), plain)
    both = with_lora(patched, lora_of(weights), 1.0)
    assert not torch.equal(sampled(both, family), first)
    assert torch.equal(sampled(base(family), family), plain)
    assert torch.equal(sampled(patched, family), first)


@every_family
def test_every_adapter_is_reached(family):
    plain = sampled(base(family), family)
    for site in adapter_sites(anatomy_of(base(family).model)):
        weights = fresh(family, rank=0)
        name = f"adapter.adapters.{site.name}.zero.weight"
        weights.tensors[name] = torch.randn(weights.tensors[name].shape) * 0.1
        assert not torch.equal(sampled(applied(base(family), weights, lq(family)), family), plain), site


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_small_size_acts_too(family):
    weights = trained(family, size="small")
    check_fit(weights, base(family).model, NODE)
    assert sum(t.numel() for t in weights.tensors.values()) < sum(t.numel() for t in trained(family).tensors.values())
    result = sampled(applied(base(family), weights, lq(family, height=7, width=9)), family, height=7, width=9)
    assert result.isfinite().all() and not torch.equal(result, sampled(base(family), family, height=7, width=9))


def test_the_seed_fixes_fresh_weights():
    one, same, other = (fresh("sd15", seed=seed).tensors for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].ndim > 1 and one[name].any())


# What is left behind


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) + ("forward" in vars(part)) for part in module.modules())


@every_family
def test_weights_and_options_of_the_base_stay(family):
    own = model(family, 3)
    weights, options = copy.deepcopy(own.model.state_dict()), copy.deepcopy(own.model_options)
    for _ in range(2):
        changed = trained(family)
        patched = with_lora(applied(applied(own, changed, lq(family)), trained(family, seed=6), lq(family, 8)), lora_of(changed), 0.7)
        sampled(patched, family)
        del patched
    plain = sampled(own, family)
    assert own.model_options == options and not own.wrappers and not own.additional_models and not own.injections
    assert hooks(own.model) == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in own.model.state_dict().items())
    assert torch.equal(plain, sampled(model(family, 3), family))


@every_family
def test_two_branches_do_not_touch_each_other(family):
    left, right = (applied(base(family), trained(family, seed=seed), lq(family, seed)) for seed in (5, 6))
    alone = sampled(left, family), sampled(right, family)
    assert not torch.equal(*alone)
    for _ in range(2):
        assert torch.equal(sampled(left, family), alone[0]) and torch.equal(sampled(right, family), alone[1])


@every_family
def test_two_on_one_model_both_act_in_their_order(family):
    a, b = trained(family, seed=5), trained(family, seed=6)
    both = sampled(applied(applied(base(family), a, lq(family)), b, lq(family, 8)), family)
    other_way = sampled(applied(applied(base(family), b, lq(family, 8)), a, lq(family)), family)
    for one in (sampled(applied(base(family), a, lq(family)), family), sampled(applied(base(family), b, lq(family, 8)), family), other_way):
        assert not torch.equal(both, one)
    idle = applied(applied(base(family), a, lq(family)), fresh(family), lq(family, 8))
    assert torch.equal(sampled(idle, family), sampled(applied(base(family), a, lq(family)), family))
    twice = applied(applied(base(family), a, lq(family)), a, lq(family), strength=0.0)
    assert torch.equal(sampled(twice, family), sampled(applied(base(family), a, lq(family)), family))


@every_family
def test_uses_of_one_file_share_its_network(family):
    weights = trained(family)
    anatomy = anatomy_of(base(family).model)
    first = inference_patcher(weights, anatomy)
    assert inference_patcher(weights, anatomy) is first
    patched = [applied(base(family), weights, lq(family), strength=strength) for strength in (1.0, 0.5)]
    results = [sampled(each, family) for each in patched]
    assert not torch.equal(*results)
    assert {id(extra.model) for each in patched for extra in each.get_additional_models()} == {id(first.model)}


# Hosts that load weights on demand


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_new_weights_have_values_where_the_host_loads_on_demand(monkeypatch, family):
    expected = fresh(family)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    found = fresh(family)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
    wanted = expected_tensors(anatomy_of(base(family).model), found.config, base(family).model)
    assert {name: t.shape for name, t in wanted.items()} == {name: t.shape for name, t in found.tensors.items()}
