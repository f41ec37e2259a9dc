"""A Restoration Adapter in training: right gradients everywhere, a base that stays, and weights that act in the host as they were trained."""

import pytest
import torch

import comfy.memory_management
import comfy.model_management
import comfy.sample
from mend.model_patches.diffusion_adapter import lora_of
from mend.model_patches.host_gradients import gradients
from mend.model_patches.host_lora import with_lora
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import applied, fresh, trained
from mend.tests.tiny_models import FAMILIES
from mend.tests.training.tiny_training import SIDE, batch, evaluated, generators, models, started
from mend.training import restoration_adapter
from mend.training.kinds import trainee_of
from mend.training.restoration_adapter import RestorationAdapterTrainee, new_adapter
from mend.training.trainee import Models

every_family = pytest.mark.parametrize("family", FAMILIES)


def state(given):
    return {name: tensor.clone() for name, tensor in given.model.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) + ("forward" in vars(part)) for part in module.modules())


# Gradients


@every_family
def test_every_parameter_has_a_gradient(family):
    given = models(family)
    trainee = RestorationAdapterTrainee(started(family, given, robust=True), given)
    with gradients(), trainee.attach(given):
        loss, figures = trainee.loss(batch(2), generators(2))
        loss.backward()
        assert loss.isfinite() and float(loss.detach()) == pytest.approx(figures["denoising"] + figures["encoding"], rel=1e-5)
    parameters = list(trainee.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)
    assert sum(p.numel() for p in parameters) > sum(p.numel() for p in trainee.network.parameters())


@every_family
def test_a_fresh_one_starts_at_its_last_layers(family):
    given = models(family)
    trainee = RestorationAdapterTrainee(fresh(family), given)
    with gradients(), trainee.attach(given):
        trainee.loss(batch(), generators())[0].backward()
    for name, p in trainee.network.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (".zero." in name), name
    for name, p in trainee.lora.named_parameters():
        assert bool(p.grad.any()) == (".up." in name), name


@every_family
def test_gradients_equal_finite_differences(family):
    given = models(family)
    trainee = RestorationAdapterTrainee(trained(family), given)
    parameters, generator = list(trainee.parameters()), torch.Generator().manual_seed(1)
    with gradients(), trainee.attach(given):

        def loss():
            return trainee.loss(batch(2), generators(2, seed=5))[0]

        slopes = torch.autograd.grad(loss(), parameters)
        # Along the gradient itself, where the loss changes most, and a random way that every parameter takes part in.
        size = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        assert size > 0.1
        random = [torch.randn(p.shape, generator=generator) * p.detach().std().nan_to_num(0.01).clamp_min(0.01) for p in parameters]
        length = 2e-3
        for way in ([slope / size for slope in slopes], random):
            expected = sum(float((slope * step.detach()).sum()) for slope, step in zip(slopes, way))
            with torch.no_grad():
                ends = []
                for sign in (1, -2):
                    for p, step in zip(parameters, way):
                        p.add_(step, alpha=sign * length)
                    ends.append(float(loss().double()))
                for p, step in zip(parameters, way):
                    p.add_(step, alpha=length)
            found = (ends[0] - ends[1]) / (2 * length)
            # The loss is about 1 and known to 1e-6; over 4e-3 that is 3e-4, and the curve's third order is as small.
            assert found == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_the_robust_encoder_learns_from_its_own_loss_only():
    given = models("sd15")
    trainee = RestorationAdapterTrainee(started("sd15", given, robust=True), given)
    learned = list(trainee.encoder.parameters())
    with gradients(), trainee.attach(given):
        found = torch.autograd.grad(trainee.loss(batch(), generators())[0], learned)
        clean = trainee.denoising.encode(batch().clean)
        expected = torch.autograd.grad((trainee._encode_robustly(batch().degraded) - clean).square().mean(), learned)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_everything_learns_where_the_host_loads_on_demand(monkeypatch, family):
    given = models(family)
    names = [name for name, _ in RestorationAdapterTrainee(trained(family), given).network.named_parameters()]
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    trainee = RestorationAdapterTrainee(trained(family), given)
    assert [name for name, p in trainee.network.named_parameters() if p.requires_grad] == names


# Steps


def stepped(family, given, steps=6, rate=1e-3, weights=None, robust=False):
    """Take steps on one batch at fixed noise levels, and return the trainee and the losses."""
    trainee, losses = RestorationAdapterTrainee(weights or started(family, given, robust), given), []
    with gradients(), trainee.attach(given):
        optimizer = torch.optim.Adam(list(trainee.parameters()), rate)
        for _ in range(steps):
            loss, _ = trainee.loss(batch(2), generators(2, seed=5))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return trainee, losses


@every_family
def test_steps_lower_the_loss_and_leave_the_base(family):
    given = models(family)
    before, vae = state(given), {name: t.clone() for name, t in given.vae.first_stage_model.state_dict().items()}
    training = comfy.model_management.in_training
    _, losses = stepped(family, given, robust=True)
    assert losses[-1] < losses[0]
    assert all(after < earlier + 0.05 * losses[0] for earlier, after in zip(losses, losses[1:]))
    assert same(state(given), before) and same(given.vae.first_stage_model.state_dict(), vae)
    assert not given.model.wrappers and not given.model.patches and hooks(given.model.model) == 0
    assert comfy.model_management.in_training == training and not any(p.requires_grad for p in given.model.model.parameters())


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize("settings", [dict(size="full", rank=0), dict(size="none", rank=4)], ids=str)
def test_adapters_and_lora_learn_alone(family, settings):
    given = models(family)
    trainee, losses = stepped(family, given, weights=trained(family, **settings))
    assert losses[-1] < losses[0]
    assert (trainee.network is None) == (settings["size"] == "none") and (trainee.lora is None) == (settings["rank"] == 0)


@every_family
def test_the_same_seeds_give_the_same_weights(family):
    runs = [stepped(family, models(family), steps=2)[0].state_dict() for _ in range(2)]
    assert same(*runs)


@every_family
def test_nothing_is_left_after_an_error(family):
    given = models(family)
    before, training = state(given), comfy.model_management.in_training
    trainee = RestorationAdapterTrainee(trained(family), given)
    with pytest.raises(KeyError), gradients(), trainee.attach(given):
        trainee.loss(batch(), generators())
        raise KeyError
    assert hooks(given.model.model) == 0 and same(state(given), before) and comfy.model_management.in_training == training
    assert not given.model.wrappers and not given.model.model_options["transformer_options"]


# What was trained is what is applied


@every_family
def test_the_host_applies_what_was_trained(family):
    given = models(family)
    trainee, _ = stepped(family, given, steps=2)
    with gradients(), torch.no_grad(), trainee.attach(given):
        z = trainee.denoising.encode(batch().clean)
        c_lq, sigma = trainee.denoising.encode(batch().degraded), torch.tensor([0.6])
        x = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(2)) * 0.6
        plain_extra = trainee._extra(batch().degraded, c_lq)
        expected = trainee.denoising.x0(x, sigma, ["a"], plain_extra)
        tensors = {name: t.detach().clone() for name, t in trainee.state_dict().items()}
    conditioning = given.clip.encode_from_tokens_scheduled("a")
    weights = Weights(trainee.kind, trainee.family, trainee.config, tensors)
    base = evaluated(given.model, conditioning, x, sigma, {})
    patched = with_lora(applied(given.model, weights, c_lq), lora_of(weights), 1.0)
    key = next(key for key in patched.additional_models)
    found = evaluated(patched, conditioning, x, sigma, {key: torch.cat([c_lq, torch.ones_like(c_lq[:, :1])], 1)})
    # Hooks beside the weights and factors in them round differently: far less than the whole effect.
    effect = (expected - base).abs().max()
    assert effect > 1e-3 and (found - expected).abs().max() < 1e-2 * effect


@pytest.mark.parametrize("robust", [False, True])
@every_family
def test_the_file_holds_the_trainee_bit_for_bit(family, robust):
    given = models(family)
    trainee, _ = stepped(family, given, steps=1, robust=robust)
    tensors = {name: t.detach().clone() for name, t in trainee.state_dict().items()}
    other = RestorationAdapterTrainee(Weights(trainee.kind, trainee.family, trainee.config, tensors), given)
    assert same(other.state_dict(), tensors) and any(name.startswith(ENCODER) for name in tensors) == robust
    assert all(torch.equal(a, b) for a, b in zip(trainee.parameters(), other.parameters(), strict=True))
    other.load_state_dict(started(family, given, robust).tensors)
    assert not same(other.state_dict(), tensors)
    other.load_state_dict(tensors)
    assert same(other.state_dict(), tensors)


# Texts and targets


@pytest.fixture
def told(monkeypatch):
    """What the objective is given, with chances of our own."""

    def with_chances(drop, lq_target, robust=False, **given):
        models_given, seen = models("sd15"), []
        monkeypatch.setattr(restoration_adapter, "TEXT_DROP", drop)
        monkeypatch.setattr(restoration_adapter, "LQ_TARGET", lq_target)
        trainee = RestorationAdapterTrainee(started("sd15", models_given, robust), models_given)
        with gradients(), trainee.attach(models_given):
            loss = trainee.denoising.loss
            monkeypatch.setattr(trainee.denoising, "loss", lambda z0, texts, *rest: (seen.append((z0, texts)), loss(z0, texts, *rest))[1])
            trainee.loss(batch(2, **given), generators(2))
            clean, degraded = trainee.denoising.encode(batch(2).clean), trainee.denoising.encode(batch(2).degraded)
        return *seen[0], clean, degraded

    return with_chances


def test_captions_are_told(told):
    z0, texts, clean, _ = told(0.0, 0.0)
    assert texts == ["a red house", "a green tree"] and torch.equal(z0, clean)


def test_captions_are_dropped(told):
    z0, texts, clean, _ = told(1.0, 0.0)
    assert texts == ["", ""] and torch.equal(z0, clean)


def test_degraded_pictures_are_targets_under_their_own_words(told):
    z0, texts, _, degraded = told(1.0, 1.0)
    assert texts == ["noisy", "noisy"] and torch.equal(z0, degraded)


def test_a_degraded_target_is_not_what_the_robust_encoder_makes_of_it(told):
    z0, _, clean, degraded = told(1.0, 1.0, robust=True)
    assert torch.equal(z0, degraded) and not torch.equal(z0, clean)


def test_without_words_they_are_no_targets(told):
    z0, texts, clean, _ = told(0.0, 1.0, words="")
    assert texts == ["a red house", "a green tree"] and torch.equal(z0, clean)


def test_chances_are_as_published():
    draws = torch.stack([torch.rand(2, generator=torch.Generator().manual_seed(seed)) for seed in range(2000)])
    drop, lq = (draws < torch.tensor([restoration_adapter.TEXT_DROP, restoration_adapter.LQ_TARGET])).float().mean(0).tolist()
    # 0.1 of 2000 is known to 0.0067.
    assert drop == pytest.approx(0.1, abs=0.027) and lq == pytest.approx(0.1, abs=0.027)


# Validation


@every_family
def test_validation_restores_pictures(family):
    given = models(family)
    trainee = RestorationAdapterTrainee(trained(family), given)
    with gradients(), trainee.attach(given):
        pages = [trainee.validate(batch(2), generators(2)) for _ in range(2)]
        alone = trainee.validate(batch(2), generators(2, seed=9))
        loss, _ = trainee.loss(batch(), generators())
        loss.backward()
    assert pages[0].shape == (2, SIDE, SIDE, 3) and pages[0].min() >= 0 and pages[0].max() <= 1
    assert torch.equal(*pages) and not torch.equal(pages[0], alone) and not pages[0].requires_grad
    assert all(p.grad is not None for p in trainee.parameters()), "training goes on after a validation"
    assert hooks(given.model.model) == 0


@every_family
def test_validation_shows_the_lora_and_the_adapters(family):
    given = models(family)
    pages = []
    for weights in (fresh(family), trained(family, rank=0), trained(family)):
        trainee = RestorationAdapterTrainee(weights, given)
        with gradients(), trainee.attach(given):
            pages.append(trainee.validate(batch(), generators()))
    assert not any(torch.equal(pages[i], pages[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# What is refused


@pytest.mark.parametrize("name", ["model", "clip", "vae"])
def test_missing_models_are_named(name):
    given = models("sd15")
    given = Models(**{each: None if each == name else getattr(given, each) for each in ("model", "clip", "vae")})
    with pytest.raises(ValueError, match=f"Train: '{name}' is not connected. A restoration adapter learns on a model with its text"):
        RestorationAdapterTrainee(trained("sd15"), given)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="Train: the new adapter for UNet 32 was made for UNet 32, and 'model' is SD3 of depth 2"):
        RestorationAdapterTrainee(trained("sd15"), models("sd3"))
    with pytest.raises(ValueError, match="Train: words is of the kind learned prompt, and this node applies the kind restoration adapter"):
        RestorationAdapterTrainee(Weights("learned_prompt", "UNet 32", {}, {}, "words"), models("sd15"))


def test_an_encoder_of_another_vae_is_refused():
    given, other = models("sd15"), models("sd3")
    with pytest.raises(ValueError, match="Train: 'vae': the new adapter for UNet 32 brings an encoder for another kind of VAE"):
        RestorationAdapterTrainee(started("sd15", other, robust=True), given)


@pytest.mark.parametrize("config", [{"size": "huge"}, {"ranks": 3}, {"robust_encoder": True}], ids=str)
def test_new_ones_say_what_they_take(config):
    given = models("sd15")
    with pytest.raises(ValueError, match="a new restoration adapter (takes|needs)"):
        new_adapter(Models(given.model, None, None), config)


def test_new_ones_are_as_the_node_makes_them():
    given = models("sd15")
    made = new_adapter(given, {"rank": 4, "seed": 0})
    assert same(made.tensors, fresh("sd15").tensors) and made.config == fresh("sd15").config
    assert any(name.startswith(ENCODER) for name in new_adapter(given, {"robust_encoder": True}).tensors)


def test_a_vae_of_another_model_is_named():
    given = models("sd15")
    with pytest.raises(ValueError, match="Train: 'vae' gives latents of 16 channels and the model works on 4"):
        trainee_of(fresh("sd15"), Models(given.model, given.clip, tiny_models.vae(16)))
