"""The bridge objective: states that sampling walks too, the targets of the definition, times between t_min and T0."""

import math

import pytest
import torch

from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from mend.model_patches.host import for_training, is_flow
from mend.samplers.bridge import Bridge, Path, least_time
from mend.tests.samplers.test_bridge import sample
from mend.tests.tiny_models import latent_shape, model
from mend.tests.training.tiny_training import Words, generators
from mend.training.bridge import BridgeObjective
from mend.training.denoising import Denoising
from mend.training.trainee import Models

KINDS = ("sd15", "v", "sd3", "flux", "wan")
every_kind = pytest.mark.parametrize("kind", KINDS)


def family(kind):
    return "sd15" if kind == "v" else kind


def patched(kind):
    own = model(family(kind))
    return ModelSamplingDiscrete().patch(own, "v_prediction", False)[0] if kind == "v" else own


def denoising(kind):
    given = patched(kind)
    return Denoising(Models(given, Words(family(kind)), None), for_training(given))


def latents(kind, count=1, seed=4):
    return torch.randn(latent_shape(family(kind), count), generator=torch.Generator().manual_seed(seed))


def watched(objective):
    """What the denoiser is asked and what it says, filled as it goes."""
    asked = []
    inner = objective.x0

    def x0(x, sigma, texts, extra):
        found = inner(x, sigma, texts, extra)
        asked.append((x.clone(), sigma.clone(), found.clone()))
        return found

    objective.x0 = x0
    return asked


@every_kind
def test_the_loss_is_the_error_of_the_models_own_output(kind):
    objective, clean, degraded = denoising(kind), latents(kind), latents(kind, seed=5)
    said = []
    handle = objective.patched.model.diffusion_model.register_forward_hook(lambda _, args, out: said.append(out.float()))
    with torch.no_grad():
        loss = BridgeObjective().loss(objective, clean, degraded, [""], generators())
    handle.remove()
    flow, generator = is_flow(objective.sampling), generators()[0]
    t = float(BridgeObjective().draw(objective.sampling, generator))
    noise = torch.randn(clean[0].shape, generator=generator)[None]
    sigma = t if flow else t / (1 - t)
    # v* = (X_T - X0) + (1 - t) / T0 (Y - X0); eps* = X_T + (Y - X0) / ((1 + sigma) T0); v of diffusion models is made of eps and the x0 it implies.
    target = noise + (1 - t) / 0.4 * (degraded - clean) - (clean if flow else 0)
    if kind == "v":
        target = (target - sigma * clean) / math.sqrt(1 + sigma**2)
        # x = X0 + sigma eps*, of which v takes 1 / (1 + sigma^2) as X0.
    # x0 = x - sigma * output and back: what float32 loses in between at a sigma of about 0.2.
    torch.testing.assert_close(loss, (said[0] - target).square().mean(), rtol=1e-3, atol=1e-5)


@every_kind
def test_training_and_sampling_ask_at_the_same_states(kind, monkeypatch):
    """An oracle walks the bridge; at the times that it was asked, training makes the same states of the same X0, Y and X_T."""
    base = patched(kind)
    clean, degraded = latents(kind), latents(kind, seed=5)
    to_model = base.get_model_object("process_latent_in")
    given, asked = base.clone(), []
    given.set_model_unet_function_wrapper(lambda apply, args: (asked.append((float(args["timestep"][0]), args["input"].clone())), to_model(clean))[1])
    sample(given, kind, Bridge(seed=42), latent=degraded, steps=4)
    objective = denoising(kind)
    seen = watched(objective)
    path = Path(0.4, is_flow(objective.sampling))
    for sigma, x in asked:
        time = torch.tensor(path.time(sigma))
        monkeypatch.setattr(BridgeObjective, "draw", lambda *_, time=time: time)
        with torch.no_grad():
            BridgeObjective().loss(objective, to_model(clean), to_model(degraded), [""], generators(1, seed=42))
        torch.testing.assert_close(seen[-1][0], x, rtol=1e-4, atol=1e-4)
        assert float(seen[-1][1]) == pytest.approx(sigma, rel=1e-5)


@every_kind
@pytest.mark.parametrize("naive", [False, True])
def test_a_perfect_model_has_no_loss(kind, naive, monkeypatch):
    objective, clean, degraded = denoising(kind), latents(kind, 2), latents(kind, 2, seed=5)
    monkeypatch.setattr(objective, "x0", lambda x, sigma, texts, extra: clean.clone())
    assert float(BridgeObjective(naive=naive).loss(objective, clean, degraded, ["", ""], generators(2))) == 0


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_naive_states_hold_nothing_of_the_clean_latent(kind):
    objective, clean, degraded = denoising(kind), latents(kind), latents(kind, seed=5)
    seen = watched(objective)
    with torch.no_grad():
        loss = BridgeObjective(naive=True).loss(objective, clean, degraded, [""], generators())
    x, sigma, x0 = seen[0]
    generator = generators()[0]
    BridgeObjective().draw(objective.sampling, generator)
    noise = torch.randn(clean[0].shape, generator=generator)[None]
    sigma, flow = float(sigma), is_flow(objective.sampling)
    torch.testing.assert_close(x, (1 - sigma if flow else 1) * degraded + sigma * noise)
    start = 0.4 if flow else 0.4 / 0.6
    torch.testing.assert_close(loss, ((x0 - clean) / start).square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_times_are_uniform_unless_skewed(kind):
    sampling = denoising(kind).sampling
    least = least_time(sampling, Path(0.4, is_flow(sampling)))
    for skew in (1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        times = torch.stack([BridgeObjective(skew=skew).draw(sampling, generator) for _ in range(2000)])
        assert times.min() >= least and times.max() <= 0.4
        counts = torch.histc(((times - least) / (0.4 - least)) ** (1 / skew), 10, 0, 1)
        # Chi-square of ten bins: nine degrees of freedom, beyond 27.9 once in a thousand seeds.
        assert float(((counts - 200) ** 2 / 200).sum()) < 27.9


def test_samples_do_not_depend_on_their_batch():
    objective, clean, degraded = denoising("sd3"), latents("sd3", 2), latents("sd3", 2, seed=5)
    with torch.no_grad():
        together = BridgeObjective().loss(objective, clean, degraded, ["", ""], generators(2))
        alone = [BridgeObjective().loss(objective, clean[i:i + 1], degraded[i:i + 1], [""], generators(1, seed=i)) for i in range(2)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0)


def test_settings_come_from_a_config():
    assert BridgeObjective.of({"length": 7}) == BridgeObjective() == BridgeObjective(0.4, 1.0, False)
    assert BridgeObjective.of({"t0": 0.5, "skew": 2, "naive": True}).config() == {"t0": 0.5, "skew": 2, "naive": True}
    for wrong in ({"t0": "high"}, {"t0": 0}, {"skew": -1}, {"naive": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} of the bridge is"):
            BridgeObjective.of(wrong)
    with pytest.raises(ValueError, match="t0 is 0.95, and this model knows times"):
        BridgeObjective(t0=0.95).path(patched("sd15").get_model_object("model_sampling"))
