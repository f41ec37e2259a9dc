"""Recurrent re-noising wraps any host sampler: the same first pass, then rounds from gamma T that count, repeat and stop as one run."""

import math

import pytest
import torch

import comfy.model_management
import comfy.samplers
import comfy.sd
from comfy.ldm.wan.vae import WanVAE
from mend.model_patches.host import model_time, noise_to_signal
from mend.samplers.posterior_guidance import AlignmentRun
from mend.samplers.recurrence import RecurrentSampler, round_noise, round_sigmas
from mend.tests.samplers.tiny_guidance import SIDE, STILL, guided, model, new_model, pictures, sample, vae_of
from mend.tests.tiny_models import initialise

# Steps of a whole pass, and of a round from gamma: 3 of 6 equal steps of model time lie below 0.55, and the one that leads to them.
STEPS, GAMMA, ROUND = 6, 0.55, 4


def recurrent(rounds=2, gamma=GAMMA, inner="euler", vae=None):
    inner = comfy.samplers.sampler_object(inner) if isinstance(inner, str) else inner
    return RecurrentSampler(inner, rounds, gamma, vae)


def refined(kind="sd15", patcher=None, rounds=2, gamma=GAMMA, inner="euler", vae=None, **changes):
    return sample(patcher or model(kind), kind, **{"steps": STEPS, **changes}, sampler=recurrent(rounds, gamma, inner, vae))


class Passes:
    """A sampler function of the host's shape: keeps what each pass is given and answers with a plain latent."""

    def __init__(self, value=0.5, after=None):
        self.value, self.after, self.starts, self.sigmas = value, after, [], []

    def __call__(self, denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        self.starts.append(x.clone())
        self.sigmas.append(sigmas.clone())
        if self.after:
            self.after()
        return torch.full_like(x, self.value)

    @property
    def sampler(self):
        return comfy.samplers.KSAMPLER(self)


@pytest.mark.parametrize("kind", ["sd15", "sd3", "wan"])
def test_no_rounds_is_the_inner_sampler(kind):
    assert torch.equal(refined(kind, rounds=0), sample(model(kind), kind, steps=STEPS))


@pytest.mark.parametrize("kind", ["sd15", "sd3", "wan"])
def test_rounds_act_and_repeat(kind):
    one, other = refined(kind), refined(kind)
    assert torch.isfinite(one).all() and torch.equal(one, other)
    assert not torch.equal(one, refined(kind, rounds=1)) and not torch.equal(one, refined(kind, rounds=0))
    assert not torch.equal(one, refined(kind, seed=2))


@pytest.mark.parametrize("inner", ["dpmpp_2m", "euler_ancestral", "uni_pc", "heun"])
def test_any_sampler_may_be_repeated(inner):
    one, other = refined(inner=inner), refined(inner=inner)
    assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.parametrize(("start", "expected"), [
    (0.5, [0.5, 0.4, 0.2, 0.0]), (0.4, [0.4, 0.2, 0.0]), (0.1, [0.1, 0.0]), (1.0, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), (7.0, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
])  # fmt: skip
def test_a_round_walks_what_lies_below_its_start(start, expected):
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    torch.testing.assert_close(round_sigmas(sigmas, start), torch.tensor(expected))


def test_a_schedule_that_ends_above_gamma_has_no_rounds():
    assert len(round_sigmas(torch.tensor([9.0, 5.0, 3.0]), 0.5)) == 1


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_callback_counts_across_rounds(kind, rounds):
    seen = []
    refined(kind, rounds=rounds, callback=lambda step, x0, x, total: seen.append((step, total)))
    total = len(seen)
    assert seen == [(step, total) for step in range(total)]
    assert total > STEPS or rounds == 0
    if kind == "sd15":
        assert total == STEPS + rounds * ROUND


def test_progress_reaches_the_end_once(run_prompt):
    prompt = {
        "1": {"class_type": "TestTinyModel", "inputs": {"family": "sd15"}},
        "2": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "3": {"class_type": "MendRecurrentRenoising", "inputs": {"sampler": ["2", 0], "rounds": 2, "gamma": GAMMA}},
        "4": {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0}},
        "5": {"class_type": "SamplerCustom", "inputs": {"model": ["1", 0], "add_noise": True, "noise_seed": 1, "cfg": 1.0, "positive": ["1", 1],
                                                        "negative": ["1", 2], "sampler": ["3", 0], "sigmas": ["4", 0], "latent_image": ["1", 4]}},
        "6": {"class_type": "TestCapture", "inputs": {"value": ["5", 0]}},
    }  # fmt: skip
    total = STEPS + 2 * ROUND
    result = run_prompt(prompt)
    values = [data["value"] for data in result.of("progress")]
    # The host's bar leaves out steps that follow each other too quickly.
    assert values == sorted(set(values)) and values[-1] == total and {data["max"] for data in result.of("progress")} == {total}
    assert torch.isfinite(result.values["6"]["samples"]).all()


# Noise


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("gamma", [0.2, 0.55, 0.9])
def test_a_round_starts_from_gamma(kind, gamma):
    passes = Passes()
    refined(kind, inner=passes.sampler, gamma=gamma, side=32)
    model_sampling = model(kind).model.model_sampling
    sigma = float(passes.sigmas[1][0])
    assert sigma == pytest.approx(float(model_sampling.percent_to_sigma(1 - gamma)))
    if kind == "sd15":
        # Sigmas come from a table of 1000 timesteps.
        assert model_time(model_sampling, sigma) == pytest.approx(gamma, abs=1e-3)
    for x in passes.starts[1:]:
        # x = a * (latent + (s/a) n): at least 4096 values, whose deviation is known to about 1 % and whose mean to 1/64 of it.
        deviation, share = float(x.std()), 1.0 if kind == "sd15" else 1 - sigma
        assert deviation == pytest.approx(share * noise_to_signal(model_sampling, sigma), rel=0.05)
        assert float(x.mean()) == pytest.approx(share * passes.value, abs=5 * deviation / x.numel() ** 0.5)


def test_a_schedule_that_ends_in_noise_has_no_rounds(caplog):
    passes = Passes()
    refined(inner=passes.sampler, sigmas=torch.tensor([5.0, 1.0, 0.2]))
    assert len(passes.sigmas) == 1 and float(passes.sigmas[0][-1]) == pytest.approx(0.2)
    assert "the sigmas end at 0.200, above 0, so that there are no extra passes" in caplog.text


def test_every_round_has_noise_of_its_own():
    passes = Passes(value=0.0)
    refined(inner=passes.sampler, rounds=3, side=32)
    rows = torch.stack([x.flatten() for x in passes.starts])
    # Independent rows of 4096 values correlate by 1/64 at most times five.
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / rows.shape[1] ** 0.5


def test_round_noise_belongs_to_its_picture():
    noise = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    together = round_noise(noise, 7, 0)
    for index in range(3):
        assert torch.equal(together[index], round_noise(noise[index:index + 1], 7, 0)[0])
    assert not torch.equal(together, round_noise(noise, 7, 1)) and not torch.equal(together, round_noise(noise, 8, 0))
    assert together.dtype == noise.dtype
    # A first pass that began at the picture's own noise was given none.
    assert round_noise(torch.zeros(1, 4, 6, 6), 7, 0).std() > 0.5


@pytest.mark.parametrize("kind", ["sd15", "wan"])
def test_a_batch_is_its_pictures_one_by_one(kind):
    both = refined(kind, batch=2, inner="euler")
    for index in range(2):
        # Another batch size sums matrix products in another order.
        torch.testing.assert_close(both[index:index + 1], refined(kind, batch_index=[index]), atol=1e-3, rtol=1e-3)


# Masks and the VAE


def half_mask():
    mask = torch.zeros(1, 1, SIDE * 8, SIDE * 8)
    mask[..., SIDE * 4:] = 1
    return mask


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("through_vae", [False, True])
def test_what_a_noise_mask_holds_stays_held(kind, through_vae):
    latent = torch.randn(1, model(kind).model.latent_format.latent_channels, SIDE, SIDE, generator=torch.Generator().manual_seed(8))
    out = refined(kind, latent=latent, mask=half_mask(), vae=vae_of(kind) if through_vae else None)
    # Euler's last step reaches the held latent through x + (latent - x) / sigma * -sigma, and each round begins with what that left.
    torch.testing.assert_close(out[..., :SIDE // 2], latent[..., :SIDE // 2], atol=1e-3, rtol=1e-3)
    free = sample(model(kind), kind, steps=STEPS, latent=latent, mask=half_mask())
    assert not torch.allclose(out[..., SIDE // 2:], free[..., SIDE // 2:], atol=1e-2)


@pytest.mark.parametrize("kind", ["sd15", "sd3", "wan"])
def test_a_vae_sends_each_start_through_pixels(kind):
    plain, through = Passes(), Passes()
    refined(kind, inner=plain.sampler)
    refined(kind, inner=through.sampler, vae=vae_of(kind))
    base = model(kind).model
    clean = torch.full_like(plain.starts[0], 0.5)
    with torch.inference_mode():
        raw = base.process_latent_out(clean)
        again = vae_of(kind).encode(vae_of(kind).decode(raw[:, :, 0] if raw.ndim == 5 else raw))
        expected = base.process_latent_in(again.reshape(raw.shape)) - clean
    share = 1 - float(through.sigmas[1][0]) if kind != "sd15" else 1.0
    assert torch.equal(through.starts[0], plain.starts[0])
    torch.testing.assert_close(through.starts[1] - plain.starts[1], share * expected, atol=1e-4, rtol=1e-4)


def test_a_vae_of_another_model_is_named_before_anything_is_sampled():
    through = Passes()
    with pytest.raises(ValueError, match="Recurrent Re-noising: 'vae' gives latents of 16 channels and the model works on 4"):
        refined("sd15", inner=through.sampler, vae=vae_of("sd3"))
    assert not through.starts


class Greedy:
    """A VAE that needs so much room that the host moves the model away."""

    def __init__(self, vae, patcher):
        self.vae, self.patcher = vae, patcher

    def __getattr__(self, name):
        return getattr(self.vae, name)

    def decode(self, *args):
        comfy.model_management.unload_all_models()
        return self.vae.decode(*args)


def test_a_model_that_a_vae_has_driven_away_comes_back():
    patcher = new_model("sd15")
    key = "diffusion_model.input_blocks.0.0.weight"
    patcher.add_patches({key: (torch.full_like(patcher.model.state_dict()[key], 0.1),)})
    calm = refined(patcher=patcher, vae=vae_of("sd15"))
    assert not torch.equal(calm, refined(vae=vae_of("sd15")))
    assert torch.equal(refined(patcher=patcher, vae=Greedy(vae_of("sd15"), patcher)), calm)


def wan_vae():
    """The host's causal video VAE, at eight channels."""
    shape = dict(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
    weights = WanVAE(**shape)
    initialise(weights, 3)
    with torch.inference_mode():
        return comfy.sd.VAE(sd=weights.state_dict())


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 1), (1, 2)])
def test_a_video_vae_keeps_pictures_and_frames_apart(batch, frames):
    latent = torch.randn(batch, 16, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    video, base = wan_vae(), model("wan").model
    with torch.inference_mode():
        together = RecurrentSampler(None, 1, 0.3, video)._reencode(base, latent, None)
        alone = [RecurrentSampler(None, 1, 0.3, video)._reencode(base, row, None) for row in latent.split(1)]
    assert together.shape == latent.shape
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


# With guidance


def test_psi_lives_through_all_rounds(monkeypatch):
    found, learned, seen = [], [], []
    update = AlignmentRun.update
    monkeypatch.setattr(AlignmentRun, "update", lambda self, *args: (learned.append(self), update(self, *args))[1])
    refined(patcher=guided("sd15", steps=1, on_finish=found.append), steps=3, rounds=2, gamma=0.3, callback=lambda *args: seen.append(1))
    assert len(found) == 1 and len(set(map(id, learned))) == 1
    # One update an evaluation, and a warm-up of one in place of the first: nothing of it is done again in a round.
    assert learned[0].updates == found[0].updates == len(seen) > 3


def test_guidance_follows_the_schedule_of_the_round():
    found = []
    refined(patcher=guided("sd15", every=2, steps=1, on_finish=found.append), rounds=1)
    # First pass: the first guided step, 1, and then 2 and 4. The round: its own steps 0 and 2.
    assert found[0].decoder_backwards == 3 + 2


def test_patches_see_the_schedule_of_the_round():
    schedules = []

    def note(executor, *args, **kwargs):
        schedules.append(args[5]["sample_sigmas"].tolist())
        return executor(*args, **kwargs)

    patcher = model("sd15").clone()
    patcher.add_wrapper_with_key("apply_model", "test", note)
    refined(patcher=patcher, rounds=1)
    assert len(schedules[0]) == STEPS + 1 and len(schedules[-1]) == ROUND + 1
    assert schedules[-1][1:] == schedules[0][-ROUND:]


def test_guided_batches_are_their_pictures_one_by_one_under_a_mask():
    degraded = pictures(2)
    changes = dict(rounds=1, gamma=0.3, steps=3, mask=half_mask())
    both = refined(patcher=guided("sd15", alignment=STILL, degraded=degraded), batch=2, **changes)
    for index in range(2):
        alone = refined(patcher=guided("sd15", alignment=STILL, degraded=degraded[index:index + 1]), batch_index=[index], **changes)
        # Another batch size sums convolutions in another order, which the line search carries on.
        assert (both[index:index + 1] - alone).abs().max() < 2e-3 * alone.std()


# Cancel


def test_cancel_between_rounds_stops():
    passes = Passes(after=lambda: comfy.model_management.interrupt_current_processing(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        refined(inner=passes.sampler)
    assert len(passes.starts) == 1
    comfy.model_management.throw_exception_if_processing_interrupted()


def test_gamma_may_go_to_its_limits():
    for gamma in (0.01, 0.99):
        out = refined(gamma=gamma, rounds=1)
        assert torch.isfinite(out).all() and not math.isclose(float(out.std()), 0)
