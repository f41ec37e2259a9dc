"""The training loop: it learns, the same every time, whatever its work is split into and whoever interrupts it."""

import math
from contextlib import contextmanager

import pytest
import torch

import comfy.model_management
import comfy.model_patcher
from mend.model_patches.host import INTERRUPTED, for_training
from mend.tests.tiny_models import model
from mend.tests.training.dummies import DummyPairs, DummyTrainee, Watcher, same, trainee, weights
from mend.training import state
from mend.training.checkpoint import TrainingError, open_run
from mend.training.loop import describe_run, train
from mend.training.seeding import Plan, generator, mixed
from mend.training.settings import Settings
from mend.training.trainee import Models

BASE = dict(steps=12, batch=4, rate=1e-2, weight_decay=0.01, validate_every=0, seed=5)


def run(watcher=None, pairs=None, folder=None, learner=None, **changes):
    """Train the dummy; in a run folder where one is given."""
    settings, pairs, learner = Settings(**{**BASE, **changes}), DummyPairs() if pairs is None else pairs, learner or trainee()
    opened = None if folder is None else open_run(folder, "run", describe_run(learner, pairs, Models(), settings), settings.steps)
    return train(learner, pairs, Models(), settings, opened, watcher or Watcher())


def test_it_learns():
    result = run(steps=150, validate_every=150, rate=2e-2)
    before, after = result.validations
    assert (before.step, after.step) == (0, 150) and before.degraded == after.degraded
    assert after.restored > before.degraded + 1 and after.restored > before.restored + 1, "a 3 x 3 filter takes off much of white noise"
    assert sum(result.losses[-20:]) < sum(result.losses[:20]) / 2 and len(result.losses) == 150


def test_the_same_again_bit_for_bit():
    assert same(run().tensors, run().tensors)
    assert not same(run().tensors, run(seed=6).tensors)


def test_nothing_depends_on_the_random_numbers_of_others():
    torch.manual_seed(1)
    one = run()
    torch.manual_seed(2)
    assert same(run(Watcher(lambda step: torch.rand(step))).tensors, one.tensors)


@pytest.mark.parametrize("batch, accumulate", [(2, 2), (1, 4)])
def test_accumulation_splits_a_step(batch, accumulate):
    whole, split = run(), run(batch=batch, accumulate=accumulate)
    # Means of means: sums of 4 float32 in another order, off by about 1e-7 each. Adam divides by the size of the gradient, so a step of
    # 1e-2 is off by about 1e-9 where gradients are not tiny, and 12 steps by 1e-7 allow for those that are.
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(split.tensors[name], tensor, rtol=0, atol=2e-6)
    assert split.losses == pytest.approx(whole.losses, rel=1e-5)


def test_samples_are_spread_without_gap_or_overlap():
    count, steps, batch, accumulate, processes = 5, 3, 2, 2, 2
    alone = Plan(1, count, batch * accumulate * processes)
    expected = [alone.sample(step, row) for step in range(steps) for row in alone.rows(0)]
    rows = [Plan(1, count, batch, accumulate, rank, processes).rows(part) for part in range(accumulate) for rank in range(processes)]
    assert [row for part in rows for row in part] == list(range(batch * accumulate * processes))
    one = Plan(1, count, batch, accumulate, 1, processes)
    assert [one.sample(step, row) for step in range(steps) for row in range(8)] == expected
    passes = [expected[start:start + count] for start in range(0, len(expected) - count, count)]
    assert all(sorted(order) == list(range(count)) for order in passes) and len({tuple(order) for order in passes}) > 1


def test_seeds_are_well_mixed():
    seeds = {mixed(seed, purpose, step, row) for seed in (0, 1) for purpose in ("loss", "data") for step in range(40) for row in range(40)}
    assert len(seeds) == 2 * 2 * 40 * 40 and len({value % 2**32 for value in seeds}) == len(seeds)
    first = torch.stack([torch.randn(64, generator=generator(0, "loss", 0, row)) for row in range(64)])
    # Correlation of independent rows of 64 normal numbers has the deviation 1 / 8; the largest of 2016 of them stays below 5 of these.
    assert (torch.corrcoef(first) - torch.eye(64)).abs().max() < 5 / 8
    assert mixed(1, "a", 23) != mixed(12, "a", 3) and 0 <= mixed(2**64 - 1, "a") < 2**64


def test_cancelling_keeps_a_checkpoint_and_the_next_run_goes_on(tmp_path):
    def cancel(step):
        if step == 5:
            comfy.model_management.interrupt_current_processing()

    watcher = Watcher(cancel)
    with pytest.raises(INTERRUPTED):
        run(watcher, folder=tmp_path)
    assert [progress.step for progress in watcher.progress] == [1, 2, 3, 4, 5], "no step after the one in which it was cancelled"
    assert [file.name for file in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint_000000005.safetensors"]
    watcher = Watcher()
    resumed = run(watcher, folder=tmp_path)
    assert watcher.progress[0].step == 6
    whole = run()
    assert same(resumed.tensors, whole.tensors) and resumed.losses == whole.losses


@pytest.mark.parametrize("changes", [
    {"ema": 0.9}, {"schedule": "cosine", "warmup": 3}, {"warmup": 8}, {"batch": 2, "accumulate": 2}, {"validate_every": 4}, {"precision": "bf16"},
])  # fmt: skip
def test_whatever_the_settings_an_interrupted_run_ends_the_same(tmp_path, changes):
    assert run(Watcher(stop_after=3), folder=tmp_path, **changes).finished is False
    assert run(Watcher(stop_after=4), folder=tmp_path, **changes).step == 7
    resumed, whole = run(folder=tmp_path, **changes), run(**changes)
    assert resumed.finished and same(resumed.tensors, whole.tensors) and resumed.losses == whole.losses
    assert resumed.validations == whole.validations


def test_a_finished_run_is_handed_out_at_once(tmp_path):
    first = run(folder=tmp_path, validate_every=5, ema=0.9)
    watcher = Watcher()
    again = run(watcher, folder=tmp_path, validate_every=5, ema=0.9)
    assert not watcher.progress and not watcher.validations
    assert same(first.tensors, again.tensors) and first.losses == again.losses and first.validations == again.validations
    assert torch.equal(first.page, again.page) and first.seconds == again.seconds


def test_lost_pictures_of_a_finished_run_are_made_again(tmp_path):
    first = run(folder=tmp_path, validate_every=5)
    next((tmp_path / "run" / "validation").glob("*12_1.png")).unlink()
    again = run(folder=tmp_path, validate_every=5)
    assert torch.equal(first.page, again.page) and again.validations == first.validations and same(first.tensors, again.tensors)


def test_more_steps_go_on_where_the_schedule_is_constant(tmp_path):
    run(folder=tmp_path, steps=6)
    watcher = Watcher()
    longer = run(watcher, folder=tmp_path, steps=12)
    assert watcher.progress[0].step == 7 and same(longer.tensors, run(steps=12).tensors)
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("changes", [{"steps": 6}, {"rate": 2e-2}, {"seed": 1}, {"batch": 8}, {"schedule": "cosine"}, {"pairs": DummyPairs(8)},
                                     {"learner": 1}])
def test_another_run_gets_a_folder_of_its_own(tmp_path, changes):
    run(folder=tmp_path)
    kept = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    if "learner" in changes:
        changes = {"learner": trainee(seed=1)}
    run(folder=tmp_path, **changes)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["run", "run_2"]
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == kept


@pytest.mark.parametrize("changes", [{"batch": 2, "accumulate": 2}, {"checkpointing": True}, {"save_every": 1.0}, {"validate_every": 3}, {"keep": 4}])
def test_settings_that_change_no_weights_change_no_folder(tmp_path, changes):
    run(Watcher(stop_after=4), folder=tmp_path)
    watcher = Watcher()
    run(watcher, folder=tmp_path, **changes)
    assert watcher.progress[0].step == 5 and [folder.name for folder in tmp_path.iterdir()] == ["run"]


def test_the_average_is_what_comes_out_and_what_is_validated():
    class Recorder(Watcher):
        def stepped(self, progress):
            super().stepped(progress)
            track.append({name: tensor.clone() for name, tensor in learner.state_dict().items()})

    track, learner = [], trainee()
    average = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    result = run(Recorder(), learner=learner, ema=0.8, validate_every=12)
    for step, current in enumerate(track, 1):
        # diffusers lets the start be forgotten: (1 + n) / (10 + n) below the decay, and nothing of it after the first step.
        decay = 0.0 if step == 1 else min(0.8, step / (9 + step))
        average = {name: decay * tensor + (1 - decay) * current[name] for name, tensor in average.items()}
    for name, tensor in average.items():
        torch.testing.assert_close(result.tensors[name], tensor, rtol=0, atol=1e-6)
    assert same(learner.state_dict(), track[-1]) and not same(result.tensors, track[-1])
    averaged = trainee()
    averaged.load_state_dict(result.tensors)
    pair = DummyPairs().validation(0)
    restored = (averaged._restore(pair.degraded[None])[0].detach().clamp(0, 1) * 255).round().to(torch.uint8)
    side = restored.shape[1]
    # The loop adds up in float32 what this test adds up again: a picture may round to the next of 256 levels.
    assert (result.page[0, :, side:2 * side].int() - restored.int()).abs().max() <= 1


def test_validation_pictures_stand_side_by_side(tmp_path):
    watcher = Watcher()
    result = run(watcher, folder=tmp_path, validate_every=5)
    assert [validation.step for validation in watcher.validations] == [0, 5, 10, 12] == [validation.step for validation in result.validations]
    pair = DummyPairs().validation(2)
    assert result.page.shape == (3, 12, 36, 3) and result.page.dtype == torch.uint8
    assert torch.equal(result.page[2, :, :12], (pair.degraded * 255).round().to(torch.uint8))
    assert torch.equal(result.page[2, :, 24:], (pair.clean * 255).round().to(torch.uint8))
    assert len(list((tmp_path / "run" / "validation").glob("*.png"))) == 12


def test_validating_does_not_change_what_is_learned():
    assert same(run(validate_every=1).tensors, run().tensors)


def test_schedules_follow_the_steps():
    for changes, expected in (
        ({"warmup": 4, "steps": 8}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "steps": 4}, [3 / 4, 2 / 4, 1 / 4, 0]),
        ({"schedule": "cosine", "steps": 2}, [0.5, 0]),
    ):
        watcher = Watcher()
        run(watcher, **changes)
        # What is told is the rate of the next step.
        assert [progress.rate / 1e-2 for progress in watcher.progress] == pytest.approx(expected, abs=1e-9)


def test_gradients_are_clipped():
    assert not same(run(clip=1e-3, weight_decay=0.0).tensors, run(clip=0.0, weight_decay=0.0).tensors)
    assert same(run(clip=1e6).tensors, run(clip=0.0).tensors)


class Broken(DummyPairs):
    """Whose pictures turn to NaN for a while."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.asked = bad, 0

    def collate(self, pairs):
        batch = DummyPairs.collate(pairs)
        self.asked += 1
        if self.asked in self.bad:
            batch.degraded.fill_(math.nan)
        return batch


def test_a_step_without_a_finite_gradient_is_lost_and_no_more():
    result = run(pairs=Broken({3, 4}))
    assert len(result.losses) == 10 and all(map(math.isfinite, result.losses))
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())


def test_ten_of_them_in_a_row_end_the_run():
    with pytest.raises(TrainingError, match="up to step 11 were not finite. Use a smaller learning rate"):
        run(pairs=Broken(set(range(2, 30))), steps=20)


def test_the_size_of_losses_on_their_way_back_changes_nothing(monkeypatch):
    scaled = run()
    monkeypatch.setattr(state, "LOSS_EXPONENT", 0)
    assert same(run().tensors, scaled.tensors)


def test_every_lost_step_halves_it_and_the_rest_of_the_run_keeps_that(tmp_path):
    def scales(watcher, folder):
        found, backward = [], state.State.backward
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(state.State, "backward", lambda own, loss: (found.append(own._scale), backward(own, loss))[1])
            run(watcher, Broken({3}), folder, steps=8)
        return found

    assert scales(Watcher(stop_after=5), tmp_path) == [2.0**14] * 3 + [2.0**13] * 2
    assert scales(Watcher(), tmp_path)[0] == 2.0**13


class Measuring(DummyTrainee):
    """Counts what it sees, as routers follow the pictures that they learn from."""

    seen = torch.zeros(())
    after = None

    def statistics(self):
        yield self.seen

    def loss(self, batch, generators):
        self.seen += 1
        if self.after is not None:
            self.after(int(self.seen))
        return super().loss(batch, generators)

    def state_dict(self):
        return {**super().state_dict(), "seen": self.seen.clone()}

    def load_state_dict(self, tensors):
        self.seen = tensors.get("seen", torch.zeros(())).clone()
        super().load_state_dict({name: tensor for name, tensor in tensors.items() if name != "seen"})


def test_what_was_measured_in_a_step_that_is_cancelled_is_taken_back(tmp_path):
    learner = Measuring(weights())
    learner.after = lambda seen: comfy.model_management.interrupt_current_processing() if seen == 5 else None
    with pytest.raises(INTERRUPTED):
        run(folder=tmp_path, learner=learner, accumulate=2)
    resumed = run(folder=tmp_path, learner=Measuring(weights()), accumulate=2)
    assert same(resumed.tensors, run(learner=Measuring(weights()), accumulate=2).tensors) and resumed.tensors["seen"] == 24


class Fed(comfy.model_patcher.ModelPatcher):
    """A model that the host feeds on demand, and would load anew to hold it still."""

    def is_dynamic(self):
        return True


def test_training_and_validation_share_one_copy_of_a_model_fed_on_demand():
    made, used = [], []

    class Using(DummyTrainee):
        @contextmanager
        def attach(self, models):
            used.extend(for_training(models.model) for _ in range(2))
            with super().attach(models):
                yield

    def load(disable_dynamic):
        assert disable_dynamic
        made.append(model("sd15"))
        return made[-1]

    fed = Fed(model("sd15").model, torch.device("cpu"), torch.device("cpu"))
    settings = Settings(**BASE)
    with pytest.raises(ValueError, match="Train: 'model' was not loaded by one of ComfyUI's own loaders"):
        train(Using(weights()), DummyPairs(), Models(fed), settings, None, Watcher())
    fed.cached_patcher_init = (load, ())
    train(Using(weights()), DummyPairs(), Models(fed), settings, None, Watcher())
    assert len(made) == 1 and all(patcher.model is made[0].model and not patcher.is_dynamic() for patcher in used)


def test_an_error_in_the_data_is_told():
    class Missing(DummyPairs):
        def pair(self, index, generator):
            raise ValueError("Paired Data: none of the pictures can be read any more.")

    with pytest.raises(ValueError, match="can be read any more"):
        run(pairs=Missing())
    with pytest.raises(ValueError, match="no pairs to train with"):
        run(pairs=DummyPairs(0))


def test_works_inside_inference_mode(tmp_path):
    with torch.inference_mode():
        inside = run(folder=tmp_path, learner=trainee_made_outside(), validate_every=6)
    assert same(inside.tensors, run().tensors)
    assert not any(tensor.is_inference() for tensor in inside.tensors.values()) and not comfy.model_management.in_training


def trainee_made_outside():
    """As kinds.trainee_of makes it."""
    with torch.inference_mode(False):
        return trainee()


def test_bf16_is_only_how_the_loss_is_computed():
    kinds = []

    class Curious(DummyPairs):
        def collate(self, pairs):
            kinds.append(torch.is_autocast_enabled("cpu"))
            return DummyPairs.collate(pairs)

    half, full = run(precision="bf16", pairs=Curious()), run()
    assert not any(kinds) and all(tensor.dtype == torch.float32 for tensor in half.tensors.values())
    assert half.losses != full.losses and half.losses == pytest.approx(full.losses, rel=0.05), "bf16 keeps 8 bits: about 0.4 % per number"


@pytest.mark.parametrize("changes, message", [
    ({"steps": 0}, "steps is 0; give a number from 1"), ({"rate": -1.0}, "rate is -1.0"), ({"rate": "fast"}, "rate is 'fast'"),
    ({"schedule": "sine"}, "schedule is 'sine'; choose one of constant"),
    ({"precision": "fp16"}, "precision is 'fp16'; choose one of fp32, bf16"), ({"batch": 2.5}, "batch is 2.5; give a whole number"),
    ({"ema": 1.0}, "ema is 1.0"), ({"betas": (0.9,)}, "give two numbers"), ({"keep": 1}, "keep is 1; give a number from 2"),
    ({"rate": math.nan}, "rate is nan"),
])  # fmt: skip
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)
