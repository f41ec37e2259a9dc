"""Where and when an adapter acts, seen at the places after the blocks."""

import pytest
import torch

import comfy.samplers
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, ModelSamplingSD3
from mend.model_patches.anatomy import anatomy_of
from mend.model_patches.lq_condition import latent_mask
from mend.model_patches.restoration_adapter import adapter_sites
from mend.tests.model_patches.adapters import FLOWS, NODE, applied, base, lq, placed, sampled, spy_on_visits, trained
from mend.tests.tiny_models import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def visits(monkeypatch):
    return spy_on_visits(monkeypatch)


def run(family, mask=None, size=None, **settings):
    size = size or {}
    return sampled(applied(base(family), trained(family), lq(family, **size), mask, **settings), family, **size)


def half(*shape):
    """Black on the left, white on the right."""
    mask = torch.zeros(shape)
    mask[..., shape[-1] // 2:] = 1
    return mask


# Masks


@every_family
def test_a_black_mask_is_the_model_alone(visits, family):
    assert torch.equal(run(family, torch.zeros(1, 64, 64)), sampled(base(family), family))
    assert visits and not any(visit.change.any() for visit in visits)


@every_family
@pytest.mark.parametrize("size", [dict(), dict(height=7, width=9), dict(batch=2)], ids=str)
def test_a_white_mask_is_no_mask(family, size):
    assert torch.equal(run(family, torch.ones(1, 64, 64), size), run(family, None, size))


@every_family
def test_a_half_mask_changes_half(visits, family):
    whole, halved = run(family), run(family, half(1, 8, 8))
    assert not torch.equal(halved, whole) and not torch.equal(halved, sampled(base(family), family))
    masked = visits[len(visits) // 2:]
    for visit in masked:
        change = placed(family, visit.change)
        middle = change.shape[-1] // 2
        assert not change[..., :middle].any(), visit.site
        assert change[..., middle:].flatten(-2).any(-1).all(), visit.site
    first, unmasked = placed(family, masked[0].change), placed(family, visits[0].change)
    assert torch.equal(first[..., first.shape[-1] // 2:], unmasked[..., first.shape[-1] // 2:])


@every_family
@pytest.mark.parametrize("shape", [(1, 64, 64), (8, 8), (1, 16, 24), (1, 800, 600)], ids=str)
def test_masks_of_another_size_are_scaled(family, shape):
    assert torch.equal(run(family, half(*shape)), run(family, half(1, 8, 8)))


@every_family
def test_grey_weakens(family):
    assert torch.equal(run(family, torch.full((1, 32, 32), 0.5)), run(family, strength=0.5))
    assert torch.equal(run(family, torch.full((1, 8, 8), 3.0)), run(family)), "what is above white is white"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "wan"])
def test_each_picture_has_its_own_mask(visits, family):
    masks = torch.stack([torch.zeros(8, 8), half(8, 8)])
    run(family, masks, dict(batch=2))
    for visit in visits:
        black, halved = visit.change[0::2], visit.change[1::2]
        assert not black.any() and halved.any()
        assert torch.equal(visit.mask[0::2, 0], masks[:1].expand(2, -1, -1))


def test_masks_on_video_are_frames(visits):
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8), torch.zeros(8, 8)])
    run("wan", masks, dict(frames=3))
    for visit in visits:
        change = placed("wan", visit.change)
        assert not change[:, :, 0].any() and change[:, :, 1].any() and not change[:, :, 2].any()
    spread = run("wan", masks.repeat_interleave(4, 0), dict(frames=3))
    assert torch.equal(spread, run("wan", masks, dict(frames=3))), "a mask for each frame of the video, where four make one of the latent"


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize(("count", "batch"), [(0, 1), (2, 1), (2, 3), (3, 2)])
def test_a_wrong_number_of_masks_is_refused(family, count, batch):
    with pytest.raises(ValueError, match=f"{NODE}: 'mask' holds {count} for a batch of {batch}. Give one for all, or one each."):
        run(family, torch.ones(count, 8, 8), dict(batch=batch))


# Time


STEPS = 10


def sigmas_of(patcher):
    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)[:-1].tolist()


def acted(visits, family):
    """The sigmas at which adapters acted; all of them at each."""
    names = [site.name for site in adapter_sites(anatomy_of(base(family).model))]
    assert [visit.site.name for visit in visits] == names * (len(visits) // len(names))
    return [visit.sigma for visit in visits[::len(names)]]


@every_family
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (0.3, 0.6), (0.6, 0.3), (1.0, 1.0), (0.0, 0.0)])
def test_it_acts_in_its_part_of_the_schedule(visits, family, start, end):
    patched = applied(base(family), trained(family), lq(family), start_percent=start, end_percent=end)
    sampled(patched, family, STEPS)
    sampling = patched.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    expected = [sigma for sigma in sigmas_of(patched) if last <= sigma <= first]
    assert acted(visits, family) == pytest.approx(expected)
    if family not in FLOWS:
        # Ten equal steps of model time, of which one may lie on an edge.
        assert abs(len(expected) - round(STEPS * max(0.0, end - start))) <= 1


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_it_follows_a_schedule_that_is_set_after_it(visits, family):
    patched = applied(base(family), trained(family), lq(family), start_percent=0.5)
    shifted = {
        "sd15": lambda: ModelSamplingDiscrete().patch(patched, "eps", True)[0],
        "sd3": lambda: ModelSamplingSD3().patch(patched, 6.0)[0],
        "flux": lambda: ModelSamplingFlux().patch(patched, 1.15, 3.0, 64, 64)[0],
    }[family]()
    sampled(shifted, family, STEPS)
    first = shifted.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert first != pytest.approx(patched.get_model_object("model_sampling").percent_to_sigma(0.5))
    assert acted(visits, family) == pytest.approx([sigma for sigma in sigmas_of(shifted) if sigma <= first])


@every_family
def test_outside_its_part_the_model_is_itself(family):
    plain = sampled(base(family), family, STEPS)
    assert torch.equal(sampled(applied(base(family), trained(family), lq(family), start_percent=1.0), family, STEPS), plain)
    late = sampled(applied(base(family), trained(family), lq(family), start_percent=0.5), family, STEPS)
    always = sampled(applied(base(family), trained(family), lq(family)), family, STEPS)
    assert not torch.equal(late, plain) and not torch.equal(late, always)


def test_the_masks_of_a_video_go_to_the_latent_frames_of_their_pictures():
    """WAN's first latent frame is the first picture, and each other one the four after it."""
    masks = torch.zeros(9, 16, 16)
    masks[0], masks[5:] = 1, 0.5
    assert latent_mask(masks, (3, 2, 2))[0, 0].flatten(1).tolist() == [[1] * 4, [0] * 4, [0.5] * 4]
    assert latent_mask(masks[:1], (3, 2, 2)).eq(1).all() and latent_mask(masks[:4], (3, 2, 2)).shape == (1, 1, 3, 2, 2)
