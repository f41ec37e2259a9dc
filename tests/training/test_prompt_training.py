"""Learned prompts in training: right gradients through every family, a base that stays, runs that resume, and both forms of a prompt."""

import pytest
import torch

import comfy.model_management
from mend.model_patches import prompt_conditioning
from mend.model_patches.host_checkpoints import checkpointed_blocks
from mend.model_patches.host_gradients import gradients
from mend.model_patches.prompt_conditioning import new_conditioning
from mend.model_patches.weights_file import Weights
from mend.samplers.bridge import Bridge, bridge_sigmas
from mend.tests import tiny_models
from mend.tests.model_patches.learned_prompts import LENGTHS, applied, fresh, trained
from mend.tests.training import tiny_training
from mend.tests.training.dummies import DummyPairs, Watcher, same
from mend.tests.training.tiny_training import SIDE, batch, generators
from mend.training.checkpoint import open_run
from mend.training.kinds import KINDS, new_weights, trainee_of
from mend.training.learned_prompt import ALPHA_RATE, LearnedConditioningTrainee, LearnedPromptTrainee
from mend.training.loop import describe_run, train
from mend.training.settings import SCHEDULES, Settings
from mend.training.state import State
from mend.training.trainee import Models

# Of each way to hang a prompt in; SDXL is built as SD1.5, and SD3's layers as FLUX's.
FAMILIES = ("sd15", "sd3", "flux", "wan")
every_family = pytest.mark.parametrize("family", FAMILIES)
PROMPT, PLAIN = "learned_prompt", "learned_prompt_conditioning"


class Words(tiny_training.Words):
    """A text encoder that is asked for as many tokens as FLUX's prompts have."""

    asked = None

    def clone(self):
        return Words(self.family)

    def set_tokenizer_option(self, option, value):
        self.asked = (option, value)


def models(family):
    given = tiny_training.models(family)
    return Models(given.model, Words(family), given.vae)


def lively(family):
    """Models whose answers depend strongly on what they are told, for differences to stand out of the rounding."""
    given = models(family)
    with torch.inference_mode():
        tiny_models.initialise(given.model.model.diffusion_model, 0, spread=0.2)
    return given


def plain(family, given, seed=5):
    """An embedding as if something had been learned."""
    weights = new_conditioning(given.model.model, LENGTHS[family], seed)
    return Weights(weights.kind, weights.family, weights.config, {**weights.tensors, "tokens": 20 * weights.tensors["tokens"]})


def trainee(family, given, form=PROMPT, weights=None):
    if form == PROMPT:
        return LearnedPromptTrainee(weights or trained(family, spread=0.5), given)
    return LearnedConditioningTrainee(weights or plain(family, given), given)


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) + ("forward" in vars(part)) for part in module.modules())


# Gradients


def slopes_and_differences(learner, given, length=2e-3):
    """The loss's change along its own gradient and along a random way, by autograd and by central differences, and what rounding it adds to these."""
    parameters, generator, found = list(learner.parameters()), torch.Generator().manual_seed(1), []
    with gradients(), learner.attach(given):

        def loss():
            return learner.loss(batch(2), generators(2, seed=5))[0]

        slopes = torch.autograd.grad(loss(), parameters)
        size = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        random = [torch.randn(p.shape, generator=generator) / p.numel() ** 0.5 for p in parameters]
        for way in ([slope / size for slope in slopes], random):
            expected = sum(float((slope * step).sum()) for slope, step in zip(slopes, way))
            ends = []
            with torch.no_grad():
                for sign in (1, -2):
                    for p, step in zip(parameters, way):
                        p.add_(step, alpha=sign * length)
                    ends.append(float(loss().double()))
                for p, step in zip(parameters, way):
                    p.add_(step, alpha=length)
            found.append((expected, (ends[0] - ends[1]) / (2 * length), abs(ends[0]) * torch.finfo(torch.float32).eps / length))
    return slopes, found


@pytest.mark.parametrize(("family", "checkpointed"), [("sd15", False), ("sd3", False), ("flux", False), ("flux", True), ("wan", True)])
def test_gradients_equal_finite_differences(family, checkpointed):
    given = lively(family)
    learner = trainee(family, given)
    if checkpointed:
        given = Models(checkpointed_blocks(given.model), given.clip, given.vae)
    slopes, found = slopes_and_differences(learner, given, 1e-2)
    assert all(slope.isfinite().all() and slope.any() for slope in slopes)
    for expected, difference, rounding in found:
        # The curve's third order is less than 1e-2 of the slope; SD3's loss is some hundreds, of which float32 keeps 1e-7.
        assert difference == pytest.approx(expected, rel=2e-2, abs=4e-4 + rounding)
    assert abs(found[0][0]) > 1e-2


@pytest.mark.parametrize("family", ["sd15", "wan"])
def test_gradients_of_the_plain_form_equal_finite_differences(family):
    given = lively(family)
    slopes, found = slopes_and_differences(trainee(family, given, PLAIN), given, 5e-3)
    assert len(slopes) == 1 and abs(found[0][0]) > 1e-2
    for expected, difference, rounding in found:
        assert difference == pytest.approx(expected, rel=2e-2, abs=4e-4 + rounding)


def test_checkpointing_changes_no_gradient_of_flux():
    found = []
    for checkpointed in (False, True):
        given = models("flux")
        learner = trainee("flux", given)
        if checkpointed:
            given = Models(checkpointed_blocks(given.model), given.clip, given.vae)
        with gradients(), learner.attach(given):
            found.append(torch.autograd.grad(learner.loss(batch(2), generators(2))[0], list(learner.parameters())))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@every_family
def test_a_fresh_prompt_learns_its_alphas_first(family):
    given = models(family)
    learner = trainee(family, given, weights=fresh(family))
    with gradients(), learner.attach(given):
        learner.loss(batch(), generators())[0].backward()
    assert learner.prompt.alphas.grad.any() and not learner.prompt.prompts.grad.any()


# Steps


def stepped(family, given, steps=5, form=PROMPT, rate=1e-2):
    learner, losses = trainee(family, given, form), []
    with gradients(), learner.attach(given):
        optimizer = torch.optim.Adam(list(learner.parameters()), rate)
        for _ in range(steps):
            loss, figures = learner.loss(batch(2), generators(2, seed=5))
            losses.append(float(loss.detach()))
            assert figures == {"bridge": losses[-1]}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return learner, losses


@pytest.mark.parametrize(("family", "form"), [("sd15", PROMPT), ("flux", PROMPT), ("wan", PLAIN)])
def test_steps_lower_the_loss_and_leave_the_base(family, form):
    given = models(family)
    before = {name: tensor.clone() for name, tensor in given.model.model.state_dict().items()}
    training = comfy.model_management.in_training
    _, losses = stepped(family, given, form=form)
    assert losses[-1] < losses[0]
    assert same(given.model.model.state_dict(), before)
    assert not given.model.wrappers and not given.model.patches and hooks(given.model.model) == 0
    assert comfy.model_management.in_training == training and not any(p.requires_grad for p in given.model.model.parameters())


@pytest.mark.parametrize("form", [PROMPT, PLAIN])
def test_the_same_seeds_give_the_same_weights(form):
    runs = [stepped("sd3", models("sd3"), steps=2, form=form)[0].state_dict() for _ in range(2)]
    assert same(*runs)


@pytest.mark.parametrize("form", [PROMPT, PLAIN])
def test_the_file_holds_the_trainee_bit_for_bit(form):
    given = models("sd3")
    learner, _ = stepped("sd3", given, steps=1, form=form)
    tensors = {name: tensor.detach().clone() for name, tensor in learner.state_dict().items()}
    other = trainee("sd3", given, form, Weights(learner.kind, learner.family, learner.config, tensors))
    assert same(other.state_dict(), tensors) and set(tensors) == ({"prompts", "alphas"} if form == PROMPT else {"tokens", "pooled"})


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_host_applies_what_was_trained(family):
    """The trainee's validation is what sampling with the Apply node gives."""
    given = models(family)
    learner = trainee(family, given)
    with gradients(), learner.attach(given):
        page = learner.validate(batch(), generators())
        raw = learner._raw(batch().degraded)
    weights = Weights(learner.kind, learner.family, learner.config, {name: tensor.detach() for name, tensor in learner.state_dict().items()})
    with torch.inference_mode():
        patched = applied(given.model, weights)
        sigmas = bridge_sigmas(patched.get_model_object("model_sampling"), 0.4, 8)
        noise = torch.randn(raw.shape, generator=generators()[0])
        conditioning = given.clip.encode_from_tokens_scheduled("")
        restored = comfy.sample.sample_custom(patched, noise, 1.0, Bridge().sampler(), sigmas, conditioning, conditioning, raw, disable_pbar=True)
        expected = given.vae.decode(restored).clamp(0, 1)
    torch.testing.assert_close(page, expected.reshape(page.shape).clone(), rtol=1e-4, atol=1e-4)


# Validation


@pytest.mark.parametrize(("family", "form"), [("sd15", PLAIN), ("flux", PROMPT), ("wan", PROMPT)])
def test_validation_restores_pictures(family, form):
    given = models(family)
    learner = trainee(family, given, form)
    with gradients(), learner.attach(given):
        pages = [learner.validate(batch(2), generators(2)) for _ in range(2)]
        other = learner.validate(batch(2), generators(2, seed=9))
        learner.loss(batch(), generators())[0].backward()
    assert pages[0].shape == (2, SIDE, SIDE, 3) and pages[0].min() >= 0 and pages[0].max() <= 1
    assert torch.equal(*pages) and not torch.equal(pages[0], other) and not pages[0].requires_grad
    assert hooks(given.model.model) == 0


# The loop


def test_the_alphas_learn_faster():
    given = models("sd3")
    for schedule in SCHEDULES:
        settings = Settings(steps=4, rate=1e-3, schedule=schedule, warmup=1, weight_decay=0.0)
        state = State(trainee("sd3", given), settings)
        rates = [(group["lr"], len(group["params"])) for group in state.optimizer.param_groups]
        assert rates == [(0, 1), (0, 1)]
        state.optimizer.step()
        state.schedule.step()
        rates = [group["lr"] for group in state.optimizer.param_groups]
        assert rates == pytest.approx([1e-3, 1e-3 * ALPHA_RATE])
    assert [len(group["params"]) for group in State(trainee("sd3", given, PLAIN), Settings()).optimizer.param_groups] == [1]


class Pairs(DummyPairs):
    """Smooth pictures that a tiny VAE can be given."""

    def _clean(self, index):
        return super()._clean(index).repeat(3, 3, 1)[:32, :32]


def run(folder, form=PROMPT, watcher=None, **changes):
    given = models("sd15")
    settings = Settings(**{"steps": 5, "batch": 2, "rate": 1e-2, "validate_every": 5, "validation_pictures": 1, "warmup": 2, "ema": 0.9, **changes})
    learner = trainee_of(new_weights(form, given, {"length": 77, "seed": 3}), given)
    opened = open_run(folder, "run", describe_run(learner, Pairs(), given, settings), settings.steps)
    return train(learner, Pairs(), given, settings, opened, watcher or Watcher())


@pytest.mark.parametrize("form", [PROMPT, PLAIN])
def test_an_interrupted_run_ends_the_same(tmp_path, form):
    assert run(tmp_path / "one", form, Watcher(stop_after=2), schedule="cosine").step == 2
    resumed, whole = run(tmp_path / "one", form, schedule="cosine"), run(tmp_path / "other", form, schedule="cosine")
    assert resumed.finished and same(resumed.tensors, whole.tensors) and resumed.losses == whole.losses
    start = new_weights(form, models("sd15"), {"length": 77, "seed": 3}).tensors
    assert not any(torch.equal(resumed.tensors[name], start[name]) for name in resumed.tensors)


def test_checkpointing_and_accumulation_are_incidental(tmp_path):
    whole, split = run(tmp_path / "one"), run(tmp_path / "other", batch=1, accumulate=2, checkpointing=True)
    for name, tensor in whole.tensors.items():
        # Rounding, which Adam magnifies where a gradient is next to nothing.
        torch.testing.assert_close(split.tensors[name], tensor, rtol=0, atol=1e-4)


def test_a_backward_pass_that_breaks_off_leaves_nothing_in_the_model():
    def fail(gradient):
        raise RuntimeError("broken")

    given = models("flux")
    learner = trainee("flux", given)
    with gradients(), learner.attach(given):
        attached = hooks(given.model.model)
        loss = learner.loss(batch(1), generators(1))[0]
        learner.prompt.alphas.register_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            loss.backward()
        assert hooks(given.model.model) > attached
    assert hooks(given.model.model) == 0


# Fresh weights, and what is refused


def test_fresh_weights_remember_their_bridge():
    given = models("sd3")
    made = new_weights(PROMPT, given, {"length": 9, "seed": 2, "t0": 0.5, "naive": True})
    assert made.config == {"length": 9, "t0": 0.5, "skew": 1.0, "naive": True} and made.tensors["prompts"].shape == (1, 9, 128)
    learner = trainee_of(made, given)
    assert learner.objective.t0 == 0.5 and learner.objective.naive and learner.config == made.config
    default = new_weights(PROMPT, given, {})
    assert default.config["t0"] == 0.4 and trainee_of(trained("sd3"), given).objective.t0 == 0.4
    with pytest.raises(ValueError, match="a new learned prompt takes length, seed, t0, skew, naive; found size"):
        new_weights(PROMPT, given, {"size": 3})
    with pytest.raises(ValueError, match="a new learned prompt needs a model"):
        new_weights(PROMPT, Models(), {})


@pytest.mark.parametrize(("family", "config", "message"), [
    ("sd3", {"length": -1}, "length of a new learned prompt is -1; give a whole number"),
    ("sd3", {"seed": "one"}, "seed of a new learned prompt is 'one'; give a whole number"),
    ("sd15", {"t0": 1.0}, "t0 is 1, and this model knows times above 0 and up to 0.936"),
])  # fmt: skip
def test_settings_that_make_no_sense(family, config, message):
    with pytest.raises(ValueError, match=message):
        new_weights(PROMPT, models(family), config)


def test_a_fresh_embedding_starts_near_the_empty_text():
    given = models("sd15")
    made = new_weights(PLAIN, given, {"seed": 1})
    empty = given.clip.encode_from_tokens_scheduled("")[0][0]
    away = made.tensors["tokens"] - empty
    assert made.kind == prompt_conditioning.KIND and 0.015 < away.std() < 0.025
    assert new_weights(PLAIN, Models(given.model), {"length": 154}).tensors["tokens"].shape == (1, 154, 64)


@pytest.mark.parametrize(("form", "name"), [(PROMPT, "model"), (PROMPT, "clip"), (PROMPT, "vae"), (PLAIN, "vae")])
def test_missing_models_are_named(form, name):
    given = models("sd15")
    weights = trained("sd15") if form == PROMPT else plain("sd15", given)
    fewer = Models(**{each: None if each == name else getattr(given, each) for each in ("model", "clip", "vae")})
    with pytest.raises(ValueError, match=f"Train: '{name}' is not connected. A {form.replace('_', ' ')} needs"):
        KINDS[form].trainee(weights, fewer)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="Train: prompt.safetensors was made for UNet 32, and 'model' is SD3 of depth 2"):
        KINDS[PROMPT].trainee(trained("sd15"), models("sd3"))


def test_a_bridge_that_the_model_does_not_reach_is_refused():
    weights = trained("sd15")
    with pytest.raises(ValueError, match="Train: prompt.safetensors: t0 is 0.99, and this model knows times above 0 and up to 0.936"):
        LearnedPromptTrainee(Weights(weights.kind, weights.family, {"t0": 0.99}, weights.tensors, weights.name), models("sd15"))


@pytest.mark.parametrize(("length", "tokens"), [(7, 256), (300, 300)])
def test_flux_is_told_as_many_empty_tokens_as_where_the_prompt_is_used(length, tokens):
    given = models("flux")
    learner = trainee("flux", given, weights=trained("flux", length))
    with gradients(), learner.attach(given):
        assert learner.denoising.models.clip.asked == ("t5xxl_min_length", tokens)
