"""A degradation model in training: charts that show what happened, right targets, gradients everywhere, and the same end after an interruption."""

import dataclasses

import pytest
import torch

from mend.degradations.recipe import Recipe
from mend.degradations.visual_ground import visual_ground
from mend.model_patches.degradation_model import DEVIATION
from mend.model_patches.degraded_picture import Residuals
from mend.model_patches.host import checkpointed_blocks, gradients
from mend.tests.model_patches.degradation_models import codes, fresh, removed, sampled, trained
from mend.tests.training import tiny_training
from mend.tests.training.picture_files import fill
from mend.training import degradation_model
from mend.training.charts import charts
from mend.training.checkpoint import open_run
from mend.training.degradation_model import CLEAN, OTHER, DegradationTrainee
from mend.training.kinds import KINDS
from mend.training.loop import describe_run, train
from mend.training.pairs import Pairs
from mend.training.settings import Settings
from mend.training.sources import good_folder, paired_folders
from mend.training.trainee import Batch

NOISE = Recipe.from_json([{"kind": "gaussian noise", "sigma": 50}])
HAZE = Recipe.from_json([{"kind": "haze"}])
MIXED = Recipe.from_json([{"kind": "real-esrgan", "preset": "mild", "scale": 2}])


def unmeasured(family, **settings):
    weights = trained(family, **settings)
    return dataclasses.replace(weights, tensors={**weights.tensors, DEVIATION: torch.zeros(())})


def batch(count=2, side=64):
    plain = tiny_training.batch(count)
    chart = torch.cat([visual_ground(seed, side) for seed in range(count)])
    return dataclasses.replace(plain, chart=chart, degraded_chart=chart * 0.5, other_chart=1 - chart)


class Watcher:
    def __init__(self, stop_after=None):
        self.steps, self.stop_after = [], stop_after

    def stepped(self, progress):
        self.steps.append(progress.step)

    def validated(self, validation, page):
        pass

    def stop(self):
        return self.stop_after is not None and len(self.steps) >= self.stop_after


# Charts


@pytest.fixture
def pairs(tmp_path):
    return Pairs(good_folder(fill(tmp_path / "pictures", 4, 64, 64)), [NOISE, HAZE], crop=64)


def test_charts_leave_pictures_as_they_are(pairs):
    charted = pairs.with_charts(48)
    for index in range(3):
        one, other = (source.pair(index, torch.Generator().manual_seed(index)) for source in (pairs, charted))
        assert torch.equal(one.clean, other.clean) and torch.equal(one.degraded, other.degraded) and one.words == other.words
        assert one.chart is None and other.chart.shape == other.degraded_chart.shape == other.other_chart.shape == (48, 48, 3)
        again = charted.pair(index, torch.Generator().manual_seed(index))
        assert torch.equal(again.chart, other.chart) and torch.equal(again.degraded_chart, other.degraded_chart)
    assert charted.fingerprint() == pairs.fingerprint() and pairs.chart_side == 0
    collated = charted.collate([charted.validation(0), charted.validation(1)])
    assert collated.degraded_chart.shape == (2, 48, 48, 3) and pairs.collate([pairs.validation(0)]).chart is None


def test_a_chart_shows_the_same_damage_but_not_the_same_noise():
    noise = NOISE.apply(torch.full((1, 48, 48, 3), 0.5), 7)[0][0] - 0.5
    chart, noisy, _ = charts(NOISE, [NOISE], 7, 48)
    inside = (chart > 0.35) & (chart < 0.65)
    found = (noisy - chart)[inside]
    assert found.std() == pytest.approx(50 / 255, rel=0.15)
    assert torch.corrcoef(torch.stack([found, noise[inside]]))[0, 1].abs() < 0.1
    chart, damaged, _ = charts(MIXED, [MIXED], 7, 48)
    torch.testing.assert_close(damaged, MIXED.apply(chart[None], 7)[0][0], msg="its strengths come from the seed")


def test_the_other_chart_shows_something_else():
    chart, noisy, other = charts(NOISE, [NOISE, HAZE], 3, 48)
    assert (other - chart).abs().mean() > 0.05 and torch.equal(charts(NOISE, [NOISE], 3, 48)[2], chart)
    # Haze is smooth: neighbours differ no more than in the chart.
    assert (other[1:] - other[:-1]).abs().mean() <= (chart[1:] - chart[:-1]).abs().mean() < (noisy[1:] - noisy[:-1]).abs().mean()


def test_pictures_with_partners_have_no_chart(tmp_path):
    good, bad = (fill(tmp_path / name, 3, 64, 64) for name in ("good", "bad"))
    with pytest.raises(ValueError, match="come with degraded ones"):
        Pairs(paired_folders(good, bad), crop=64).with_charts(48)


# Trainee


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_every_parameter_has_a_gradient(family):
    given = tiny_training.models(family)
    trainee = DegradationTrainee(trained(family), given)
    with gradients(), trainee.attach(given):
        loss, _ = trainee.loss(batch(), tiny_training.generators(2, seed=4))
        loss.backward()
    missing = [name for name, p in trainee.network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert loss.isfinite() and not missing and all(p.grad is not None for p in trainee.lora.parameters())
    assert not any(p.requires_grad for p in trainee.encoder.parameters())
    assert not any(module._forward_hooks for module in given.model.model.modules())


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_checkpointing_changes_no_gradient(family):
    given, slopes = tiny_training.models(family), []
    for model in (given.model, checkpointed_blocks(given.model)):
        models = dataclasses.replace(given, model=model)
        trainee = DegradationTrainee(trained(family), models)
        with gradients(), trainee.attach(models):
            trainee.loss(batch(1), tiny_training.generators(1, seed=4))[0].backward()
        slopes.append([p.grad for p in trainee.network.parameters()])
    for a, b in zip(*slopes):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_targets_follow_the_instruction(monkeypatch):
    given, seen = tiny_training.models("sd15"), []
    trainee = DegradationTrainee(trained("sd15"), given)
    with gradients(), trainee.attach(given):
        monkeypatch.setattr(trainee.denoising, "loss", lambda target, texts, generators, extra: seen.append((target, texts, extra)) or torch.zeros(()))
        rows = batch(1)
        own = Residuals("latent", given.vae, given.model.model)(rows.degraded, rows.clean) / 0.5
        kinds = {"clean": 0, "other": 0, "own": 0}
        for seed in range(40):
            draw = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
            trainee.loss(rows, tiny_training.generators(1, seed=seed))
            target, texts, extra = seen[-1]
            kind = "clean" if draw < CLEAN else "other" if draw < CLEAN + OTHER else "own"
            kinds[kind] += 1
            torch.testing.assert_close(target, own if kind == "own" else torch.zeros_like(own), atol=1e-5, rtol=1e-5)
            assert texts == [""] and bool(extra[trainee.condition.tokens_key].any()) == (kind != "clean")
        assert all(kinds.values())
        degraded_chart = trainee.instruction(rows.degraded_chart, rows.chart)
        assert not trainee.instruction(rows.chart, rows.chart).any() and degraded_chart.any()


def test_words_instead_of_charts_for_comparison():
    given = tiny_training.models("sd15")
    trainee = DegradationTrainee(trained("sd15", instruction="words"), given)
    assert trainee.wants_charts == 0 and not any(name.startswith("via") for name, _ in trainee.network.named_parameters())
    with gradients(), trainee.attach(given):
        assert trainee.loss(tiny_training.batch(2), tiny_training.generators(2, seed=4))[0].isfinite()
        assert "noisy" in given.clip.encoded
        assert trainee.validate(tiny_training.batch(1), tiny_training.generators(1)).shape == (1, 64, 64, 3)


def test_without_charts_it_says_so():
    given = tiny_training.models("sd15")
    trainee = DegradationTrainee(trained("sd15"), given)
    with gradients(), trainee.attach(given), pytest.raises(ValueError, match="without test charts"):
        trainee.loss(tiny_training.batch(1), tiny_training.generators(1))


def test_training_measures_learns_and_resumes_exactly(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(degradation_model, "MEASURED", 8)
    given = tiny_training.models("sd15")
    settings = Settings(steps=4, batch=2, rate=3e-3, validate_every=0)

    def run(folder=None, stop_after=None):
        trainee, watcher = DegradationTrainee(unmeasured("sd15"), given), Watcher(stop_after)
        opened = open_run(folder, "run", describe_run(trainee, pairs, given, settings), settings.steps) if folder else None
        return train(trainee, pairs, given, settings, opened, watcher), trainee

    whole, trainee = run()
    assert float(whole.tensors[DEVIATION]) == pytest.approx(trainee.deviation) and trainee.deviation > 0
    assert not run(tmp_path / "runs", 1)[0].finished
    resumed, _ = run(tmp_path / "runs")
    assert resumed.finished and resumed.losses == whole.losses
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())
    moved = [name for name, tensor in whole.tensors.items() if not torch.equal(tensor, unmeasured("sd15").tensors[name])]
    assert not any(name.startswith("tokenizer.") for name in moved) and any(".irb." in name for name in moved) and any(".via." in name for name in moved)


def test_it_restores_in_training_as_its_nodes_do():
    given, weights = tiny_training.models("sd15"), trained("sd15", "pixel")
    trainee, picture = DegradationTrainee(weights, given), tiny_training.batch(1).degraded
    tokens = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
    with gradients(), trainee.attach(given), torch.no_grad():
        inside = trainee.restoring(picture, tokens)
        one = removed(inside, sampled(inside, "sd15"))
    from mend.model_patches.degradation_tokenizer import Instruction, fingerprint
    from mend.nodes.degradation_space import ApplyDegradationDiffusion

    told = Instruction(tokens, fingerprint(codes()))
    with torch.inference_mode():
        outside = ApplyDegradationDiffusion.execute(given.model, weights, told, picture, given.vae, 1.0, 1.0).args[0]
        torch.testing.assert_close(one, removed(outside, sampled(outside, "sd15")), atol=1e-4, rtol=0)


def test_kinds_know_it(tmp_path):
    given = tiny_training.models("sd15")
    assert isinstance(KINDS["degradation_model"].trainee(fresh("sd15"), given), DegradationTrainee)
    with pytest.raises(ValueError, match="takes tokenizer"):
        KINDS["degradation_model"].new(given, {"form": "latent"})
    from mend.model_patches.weights_file import save_weights

    save_weights(codes(), tmp_path / "codes.safetensors")
    with pytest.raises(ValueError, match="whole numbers"):
        KINDS["degradation_model"].new(given, {"tokenizer": str(tmp_path / "codes.safetensors"), "rank": "8"})
    made = KINDS["degradation_model"].new(given, {"tokenizer": str(tmp_path / "codes.safetensors"), "form": "pixel", "size": "small"})
    assert made.config["form"] == "pixel" and not made.tensors[DEVIATION]
    assert isinstance(batch(), Batch)
