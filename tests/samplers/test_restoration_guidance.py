"""Restoration guidance: the paper's arithmetic, the same pull on any schedule and sampler, and runs that leave nothing behind."""

import copy
import itertools
import math
from functools import cache

import pytest
import torch

import comfy.k_diffusion.sampling
import comfy.samplers
from mend.model_patches.host import noise_to_signal, state_use
from mend.samplers import restoration_guidance
from mend.samplers.degraded_latent import DegradedLatent, cell_mask
from mend.samplers.recurrence import RecurrentSampler
from mend.samplers.restoration_guidance import Pull, Restoration, RestorationGuidance, Target, guided_sampler, ramp, step_weights
from mend.tests import tiny_models
from mend.tests.samplers.test_guided_model import assert_same_state, state_of
from mend.tests.samplers.test_recurrence import wan_vae
from mend.tests.samplers.tiny_guidance import KINDS, SIDE, STILL, family, model, new_model, pictures, sample, vae_of
from mend.tests.samplers.tiny_guidance import guided as posterior

SAMPLERS = comfy.samplers.SAMPLER_NAMES
W, A = 0.05, 0.8
# Acts on all but the last steps, so that samplers that forget are left with an effect.
LONG = dict(onset=0.1)


def even(steps):
    return [1 - i / steps for i in range(steps + 1)]


def kept(weights):
    """How much of the start's weight is left when all moves are made."""
    return math.prod(1 - weight for weight in weights)


def goal(kind, value=1.0, batch=1, side=SIDE):
    """A plain c_lq of the model's own units, as a LATENT would bring it."""
    shape = tiny_models.latent_shape(family(kind), batch, side, side)
    return model(kind).model.process_latent_out(torch.full(shape, float(value)))


def pulled(kind, base=None, latent=None, mask=None, **settings):
    """A model under guidance towards a plain latent."""
    latent = goal(kind) if latent is None else latent
    return RestorationGuidance(Restoration(**settings), DegradedLatent(latent=latent), mask).attach(base or model(kind))


@cache
def gaussian(kind):
    """A model whose exact answer is known: latents are independent standard normal values."""
    patcher = model(kind).clone()
    flow = kind in ("sd3", "flux", "wan")

    def answer(executor, x, t, *args, **kwargs):
        sigma = t.view(-1, *[1] * (x.ndim - 1))
        signal = 1 - sigma if flow else torch.ones_like(sigma)
        return signal * x / (signal**2 + sigma**2)

    patcher.add_wrapper_with_key("apply_model", "gaussian", answer)
    return patcher


def drawn(patcher, kind, **changes):
    """A sample in the model's own units."""
    return patcher.model.process_latent_in(sample(patcher, kind, **changes))


def shift(kind, settings, base=gaussian, latent=None, **changes):
    """What guidance changes, in the model's own units."""
    return drawn(pulled(kind, base(kind), latent, **settings), kind, **changes) - drawn(base(kind), kind, **changes)


# Equations 1 and 2


def test_the_ramp_is_equation_2():
    assert [ramp(t, A) for t in (0.0, 0.5, 0.8)] == [0, 0, 0]
    assert ramp(0.9, A) == pytest.approx(0.5) and ramp(0.99, A) == pytest.approx(0.95) and ramp(0.3, 0.2) == pytest.approx(0.125)


def test_at_100_steps_a_weight_is_the_papers():
    weights = step_weights(even(100), W, A)
    assert weights == pytest.approx([0, *(W * ramp(t / 100, A) for t in range(99, -1, -1))], abs=1e-9)
    assert sum(weights) == pytest.approx(0.475)


@pytest.mark.parametrize(("time", "index"), [(0.9, 2), (0.85, 3)])
def test_a_step_of_any_schedule_counts_for_the_time_it_stands_for(time, index):
    # Away from the ends of the ramp, g is linear over the step, so that its mean is its value.
    assert step_weights(even(20), W, A)[index] == pytest.approx(1 - (1 - W * ramp(time, A)) ** (100 * 0.05))


@pytest.mark.parametrize("times", [even(4), even(8), even(20), even(33), even(400), even(1000), [t**0.5 for t in even(15)], [t**3 for t in even(25)]])
def test_all_moves_of_a_schedule_add_up_to_the_papers(times):
    # (1 - w g)^n with a mean g is not quite the product over n steps, by the square of w.
    assert kept(step_weights(times, W, A)) == pytest.approx(kept(step_weights(even(100), W, A)), rel=0.01)


def test_a_schedule_in_two_parts_is_the_whole():
    whole = even(20)
    parts = kept(step_weights(whole[:3], W, A)) * kept(step_weights(whole[2:], W, A))
    assert parts == pytest.approx(kept(step_weights(whole, W, A)), rel=0.01)


def test_a_late_start_leaves_out_what_was_before_it():
    assert kept(step_weights([t for t in even(100) if t <= 0.9], W, A)) == pytest.approx(math.prod(1 - W * ramp(t / 100, A) for t in range(89, 80, -1)))
    assert kept(step_weights([0.7, 0.4, 0.0], W, A)) == 1


@pytest.mark.parametrize(("times", "weight", "onset"), [([1, 1, 0], 1.0, 0.0), ([1.0, 0.0], 1.0, 0.99), ([0.5, 0.9, 0.0], 1.0, 0.0), ([1.0], 0.5, 0.5)])
def test_odd_schedules_have_weights_too(times, weight, onset):
    assert all(0 <= value <= 1 for value in step_weights([float(t) for t in times], weight, onset))


@pytest.mark.parametrize("kind", ["sd15", "v", "sd3", "flux"])
def test_a_move_is_towards_the_degraded_latent_with_the_same_noise(kind):
    sampling = model(kind).model.model_sampling
    x, x0, c = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma = float(sampling.sigma_max) * 0.6
    pull = Pull(Restoration(), Target(c, None, 1), sampling, torch.tensor([float(sampling.sigma_max), sigma, 0.0]), None)
    pull.weights[1] = 0.3
    signal = 1.0 if noise_to_signal(sampling, sigma) == sigma else 1 - sigma
    noise = (x - signal * x0) / sigma
    matched = sampling.noise_scaling(torch.tensor([sigma]), noise, c, False)
    torch.testing.assert_close(pull.shift(1, x, x0), 0.3 * (matched - x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "v", "sd3", "flux"])
def test_the_literal_move_is_equation_1_on_the_papers_z(kind):
    sampling = model(kind).model.model_sampling
    x, c = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma = float(sampling.sigma_max) * 0.6
    pull = Pull(Restoration(literal=True), Target(c, None, 1), sampling, torch.tensor([float(sampling.sigma_max), sigma, 0.0]), None)
    pull.weights[1] = 0.3
    # z of variance preserving models is x / sqrt(1 + sigma^2), that of flow models x itself.
    spread = (1 + sigma**2) ** 0.5 if noise_to_signal(sampling, sigma) == sigma else 1.0
    z = x / spread
    torch.testing.assert_close((x + pull.shift(1, x, x)) / spread, z + 0.3 * (c - z))


# The same pull on any schedule


SAME_FAR = [*itertools.product([gaussian], ["sd15", "sd3"], ["euler", "dpmpp_2m", "heun"]), *itertools.product([model], ["sd15", "sd3"], ["euler"])]


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize(("base", "kind", "sampler"), SAME_FAR, ids=lambda value: getattr(value, "__name__", value))
def test_20_and_100_steps_are_moved_as_far(kind, literal, sampler, base):
    few, many = (shift(kind, dict(literal=literal), base, sampler=sampler, steps=steps) for steps in (20, 100))
    assert few.norm() == pytest.approx(float(many.norm()), rel=0.1)
    # Not only as far but to the same place: what is left is how the sampler's own steps differ.
    assert (few - many).norm() < 0.15 * many.norm()


def test_the_papers_setting_keeps_62_hundredths():
    # Literal on unit latents: the state's z keeps exp(-0.475) of itself, and the walk down to the result keeps z.
    settings = dict(literal=True)
    start = drawn(gaussian("sd3"), "sd3", steps=400)
    there = drawn(pulled("sd3", gaussian("sd3"), **settings), "sd3", steps=400)
    share = float(((there - there.mean()) * (start - start.mean())).sum() / (start - start.mean()).square().sum())
    # (1 - w g) is a little below exp(-w g), and flow models' z has less than unit variance on the way.
    assert share == pytest.approx(math.exp(-0.475), abs=0.03)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("base", [gaussian, model], ids=["gaussian", "tiny"])
def test_a_moved_prediction_is_a_moved_state_for_euler(monkeypatch, kind, literal, base):
    settings = dict(literal=literal)
    state = shift(kind, settings, base, steps=20)
    monkeypatch.setattr(restoration_guidance, "state_use", lambda function: "copied")
    prediction = shift(kind, settings, base, steps=20)
    # One is divided by 1 - r and multiplied again, in single precision and at sigmas up to 15.
    torch.testing.assert_close(prediction, state, rtol=1e-3, atol=1e-4)


def substepped(name, kind, steps, weight, onset):
    """A single-step sampler run a step at a time, with equation 1 between the steps."""
    function = getattr(comfy.k_diffusion.sampling, f"sample_{name}")

    def walk(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        pull = Pull(Restoration(weight, onset, True), Target(torch.ones_like(x), None, 1), model(kind).model.model_sampling, sigmas, None)
        for index in range(len(sigmas) - 1):
            x = function(denoiser, x, sigmas[index:index + 2], extra_args=extra_args, disable=True)
            if index + 2 < len(sigmas):
                x = x + pull.shift(index + 1, x, x)
        return x

    return drawn(gaussian(kind), kind, steps=steps, sampler=comfy.samplers.KSAMPLER(walk))


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "exp_heun_2_x0"])
def test_states_are_moved_and_guesses_of_them_are_not(kind, name):
    settings = dict(weight=0.2, onset=0.3, literal=True)
    expected = substepped(name, kind, 8, 0.2, 0.3)
    torch.testing.assert_close(drawn(pulled(kind, gaussian(kind), **settings), kind, steps=8, sampler=name), expected, rtol=1e-4, atol=1e-4)


# Every sampler of the host


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_itself_without_weight(kind, name):
    free = sample(gaussian(kind), kind, sampler=name, steps=6)
    assert torch.equal(sample(pulled(kind, gaussian(kind), weight=0.0), kind, sampler=name, steps=6), free)
    # Here all wrappers are at work, with moves of zero.
    nowhere = pulled(kind, gaussian(kind), mask=torch.zeros(1, 8, 8), **LONG)
    assert torch.equal(sample(nowhere, kind, sampler=name, steps=6), free)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_pulled_and_harder_with_more_weight(kind, name, literal):
    latent = goal(kind, 3.0)
    means = [float(shift(kind, dict(weight=weight, literal=literal, **LONG), latent=latent, sampler=name, steps=10).mean()) for weight in (0.01, 0.04)]
    assert 1e-4 < means[0] < means[1] < 4


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_samplers_with_a_schedule_of_their_own_have_their_result_moved(name):
    settings = Restoration(literal=True)
    free = drawn(gaussian("sd15"), "sd15", sampler=name, steps=20)
    there = drawn(pulled("sd15", gaussian("sd15"), literal=True), "sd15", sampler=name, steps=20)
    share = 1 - kept(step_weights(even(20), settings.weight, settings.onset))
    # They end above 0, at the last sigma but one.
    torch.testing.assert_close(there, torch.lerp(free, torch.ones_like(free), share), rtol=0.01, atol=0.01)


def test_steps_that_no_evaluation_hits_are_made_up_for_at_the_end():
    churning = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler, {"s_churn": 8.0})
    with torch.inference_mode():
        torch.manual_seed(0)
        free = drawn(gaussian("sd15"), "sd15", sampler=churning, steps=20)
        torch.manual_seed(0)
        there = drawn(pulled("sd15", gaussian("sd15"), literal=True), "sd15", sampler=churning, steps=20)
    torch.testing.assert_close(there - free, 0.383 * (1 - free), rtol=0.02, atol=0.02)


def test_part_of_a_schedule_ends_with_a_move():
    sigmas = comfy.samplers.calculate_sigmas(model("sd3").model.model_sampling, "simple", 20)

    def walk(patcher, sigmas, noise, latent):
        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(patcher)
            guider.set_conds(tiny_models.conditioning("sd3", 1), tiny_models.conditioning("sd3", 2))
            return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)

    patcher = pulled("sd3", gaussian("sd3"), goal("sd3", side=8), weight=0.2)
    noise = torch.randn(tiny_models.latent_shape("sd3"), generator=torch.Generator().manual_seed(5))
    whole = walk(patcher, sigmas, noise, torch.zeros_like(noise))
    cut = next(index for index, sigma in enumerate(sigmas) if sigma < 0.9)
    half = walk(patcher, sigmas[:cut + 1], noise, torch.zeros_like(noise))
    parts = walk(patcher, sigmas[cut:], torch.zeros_like(noise), half)
    free = walk(gaussian("sd3"), sigmas, noise, torch.zeros_like(noise))
    assert (parts - whole).norm() < 0.1 * (whole - free).norm()


class OwnLoop(comfy.samplers.Sampler):
    """A sampler that is no function of the host's kind: Euler."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        x = model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        for sigma, following in zip(sigmas, sigmas[1:]):
            x0 = model_wrap(x, sigma.expand(len(x)), model_options=extra_args["model_options"], seed=extra_args["seed"])
            x = torch.lerp(x0, x, following / sigma)
        return x


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_samplers_of_unknown_kind_have_their_predictions_moved(kind):
    own = sample(pulled(kind), kind, sampler=OwnLoop(), steps=10)
    torch.testing.assert_close(own, sample(pulled(kind), kind, sampler="euler", steps=10), rtol=1e-3, atol=1e-3)
    assert not torch.equal(own, sample(model(kind), kind, sampler=OwnLoop(), steps=10))


# Families, masks, batches, video


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_guided_by_a_picture_and_repeats(kind, literal):
    def once():
        source = DegradedLatent(pictures(), vae_of(kind))
        return sample(RestorationGuidance(Restoration(literal=literal, weight=0.2), source).attach(model(kind)), kind, steps=6)

    one, other, free = once(), once(), sample(model(kind), kind, steps=6)
    assert torch.isfinite(one).all() and torch.equal(one, other)
    base = model(kind).model
    with torch.inference_mode():
        c = base.process_latent_in(vae_of(kind).encode(pictures()).reshape(tiny_models.latent_shape(family(kind), 1, SIDE, SIDE)))
    one, free = base.process_latent_in(one), base.process_latent_in(free)
    assert (one - c).norm() < (free - c).norm()


@pytest.mark.parametrize("kind", ["sd15", "sd3", "wan"])
def test_the_degraded_latent_is_in_the_models_units(kind):
    with torch.inference_mode():
        shape = torch.Size(tiny_models.latent_shape(family(kind), 1, SIDE, SIDE))
        raw = vae_of(kind).encode(pictures()).reshape(shape)
        expected = model(kind).model.process_latent_in(raw)
        torch.testing.assert_close(DegradedLatent(pictures(), vae_of(kind)).fitted(model(kind), shape), expected)
        torch.testing.assert_close(DegradedLatent(latent=raw).fitted(model(kind), shape), expected)


@pytest.mark.parametrize("name", ["euler", "uni_pc", "dpm_fast"])
@pytest.mark.parametrize("size", [SIDE, 8 * SIDE, 3 * SIDE])
def test_half_a_mask_guides_half(name, size):
    mask = torch.zeros(1, size, size)
    mask[..., size // 2:] = 1
    changes = dict(sampler=name, steps=10)
    free, whole = (sample(patcher, "sd15", **changes) for patcher in (gaussian("sd15"), pulled("sd15", gaussian("sd15"))))
    half = sample(pulled("sd15", gaussian("sd15"), mask=mask), "sd15", **changes)
    middle = SIDE // 2
    assert torch.equal(half[..., :middle], free[..., :middle])
    torch.testing.assert_close(half[..., middle:], whole[..., middle:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_black_mask_is_the_model_itself(kind):
    assert torch.equal(sample(pulled(kind, mask=torch.zeros(1, 5, 7)), kind), sample(model(kind), kind))


def test_masks_take_the_mean_under_a_cell():
    mask = torch.zeros(2, 16, 8)
    mask[0, 8:] = 1
    mask[1, :, :2] = 1
    assert cell_mask(mask, (2, 4, 2, 1)).flatten(1).tolist() == [[0, 1], [0.25, 0.25]]
    assert cell_mask(mask, (2, 16, 3, 2, 1)).shape == (2, 1, 1, 2, 1)


@pytest.mark.parametrize("kind", ["sd15", "sd3", "wan"])
def test_a_batch_is_its_pictures_one_by_one(kind):
    latent = torch.cat([goal(kind, 1.0), goal(kind, -2.0)])
    mask = torch.stack([torch.ones(4, 4), torch.eye(4)])
    both = sample(pulled(kind, latent=latent, mask=mask, weight=0.2), kind, batch=2)
    for index in range(2):
        own = slice(index, index + 1)
        alone = sample(pulled(kind, latent=latent[own], mask=mask[own], weight=0.2), kind, batch_index=[index])
        # Another batch size sums matrix products in another order.
        torch.testing.assert_close(both[own], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sd15", "wan"])
def test_one_picture_serves_all(kind):
    one = sample(pulled(kind), kind, batch=3)
    assert torch.equal(one, sample(pulled(kind, latent=goal(kind).expand(3, *goal(kind).shape[1:])), kind, batch=3))


def video(frames, side=SIDE):
    return torch.zeros(1, 16, frames, side, side)


@pytest.mark.parametrize("count", [1, 3])
def test_frames_of_a_video_are_guided_each_by_its_own(count):
    source = DegradedLatent(pictures(count), vae_of("wan"))
    with torch.inference_mode():
        c = source.fitted(model("wan"), video(3).shape)
        each = [source.fitted(model("wan"), video(1).shape)] if count == 1 else [
            DegradedLatent(pictures(3)[i:i + 1], vae_of("wan")).fitted(model("wan"), video(1).shape) for i in range(3)]
    torch.testing.assert_close(c, torch.cat(each * (3 // len(each)), 2))
    out = sample(RestorationGuidance(Restoration(0.2), source).attach(model("wan")), "wan", latent=video(3))
    assert out.shape == video(3).shape and not torch.equal(out, sample(model("wan"), "wan", latent=video(3)))


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (5, 1), (5, 2), (10, 2), (6, 1)])
def test_a_video_vae_encodes_frames_together(count, batch):
    vae = wan_vae()
    frames = pictures(count)
    with torch.inference_mode():
        c = DegradedLatent(frames, vae).fitted(model("wan"), torch.Size([batch, 16, 2, SIDE, SIDE]))
        first = frames.expand(5, -1, -1, -1) if count == 1 else frames[:5]
        expected = model("wan").model.process_latent_in(vae.encode(first))
    assert c.shape == (2 if count == 10 else 1, 16, 2, SIDE, SIDE)
    torch.testing.assert_close(c[:1], expected)


def test_a_video_vae_takes_pictures_of_a_batch_apart():
    vae, both = wan_vae(), pictures(2)
    with torch.inference_mode():
        c = DegradedLatent(both, vae).fitted(model("wan"), torch.Size([2, 16, 1, SIDE, SIDE]))
        alone = [DegradedLatent(both[i:i + 1], vae).fitted(model("wan"), torch.Size([1, 16, 1, SIDE, SIDE])) for i in range(2)]
    torch.testing.assert_close(c, torch.cat(alone))


@pytest.mark.parametrize("extra", [-7, -3, 5, 7])
def test_less_than_a_cell_is_padded_or_cropped(extra):
    side = SIDE * 8
    picture = torch.rand(1, side + extra, side, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        c = DegradedLatent(picture, vae_of("sd15")).fitted(model("sd15"), torch.Size([1, 4, SIDE, SIDE]))
    assert c.shape == (1, 4, SIDE, SIDE) and torch.isfinite(c).all()


# Inpainting


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "uni_pc", "lms"])
def test_what_a_noise_mask_holds_stays_held(kind, name):
    latent = torch.randn(tiny_models.latent_shape(family(kind), 1, SIDE, SIDE), generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(1, 1, SIDE * 8, SIDE * 8)
    mask[..., SIDE * 4:] = 1
    changes = dict(latent=latent, mask=mask, sampler=name, steps=8)
    out, free = sample(pulled(kind, weight=0.3, literal=True), kind, **changes), sample(model(kind), kind, **changes)
    torch.testing.assert_close(out[..., :SIDE // 2], free[..., :SIDE // 2], atol=2e-3, rtol=2e-3)
    assert (out - free)[..., SIDE // 2:].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_conditioning_for_an_area(kind):
    def run(patcher):
        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(patcher)
            entry, options = tiny_models.conditioning(family(kind), 1)[0]
            part = [entry, {**options, "area": (4, 4, 2, 0), "strength": 1.0}]
            guider.set_conds([[entry, options], part], tiny_models.conditioning(family(kind), 2))
            guider.set_cfg(2.0)
            noise = torch.randn(tiny_models.latent_shape(family(kind)), generator=torch.Generator().manual_seed(1))
            sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 6)
            return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)

    out = run(pulled(kind, latent=goal(kind, side=8)))
    assert torch.isfinite(out).all() and not torch.equal(out, run(model(kind)))


# With other parts


def test_every_round_of_recurrent_re_noising_is_guided(monkeypatch):
    walks = []
    start = Pull.__init__
    monkeypatch.setattr(Pull, "__init__", lambda self, *args: (walks.append(self), start(self, *args))[1])
    inner = comfy.samplers.sampler_object("euler")
    function, rounds = inner.sampler_function, RecurrentSampler(inner, 2, 0.55)
    changes = dict(sampler=rounds, steps=10)
    free = sample(gaussian("sd15"), "sd15", **changes)
    out = sample(pulled("sd15", gaussian("sd15"), latent=goal("sd15", 3.0), **LONG), "sd15", **changes)
    assert len(walks) == 3 and len(walks[0].sigmas) == 11 and len(walks[1].sigmas) < 11
    # All that is due is the end of each walk, where g is 0.
    assert [walk.due for walk in walks] == [{len(walk.sigmas) - 1} for walk in walks] and all(any(walk.weights) for walk in walks)
    assert rounds.inner is inner and inner.sampler_function is function
    assert (out - free).mean() > 0.1 * goal("sd15", 3.0).mean()


@pytest.mark.parametrize(("kind", "companion"), [("sd15", True), ("sd3", False)])
def test_posterior_guidance_goes_along_in_either_order(kind, companion):
    settings = dict(alignment=STILL, quality=None, companion=companion)
    degraded = pictures(2)

    def restored(base):
        return RestorationGuidance(Restoration(0.2), DegradedLatent(degraded, vae_of(kind))).attach(base)

    alone = sample(posterior(kind, degraded=degraded, **settings), kind, batch=2)
    inside = sample(posterior(kind, base=restored(model(kind)), degraded=degraded, **settings), kind, batch=2)
    outside = sample(restored(posterior(kind, degraded=degraded, **settings)), kind, batch=2)
    for out in (inside, outside):
        assert out.shape == alone.shape and torch.isfinite(out).all() and not torch.equal(out, alone)
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)


def test_companions_are_left_free():
    target = Target(torch.ones(1, 4, 2, 2), None, 2)
    pull = Pull(Restoration(), target, model("sd15").model.model_sampling, torch.tensor([14.6, 10.0, 0.0]), None)
    move = pull.shift(1, torch.zeros(4, 4, 2, 2), torch.zeros(4, 4, 2, 2))
    assert (move[:2] > 0).all() and not move[2:].any()


def test_two_guidances_chain():
    one = pulled("sd15", gaussian("sd15"), latent=goal("sd15", 2.0))
    two = pulled("sd15", one, latent=goal("sd15", 2.0))
    free, once, twice = (drawn(patcher, "sd15", steps=20).mean() for patcher in (gaussian("sd15"), one, two))
    assert 1.8 < (twice - free) / (once - free) < 2.0


# Nothing stays


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_and_the_sampler_are_left_as_they_were(kind):
    base, sampler = new_model(kind), comfy.samplers.sampler_object("euler")
    before, of_sampler = state_of(base), copy.copy(vars(sampler))
    patched = pulled(kind, base)
    options = {name: sorted(group) for name, group in patched.wrappers.items()}
    sample(patched, kind, sampler=sampler)
    assert_same_state(before, state_of(base))
    assert vars(sampler) == of_sampler and {name: sorted(group) for name, group in patched.wrappers.items()} == options
    assert torch.equal(sample(base, kind, sampler=sampler), sample(model(kind), kind, sampler="euler"))


def test_a_run_within_a_run_is_its_own():
    # The host samples one model at a time, so the run inside is of another one, with the same sampler and guidance objects.
    guidance = RestorationGuidance(Restoration(), DegradedLatent(latent=goal("sd15", 3.0)))
    sampler, others, inner = comfy.samplers.sampler_object("euler"), [new_model("sd15"), guidance.attach(new_model("sd15"))], []
    changes = dict(sampler=sampler, steps=5)

    def callback(step, *args):
        if step == 2:
            inner.extend(sample(other, "sd15", **changes) for other in others)

    patched = guidance.attach(model("sd15"))
    outer = sample(patched, "sd15", callback=callback, **changes)
    assert torch.equal(inner[0], sample(model("sd15"), "sd15", **changes))
    assert torch.equal(outer, inner[1]) and torch.equal(outer, sample(patched, "sd15", **changes))


def test_nothing_stays_after_an_error(monkeypatch):
    base, sampler = new_model("sd15"), comfy.samplers.sampler_object("euler")
    before, function = state_of(base), sampler.sampler_function
    patched = pulled("sd15", base)
    with monkeypatch.context() as broken:
        broken.setattr(Pull, "shift", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(patched, "sd15", sampler=sampler)
    assert_same_state(before, state_of(base))
    assert sampler.sampler_function is function
    assert torch.equal(sample(patched, "sd15"), sample(pulled("sd15"), "sd15"))


def test_the_guided_sampler_is_a_copy_under_the_same_name():
    sampler = comfy.samplers.sampler_object("uni_pc")
    twice = guided_sampler(guided_sampler(sampler, Restoration(), None), Restoration(), None)
    assert type(twice) is type(sampler) and state_use(twice.sampler_function) == state_use(sampler.sampler_function) == "copied"


# Errors


@pytest.mark.parametrize(("make", "changes", "message"), [
    (lambda: DegradedLatent(pictures(1, SIDE + 1), vae_of("sd15")), {}, "'degraded' is 56 x 56 but the latent belongs to a picture of 48 x 48"),
    (lambda: DegradedLatent(pictures(3), vae_of("sd15")), {"batch": 2}, "'degraded' is for 3 pictures but the latent batch has 2"),
    (lambda: DegradedLatent(pictures(), vae_of("sd3")), {}, "'vae' gives latents of 16 channels but the model works on 4"),
    (lambda: DegradedLatent(latent=torch.zeros(1, 16, SIDE, SIDE)), {}, "'latent' gives latents of 16 channels but the model works on 4"),
    (lambda: DegradedLatent(latent=torch.zeros(1, 4, 5, SIDE)), {}, "'latent' is 6 x 5 cells but 6 x 6 are sampled"),
    (lambda: DegradedLatent(latent=torch.zeros(1, 4, 1, SIDE, SIDE)), {}, "'latent' has the shape (1, 4, 1, 6, 6) but (1, 4, 6, 6) is sampled"),
    (lambda: DegradedLatent(latent=torch.zeros(3, 4, SIDE, SIDE)), {"batch": 2}, "'latent' is for 3 pictures but the latent batch has 2"),
    (lambda: DegradedLatent(latent=torch.full((1, 4, SIDE, SIDE), math.nan)), {}, "'latent' gives NaN or infinite values"),
])  # fmt: skip
def test_what_does_not_fit_is_said(make, changes, message):
    patched = RestorationGuidance(Restoration(), make()).attach(model("sd15"))
    with pytest.raises(ValueError) as error:
        sample(patched, "sd15", **changes)
    assert str(error.value).startswith("Restoration Guidance: ") and message in str(error.value)


def test_masks_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="Restoration Guidance: 'mask' is for 3 pictures but the latent batch has 2"):
        sample(pulled("sd15", mask=torch.ones(3, 8, 8)), "sd15", batch=2)


@pytest.mark.parametrize(("given", "message"), [
    (DegradedLatent(pictures(2), None), "'degraded' holds 2 pictures but the latent is a video of 3"),
    (DegradedLatent(latent=torch.zeros(1, 16, 2, SIDE, SIDE)), "'latent' has 2 frames but 3 are sampled"),
])  # fmt: skip
def test_videos_that_do_not_fit_are_said(given, message):
    given = DegradedLatent(given.pictures, None if given.pictures is None else vae_of("wan"), given.latent)
    with pytest.raises(ValueError, match=f"Restoration Guidance: {message}"):
        sample(RestorationGuidance(Restoration(), given).attach(model("wan")), "wan", latent=video(3))


def test_sound_is_refused():
    with pytest.raises(ValueError, match="Restoration Guidance: the latent has the shape"):
        DegradedLatent(latent=torch.zeros(1, 8, 32)).fitted(model("sd15"), torch.Size([1, 8, 32]))


def test_a_run_below_the_onset_is_said(caplog):
    """As after Noise-Matched Start with little noise."""
    for high, said in ((0.5, True), (14.0, False)):
        caplog.clear()
        sample(pulled("sd15"), "sd15", sigmas=torch.linspace(high, 0, 4))
        assert ("Restoration Guidance does nothing in this run" in caplog.text) is said
