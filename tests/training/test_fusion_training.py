"""Degradation-aware feature fusion in training: gradients where they belong, a base that stays, and weights that act in the host as they were trained."""

import pytest
import torch
from torch.nn.functional import l1_loss

from mend.model_patches.diffusion_adapter import lora_of
from mend.model_patches.encoder_features import feature_channels
from mend.model_patches.fine_tune import FINE_TUNE_RATE, FineTune
from mend.model_patches.fusion_patch import grown, new_fusion
from mend.model_patches.host_checkpoints import checkpointed_blocks
from mend.model_patches.host_gradients import gradients
from mend.model_patches.host_lora import with_lora
from mend.model_patches.lq_encoder import frozen_features
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights, save_weights
from mend.tests.model_patches.fusions import applied, trained
from mend.tests.training.tiny_training import SIDE, batch, evaluated, generators, models
from mend.training import fusion
from mend.training.checkpoint import open_run
from mend.training.fusion import ENCODER_RATE, LORA_RATE, FusionTrainee, fresh_fusion
from mend.training.kinds import KINDS, trainee_of
from mend.training.loop import train
from mend.training.settings import Settings
from mend.training.state import State
from mend.training.trainee import Models

FAMILIES = ("sd15", "sd3", "flux", "wan")
every_family = pytest.mark.parametrize("family", FAMILIES)


def started(family, given, rank=2, learns=True, fine_tune=False, **settings):
    """Weights that all have values, so that each has a gradient."""
    weights = trained(family, rank=0 if fine_tune else rank, **settings)
    return grown(weights, given.model.model, given.vae, 0, learns, 0, fine_tune)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_family
def test_every_parameter_has_a_gradient(family):
    given = models(family)
    trainee = FusionTrainee(started(family, given), given)
    base = {name: tensor.clone() for name, tensor in given.model.model.state_dict().items()}
    with gradients(), trainee.attach(given):
        loss, figures = trainee.loss(batch(2), generators(2))
        loss.backward()
    assert loss.isfinite() and float(loss.detach()) == figures["denoising"]
    parameters = list(trainee.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)
    assert len(list(trainee.rate_factors())) == len(parameters)
    assert same(given.model.model.state_dict(), base) and not given.model.wrappers


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_gradients_equal_finite_differences(family):
    given = models(family)
    trainee = FusionTrainee(started(family, given), given)
    parameters = list(trainee.parameters())
    with gradients(), trainee.attach(given):

        def loss():
            return trainee.loss(batch(2), generators(2, seed=5))[0]

        slopes = torch.autograd.grad(loss(), parameters)
        size = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        length, ends = 2e-3 / size, []
        with torch.no_grad():
            for sign in (1, -2):
                for p, slope in zip(parameters, slopes):
                    p.add_(slope, alpha=float(sign * length / size))
                ends.append(float(loss()))
    # Along the gradient itself the loss, about 1 and known to 1e-6, changes by 4e-3; absolute errors have kinks, which leave a percent or two.
    assert (ends[0] - ends[1]) / float(2 * length) == pytest.approx(float(size), rel=0.03)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_gradient_checkpointing_changes_nothing(family):
    given, found = models(family), []
    for model in (given.model, checkpointed_blocks(given.model)):
        chosen = Models(model, given.clip, given.vae)
        trainee = FusionTrainee(started(family, given, learns=False), chosen)
        with gradients(), trainee.attach(chosen):
            found.append(torch.autograd.grad(trainee.loss(batch(), generators())[0], list(trainee.parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_absolute_error_of_the_models_own_output(monkeypatch):
    given, seen = models("sd15"), []
    trainee = FusionTrainee(started("sd15", given, learns=False), given)
    with gradients(), torch.no_grad(), trainee.attach(given):
        x0 = trainee.denoising.x0
        monkeypatch.setattr(trainee.denoising, "x0", lambda *args: (seen.append((args, x0(*args))), seen[-1][1])[1])
        loss, _ = trainee.loss(batch(2), generators(2))
        (x, sigma, *_), found = seen[0]
        clean = trainee.denoising.encode(batch(2).clean)
        expected = l1_loss((x - found) / sigma.reshape(-1, 1, 1, 1), (x - clean) / sigma.reshape(-1, 1, 1, 1))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


# Stages


def test_what_the_weights_hold_is_what_learns():
    given = models("sd15")
    alone = FusionTrainee(started("sd15", given, rank=0, learns=False), given)
    assert alone.lora is None and alone.encoder is None and set(alone.rate_factors()) == {1.0}
    both = FusionTrainee(started("sd15", given), given)
    groups = State(both, Settings(rate=1e-2)).optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, 1e-2 * LORA_RATE, 1e-2 * ENCODER_RATE])
    for group, part in zip(groups[1:], (both.lora, both.encoder)):
        assert {id(p) for p in group["params"]} == {id(p) for p in part.parameters()}


@every_family
def test_all_of_the_model_may_learn_in_place_of_a_lora(family):
    given = models(family)
    weights = started(family, given, fine_tune=True, learns=False)
    assert weights.config["fine_tune"] and weights.config["rank"] == 0
    assert not any(tensor.requires_grad for tensor in weights.tensors.values())
    trainee = FusionTrainee(weights, given)
    assert isinstance(trainee.lora, FineTune)
    groups = State(trainee, Settings(rate=1e-2)).optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, 1e-2 * FINE_TUNE_RATE])
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in trainee.lora.parameters()}
    base = {name: tensor.clone() for name, tensor in given.model.model.state_dict().items()}
    with gradients(), trainee.attach(given):
        trainee.loss(batch(2), generators(2))[0].backward()
    moved = [bool(p.grad is not None and p.grad.any()) for p in trainee.lora.parameters()]
    assert sum(moved) > 0.9 * len(moved) and same(given.model.model.state_dict(), base)


def test_a_fusion_has_a_lora_or_a_fine_tune():
    given = models("sd15")
    with pytest.raises(ValueError, match="has a LoRA of rank 2, and fine_tune would stand in its place"):
        grown(trained("sd15", rank=2), given.model.model, given.vae, 0, False, 0, True)
    tuned = started("sd15", given, fine_tune=True, learns=False)
    assert same(grown(tuned, given.model.model, given.vae, 8, False, 0).tensors, tuned.tensors), "it has what a LoRA would stand for"


def test_the_second_stage_goes_on_from_the_first(tmp_path):
    given = models("sd15")
    first = started("sd15", given, rank=0, learns=False)
    save_weights(first, tmp_path / "first.safetensors")
    second = fresh_fusion(given, {"start": str(tmp_path / "first.safetensors"), "rank": 3, "train_encoder": True})
    assert second.config == first.config | {"rank": 3} and all(torch.equal(second.tensors[name], t) for name, t in first.tensors.items())
    losses = []
    for weights in (first, second):
        trainee = FusionTrainee(weights, given)
        with gradients(), torch.no_grad(), trainee.attach(given):
            losses.append(float(trainee.loss(batch(2), generators(2))[0]))
    # The copy of the encoder computes in full precision, as the VAE does here; nothing has learned yet.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(ValueError, match="has a LoRA of rank 3 already. Set the rank to that, or to 0"):
        grown(second, given.model.model, given.vae, 4, False, 0)
    assert same(grown(second, given.model.model, given.vae, 3, True, 9).tensors, second.tensors)


# Steps


def stepped(family, steps=4, **settings):
    given = models(family)
    trainee, losses = FusionTrainee(started(family, given, **settings), given), []
    with gradients(), trainee.attach(given):
        optimizer = torch.optim.Adam(list(trainee.parameters()), 1e-3)
        for _ in range(steps):
            loss, _ = trainee.loss(batch(2), generators(2, seed=5))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return trainee, losses, given


@every_family
def test_steps_lower_the_loss(family):
    _, losses, given = stepped(family)
    assert losses[-1] < losses[0] and not any(p.grad is not None for p in given.vae.first_stage_model.parameters())


def test_a_fresh_one_learns_to_see():
    given = models("sd15")
    weights = new_fusion(given.model.model, feature_channels(given.vae))
    trainee = FusionTrainee(weights, given)
    with gradients(), trainee.attach(given):
        optimizer = torch.optim.Adam(list(trainee.parameters()), 1e-2)
        for _ in range(3):
            trainee.loss(batch(2), generators(2, seed=5))[0].backward()
            optimizer.step()
            moved = [bool(p.grad.any()) for p in trainee.parameters()]
            optimizer.zero_grad()
    assert all(moved), "the last layers move first, and then what is behind them"


@pytest.mark.parametrize("fine_tune", [False, True])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_host_applies_what_was_trained(family, fine_tune):
    trainee, _, given = stepped(family, steps=2, learns=False, fine_tune=fine_tune)
    with gradients(), torch.no_grad(), trainee.attach(given):
        z, e = trainee.denoising.encode(batch().clean), trainee.network.embed(trainee._features(batch().degraded))
        sigma = torch.tensor([0.6])
        x = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(2)) * 0.6
        extra = torch.cat([e, torch.ones_like(e[:, :1])], 1)
        expected = trainee.denoising.x0(x, sigma, ["a"], {trainee.condition.key: extra})
        tensors = {name: t.detach().clone() for name, t in trainee.state_dict().items()}
    weights = Weights(trainee.kind, trainee.family, trainee.config, tensors)
    conditioning = given.clip.encode_from_tokens_scheduled("a")
    patched = with_lora(applied(given.model, weights, frozen_features(given.vae, batch().degraded)), lora_of(weights), 1.0)
    base = evaluated(given.model, conditioning, x, sigma, {})
    found = evaluated(patched, conditioning, x, sigma, {next(iter(patched.additional_models)): extra})
    # Hooks beside the weights and factors in them round differently: far less than the whole effect.
    effect = (expected - base).abs().max()
    assert effect > 1e-3 and (found - expected).abs().max() < 1e-2 * effect


def test_the_file_holds_the_trainee_bit_for_bit():
    trainee, _, given = stepped("sd15", steps=1)
    tensors = {name: t.detach().clone() for name, t in trainee.state_dict().items()}
    other = FusionTrainee(Weights(trainee.kind, trainee.family, trainee.config, tensors), given)
    assert same(other.state_dict(), tensors) and any(name.startswith(ENCODER) for name in tensors)
    assert all(torch.equal(a, b) for a, b in zip(trainee.parameters(), other.parameters(), strict=True))


class TinyPairs:
    """As many noisy pictures as are asked for."""

    validation_count = 1

    def __len__(self):
        return 4

    def fingerprint(self):
        return "noisy"

    def pair(self, index, generator):
        whole = batch(seed=index)
        return type("Pair", (), dict(clean=whole.clean[0], degraded=whole.degraded[0], caption="a house", words="noisy"))()

    def collate(self, pairs):
        stacked = {name: torch.stack([getattr(pair, name) for pair in pairs]) for name in ("clean", "degraded")}
        return type(batch())(stacked["clean"], stacked["degraded"], ("a house",) * len(pairs), ("noisy",) * len(pairs))


class Stopping:
    """Ends a run after some steps."""

    def __init__(self, after):
        self.after = after

    def stepped(self, progress):
        self.after -= 1

    def validated(self, validation, page):
        pass

    def stop(self):
        return self.after <= 0


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path):
    ends = []
    for name, stops in (("whole", (99,)), ("parts", (2, 99))):
        for stop in stops:
            given = models("sd15")
            trainee = trainee_of(started("sd15", given), given)
            settings = Settings(steps=4, batch=2, rate=1e-3, ema=0.5, validate_every=0)
            described = {"kind": trainee.kind, "settings": settings.identity()}
            result = train(trainee, TinyPairs(), given, settings, open_run(tmp_path / name, name, described, 4), Stopping(stop))
        ends.append(result.tensors)
    assert same(*ends)


# Texts


@pytest.mark.parametrize(("drop", "captions", "texts"), [
    (0.0, ("a red house", "a green tree"), ["a red house", "a green tree"]), (0.0, ("", "a green tree"), ["", "a green tree"]),
    (1.0, ("a red house", "a green tree"), ["", ""]),
])  # fmt: skip
def test_captions_or_nothing_are_told(monkeypatch, drop, captions, texts):
    given, told = models("sd15"), []
    monkeypatch.setattr(fusion, "TEXT_DROP", drop)
    trainee = FusionTrainee(started("sd15", given, learns=False), given)
    with gradients(), trainee.attach(given):
        loss = trainee.denoising.loss
        monkeypatch.setattr(trainee.denoising, "loss", lambda z0, texts, *rest, **more: (told.append(texts), loss(z0, texts, *rest, **more))[1])
        trainee.loss(batch(2, captions=captions), generators(2))
    assert told == [texts]


def test_the_published_chance():
    draws = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < fusion.TEXT_DROP for seed in range(2000)]
    # 0.2 of 2000 is known to 0.009.
    assert sum(draws) / 2000 == pytest.approx(0.2, abs=0.036)


# Validation


@pytest.mark.parametrize("family", ["sd15", "sd3", "wan"])
def test_validation_restores_pictures(family):
    given = models(family)
    trainee = FusionTrainee(started(family, given), given)
    with gradients(), trainee.attach(given):
        pages = [trainee.validate(batch(2), generators(2)) for _ in range(2)]
        trainee.loss(batch(), generators())[0].backward()
    assert pages[0].shape == (2, SIDE, SIDE, 3) and pages[0].min() >= 0 and pages[0].max() <= 1 and not pages[0].requires_grad
    assert torch.equal(*pages) and all(p.grad is not None for p in trainee.parameters())


# What is refused


@pytest.mark.parametrize("name", ["model", "clip", "vae"])
def test_missing_models_are_named(name):
    given = models("sd15")
    weights = started("sd15", given)
    given = Models(**{each: None if each == name else getattr(given, each) for each in ("model", "clip", "vae")})
    with pytest.raises(ValueError, match=f"Train: '{name}' is not connected. A fusion learns on a model with its text encoder and VAE."):
        FusionTrainee(weights, given)


def test_another_vae_is_refused():
    given = models("sd15")
    weights = started("sd15", given)
    odd = Weights(weights.kind, weights.family, weights.config, {**weights.tensors, f"{ENCODER}encoder.conv_in.weight": torch.zeros(3)}, "odd")
    with pytest.raises(ValueError, match="Train: 'vae': odd brings an encoder for another kind of VAE: encoder.conv_in.weight does not fit"):
        FusionTrainee(odd, given)


@pytest.mark.parametrize("config", [{"preset": "huge"}, {"ranks": 3}, {"rank": "8"}, {"seed": -1}, {"single": 1}, {"start": 5}, {"preset": ["lite"]}, {"fine_tune": "yes"}], ids=str)
def test_new_ones_say_what_they_take(config):
    with pytest.raises(ValueError, match=r"a new fusion takes preset \(published, lite\), rank, seed, train_encoder, fine_tune, single and start; found"):
        fresh_fusion(models("sd15"), config)


def test_new_ones_from_a_configuration():
    given = models("sd15")
    weights = KINDS["fusion"].new(given, {"preset": "published", "rank": 2, "seed": 3, "single": False})
    assert weights.config == {"preset": "published", "features": 32, "single": False, "rank": 2}
    tuned = KINDS["fusion"].new(given, {"rank": 2, "fine_tune": True})
    assert tuned.config == {"preset": "lite", "features": 32, "single": True, "rank": 0, "fine_tune": True}
    with pytest.raises(ValueError, match="a new fusion needs a model and its VAE."):
        fresh_fusion(Models(given.model), {})
