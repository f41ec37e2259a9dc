"""Guidance on every family: it acts, repeats itself bit for bit, and leaves nothing behind on what it was hung on."""

import copy
import gc
import weakref

import pytest
import torch

import comfy.model_management
import comfy.samplers
from mend.model_patches.host import OUT_OF_MEMORY, WrappersMP
from mend.samplers import guided_model, posterior_guidance
from mend.samplers.guided_model import GuidedModel, fitted_mask, fitted_pictures
from mend.samplers.posterior_guidance import Posterior
from mend.tests import tiny_models
from mend.tests.samplers.tiny_guidance import ALIGNMENT, EARLY, KINDS, QUALITY, SIDE, guided, model, new_model, pictures, sample, vae_of
from mend.tests.training.tiny_training import video_vae

OPTIONS = {
    "default": {},
    "through the model": {"through_model": True},
    "published": {"published": True},
    "companion": {"companion": True},
    "every second step": {"every": 2},
}


@pytest.fixture(scope="module")
def unguided():
    return {kind: sample(model(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_guidance_acts_and_repeats(unguided, kind, option):
    if option == "every second step" and kind not in ("sd15", "sd3"):
        pytest.skip("the step counter knows no family; eps and flow are enough")
    one, other = (sample(guided(kind, **OPTIONS[option]), kind) for _ in range(2))
    assert torch.isfinite(one).all() and one.shape == unguided[kind].shape
    assert not torch.equal(one, unguided[kind])
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_no_patch(unguided, kind):
    assert torch.equal(sample(guided(kind, strength=0.0, companion=True, through_model=True), kind), unguided[kind])


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_companion_changes_nothing_by_itself(kind, masked):
    """Until guidance begins, here never, pictures are sampled as if they were alone."""
    side = torch.zeros(1, 1, SIDE * 8, SIDE * 8)
    side[..., SIDE * 4:] = 1
    given = dict(batch=2, mask=side if masked else None, latent=torch.randn(tiny_models.latent_shape(kind, 2, SIDE, SIDE), generator=torch.Generator().manual_seed(8)))
    alone = sample(model(kind), kind, **given)
    beside = sample(guided(kind, companion=True, guide_below=0.0), kind, **given)
    # Larger batches go through other kernels of matrix products.
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


def test_no_gradient_goes_through_a_quantised_model(monkeypatch):
    monkeypatch.setattr(guided_model, "is_quantised", lambda patcher: True)
    with pytest.raises(ValueError, match="Apply Posterior Guidance: 'gradient' is 'through model'.*quantised.*'prediction'"):
        guided("sd15", through_model=True)
    guided("sd15")


def test_without_memory_to_go_back_through_the_model_it_says_so(monkeypatch):
    def crowded(*_):
        raise OUT_OF_MEMORY[0]("no memory left")

    monkeypatch.setattr(guided_model, "is_flow", crowded)
    with pytest.raises(MemoryError, match="Apply Posterior Guidance.*'gradient' to 'prediction'"):
        sample(guided("sd15", through_model=True), "sd15")


@pytest.mark.parametrize(("kind", "sampler"), [*(("sd15", name) for name in comfy.samplers.SAMPLER_NAMES),
                                                *(("sd3", name) for name in ("euler", "dpmpp_2m", "dpmpp_sde", "uni_pc", "heun"))])
def test_any_sampler(kind, sampler):
    free = sample(model(kind), kind, sampler=sampler)
    one, other = (sample(guided(kind), kind, sampler=sampler) for _ in range(2))
    assert torch.isfinite(one).all() and torch.equal(one, other) and not torch.equal(one, free)


def state_of(patcher):
    """What a patcher and its model hold, in a form that can be compared."""
    weights = {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}
    modules = [module for root in (patcher.model,) for module in root.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks), len(m._backward_pre_hooks)) for m in modules]
    names = {name: sorted(vars(patcher)[name]) for name in ("wrappers", "callbacks", "attachments", "additional_models", "injections", "object_patches")}
    return weights, hooks, names, copy.deepcopy(patcher.model_options)


def assert_same_state(before, after):
    assert before[0].keys() == after[0].keys() and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through_model", [False, True])
def test_the_base_model_is_left_as_it_was(unguided, kind, through_model):
    base = new_model(kind)
    before, of_vae = state_of(base), {name: tensor.clone() for name, tensor in vae_of(kind).first_stage_model.state_dict().items()}
    patched = guided(kind, base=base, through_model=through_model, companion=True)
    options = copy.deepcopy({name: sorted(group) for name, group in patched.wrappers.items()})
    sample(patched, kind)
    assert_same_state(before, state_of(base))
    assert {name: sorted(group) for name, group in patched.wrappers.items()} == options
    assert all(torch.equal(of_vae[name], tensor) for name, tensor in vae_of(kind).first_stage_model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in vae_of(kind).first_stage_model.modules())
    assert not comfy.model_management.in_training
    assert torch.equal(sample(base, kind), unguided[kind])


@pytest.fixture
def runs(monkeypatch):
    """Weak references to every PosteriorRun that is made."""
    made = []
    start = posterior_guidance.PosteriorRun.__init__

    def note(self, *args, **kwargs):
        start(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(posterior_guidance.PosteriorRun, "__init__", note)
    return made


def test_the_run_is_dead_when_sampling_ends(runs):
    patched = guided("sd15", companion=True)
    result = sample(patched, "sd15")
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None and result is not None


def test_the_run_is_dead_after_an_error(runs, monkeypatch):
    patched = guided("sd15")
    monkeypatch.setattr(posterior_guidance.PosteriorRun, "guide", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(patched, "sd15")
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None and not comfy.model_management.in_training


@pytest.mark.parametrize("through_model", [False, True])
def test_nothing_stays_after_an_error_within_gradients(monkeypatch, through_model):
    base = new_model("flux")
    before = state_of(base)
    monkeypatch.setattr(posterior_guidance.PosteriorRun, "_likelihood", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(guided("flux", base=base, through_model=through_model), "flux")
    assert_same_state(before, state_of(base))
    assert not comfy.model_management.in_training


def test_two_guidances_on_one_model_both_act():
    other = pictures(seed=9)
    both = sample(guided("sd15", base=guided("sd15"), degraded=other), "sd15")
    assert not torch.equal(both, sample(guided("sd15"), "sd15"))
    assert not torch.equal(both, sample(guided("sd15", degraded=other), "sd15"))


def test_cloning_a_guided_model_keeps_the_guidance():
    patched = guided("sd15")
    assert torch.equal(sample(patched.clone(), "sd15"), sample(patched, "sd15"))


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("settings", [{}, {"through_model": True}, {"companion": True}], ids=["default", "through the model", "companion"])
def test_a_batch_is_its_pictures_one_by_one(kind, settings):
    degraded = pictures(2)
    both = sample(guided(kind, degraded=degraded, **settings), kind, batch=2)
    for index in range(2):
        alone = sample(guided(kind, degraded=degraded[index:index + 1], **settings), kind, batch_index=[index])
        # Another batch size sums convolutions and matrix products in another order: bits that F-PAM's Adam, which divides by small gradients,
        # and the line search carry on. A picture that saw another's state would be off by the deviation itself.
        assert (both[index:index + 1] - alone).abs().max() < 2e-3 * alone.std()


def test_one_picture_serves_a_batch():
    both = sample(guided("sd15"), "sd15", batch=2)
    twice = sample(guided("sd15", degraded=pictures().expand(2, -1, -1, -1)), "sd15", batch=2)
    assert torch.equal(both, twice)


def test_no_companion_is_sampled_on_the_way_back_through_the_model():
    seen = []
    out = sample(guided("sd15", companion=True, through_model=True), "sd15", callback=lambda step, x0, x, total: seen.append(x.shape[0]))
    assert set(seen) == {1} and torch.equal(out, sample(guided("sd15", through_model=True), "sd15"))


def test_wan_frames_are_guided_through_their_own_vae():
    """Guidance elsewhere uses a VAE of pictures with as many channels; WAN's own decodes a video of one frame."""
    given = GuidedModel(Posterior(**EARLY), ALIGNMENT, QUALITY, video_vae(), pictures(), None, None)
    free, guided_frame = (sample(patcher, "wan") for patcher in (model("wan"), given.attach(model("wan"))))
    assert torch.isfinite(guided_frame).all() and guided_frame.shape == free.shape and not torch.equal(guided_frame, free)


@pytest.mark.parametrize(("shape", "message"), [((1, 1, 900), "pictures and sound together"), ((1, 4, 3, 8, 8), "a video of 3 latent frames")])
def test_what_are_no_pictures_is_refused_before_anything_is_loaded(shape, message):
    """The host lays latents that are sampled together into one row before any wrapper sees them."""
    given = GuidedModel(Posterior(**EARLY), ALIGNMENT, QUALITY, vae_of("sd15"), pictures(), None, None)
    with pytest.raises(ValueError, match=f"Apply Posterior Guidance: the latent .*{message}"):
        given._outer_sample(None, torch.zeros(shape), torch.zeros(shape), None, torch.ones(2))


def test_the_callback_sees_no_companions():
    seen = []
    sample(guided("sd3", companion=True), "sd3", batch=2, callback=lambda step, x0, x, total: seen.append((step, x0.shape[0], x.shape[0], total)))
    assert seen == [(step, 2, 2, 3) for step in range(3)]


def test_companions_start_from_noise_of_their_own():
    noises = []

    class Probe(comfy.samplers.KSAMPLER):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            noises.append(noise.clone())
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)

    for batch in (2, 1):
        sample(guided("sd15", companion=True), "sd15", batch=batch, sampler=Probe(comfy.samplers.sampler_object("euler").sampler_function))
    noise, alone = noises
    assert noise.shape[0] == 4 and len({tuple(row.flatten()[:4].tolist()) for row in noise}) == 4
    assert torch.equal(noise[2], alone[1])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_companions_are_as_noisy_as_their_pictures(share):
    """Noise-Matched Start adds what noise a picture lacks, which may be none."""
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(4)) * share
    both, _, _ = guided_model._with_companions(noise, torch.zeros_like(noise), None, 5)
    torch.testing.assert_close(both[2:].std((1, 2, 3)), noise.std((1, 2, 3)), atol=0.02 * share, rtol=0.0)


def test_a_companion_works_with_a_noise_mask():
    mask = torch.zeros(1, 1, SIDE * 8, SIDE * 8)
    mask[..., SIDE * 4:] = 1
    latent = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(8))
    out = sample(guided("sd15", companion=True), "sd15", batch=2, latent=latent, mask=mask)
    # Euler's last step reaches the held latent through x + (latent - x) / sigma * -sigma.
    torch.testing.assert_close(out[..., :SIDE // 2], latent[..., :SIDE // 2], atol=1e-4, rtol=1e-4)


def test_counters_count_the_work():
    found = []
    sample(guided("sd15", steps=2, on_finish=found.append), "sd15", steps=4)
    # The first of four steps is above t1: three guided ones, each of two solver steps.
    assert found[0].decoder_backwards == 3 * 2 and found[0].updates == 4


def test_every_second_step_solves_half_as_often():
    counted = []
    for every in (1, 2):
        found = []
        sample(guided("sd15", every=every, steps=1, on_finish=found.append), "sd15", steps=5)
        counted.append(found[0].decoder_backwards)
    # Steps 1 to 4 are guided: all of them, or the first there is (1) and then 2 and 4.
    assert counted == [4, 3]


@pytest.mark.parametrize("through_model", [False, True])
def test_psi_has_learned_before_it_guides(monkeypatch, through_model):
    order = []
    learn, guide = guided_model.PosteriorRun._learn, guided_model.PosteriorRun._likelihood
    monkeypatch.setattr(guided_model.PosteriorRun, "_learn", lambda self, *args: (order.append("learn"), learn(self, *args))[1])
    monkeypatch.setattr(guided_model.PosteriorRun, "_likelihood", lambda self, *args: (order.append("guide"), guide(self, *args))[1])
    sample(guided("sd15", guide_below=1.1, through_model=through_model), "sd15", steps=2)
    assert "guide" in order and order[0] == "learn"


def test_a_late_start_warms_up_once(monkeypatch):
    updates = []
    update = posterior_guidance.AlignmentRun.update
    monkeypatch.setattr(posterior_guidance.AlignmentRun, "update", lambda self, *args: (updates.append(1), update(self, *args))[1])
    from mend.samplers.alignment import Alignment

    sample(guided("sd15", alignment=Alignment(crop=32, warmup=5, updates=2), guide_below=1.1), "sd15", steps=3)
    assert len(updates) == 5 + 2 + 2


# Masks


def mask_of(value, side=SIDE * 8):
    return torch.full((1, side, side), value)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("through_model", [False, True])
def test_a_white_mask_is_no_mask(kind, through_model):
    white = sample(guided(kind, mask=mask_of(1.0), through_model=through_model), kind)
    assert torch.equal(white, sample(guided(kind, through_model=through_model), kind))


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_a_black_mask_is_no_guidance(unguided, kind):
    # With nothing to compare the gradient is zero exactly, and so is the step.
    assert torch.equal(sample(guided(kind, mask=mask_of(0.0)), kind), unguided[kind])


def test_a_black_mask_is_no_guidance_through_the_model(unguided):
    # The denoiser runs with gradients on, where the host may take other kernels; nothing else may differ.
    out = sample(guided("sd15", mask=mask_of(0.0), through_model=True), "sd15")
    torch.testing.assert_close(out, unguided["sd15"], atol=1e-4, rtol=1e-4)


def test_half_a_mask_guides_half_the_picture(unguided):
    mask = mask_of(0.0)
    mask[..., :SIDE * 4] = 1
    moved = (sample(guided("sd15", mask=mask), "sd15") - unguided["sd15"]).abs().mean((0, 1, 2))
    # The denoiser and this decoder's attention both look across the border, so the black half moves too, but less; with a decoder that does
    # not, tests/samplers/test_posterior_guidance.py shows that it stays still.
    assert moved[:SIDE // 2].mean() > moved[SIDE // 2:].mean()


def test_a_mask_of_another_size_is_scaled():
    small = torch.zeros(1, 3, 3)
    small[..., 0] = 1
    fitted = fitted_mask(small, (48, 48), (48, 48), 2)
    assert fitted.shape == (2, 1, 48, 48)
    assert fitted[..., :8].mean() > 0.99 and fitted[..., 24:].max() < 0.01
    assert torch.isfinite(sample(guided("sd15", mask=small), "sd15")).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 513), (48, 48)])
def test_plain_masks_stay_plain_at_any_size(size):
    for value in (0.0, 1.0):
        fitted = fitted_mask(torch.full((1, *size), value), (45, 44), (48, 48), 1)
        # The weights of the resampling add up to 1 but for rounding.
        torch.testing.assert_close(fitted, torch.full_like(fitted, value), atol=1e-6, rtol=0)


def test_a_mask_is_padded_as_the_picture_is():
    mask = torch.rand(1, 45, 44, generator=torch.Generator().manual_seed(0))
    padded = fitted_mask(mask, (45, 44), (48, 48), 1)
    picture = fitted_pictures(mask[..., None].expand(-1, -1, -1, 3), 1, (6, 6), 8)
    assert torch.equal(padded[:, 0], picture[:, 0])


# Pictures


@pytest.mark.parametrize("size", [(48, 48), (41, 48), (48, 41), (55, 55), (44, 51)])
def test_less_than_a_cell_is_padded_or_cropped(size):
    image = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(0))
    fitted = fitted_pictures(image, 2, (6, 6), 8)
    assert fitted.shape == (2, 3, 48, 48)
    # About the middle, as the host crops before it encodes and as Frame Image pads.
    (top, height), (left, width) = ((abs(48 - side) // 2, min(side, 48)) for side in size)
    inner = fitted[0, :, top if size[0] < 48 else 0:, left if size[1] < 48 else 0:][:, :height, :width]
    assert torch.equal(inner, image[0, top if size[0] > 48 else 0:, left if size[1] > 48 else 0:][:height, :width].movedim(-1, 0))


@pytest.mark.parametrize(("size", "cells"), [((1, 1), (1, 1)), ((7, 513), (1, 65)), ((7, 513), (1, 64))])
def test_odd_pictures_fit(size, cells):
    fitted = fitted_pictures(torch.rand(1, *size, 4), 1, cells, 8)
    assert fitted.shape == (1, 3, cells[0] * 8, cells[1] * 8) and torch.isfinite(fitted).all()


@pytest.mark.parametrize("size", [(40, 48), (48, 56), (96, 96)])
def test_a_cell_or_more_is_refused(size):
    with pytest.raises(ValueError, match=rf"Apply Posterior Guidance: 'degraded' is {size[1]} x {size[0]} but the latent .* 48 x 48"):
        fitted_pictures(torch.zeros(1, *size, 3), 1, (6, 6), 8)


def test_a_wrong_number_of_pictures_or_masks_is_refused():
    with pytest.raises(ValueError, match="'degraded' holds 3 pictures but the latent batch has 2"):
        fitted_pictures(torch.zeros(3, 48, 48, 3), 2, (6, 6), 8)
    with pytest.raises(ValueError, match="'mask' holds 3 masks but the latent batch has 2"):
        fitted_mask(torch.zeros(3, 48, 48), (48, 48), (48, 48), 2)


def test_the_guidance_is_registered_as_wrappers_only():
    patched = guided("sd15")
    assert sorted(kind for kind, group in patched.wrappers.items() if group) == sorted([WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING])
    assert not model("sd15").wrappers.get(WrappersMP.OUTER_SAMPLE)
