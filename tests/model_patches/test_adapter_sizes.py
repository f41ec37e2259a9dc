"""Latents of every size and number: what an adapter sees of the degraded latent is what belongs to the latent that is sampled."""

import pytest
import torch

import comfy.cldm.cldm
import comfy.context_windows
import comfy.controlnet
import comfy.model_management
import comfy.ops
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from mend.model_patches.host import evaluate, model_conds
from mend.model_patches.lq_condition import LatentCondition
from mend.tests.model_patches.adapters import NODE, applied, base, fresh, lq, noise_of, placed, sampled, spy_on_visits, trained
from mend.tests.tiny_models import FAMILIES, conditioning, initialise, latent_shape, unet_config

every_family = pytest.mark.parametrize("family", FAMILIES)
# Another batch size sums matrix products in another order, in float32, and latents of eps models start at a deviation of 14.6.
OTHER_BATCH = dict(atol=1e-3, rtol=1e-3)


@pytest.fixture
def visits(monkeypatch):
    return spy_on_visits(monkeypatch)


def run(family, c_lq, weights=None, **size):
    return sampled(applied(base(family), weights or trained(family), c_lq), family, **size)


def coordinates(family, **size):
    """A latent whose channels hold where a cell is: channel 0 its column, 1 its row, 2 its frame or picture."""
    shape = latent_shape(family, **size)
    latent = torch.zeros(shape)
    latent[:, 0] = torch.arange(shape[-1]).float()
    latent[:, 1] = torch.arange(shape[-2]).float().unsqueeze(-1)
    if family == "wan":
        latent[:, 2] = torch.arange(shape[2]).float().reshape(-1, 1, 1)
    else:
        latent[:, 2] = torch.arange(shape[0]).float().reshape(-1, 1, 1)
    return latent


# Sides


@every_family
@pytest.mark.parametrize("sides", [(7, 9), (9, 7), (1, 1), (3, 2)], ids=str)
def test_odd_sizes(family, sides):
    size = dict(height=sides[0], width=sides[1])
    result = run(family, lq(family, **size), **size)
    assert result.shape == latent_shape(family, **size) and result.isfinite().all()
    assert not torch.equal(result, sampled(base(family), family, **size))


@pytest.mark.parametrize("adapter_first", [True, False])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_beside_a_patch_that_shrinks_features(block, adapter_first):
    def shrunk(model):
        return PatchModelAddDownscale.execute(model, block, 2.0, 0.0, 1.0, True, "bilinear", "bilinear")[0]

    size, weights = dict(height=16, width=16), trained("sd15")
    c_lq = lq("sd15", **size)
    both = shrunk(applied(base("sd15"), weights, c_lq)) if adapter_first else applied(shrunk(base("sd15")), weights, c_lq)
    result = sampled(both, "sd15", **size)
    assert result.isfinite().all() and not torch.equal(result, sampled(shrunk(base("sd15")), "sd15", **size))


@every_family
@pytest.mark.parametrize("sides", [(7, 9), (9, 7), (8, 9), (7, 7)], ids=str)
def test_a_cell_more_or_less(visits, family, sides):
    own = coordinates(family, height=sides[0], width=sides[1])
    assert run(family, own).isfinite().all()
    seen = visits[0].c_lq
    assert seen.shape[-2:] == (8, 8)
    assert seen[0, 0].flatten(0, -2)[0].tolist() == [min(column, sides[1] - 1) for column in range(8)]
    assert seen[0, 1].flatten(0, -2)[:, 0].tolist()[:8] == [min(row, sides[0] - 1) for row in range(8)]


@every_family
@pytest.mark.parametrize("sides", [(6, 8), (8, 10), (16, 16)], ids=str)
def test_other_sizes_are_refused(family, sides):
    with pytest.raises(ValueError, match=f"{NODE}: the degraded latent is .*x8x8. Encode the same picture that you connect here"):
        run(family, lq(family, height=sides[0], width=sides[1]))


@pytest.mark.parametrize(("family", "other"), [("sd15", "sd3"), ("sd3", "wan"), ("wan", "flux"), ("flux", "sd15")])
def test_latents_of_another_kind_are_refused(family, other):
    with pytest.raises(ValueError, match="Apply Restoration Adapter: the degraded latent is .* Use the VAE of this model"):
        run(family, lq(other))


def test_latents_of_several_parts_are_refused():
    condition = LatentCondition("test", lq("sd15"), None, NODE)
    message = f"{NODE}: the degraded latent is 1x4x8x8 and the one that is sampled 1x1x262. Use the VAE of this model"
    with pytest.raises(ValueError, match=message):
        condition.fitted(torch.zeros(1, 1, 262))  # as the host packs them while it samples


@every_family
def test_pieces_of_another_packs_making_are_refused(family):
    patched = applied(base(family), trained(family), lq(family))
    key, = patched.additional_models
    conds = {k: v.cond for k, v in model_conds(patched.model, conditioning(family), lq(family)).items()}
    held = torch.cat([lq(family), torch.ones_like(lq(family)[:, :1])], 1)
    with pytest.raises(ValueError, match="Apply Restoration Adapter: the model is given .*x4x8 of a latent of .*x8x8, by a tiled sampler"):
        evaluate(patched, lq(family)[..., :4, :], torch.tensor([0.5]), {**conds, key: held})


@every_family
def test_a_cell_of_the_latent_reaches_the_feature_above_it(visits, family):
    # Before anything has mixed: the first adapter's change differs only near the cell that differs.
    c_lq = lq(family, height=16, width=16)
    other = c_lq.clone()
    other[..., 12:14, 2:4] += 1
    run(family, c_lq, height=16, width=16)
    first = visits[0]
    visits.clear()
    run(family, other, height=16, width=16)
    assert torch.equal(first.before, visits[0].before)
    difference = placed(family, visits[0].change - first.change, 16, 16).abs().flatten(0, -3).amax(0)
    assert difference[6, 1] > 0
    if family in ("sd15", "sdxl"):
        # Group norms look at everything a little, convolutions at their neighbours.
        assert difference[5:8, 0:3].mean() > 5 * difference[0:3, 5:8].mean()
        assert difference[5:8, 0:3].max() == difference.max()
    else:
        difference[6, 1] = 0
        assert not difference.any()


@every_family
def test_features_are_of_the_sizes_that_are_counted_with(visits, family):
    run(family, lq(family, height=16, width=16), height=16, width=16)
    for visit in visits:
        side = 16 // visit.site.scale
        assert placed(family, visit.before, 16, 16).shape[1:] == (visit.site.channels, *[1] * (family not in ("sd15", "sdxl")), side, side)


# Numbers


@every_family
def test_a_batch_is_its_pictures_one_by_one(family):
    c_lq, noise = lq(family, batch=2), noise_of(family, batch=2)
    both = run(family, c_lq, noise=noise)
    for index in range(2):
        row = slice(index, index + 1)
        torch.testing.assert_close(both[row], run(family, c_lq[row], noise=noise[row]), **OTHER_BATCH)


@every_family
def test_one_degraded_latent_serves_all(family):
    one = lq(family)
    together = run(family, one, batch=3)
    assert torch.equal(together, run(family, one.repeat(3, *[1] * (one.ndim - 1)), batch=3))


@every_family
@pytest.mark.parametrize(("count", "batch"), [(2, 3), (3, 2), (2, 1)])
def test_a_wrong_number_is_refused(family, count, batch):
    with pytest.raises(ValueError, match=f"{NODE}: 'degraded' holds {count} for a batch of {batch}. Give one for all, or one each."):
        run(family, lq(family, batch=count), batch=batch)


# Video


def test_frames_see_their_own(visits):
    c_lq = lq("wan", frames=5)
    run("wan", c_lq, frames=5)
    first = visits[0]
    visits.clear()
    other = c_lq.clone()
    other[:, :, 3] += 1
    run("wan", other, frames=5)
    difference = placed("wan", visits[0].change - first.change).abs().flatten(3).amax((0, 1, 3))
    assert difference[3] > 0 and not difference[[0, 1, 2, 4]].any()


@pytest.mark.parametrize("size", [dict(frames=1), dict(frames=5), dict(frames=3, height=7, width=9), dict(frames=3, batch=2)], ids=str)
def test_video_of_any_length(size):
    plain = sampled(base("wan"), "wan", **size)
    assert torch.equal(run("wan", lq("wan", **size), fresh("wan"), **size), plain)
    result = run("wan", lq("wan", **size), **size)
    assert result.isfinite().all() and not torch.equal(result, plain)


@pytest.mark.parametrize("frames", [1, 4, 6])
def test_another_number_of_frames_is_refused(frames):
    with pytest.raises(ValueError, match=f"the degraded latent is 1x16x{frames}x8x8 and the one that is sampled 1x16x5x8x8"):
        run("wan", lq("wan", frames=frames), frames=5)


def in_windows(patcher, dim, length=4, overlap=1, causal=False):
    """The model sampled in the host's context windows."""
    windowed, windows = patcher.clone(), comfy.context_windows
    windowed.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
        context_length=length, context_overlap=overlap, dim=dim, causal_window_fix=causal)
    return windowed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("family", "dim", "size"), [("wan", 2, dict(frames=7)), ("sd15", 0, dict(batch=7))])
def test_context_windows_take_their_frames(visits, family, dim, size, causal):
    c_lq = coordinates(family, **size)
    plain = sampled(in_windows(base(family), dim, causal=causal), family, **size)
    assert torch.equal(sampled(in_windows(applied(base(family), fresh(family), c_lq), dim, causal=causal), family, **size), plain)
    visits.clear()
    result = sampled(in_windows(applied(base(family), trained(family), c_lq), dim, causal=causal), family, **size)
    assert result.isfinite().all() and not torch.equal(result, plain)
    found = [visit.c_lq[:1, 2] if family == "wan" else visit.c_lq[:len(visit.c_lq) // 2, 2:3] for visit in visits]
    starts = {tuple(frames[..., 0, 0].flatten().int().tolist()) for frames in found}
    assert starts == {(0, 1, 2, 3), (2, 3, 4, 5, 6) if causal else (3, 4, 5, 6)}


# Conditioning


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_areas_take_their_part(visits, family):
    tokens, extra = conditioning(family)[0]
    positive = [[tokens, {**extra, "area": (4, 6, 2, 8), "strength": 1.0}], *conditioning(family, 3)]
    size = dict(height=12, width=16)
    c_lq = coordinates(family, **size)
    result = sampled(applied(base(family), trained(family), c_lq), family, positive=positive, **size)
    plain = sampled(base(family), family, positive=positive, **size)
    assert not torch.equal(result, plain)
    idle = sampled(applied(base(family), fresh(family), c_lq), family, positive=positive, **size)
    assert torch.equal(idle, plain)
    seen = {tuple(visit.c_lq.shape[-2:]) for visit in visits}
    assert seen == {(12, 16), (4, 6)}
    cropped = next(visit for visit in visits if visit.c_lq.shape[-2:] == (4, 6))
    assert cropped.c_lq[0, 0, 0].tolist() == list(range(8, 14)) and cropped.c_lq[0, 1, :, 0].tolist() == list(range(2, 6))
    assert cropped.mask.shape[-2:] == (4, 6)


@every_family
def test_prompts_that_do_not_go_together_are_told_the_same(visits, family):
    tokens, extra = conditioning(family)[0]
    # No multiple of the other's length within what the host repeats.
    longer = [[torch.cat([tokens] * 5 + [tokens[:, :1]], 1), extra]]
    sampled(applied(base(family), trained(family), lq(family)), family, positive=longer)
    assert {len(visit.before) for visit in visits} == {1}
    assert all(torch.equal(visit.c_lq, lq(family)) for visit in visits)
    visits.clear()
    sampled(applied(base(family), trained(family), lq(family)), family)
    assert {len(visit.before) for visit in visits} == {2}
    assert all(torch.equal(visit.c_lq, lq(family).repeat(2, *[1] * (lq(family).ndim - 1))) for visit in visits)


def control():
    """A tiny ControlNet of the host's for SD1.5."""
    config = {k: v for k, v in unet_config(32, 1, linear=False).items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, num_heads=8, dtype=torch.float32, operations=comfy.ops.manual_cast)
    initialise(network, 4)
    device = comfy.model_management.get_torch_device()
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return comfy.controlnet.ControlNet(network, load_device=device).set_cond_hint(hint, 1.0)


def test_it_works_beside_a_controlnet():
    hint = {"control": control(), "control_apply_to_uncond": True}
    positive, negative = ([[c, {**d, **hint}] for c, d in conditioning("sd15", seed)] for seed in (1, 2))
    told = dict(positive=positive, negative=negative)
    plain, controlled = sampled(base("sd15"), "sd15"), sampled(base("sd15"), "sd15", **told)
    assert not torch.equal(plain, controlled)
    assert torch.equal(sampled(applied(base("sd15"), fresh("sd15"), lq("sd15")), "sd15", **told), controlled)
    both = sampled(applied(base("sd15"), trained("sd15"), lq("sd15")), "sd15", **told)
    assert not torch.equal(both, controlled) and not torch.equal(both, run("sd15", lq("sd15")))
