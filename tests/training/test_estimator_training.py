"""Training of the degradation estimator: it learns to see plain damage, and its bank stays what the tokenizer made."""

import pytest
import torch

import comfy.memory_management
from mend.degradations.scales import Scale, recipe_of
from mend.degradations.visual_ground import visual_ground
from mend.model_patches.degradation_estimator import findings
from mend.model_patches.degradation_tokenizer import difference, fingerprint
from mend.model_patches.weights_file import Weights, save_weights
from mend.tests.training.dummies import Watcher, same
from mend.tests.training.picture_files import NOISE
from mend.tests.training.tiny_tokenizer import TINY, tokenizer
from mend.training import kinds
from mend.training.checkpoint import open_run
from mend.training.degradation_estimator import new_estimator
from mend.training.loop import describe_run, train
from mend.training.pairs import Pairs
from mend.training.seeding import mixed
from mend.training.settings import Settings
from mend.training.sources import connected_pictures
from mend.training.trainee import Batch, Models

OBVIOUS = (Scale("low light", "exposure", (0.25, 0.125)), Scale("gaussian noise", "sigma", (40.0, 80.0)))


def pictures(count, first=0, size=64):
    return torch.cat([visual_ground(first + index, size) for index in range(count)])


def estimator(monkeypatch, scales=OBVIOUS, seed=0):
    return new_estimator(tokenizer(monkeypatch), seed, "Test", scales)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + index) for index in range(count)]


def test_the_bank_is_what_the_tokenizer_says(monkeypatch):
    given, made = tokenizer(monkeypatch), estimator(monkeypatch, seed=3)
    assert made.config["codebook"] == fingerprint(given) and made.config["chart"] == {"seed": 3, "size": TINY.chart}
    chart = visual_ground(3, TINY.chart)
    damaged = recipe_of({"gaussian noise": 2.0}, OBVIOUS).apply(chart, mixed(3, "gaussian noise", 2))[0]
    assert torch.equal(made.tensors["bank"][3], difference(given, damaged, chart)[0].half())
    assert same(made.tensors, estimator(monkeypatch, seed=3).tensors)


def test_it_has_all_its_weights_where_the_host_loads_on_demand(monkeypatch):
    names = estimator(monkeypatch).tensors.keys()
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    assert estimator(monkeypatch).tensors.keys() == names


def test_it_finds_the_obvious(monkeypatch):
    weights = estimator(monkeypatch)
    made, charts = kinds.trainee_of(weights, Models()), pictures(48, size=48).split(8)
    with made.attach(Models()):
        optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
        for step in range(90):
            clean = charts[step % 6]
            loss, figures = made.loss(Batch(clean, clean, ("",) * 8, ("",) * 8), generators(8, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = Weights(weights.kind, weights.family, weights.config, {name: tensor.detach() for name, tensor in made.state_dict().items()})
    right = []
    for index, scale in enumerate(OBVIOUS):
        damaged = recipe_of({scale.kind: 2.0}, OBVIOUS).apply(pictures(8, 500, 48), 1)[0]
        right += [finding.present(0.5).keys() == {index} for finding in findings(trained, damaged, "Test")]
    assert sum(right) >= 14, f"{right} and {figures}"
    assert torch.equal(trained.tensors["bank"], weights.tensors["bank"])


def test_samples_are_drawn_by_their_own_generator(monkeypatch):
    made = kinds.trainee_of(estimator(monkeypatch), Models())
    both = pictures(2)
    row, places = made._sample(both[1], generators(2)[1])
    again, places_again = made._sample(both[1], generators(2)[1])
    assert torch.equal(row, again) and torch.equal(places, places_again)
    drawn = torch.stack([made._sample(both[0], torch.Generator().manual_seed(seed))[1] for seed in range(60)])
    counts = (drawn > 0).sum(1)
    assert set(counts.tolist()) == {0, 1, 2} and drawn[drawn > 0].min() >= 0.5 and drawn.max() <= 2


def test_a_run_goes_on_exactly(monkeypatch, tmp_path):
    def run(folder, stop_after=None):
        made = kinds.trainee_of(estimator(monkeypatch), Models())
        data = Pairs(connected_pictures([pictures(4)]), [NOISE], crop=32)
        settings = Settings(steps=4, batch=2, rate=1e-3, validate_every=4, validation_pictures=1)
        opened = open_run(folder, "run", describe_run(made, data, Models(), settings), settings.steps)
        return train(made, data, Models(), settings, opened, Watcher(stop_after=stop_after))

    whole = run(tmp_path / "whole")
    assert not run(tmp_path / "parts", stop_after=2).finished
    parts = run(tmp_path / "parts")
    assert parts.losses == whole.losses and same(parts.tensors, whole.tensors) and parts.page.shape == (1, 32, 96, 3)


def test_new_ones_come_from_a_file(monkeypatch, tmp_path):
    given = tokenizer(monkeypatch)
    save_weights(given, tmp_path / "tokenizer.safetensors")
    made = kinds.new_weights("degradation_estimator", Models(), {"tokenizer": str(tmp_path / "tokenizer.safetensors"), "seed": 2})
    assert made.config["codebook"] == fingerprint(given) and made.tensors["bank"].shape == (18, 16, TINY.width)
    for wrong in ({}, {"tokenizer": 3}, {"tokenizer": "x", "seed": "2"}, {"tokenizer": "x", "size": "lab"}):
        with pytest.raises(ValueError, match="a new degradation estimator takes tokenizer"):
            kinds.new_weights("degradation_estimator", Models(), wrong)
