"""Training of the degradation tokenizer: right gradients, codes that stay in use, a critic that sets in late, runs that go on exactly."""

import pytest
import torch
import torch.nn.functional as F

from mend.model_patches.host_gradients import gradients
from mend.tests.training.dummies import Watcher, same
from mend.tests.training.picture_files import JPEG, NOISE
from mend.tests.training.tiny_tokenizer import TINY, batch, tokenizer
from mend.tests.training.tiny_training import models
from mend.training import degradation_tokenizer as own
from mend.training import kinds
from mend.training.checkpoint import open_run
from mend.training.loop import describe_run, train
from mend.training.pairs import Pairs
from mend.training.settings import Settings
from mend.training.sources import connected_pictures
from mend.training.trainee import Models


def trainee(monkeypatch, **config):
    return kinds.trainee_of(tokenizer(monkeypatch, **config), Models())


def attached(made, given=Models()):
    """The trainee ready for losses."""
    context = made.attach(given)
    context.__enter__()
    return made


def gradient(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


def test_every_parameter_learns(monkeypatch):
    made = attached(trainee(monkeypatch))
    made.at_step(TINY.critic_start)
    loss, figures = made.loss(batch(), [])
    loss.backward()
    assert loss.isfinite() and {"error", "texture", "vq", "use", "fooled", "told"} == figures.keys() and 0 < figures["use"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())


def test_the_encoder_learns_through_the_codes(monkeypatch):
    """Without commitment and evenness only the straight-through gradient is left for it."""
    monkeypatch.setattr(own, "BETA", 0.0)
    monkeypatch.setattr(own, "EVENNESS", 0.0)
    made = attached(trainee(monkeypatch))
    made.loss(batch(), [])[0].backward()
    assert made.network.encoder.stem.weight.grad.any()


def test_the_loss_falls(monkeypatch):
    made = attached(trainee(monkeypatch, adversarial=False))
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=3e-3), []
    for _ in range(60):
        loss, figures = made.loss(batch(), [])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]) and figures["use"] > 0.3


# Codes


def test_unused_codes_come_back():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(200, 8, generator=generator) + torch.tensor([3.0] + [0.0] * 7), dim=-1)
    far = F.normalize(torch.randn(32, 8, generator=generator) * 0.1 - torch.tensor([3.0] + [0.0] * 7), dim=-1)
    start = torch.cat([features[:4], far[4:]])

    def used(weight):
        raw = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([raw], lr=0.05)
        for _ in range(80):
            codes = F.normalize(raw, dim=-1)
            index = own.nearest(features, codes.detach())
            loss = F.mse_loss(F.embedding(index, codes), features) + weight * own.revival(features, codes, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return own.nearest(features, F.normalize(raw, dim=-1)).unique().numel()

    assert used(0.0) == 4 and used(1.0) > 12


def test_codes_in_use_are_left_alone():
    features = torch.eye(4)
    codes = torch.eye(4).requires_grad_(True)
    loss = own.revival(features, codes, torch.arange(4))
    assert loss == 0 and not gradient(loss, [codes])[0].any()


def test_unevenness_is_0_for_even_and_1_for_one():
    codes = torch.eye(16)
    # Half a hundredth is left to chance by the softness of the choice.
    assert own.unevenness(codes, codes) == pytest.approx(0, abs=0.005)
    assert own.unevenness(codes[:1].expand(9, -1), codes) == pytest.approx(1, abs=0.005)


def test_fresh_codes_are_in_use(monkeypatch):
    made = attached(trainee(monkeypatch))
    assert made.loss(batch(4), [])[1]["use"] > 0.6


# Terms


def test_texture_is_seen_whatever_its_shape():
    one, other = (0.5 + 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    flat = torch.full_like(one, 0.5)
    assert own.texture_distance(one, other) < 0.25 * own.texture_distance(one, flat)


def test_critic_and_decoder_leave_each_other_as_they_are(monkeypatch):
    made = attached(trainee(monkeypatch))
    network, pictures = made.network, batch().chart.movedim(-1, 1)
    features = network.encoder.features(pictures)
    decoded = network.decoder(features)
    fooled, told = made._adversarial(pictures, decoded, F.mse_loss(decoded, pictures))
    critic, rest = list(network.discriminator.parameters()), [*network.encoder.stem.parameters(), *network.decoder.parameters()]
    assert all(g is None for g in gradient(fooled, critic)) and all(g is not None and g.any() for g in gradient(fooled, rest))
    assert all(g is not None for g in gradient(told, critic)) and all(g is None for g in gradient(told, rest))


def test_the_critic_sets_in_late(monkeypatch):
    made = attached(trainee(monkeypatch))
    seen = []
    for step in range(4):
        made.at_step(step)
        seen.append("told" in made.loss(batch(), [])[1])
    assert seen == [False, False, True, True]
    off = attached(trainee(monkeypatch, adversarial=False))
    off.at_step(10**6)
    assert "told" not in off.loss(batch(), [])[1] and not any("discriminator" in name for name in off.state_dict())


def test_a_model_with_its_vae_adds_the_perceptual_distance(monkeypatch):
    given = models("sd15")
    with gradients():
        made = kinds.trainee_of(tokenizer(monkeypatch), given)
        with made.attach(given):
            loss, figures = made.loss(batch(), [])
            loss.backward()
        assert figures["perceptual"] > 0 and made.perceptual is None
        assert not any(p.requires_grad and p.grad is not None for p in given.vae.first_stage_model.parameters())


# Runs


def pairs():
    pictures = torch.rand(4, 48, 48, 3, generator=torch.Generator().manual_seed(2))
    return Pairs(connected_pictures([pictures]), [NOISE, JPEG], crop=32)


def trained(monkeypatch, folder, stop_after=None, **settings):
    made, data = trainee(monkeypatch), pairs()
    settings = Settings(**{"steps": 5, "batch": 2, "rate": 1e-3, "ema": 0.5, "validate_every": 0, **settings})
    run = open_run(folder, "run", describe_run(made, data, Models(), settings), settings.steps)
    return train(made, data, Models(), settings, run, Watcher(stop_after=stop_after))


def test_a_run_goes_on_exactly(monkeypatch, tmp_path):
    """It is stopped before the critic sets in."""
    whole = trained(monkeypatch, tmp_path / "whole")
    assert not trained(monkeypatch, tmp_path / "parts", stop_after=1).finished
    parts = trained(monkeypatch, tmp_path / "parts")
    assert parts.finished and parts.losses == whole.losses and same(parts.tensors, whole.tensors)


def test_validation_shows_what_the_codes_hold(monkeypatch, tmp_path):
    result = trained(monkeypatch, tmp_path, steps=1, validate_every=1, validation_pictures=2)
    assert result.page.shape == (2, 32, 3 * 32, 3)
    made = attached(trainee(monkeypatch))
    picture = made.validate(batch(1), [])
    assert picture.shape == (1, 32, 32, 3) and picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize("config", [{"size": "huge"}, {"size": ["lab"]}, {"codes": 3}, {"adversarial": "yes"}, {"seed": "a"}], ids=str)
def test_new_ones_say_what_they_take(config):
    with pytest.raises(ValueError, match="a new degradation tokenizer takes size"):
        kinds.new_weights("degradation_tokenizer", Models(), config)


def test_a_seed_always_makes_the_same(monkeypatch):
    assert same(tokenizer(monkeypatch).tensors, tokenizer(monkeypatch).tensors)
    assert not same(tokenizer(monkeypatch, seed=1).tensors, tokenizer(monkeypatch).tensors)
