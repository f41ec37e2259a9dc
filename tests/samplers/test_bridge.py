"""The bridge: an oracle leads to X0 from anywhere, on flows and on others; and it is a sampler as the host's are."""

from functools import cache

import pytest
import torch

import comfy.model_management
import comfy.sample
import comfy.samplers
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from mend.model_patches.host import INTERRUPTED, is_flow
from mend.model_patches.learned_prompt import LearnedPrompt
from mend.model_patches.learned_prompt_patch import AVERAGE, attach_blend
from mend.samplers import bridge as module
from mend.samplers.bridge import E_BRIDGE, ESTIMATORS, YPT, Bridge, Path, bridge_sigmas, least_time
from mend.samplers.degraded_latent import DegradedLatent
from mend.samplers.restoration_guidance import Restoration, RestorationGuidance
from mend.tests import tiny_models
from mend.tests.model_patches.learned_prompts import trained

KINDS = ("sd15", "v", "sd3", "flux", "wan")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
SIDE = 6


def family(kind):
    return "sd15" if kind == "v" else kind


@cache
def model(kind):
    with torch.inference_mode():
        own = tiny_models.model(family(kind))
        return ModelSamplingDiscrete().patch(own, "v_prediction", False)[0] if kind == "v" else own


def latents(kind, seed, batch=1, frames=1, side=SIDE):
    return torch.randn(tiny_models.latent_shape(family(kind), batch, side, side, frames), generator=torch.Generator().manual_seed(seed))


def sample(patcher, kind, bridge=None, *, latent=None, sigmas=None, steps=4, seed=1, cfg=1.0, mask=None, callback=None):
    """Sample on the bridge the way SamplerCustom does."""
    with torch.inference_mode():
        latent = latents(kind, 5) if latent is None else latent
        sigmas = bridge_sigmas(patcher.get_model_object("model_sampling"), 0.4, steps) if sigmas is None else sigmas
        positive, negative = (tiny_models.conditioning(family(kind), seed) for seed in (1, 2))
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample_custom(patcher, noise, cfg, (bridge or Bridge()).sampler(), sigmas, positive, negative, latent, mask, callback, True, seed)


class Oracle:
    """Stands where the network is: answers with the velocity that leads to a clean latent, as one of the estimators understands it."""

    def __init__(self, patcher, clean, degraded, estimator, t0=0.4):
        self.sampling = patcher.get_model_object("model_sampling")
        self.path, self.estimator = Path(t0, is_flow(self.sampling)), estimator
        to_model = patcher.get_model_object("process_latent_in")
        self.clean, self.degraded = to_model(clean), to_model(degraded)
        self.seen = []

    def __call__(self, apply_model, given):
        x, sigma = given["input"], given["timestep"]
        self.seen.append((float(sigma[0]), x.clone()))
        sigma = float(sigma[0])
        if self.estimator == YPT:
            velocity = (x - self.clean) / sigma
        else:
            # v = X_T - X0, in whichever coordinates the denoised latent is the same.
            t = self.path.time(sigma)
            a = (1 - t) * t / self.path.t0
            velocity = (x - (1 - a) * self.clean - a * self.degraded) / sigma
        return x - sigma * velocity


def with_oracle(kind, estimator, clean, degraded, t0=0.4):
    patched = model(kind).clone()
    oracle = Oracle(patched, clean, degraded, estimator, t0)
    patched.set_model_unet_function_wrapper(oracle)
    return patched, oracle


# The path


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("t0", [0.1, 0.4, 0.9])
def test_states_are_those_of_the_definition(flow, t0):
    path, (x0, y, noise) = Path(t0, flow), torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    for t in (1e-4, 0.3 * t0, 0.8 * t0, t0):
        lam, sigma = t / t0, path.sigma(t)
        expected = (1 - t) * ((1 - lam) * x0 + lam * y) + t * noise
        state = path.state(sigma, x0, y, noise)
        torch.testing.assert_close(state if flow else state * (1 - t), expected)
        torch.testing.assert_close(path.noise(sigma, state, x0, y), noise, rtol=1e-9, atol=1e-9)
        a, c = (1 - t) * t / t0, 1 - (1 - t) * t / t0
        torch.testing.assert_close(expected, c * x0 + a * y + t * (noise - x0))
        # The target of the training: v* = (X_t - X0) / t; and eps* = (x - X0) / sigma = X_T + (Y - X0) / ((1 + sigma) T0).
        target = (state - x0) / sigma
        torch.testing.assert_close(target, noise - flow * x0 + (1 - t) / t0 * (y - x0))
        if not flow:
            torch.testing.assert_close(target, noise + (y - x0) / ((1 + sigma) * t0))


@pytest.mark.parametrize("flow", [True, False])
def test_a_batch_of_sigmas_gives_each_row_its_state(flow):
    path, (x0, y, noise) = Path(0.4, flow), torch.randn(3, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    sigmas = path.sigma(torch.tensor([0.01, 0.2, 0.4]))
    together = path.state(sigmas.reshape(-1, 1, 1, 1), x0, y, noise)
    for row, sigma in enumerate(sigmas):
        torch.testing.assert_close(together[row], path.state(float(sigma), x0[row], y[row], noise[row]))


@pytest.mark.parametrize("flow", [True, False])
@every_estimator
@pytest.mark.parametrize("keep", [False, True])
def test_the_path_of_an_oracle_is_the_bridge_itself(flow, estimator, keep):
    path, (x0, y, noise) = Path(0.4, flow), torch.randn(3, 1, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    x = path.state(path.sigma(0.4), y, y, noise)
    for now, following in ((0.4, 0.25), (0.25, 0.1), (0.1, 0.001)):
        sigma, a = path.sigma(now), (1 - now) * now / 0.4
        denoised = x0 if estimator == YPT else (1 - a) * x0 + a * y
        found = path.x0(sigma, denoised, y, estimator)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)
        x = path.state(path.sigma(following), found, y, noise if keep else path.noise(sigma, x, found, y))
        torch.testing.assert_close(x, path.state(path.sigma(following), x0, y, noise), rtol=0, atol=1e-10)


# Sigmas


@every_kind
def test_sigmas_are_even_times_whatever_the_shift(kind):
    sampling = model(kind).get_model_object("model_sampling")
    sigmas, path = bridge_sigmas(sampling, 0.4, 20), Path(0.4, is_flow(sampling))
    assert len(sigmas) == 21 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    times = path.time(sigmas[:-1].double())
    least = 1e-4 if path.flow else float(sampling.sigma_min) / (1 + float(sampling.sigma_min))
    torch.testing.assert_close(times, torch.linspace(0.4, least, 20, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert least_time(sampling, path) == pytest.approx(least)
    assert len(bridge_sigmas(sampling, 0.4, 1)) == 2


def test_a_time_that_no_schedule_reaches_is_refused():
    with pytest.raises(ValueError, match="t0 is 0.95, and this model knows times above 0 and up to 0.936. Use a smaller one; 0.4 is published"):
        bridge_sigmas(model("sd15").get_model_object("model_sampling"), 0.95)
    for t0 in (0.0, 1.5):
        with pytest.raises(ValueError, match="t0 is"):
            bridge_sigmas(model("sd3").get_model_object("model_sampling"), t0)
    assert bridge_sigmas(model("flux").get_model_object("model_sampling"), 1.0)[0] == 1


@every_kind
def test_the_network_is_asked_at_the_times_of_an_unshifted_grid(kind):
    patched, asked = model(kind).clone(), []
    network = patched.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda _, args: asked.append(float(args[1].flatten()[0])))
    try:
        sample(patched, kind, steps=3)
    finally:
        handle.remove()
    sampling = patched.get_model_object("model_sampling")
    if is_flow(sampling):
        scale = 1 if kind == "flux" else 1000
        assert asked == pytest.approx([scale * t for t in (0.4, 0.20005, 1e-4)], rel=1e-4)
    else:
        alphas = 1 / (1 + sampling.sigmas**2)
        assert [float(alphas[int(t)] ** 0.5 / (1 - alphas[int(t)]) ** 0.5) for t in asked[:2]] == pytest.approx([1.5, 1 / 0.2720], rel=0.01)


# Sampling


@every_kind
@every_estimator
@pytest.mark.parametrize("keep", [False, True])
def test_an_oracle_leads_to_the_clean_latent(kind, estimator, keep):
    clean, degraded = latents(kind, 7, 2), latents(kind, 8, 2)
    patched, oracle = with_oracle(kind, estimator, clean, degraded)
    found = sample(patched, kind, Bridge(estimator=estimator, keep_noise=keep), latent=degraded, steps=20)
    # Latents of size 1 in units that some formats scale by 5.5, in float32.
    torch.testing.assert_close(found, clean, rtol=1e-5, atol=2e-5)
    assert len(oracle.seen) == 20
    noise = comfy.sample.prepare_noise(degraded, 1)
    for sigma, x in oracle.seen:
        expected = oracle.path.state(sigma, oracle.clean, oracle.degraded, noise)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@every_estimator
@pytest.mark.parametrize("t0", [0.01, 0.4, 0.9])
def test_from_any_time(kind, estimator, t0):
    clean, degraded = latents(kind, 7), latents(kind, 8)
    patched, _ = with_oracle(kind, estimator, clean, degraded, t0)
    sampling = patched.get_model_object("model_sampling")
    if t0 < least_time(sampling, Path(t0, is_flow(sampling))):
        t0 = 0.04
    patched, _ = with_oracle(kind, estimator, clean, degraded, t0)
    for steps in (1, 3):
        found = sample(patched, kind, Bridge(estimator=estimator), latent=degraded, sigmas=bridge_sigmas(sampling, t0, steps))
        # The E-Bridge estimator divides by C, which is T0 where it is smallest.
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5 / (t0 if estimator == E_BRIDGE else 1) ** 0.5)


@every_kind
def test_the_choices_matter_to_a_model_that_is_no_oracle(kind):
    results = [sample(model(kind), kind, bridge) for bridge in (Bridge(), Bridge(estimator=E_BRIDGE), Bridge(keep_noise=True), Bridge(seed=42))]
    assert all(result.isfinite().all() for result in results)
    assert not any(torch.equal(results[0], other) for other in results[1:])


@every_kind
def test_bits_repeat_for_a_seed(kind):
    assert torch.equal(sample(model(kind), kind), sample(model(kind), kind))
    assert not torch.equal(sample(model(kind), kind), sample(model(kind), kind, seed=2))
    fixed = Bridge(seed=42)
    assert torch.equal(sample(model(kind), kind, fixed), sample(model(kind), kind, fixed, seed=2))
    assert not torch.equal(sample(model(kind), kind, fixed), sample(model(kind), kind, Bridge(seed=43)))


def test_fixed_noise_is_the_same_for_every_picture():
    pair = torch.cat([latents("sd3", 1), latents("sd3", 2)])
    together = sample(model("sd3"), "sd3", Bridge(seed=42), latent=pair)
    for row in range(2):
        alone = sample(model("sd3"), "sd3", Bridge(seed=42), latent=pair[row:row + 1])
        torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_a_step_costs_one_call_without_guidance(kind):
    patched, calls = model(kind).clone(), []
    patched.set_model_unet_function_wrapper(lambda apply, given: (calls.append(given["input"].shape[0]), apply(given["input"], given["timestep"], **given["c"]))[1])
    sample(patched, kind, steps=5)
    assert calls == [1] * 5
    calls.clear()
    sample(patched, kind, steps=5, cfg=2.0)
    assert sum(calls) == 10


def test_previews_show_the_prediction_and_cancel_comes_at_once():
    shown = []
    clean, degraded = latents("sd3", 7), latents("sd3", 8)
    patched, oracle = with_oracle("sd3", YPT, clean, degraded)
    sample(patched, "sd3", latent=degraded, callback=lambda step, x0, x, total: shown.append((step, x0, total)))
    assert [(step, total) for step, _, total in shown] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for _, x0, _ in shown:
        torch.testing.assert_close(x0, oracle.clean, rtol=1e-5, atol=1e-5)
    oracle.seen.clear()

    def cancel(step, x0, x, total):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(INTERRUPTED):
        sample(patched, "sd3", latent=degraded, callback=cancel)
    assert len(oracle.seen) == 1


# What it is given


@pytest.mark.parametrize("kind", ["sd15", "flux", "wan"])
def test_the_degraded_latent_comes_from_either_input(kind):
    degraded = latents(kind, 8)
    one = sample(model(kind), kind, latent=degraded)
    other = sample(model(kind), kind, Bridge(degraded=degraded), latent=torch.zeros_like(degraded))
    # Latents that are all 0 are not shifted by the host, which this one is not.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_one_degraded_latent_serves_a_batch():
    degraded = latents("sd3", 8)
    found = sample(model("sd3"), "sd3", Bridge(degraded=degraded), latent=torch.zeros_like(degraded).repeat(2, 1, 1, 1))
    assert found.shape[0] == 2 and not torch.equal(found[0], found[1])


def test_up_to_a_cell_is_padded():
    found = sample(model("sd3"), "sd3", Bridge(degraded=latents("sd3", 8, side=SIDE + 1)), latent=latents("sd3", 1))
    assert found.shape[-1] == SIDE


@pytest.mark.parametrize(("kind", "degraded", "message"), [
    ("sd3", torch.ones(1, 16, 9, 6), "Bridge Sampler: the degraded latent is 1x16x9x6 and the one that is sampled 1x16x6x6"),
    ("sd3", torch.ones(1, 4, 6, 6), "Bridge Sampler: the degraded latent is 1x4x6x6 and the one that is sampled 1x16x6x6.*Use the VAE of this model"),
    ("sd3", torch.ones(3, 16, 6, 6), "Bridge Sampler: 'degraded' holds 3 for a batch of 1"),
    ("sd3", torch.full((1, 16, 6, 6), float("nan")), "Bridge Sampler: 'degraded' holds NaN or infinite values"),
    ("wan", torch.ones(1, 16, 9, 6, 6), "Bridge Sampler: the degraded latent is 1x16x9x6x6"),
])  # fmt: skip
def test_what_does_not_fit_is_named(kind, degraded, message):
    with pytest.raises(ValueError, match=message):
        sample(model(kind), kind, Bridge(degraded=degraded))


def test_an_empty_latent_alone_is_refused():
    with pytest.raises(ValueError, match="Bridge Sampler: the latent to sample is empty, and 'degraded' is not connected"):
        sample(model("sd3"), "sd3", latent=torch.zeros(1, 16, SIDE, SIDE))


def test_a_latent_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="Bridge Sampler: the latent to sample holds NaN or infinite values"):
        sample(model("sd3"), "sd3", latent=torch.full((1, 16, SIDE, SIDE), float("nan")))


@pytest.mark.parametrize("kind", ["sd15", "flux", "wan"])
@every_estimator
def test_a_noise_mask_keeps_what_it_holds(kind, estimator):
    latent, degraded = latents(kind, 5), latents(kind, 8)
    mask = torch.ones(1, 1, SIDE * 8, SIDE * 8)
    mask[..., :24] = 0
    found = sample(model(kind), kind, Bridge(degraded=degraded, estimator=estimator), latent=latent, mask=mask)
    # Into the model's space and back.
    torch.testing.assert_close(found[..., :2], latent[..., :2], rtol=1e-5, atol=1e-5)
    assert (found[..., 4:] - latent[..., 4:]).abs().mean() > 0.1


def test_what_the_mask_holds_is_on_the_bridge_too():
    latent, degraded = latents("sd3", 5), latents("sd3", 8)
    patched, oracle = with_oracle("sd3", YPT, latents("sd3", 9), degraded)
    held = patched.get_model_object("process_latent_in")(latent)
    sample(patched, "sd3", Bridge(degraded=degraded), latent=latent, mask=torch.zeros(1, 1, 48, 48))
    noise = comfy.sample.prepare_noise(latent, 1)
    for sigma, x in oracle.seen:
        torch.testing.assert_close(x, oracle.path.state(sigma, held, oracle.degraded, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("keep", [False, True])
def test_restoration_guidance_stacks(kind, keep):
    degraded, patched = latents(kind, 8), model(kind).clone()
    # A denoiser that follows its input; an oracle would not be moved.
    patched.set_model_unet_function_wrapper(lambda apply, given: given["input"] * 0.6)
    guided = RestorationGuidance(Restoration(0.3, 0.05), DegradedLatent(latent=degraded)).attach(patched)
    plain, found = (sample(given, kind, Bridge(keep_noise=keep), latent=degraded) for given in (patched, guided))
    assert (found - degraded).square().mean() < 0.99 * (plain - degraded).square().mean()


# Video


@pytest.fixture(scope="module")
def clip():
    return latents("wan", 11, frames=9)


def test_windows_of_frames_agree_where_they_overlap(clip):
    """A model that looks at single frames only gives the same by windows as at once: same noise, same blend, no joins."""
    patched = model("wan").clone()
    patched.set_model_unet_function_wrapper(lambda apply, given: given["input"].tanh() * 0.8)
    whole, windows = (sample(patched, "wan", bridge, latent=clip) for bridge in (Bridge(), Bridge(window=17, overlap=8)))
    torch.testing.assert_close(whole, windows, rtol=1e-4, atol=1e-5)


def test_windows_show_no_joins(clip):
    patched, spans = model("wan").clone(), []
    patched.set_model_unet_function_wrapper(lambda apply, given: (spans.append(given["input"].shape[2]), apply(given["input"], given["timestep"], **given["c"]))[1])
    windows = sample(patched, "wan", Bridge(window=17, overlap=8), latent=clip, steps=3)
    # Windows of 5 latent frames from 0, 3 and 4, the later ones with the frame before them.
    assert spans == [5, 6, 6] * 3
    whole = sample(patched, "wan", latent=clip, steps=3)
    assert windows.shape == clip.shape and windows.isfinite().all() and not torch.equal(windows, whole)
    changes = [result.diff(dim=2).square().mean((0, 1, 3, 4)) for result in (windows, whole)]
    assert (changes[0] < 1.2 * changes[1]).all()


def test_a_short_clip_needs_no_windows(clip):
    assert torch.equal(sample(model("wan"), "wan", Bridge(window=33, overlap=8), latent=clip), sample(model("wan"), "wan", latent=clip))


def test_windows_take_one_video():
    with pytest.raises(ValueError, match="Bridge Sampler: windows are for one video, and the batch holds 2"):
        sample(model("wan"), "wan", Bridge(window=17), latent=latents("wan", 1, 2, 9))


def test_windows_leave_masks_and_pictures_alone(clip):
    mask = torch.zeros(1, 1, SIDE * 8, SIDE * 8)
    found = sample(model("wan"), "wan", Bridge(window=17, overlap=4), latent=clip, mask=mask, steps=2)
    torch.testing.assert_close(found, clip, rtol=1e-5, atol=1e-5)
    assert torch.equal(sample(model("sd3"), "sd3", Bridge(window=5)), sample(model("sd3"), "sd3"))


def test_a_run_without_noise_is_refused():
    latent = latents("sd3", 5)
    first = bridge_sigmas(model("sd3").get_model_object("model_sampling"), 0.4, 6)
    settings = dict(positive=tiny_models.conditioning("sd3"), negative=tiny_models.conditioning("sd3"), latent_image=latent, disable_pbar=True)
    # The second half of Split Sigmas, as a sampling node without noise goes on with it.
    with pytest.raises(ValueError, match="Bridge Sampler: the noise is all 0.*cannot go on where another sampler stopped"):
        comfy.sample.sample_custom(model("sd3"), torch.zeros_like(latent), 1.0, Bridge().sampler(), first[3:], **settings)
    fixed = comfy.sample.sample_custom(model("sd3"), torch.zeros_like(latent), 1.0, Bridge(seed=42).sampler(), first, **settings)
    assert torch.equal(fixed, sample(model("sd3"), "sd3", Bridge(seed=42), sigmas=first, latent=latent))


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_a_prompt_that_was_trained_from_elsewhere_is_told_of(kind, caplog):
    prompts, patched = [trained(kind, 16, seed) for seed in (5, 6)], model(kind).clone()
    prompts[0].config["t0"], prompts[1].config["t0"] = 0.4, 0.7
    attach_blend(patched, [(LearnedPrompt.of(prompt), 1.0) for prompt in prompts], AVERAGE)
    sample(patched, kind)
    assert [message for message in caplog.messages if "trained from t0" in message] == [
        "Bridge Sampler: the prompt of Apply Learned Prompt was trained from t0 0.7, and this run begins at 0.4. "
        "Set t0 of Bridge Sigmas to 0.7 if the result is poor."]


def test_the_published_numbers():
    assert (module.T0, module.LEAST_TIME, module.STEPS, module.PUBLISHED_SEED) == (0.4, 1e-4, 20, 42)
