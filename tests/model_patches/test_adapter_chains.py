"""Restoration Adapters under what else the pack offers: rounds of re-noising, and posterior guidance with a companion."""

import pytest
import torch

import comfy.samplers
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from mend.model_patches.anatomy import anatomy_of
from mend.model_patches.restoration_adapter import adapter_sites
from mend.samplers.recurrence import RecurrentSampler
from mend.tests.model_patches.adapters import applied, fresh, lq, spy_on_visits, trained
from mend.tests.samplers.tiny_guidance import SIDE, STILL, guided, model, pictures, sample

KINDS = ("sd15", "sd3", "flux", "wan")
every_kind = pytest.mark.parametrize("kind", KINDS)
SIZE = dict(height=SIDE, width=SIDE)


@pytest.fixture
def visits(monkeypatch):
    return spy_on_visits(monkeypatch)


def adapted(kind, to=None, weights=None, **settings):
    return applied(to or model(kind), weights or trained(kind), lq(kind, **SIZE), **settings)


def evaluations(visits, kind):
    """What was visited at the first place, once for each evaluation of the model."""
    first = adapter_sites(anatomy_of(model(kind).model))[0]
    return [visit for visit in visits if visit.site == first]


def recurrent(rounds):
    return RecurrentSampler(comfy.samplers.sampler_object("euler"), rounds, 0.5)


@every_kind
def test_every_round_is_adapted(visits, kind):
    plain = sample(model(kind), kind, sampler=recurrent(1))
    assert torch.equal(sample(adapted(kind, weights=fresh(kind)), kind, sampler=recurrent(1)), plain)
    visits.clear()
    steps = []
    result = sample(adapted(kind), kind, sampler=recurrent(1), callback=lambda *_: steps.append(1))
    assert not torch.equal(result, plain) and result.isfinite().all()
    assert len(evaluations(visits, kind)) == len(steps) > 3
    for visit in evaluations(visits, kind):
        assert torch.equal(visit.c_lq[:1].cpu(), lq(kind, **SIZE))


@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
@pytest.mark.parametrize("adapter_first", [True, False])
def test_guidance_that_skips_blocks(kind, adapter_first):
    def skipping(patcher):
        return SkipLayerGuidanceDiT.execute(patcher, 3.0, 0.0, 1.0, double_layers="0", single_layers="0")[0]

    both = skipping(adapted(kind)) if adapter_first else adapted(kind, skipping(model(kind)))
    result = sample(both, kind)
    assert result.isfinite().all() and not torch.equal(result, sample(skipping(model(kind)), kind))


@every_kind
@pytest.mark.parametrize("order", ["adapter first", "guidance first"])
def test_the_companion_sees_the_same_degraded_latent(visits, kind, order):
    settings = dict(companion=True, steps=1, alignment=STILL, quality=None)
    c_lq = lq(kind, batch=2, **SIZE)

    def both(weights):
        if order == "adapter first":
            return guided(kind, base=applied(model(kind), weights, c_lq), degraded=pictures(2), **settings)
        return applied(guided(kind, degraded=pictures(2), **settings), weights, c_lq)

    plain = sample(guided(kind, degraded=pictures(2), **settings), kind, batch=2, steps=2)
    assert torch.equal(sample(both(fresh(kind)), kind, batch=2, steps=2), plain)
    visits.clear()
    result = sample(both(trained(kind)), kind, batch=2, steps=2)
    assert result.shape == plain.shape and result.isfinite().all() and not torch.equal(result, plain)
    for visit in evaluations(visits, kind):
        # Two pictures and their companions, told the prompt and the negative one.
        assert torch.equal(visit.c_lq, c_lq.repeat(4, *[1] * (c_lq.ndim - 1)))


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_gradients_through_the_model_pass_the_adapter(visits, kind):
    settings = dict(through_model=True, steps=1, alignment=STILL, quality=None)
    plain = sample(guided(kind, **settings), kind, steps=2)
    idle = sample(guided(kind, base=adapted(kind, weights=fresh(kind)), **settings), kind, steps=2)
    # Gradients of what a place feeds are summed in another order, zeros among them.
    assert (idle - plain).abs().max() < 1e-3 * plain.abs().max()
    result = sample(guided(kind, base=adapted(kind), **settings), kind, steps=2)
    assert visits and result.isfinite().all() and not torch.equal(result, plain)
