"""A degradation model in training: charts that show what happened, right targets, gradients everywhere, and the same end after an interruption."""

import dataclasses

import pytest
import torch
from torch.amp import autocast

from mend.degradations.recipe import Recipe
from mend.degradations.visual_ground import visual_ground
from mend.model_patches.degradation_model import DEVIATION
from mend.model_patches.degraded_picture import Residuals
from mend.model_patches.host import for_training
from mend.model_patches.host_checkpoints import checkpointed_blocks
from mend.model_patches.host_gradients import gradients
from mend.tests.model_patches.degradation_models import codes, fresh, removed, sampled, trained
from mend.tests.training import tiny_training
from mend.tests.training.picture_files import fill
from mend.training import degradation_model
from mend.training.charts import charts
from mend.training.checkpoint import open_run
from mend.training.degradation_model import (
    CLEAN,
    FINE_TUNE_RATE,
    FLOOR,
    GATE_RATE,
    LITTLE,
    MOST,
    OTHER,
    DegradationTrainee,
    ResidualDenoising,
    damage_weights,
)
from mend.training.denoising import ALONE, Denoising
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


def test_noise_is_not_something_else_than_a_dark_exposure():
    dark = Recipe.from_json([{"kind": "low light"}])
    for own, others in ((dark, [dark, NOISE]), (NOISE, [dark, NOISE])):
        chart, _, other = charts(own, others, 3, 48)
        assert torch.equal(other, chart), "dark exposures are noisy too, so nothing is left to show"


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
    assert loss.isfinite() and not missing and all(p.grad is not None for p in trainee.change.parameters())
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
        monkeypatch.setattr(trainee.denoising, "loss", lambda *given, weights: seen.append((given[0], given[1], given[3])) or torch.zeros(()))
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


def test_large_and_small_damage_are_worth_the_same():
    y0 = torch.stack([torch.full((4, 8, 8), value) for value in (0.0, 0.3, 1.0, 3.0)])
    counted = damage_weights(y0)
    assert counted[2] == pytest.approx(1) and counted[0] == counted.max() == pytest.approx((1 + FLOOR) / FLOOR)
    left = counted * y0.square().flatten(1).mean(1)
    assert left[3] < 5 * left[1], "as squares they are a hundred times apart"


def test_samples_count_by_the_damage_of_their_picture(monkeypatch):
    """Also those that are told of nothing, so that each picture is worth the same either way."""
    given, seen = tiny_training.models("sd15"), []
    for form in ("latent", "picture"):
        trainee = DegradationTrainee(trained("sd15", form), given)
        with gradients(), trainee.attach(given):
            monkeypatch.setattr(trainee.denoising, "loss", lambda *_, weights: seen.append(weights) or torch.zeros(()))
            rows = batch(1)
            for seed in range(12):
                trainee.loss(rows, tiny_training.generators(1, seed=seed))
            y0 = Residuals("latent", given.vae, given.model.model)(rows.degraded, rows.clean) / 0.5
    torch.testing.assert_close(torch.cat(seen[:12]), damage_weights(y0).repeat(12))
    assert seen[12:] == [None] * 12, "there is no damage to measure where pictures themselves are sampled"


def test_the_loss_counts_samples_by_their_weights():
    given, kept = tiny_training.models("sd3"), []
    denoising = Denoising(given, for_training(given.model))
    z0 = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([3.0, 5.0]), None):
        with gradients(), torch.no_grad():
            kept.append(float(denoising.loss(z0, ["", ""], tiny_training.generators(2), {}, weights=weights)))
    assert kept[2] == pytest.approx(3 * kept[0] + 5 * kept[1]) and kept[3] == pytest.approx(kept[0] + kept[1])


def test_latents_and_tokens_stay_in_full_precision_under_autocast(monkeypatch):
    given, told, rows = tiny_training.models("sd15"), [], batch(2)
    trainee = DegradationTrainee(trained("sd15"), given)
    with gradients(), trainee.attach(given):
        monkeypatch.setattr(trainee.denoising, "loss", lambda *seen, weights: told.append((seen[0], weights, *seen[3].values())) or torch.zeros(()))
        for enabled in (False, True):
            with autocast("cpu", torch.bfloat16, enabled=enabled):
                trainee.loss(rows, tiny_training.generators(2))
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(*told, strict=True))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_errors_of_the_residual_count_alike_unless_little_noise_is_left(family, monkeypatch):
    given = tiny_training.models(family)
    denoising = ResidualDenoising(given, for_training(given.model))
    sampling = given.model.get_model_object("model_sampling")
    sigma = torch.stack([torch.as_tensor(sampling.percent_to_sigma(percent)) for percent in (0.05, 0.5, 0.99)])
    share = sigma if family == "sd3" else sigma / (1 + sigma.square()).sqrt()
    assert share[0] > share[1] > LITTLE > share[2]
    z0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(denoising, "x0", lambda *_: z0 + 1)
    found = denoising.error(z0, sigma, z0, [""] * 3, {})
    # x0 of an eps model is sigma times as far off as its output.
    most = 1.0 if family == "sd3" else float(MOST / sigma[0])
    assert family == "sd3" or sigma[0] > MOST > sigma[1]
    torch.testing.assert_close(found.amax((1, 2, 3)), torch.tensor([most, 1.0, float(LITTLE / share[2])]))


@pytest.mark.parametrize("family, much, little", [("sd15", 3.0, 0.9), ("sd3", 0.75, 0.45)])
def test_much_noise_is_shown_alone_half_of_the_time(family, much, little):
    given = tiny_training.models(family)
    denoising = ResidualDenoising(given, for_training(given.model))
    z0 = torch.ones(400, 4, 2, 2)
    for sigma, share in ((much, ALONE), (little, 0.0)):
        shown, hidden = (denoising.noised(z, torch.full((400,), sigma), tiny_training.generators(400)) for z in (z0, 0 * z0))
        alone = (shown == hidden).flatten(1).all(1)
        assert float(alone.float().mean()) == pytest.approx(share, abs=0.08 if share else 0.0)
        kept = 1 - sigma if family == "sd3" else 1.0
        torch.testing.assert_close((shown - hidden)[~alone], kept * z0[~alone])


def test_flows_see_full_noise_as_often_as_they_need():
    given = tiny_training.models("sd3")
    drawn = {}
    for kind in (Denoising, ResidualDenoising):
        denoising, generator = kind(given, for_training(given.model)), torch.Generator().manual_seed(0)
        sigmas = torch.stack([denoising.draw_sigma(generator) for _ in range(2000)])
        sampling = given.model.get_model_object("model_sampling")
        late = float(sampling.percent_to_sigma(0.02))
        drawn[kind] = float((sigmas > late).float().mean())
    # Half of the times are uniform: 1 in 100 lies in the first 2 % of the schedule.
    assert drawn[Denoising] < 0.002 and drawn[ResidualDenoising] == pytest.approx(0.01, abs=0.005)


def test_gates_learn_faster():
    given = tiny_training.models("sd15")
    trainee = DegradationTrainee(trained("sd15"), given)
    names = [name for part in (trainee.network, trainee.change) for name, _ in part.named_parameters()]
    assert len(names) == len(list(trainee.parameters()))
    faster = {name for name, factor in zip(names, trainee.rate_factors(), strict=True) if factor != 1}
    assert faster and faster == {name for name in names if name.endswith(".gate")}


def test_all_weights_learn_slowly_where_that_is_asked_for(pairs, monkeypatch):
    monkeypatch.setattr(degradation_model, "MEASURED", 4)
    given, start = tiny_training.models("sd15"), fresh("sd15", fine_tune=True)
    before = {name: p.detach().clone() for name, p in given.model.model.named_parameters()}
    trainee = DegradationTrainee(start, given)
    assert set(trainee.rate_factors()) == {1.0, FINE_TUNE_RATE, GATE_RATE} and len(trainee.rate_factors()) == len(list(trainee.parameters()))
    result = train(trainee, pairs, given, Settings(steps=2, batch=1, rate=1e-3, validate_every=0), None, Watcher())
    still = [name for name, tensor in result.tensors.items() if name.endswith((".diff", ".diff_b")) and not tensor.any()]
    # Keys have no use for an offset: attention is the same for all of them. What goes before a norm of few channels has none either.
    assert len(still) < 0.1 * len(trainee.change.paths), still
    assert all(torch.equal(p, before[name]) for name, p in given.model.model.named_parameters())
    assert not any("lora" in name for name in result.tensors)


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
    for wrong in ({"rank": "8"}, {"rank": True}, {"form": ["latent"]}, {"size": {}}, {"seed": 0.5}):
        with pytest.raises(ValueError, match="whole numbers"):
            KINDS["degradation_model"].new(given, {"tokenizer": str(tmp_path / "codes.safetensors"), **wrong})
    made = KINDS["degradation_model"].new(given, {"tokenizer": str(tmp_path / "codes.safetensors"), "form": "pixel", "size": "small"})
    assert made.config["form"] == "pixel" and not made.tensors[DEVIATION]
    assert isinstance(batch(), Batch)
