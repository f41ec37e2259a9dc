"""The objectives are those the models were trained with: eps, v and velocity, at the noise levels of each family."""

import math
from types import SimpleNamespace

import pytest
import torch

import comfy.model_sampling
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from mend.model_patches import host
from mend.model_patches.diffusion_adapter import DiffusionAdapter
from mend.model_patches.host import for_training, output_slope
from mend.model_patches.host_gradients import gradients, unshared_norm_inputs
from mend.tests.model_patches.adapters import FLOWS
from mend.tests.tiny_models import FAMILIES, latent_shape, model
from mend.tests.training.tiny_training import Words, generators
from mend.training.denoising import Denoising
from mend.training.settings import Settings
from mend.training.state import State
from mend.training.trainee import Models

every_family = pytest.mark.parametrize("family", FAMILIES)
# What a family, or a way to patch one, predicts.
KINDS = {"sd15": "eps", "sdxl": "eps", "v": "v", "zsnr": "v", "edm": "edm", "sd3": "velocity", "flux": "velocity", "wan": "velocity"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def family_of(kind):
    return "sd15" if kind in ("v", "zsnr", "edm") else kind


def patched(kind):
    """A model of a kind; predictions are changed by the host's own nodes, as an artist changes them."""
    own = model(family_of(kind))
    if kind in ("v", "zsnr"):
        return ModelSamplingDiscrete().patch(own, "v_prediction", kind == "zsnr")[0]
    return ModelSamplingContinuousEDM().patch(own, "edm", 120.0, 0.002)[0] if kind == "edm" else own


def denoising(kind):
    given = patched(kind)
    return Denoising(Models(given, Words(family_of(kind)), None), for_training(given))


def latents(kind, count=1, seed=4):
    return torch.randn(latent_shape(family_of(kind), count), generator=torch.Generator().manual_seed(seed))


def slope(kind, sigma, data=1.0):
    """d x0 / d output, from the definitions of the predictions."""
    if KINDS[kind] in ("eps", "velocity"):
        return -sigma
    sign = 1 if KINDS[kind] == "edm" else -1
    return sign * sigma * data / math.sqrt(sigma**2 + data**2)


def test_a_model_that_was_moved_away_comes_back(monkeypatch):
    """As a VAE may push it out of a small GPU; here it is only said to be elsewhere."""
    made, loaded = denoising("sd15"), []
    monkeypatch.setattr(host, "loaded_for_training", loaded.append)
    arguments = (latents("sd15"), torch.tensor([0.5]), [""], {})
    made.x0(*arguments)
    assert not loaded
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(made.patched.model, "device", torch.device("meta"))
        made.x0(*arguments)
    assert loaded == [made.patched]
    monkeypatch.setattr(made.patched.model, "model_loaded_weight_memory", made.loaded - 1)
    made.x0(*arguments)
    assert loaded == [made.patched] * 2, "in part is not enough"


def test_the_host_makes_room_once_for_each_larger_step(monkeypatch):
    made, asked = denoising("sd15"), []
    monkeypatch.setattr("mend.training.denoising.make_room", lambda device, size, but: asked.append((size, but)))
    for count in (1, 1, 2, 1):
        made.x0(latents("sd15", count), torch.full((count,), 0.5), [""] * count, {})
    assert [but for _, but in asked] == [made.patched] * 2 and asked[1][0] > asked[0][0] > 0


@every_family
def test_gradients_pass_attention_that_has_none(family):
    """As SageAttention has none, whether it was chosen for the host or by a node."""
    def gradient(given):
        x = latents(family).requires_grad_(True)
        with gradients():
            made = Denoising(Models(given, Words(family), None), for_training(given))
            with made.learning(None):
                return torch.autograd.grad(made.x0(x, torch.tensor([0.5]), [""], {}).square().mean(), x)[0]

    def attention_without(q, k, v, heads, **kwargs):
        return attention_pytorch(q.detach(), k.detach(), v.detach(), heads, **kwargs)

    given = model(family)
    given.model_options["transformer_options"]["optimized_attention_override"] = lambda chosen, *args, **kwargs: attention_without(*args, **kwargs)
    # Implementations differ by roundings of sums of a few dozen numbers.
    torch.testing.assert_close(gradient(given), gradient(model(family)), rtol=1e-3, atol=1e-8)


def test_small_losses_of_a_model_in_half_precision_have_gradients():
    """A mean over a whole picture gives each value a gradient that fp16 cannot hold; here a small picture's loss is made as small."""
    def learned(dtype):
        given = model("sd15", dtype=dtype)
        with gradients():
            made = Denoising(Models(given, Words("sd15"), None), for_training(given))
            lora = DiffusionAdapter(given.model, 4)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in lora.parameters():
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            state = State(SimpleNamespace(kind="lora", parameters=lora.parameters), Settings(steps=1))
            with made.learning(None, lora):
                state.backward(2.0**-14 * made.loss(latents("sd15"), [""], generators(1), {}))
            state.unscale()
            return torch.cat([p.grad.flatten() for p in state.parameters])

    half, full = learned(torch.float16), learned(torch.float32)
    assert (half - full).norm() < 0.05 * full.norm()


@every_kind
@pytest.mark.parametrize("sigma", [0.03, 0.5, 0.97])
def test_the_slope_is_that_of_the_definition(kind, sigma):
    sampling = patched(kind).get_model_object("model_sampling")
    z0 = latents(kind, 2)
    found = output_slope(sampling, torch.tensor([sigma, sigma / 2]), z0)
    data = getattr(sampling, "sigma_data", 1.0)
    expected = torch.tensor([slope(kind, each, data) for each in (sigma, sigma / 2)]).reshape(-1, *[1] * (z0.ndim - 1))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def target(kind, z0, noise, sigma):
    """What the model should have said, from the papers' definitions with alpha^2 = 1 / (1 + sigma^2)."""
    if KINDS[kind] == "eps":
        return noise
    if KINDS[kind] == "velocity":
        return noise - z0
    return (noise - sigma * z0) / math.sqrt(1 + sigma**2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("edm", "zsnr")])
def test_the_loss_is_the_error_of_the_models_own_output(kind):
    objective, z0 = denoising(kind), latents(kind)
    said = []
    handle = objective.patched.model.diffusion_model.register_forward_hook(lambda _, args, out: said.append(out.float()))
    with torch.no_grad():
        loss = objective.loss(z0, ["a"], generators(), {})
    handle.remove()
    generator = generators()[0]
    sigma = float(objective.draw_sigma(generator))
    noise = torch.randn(z0[0].shape, generator=generator)[None]
    # x0 = x - sigma * output and back: what float32 loses in between, at sigmas from 0.03 up.
    torch.testing.assert_close(loss, (said[0] - target(kind, z0, noise, sigma)).square().mean(), rtol=1e-3, atol=1e-5)


@every_kind
def test_a_perfect_model_has_no_loss(kind, monkeypatch):
    objective, z0 = denoising(kind), latents(kind, 2)
    monkeypatch.setattr(objective, "x0", lambda x, sigma, texts, extra: z0.clone())
    assert float(objective.loss(z0, ["a", "b"], generators(2), {})) == 0


# Noise levels


def drawn(objective, count=2000):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([objective.draw_sigma(generator) for _ in range(count)])


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "v", "zsnr"])
def test_discrete_timesteps_are_uniform(kind):
    objective = denoising(kind)
    sigmas = drawn(objective)
    steps = objective.sampling.timestep(sigmas)
    table = objective.sampling.sigmas[steps.long()]
    torch.testing.assert_close(sigmas, table.float(), rtol=1e-3, atol=0)
    counts = torch.histc(steps.float(), 10, 0, 1000)
    # Chi-square of ten bins: nine degrees of freedom, beyond 27.9 once in a thousand seeds.
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9


@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_flow_times_are_logit_normal_under_the_shift(kind):
    objective = denoising(kind)
    sigmas = drawn(objective).double()
    shift = objective.sampling.shift
    # sigma = s t / (1 + (s - 1) t), that is logit(sigma) = logit(t) + log(s), with s the shift itself, or e to it in FLUX.
    logits = torch.logit(sigmas) - (shift if kind == "flux" else math.log(shift))
    assert abs(float(logits.mean())) < 4 / math.sqrt(len(logits)) and abs(float(logits.std()) - 1) < 4 / math.sqrt(2 * len(logits))


@every_kind
def test_no_draw_leaves_the_schedule(kind, monkeypatch):
    objective, z0 = denoising(kind), latents(kind)
    sampling = objective.sampling
    assert all(float(sampling.sigma_min) * 0.999 <= sigma <= float(sampling.sigma_max) * 1.001 for sigma in drawn(objective, 300).tolist())
    # The ends, which are drawn once in a thousand times.
    for extreme in (0, 999):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, **__: torch.tensor(extreme))
            patch.setattr(torch, "sigmoid", lambda *_: torch.tensor(float(extreme > 0)))
            sigma = objective.draw_sigma(generators()[0])
        # A flow's least time is 1 in 1000, which its shift makes more of.
        least = float(sampling.percent_to_sigma(0.999)) if kind in FLOWS else 0.0
        expected = float(sampling.sigma_max) if extreme else max(float(sampling.sigma_min), least)
        assert float(sigma) == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            monkeypatch.setattr(objective, "draw_sigma", lambda _, sigma=sigma: sigma)
            assert objective.loss(z0, ["a"], generators(), {}).isfinite()
            monkeypatch.undo()


# Samples and texts


@every_family
def test_samples_do_not_depend_on_their_batch(family):
    objective, z0 = denoising(family), latents(family, 3)
    with torch.no_grad():
        together = objective.loss(z0, ["a", "b", "c"], generators(3), {})
        alone = [objective.loss(z0[i:i + 1], [text], [generators(3)[i]], {}) for i, text in enumerate("abc")]
        again = objective.loss(z0, ["a", "b", "c"], generators(3), {})
    assert torch.equal(together, again)
    # Another batch size sums matrix products in another order.
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


@every_family
def test_texts_that_do_not_go_together_get_passes_of_their_own(family):
    objective, z0 = denoising(family), latents(family, 2)
    passes = []
    handle = objective.patched.model.diffusion_model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    sigma = torch.tensor([0.4, 0.7])
    with torch.no_grad():
        apart = objective.x0(z0, sigma, ["a", "a long text"], {})
        assert passes == [1, 1]
        alone = [objective.x0(z0[i:i + 1], sigma[i:i + 1], [text], {}) for i, text in enumerate(("a", "a long text"))]
        assert torch.equal(apart, torch.cat(alone))
        passes.clear()
        together = objective.x0(z0, sigma, ["a", "b"], {})
        assert passes == [2]
        alone = [objective.x0(z0[i:i + 1], sigma[i:i + 1], [text], {}) for i, text in enumerate("ab")]
    handle.remove()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[1], apart[1], atol=1e-3), "texts must matter"


def test_each_text_is_encoded_once():
    objective, z0 = denoising("sd15"), latents("sd15", 2)
    with torch.no_grad():
        for _ in range(3):
            objective.loss(z0, ["a", "b"], generators(2), {})
            objective.loss(z0, ["b", "b"], generators(2), {})
    assert objective.models.clip.encoded == ["a", "b"]


@every_family
def test_gradients_reach_the_latent(family):
    with gradients():
        objective, z0 = denoising(family), latents(family).requires_grad_(True)
        with unshared_norm_inputs(objective.patched.model.diffusion_model):
            gradient, = torch.autograd.grad(objective.loss(z0, ["a"], generators(), {}), z0)
    assert gradient.isfinite().all() and gradient.any()
    assert not any(p.requires_grad for p in objective.patched.model.parameters())


def test_discrete_sampling_is_what_is_tested():
    assert isinstance(patched("v").get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    assert isinstance(patched("edm").get_model_object("model_sampling"), comfy.model_sampling.EDM)
