"""Learned prompts: where they go on every family, what a fresh one and strength 0 leave alone, blends, gradients, and that nothing stays behind."""

import copy

import pytest
import torch
from torch.nn import Parameter

from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_torch_compile import TorchCompileModel
from mend.model_patches import learned_prompt_patch
from mend.model_patches.anatomy import anatomy_of
from mend.model_patches.diffusion_adapter import DiffusionAdapter
from mend.model_patches.host import WrappersMP, evaluate, for_training, loaded_for_training, reserve, sample_schedule
from mend.model_patches.host_checkpoints import checkpointed_blocks
from mend.model_patches.host_gradients import gradients, unshared_norm_inputs
from mend.model_patches.host_lora import with_lora
from mend.model_patches.learned_prompt import LearnedPrompt, attention_modules, check_fit, new_prompt, prompt_width
from mend.model_patches.learned_prompt_patch import AVERAGE, SUM, attach_blend, attach_prompt
from mend.model_patches.percents import percent_of
from mend.model_patches.prompt_injection import Injection, Term, kept_bytes
from mend.model_patches.weights_file import Weights
from mend.samplers.bridge import Bridge, bridge_sigmas
from mend.samplers.degraded_latent import DegradedLatent
from mend.samplers.restoration_guidance import Restoration, RestorationGuidance
from mend.tests.model_patches import adapters
from mend.tests.model_patches.adapters import sampled
from mend.tests.model_patches.learned_prompts import EVERY, LENGTHS, NODE, applied, base, blended, by_hand, fresh, told, trained
from mend.tests.tiny_models import latent_shape, model

every_family = pytest.mark.parametrize("family", EVERY)
EVERY_WAY = pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])  # SDXL is hung like SD1.5
FEW = pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
# One number's rounding is some 1e-7 of it; the order of sums differs, over two steps, and latents of SD1.5 come to 100 here.
ROUNDING, OF_IT = 1e-4, 1e-5


def run(patcher, family, **settings):
    """Sample as learned prompts want it: no negative prompt, FLUX at guidance 1."""
    return sampled(patcher, family, **{"cfg": 1.0, "positive": told(family), **settings})


@EVERY_WAY
def test_a_fresh_prompt_and_strength_zero_change_nothing(family):
    plain = run(base(family), family)
    check_fit(fresh(family), base(family).model, NODE)
    assert torch.equal(run(applied(base(family), fresh(family)), family), plain)
    idle = applied(base(family), trained(family), strength=0.0)
    assert torch.equal(run(idle, family), plain) and not idle.wrappers.get(WrappersMP.APPLY_MODEL)


@every_family
def test_it_goes_where_the_method_says(family):
    weights, own = trained(family), model(family)
    check_fit(weights, own.model, NODE)
    found = run(applied(base(family), weights), family, height=6, width=9, batch=2)
    with by_hand(own, weights, family):
        expected = run(own, family, height=6, width=9, batch=2)
    assert (expected - run(base(family), family, height=6, width=9, batch=2)).abs().max() > 100 * ROUNDING
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@every_family
def test_alphas_are_in_the_order_of_the_modules(family):
    own, plain = model(family), run(base(family), family)
    paths = attention_modules(own.model)
    names = [name for name, _ in own.model.diffusion_model.named_modules()]
    assert paths == sorted(paths, key=names.index) and len(paths) == len(fresh(family).tensors["alphas"])
    if family == "flux":
        assert paths == ["double_blocks.0.txt_attn.qkv", "double_blocks.1.txt_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear1"]
    for index in {0, len(paths) // 2, len(paths) - 1}:
        weights = trained(family)
        weights.tensors["alphas"] = torch.where(torch.arange(len(paths)) == index, weights.tensors["alphas"] + 2, 0.0)
        found = run(applied(base(family), weights), family)
        with by_hand(own, weights, family, only=index):
            torch.testing.assert_close(found, run(own, family), rtol=0, atol=ROUNDING)
        assert not torch.equal(found, plain)


# Texts of other lengths than the prompt


@pytest.mark.parametrize(("family", "length"), [("sd3", 12), ("sd3", 40), ("wan", 20)])
def test_rows_behind_a_prompt_stay_and_rows_behind_a_text_are_cut(family, length):
    weights, own = trained(family, length), model(family)
    found = run(applied(base(family), weights), family)
    with by_hand(own, weights, family):
        torch.testing.assert_close(found, run(own, family), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_the_text_is_seen_only_as_far_as_the_prompt_goes(family):
    weights, own = trained(family, 4), model(family)
    text, options = told(family)[0]
    found = run(applied(base(family), weights), family)
    with by_hand(own, weights, family):
        torch.testing.assert_close(found, run(own, family, positive=[[text[:, :4], options]]), rtol=0, atol=ROUNDING)


def test_flux_with_too_short_a_text_is_refused_and_its_guidance_is_one():
    with pytest.raises(ValueError, match="Apply Learned Prompt: the prompt holds 9 tokens and the text 7.*min_length 9"):
        run(applied(base("flux"), trained("flux", 9)), "flux")
    patched = applied(base("flux"), trained("flux"))
    assert torch.equal(run(patched, "flux", positive=told("flux", 3.5)), run(patched, "flux"))
    assert torch.equal(run(patched, "flux", positive=told("flux", None)), run(patched, "flux"))


@pytest.mark.parametrize("length", [77, 154])
def test_unets_repeat_texts_and_prompts(length):
    # Attention to a text that is told twice is attention to the text.
    weights, twice = trained("sd15", length), [[torch.cat([told("sd15")[0][0]] * 2, 1), {}]]
    short = run(applied(base("sd15"), weights), "sd15")
    torch.testing.assert_close(short, run(applied(base("sd15"), weights), "sd15", positive=twice), rtol=ROUNDING, atol=ROUNDING)


# Strength, parts of sampling, blends


def differences(family, patched):
    return evaluate_once(patched, family) - evaluate_once(base(family), family)


def evaluate_once(patched, family, sigma=0.5, **conds):
    """One evaluation outside any sampler, in which a run's cache has no part."""
    x = torch.randn(latent_shape(family), generator=torch.Generator().manual_seed(1))
    text, options = told(family)[0]
    conds = {"c_crossattn": text, **conds}
    if "pooled_output" in options:
        conds["y"] = torch.cat([options["pooled_output"], torch.zeros(1, 6 * 256)], 1) if family == "sdxl" else options["pooled_output"]
    if "guidance" in options:
        conds["guidance"] = torch.tensor([options["guidance"]])
    return evaluate(patched, x, torch.tensor([sigma]), conds)


def test_strength_is_a_factor_of_the_alphas():
    weights = trained("sd3")
    half = Weights(weights.kind, weights.family, weights.config, {**weights.tensors, "alphas": weights.tensors["alphas"] / 2})
    assert torch.equal(run(applied(base("sd3"), weights, strength=0.5), "sd3"), run(applied(base("sd3"), half), "sd3"))
    # What one cross-attention of WAN adds is linear in its alpha; with a single block's alpha the network behind it is a small change of it.
    one = trained("wan", spread=0.0)
    one.tensors["alphas"][-1] = 1e-3
    full, part = (differences("wan", applied(base("wan"), one, strength=strength)) for strength in (1.0, 0.25))
    torch.testing.assert_close(part, 0.25 * full, rtol=0, atol=2e-2 * float(full.detach().abs().max()))


@FEW
def test_it_acts_in_its_part_of_sampling_only(family):
    weights = trained(family)
    settings = dict(steps=4)
    plain, full = run(base(family), family, **settings), run(applied(base(family), weights), family, **settings)
    assert torch.equal(run(applied(base(family), weights, start_percent=0.99, end_percent=0.995), family, **settings), plain)
    early = run(applied(base(family), weights, end_percent=0.4), family, **settings)
    assert not torch.equal(early, plain) and not torch.equal(early, full)


# Where the published T0 of 0.4 lies in the schedule, with each family's shift as the host has it.
BEGINNINGS = {"sd15": 0.76, "sd3": 0.82, "flux": 0.83, "wan": 0.92}


@EVERY_WAY
def test_percents_that_the_bridge_never_comes_to_are_told_of(family, caplog):
    weights, settings = trained(family), dict(steps=3)
    sampling = base(family).get_model_object("model_sampling")
    sigmas = bridge_sigmas(sampling, 0.4, 3)
    assert percent_of(sampling, float(sigmas[0])) == pytest.approx(BEGINNINGS[family], abs=0.005)

    def walked(**part):
        patched, latent = applied(base(family), weights, **part), adapters.lq(family)
        caplog.clear()
        found = sample_schedule(patched, told(family), adapters.noise_of(family), Bridge().sampler(), sigmas, latent)
        return found, [message for message in caplog.messages if "does nothing" in message]

    plain = sample_schedule(base(family), told(family), adapters.noise_of(family), Bridge().sampler(), sigmas, adapters.lq(family))
    idle, messages = walked(end_percent=0.5)
    assert torch.equal(idle, plain) and messages == [
        "Apply Learned Prompt: the prompt does nothing in this run. start_percent 0 and end_percent 0.5 count along the model's whole "
        f"schedule, and this run walks it from {BEGINNINGS[family]} to 1.00."]
    for part in ({}, {"end_percent": BEGINNINGS[family] + 0.01}):
        found, messages = walked(**part)
        assert not torch.equal(found, plain) and not messages
    run(applied(base(family), weights, end_percent=0.5), family, **settings)
    assert not [message for message in caplog.messages if "does nothing" in message]


@FEW
def test_the_average_is_that_of_the_velocities(family):
    one, two = trained(family, seed=5), trained(family, seed=6)
    alone = [evaluate_once(applied(base(family), each), family) for each in (one, two)]
    for shares in ((1.0, 1.0), (0.2, 0.6), (3.0, -1.0)):
        mean = (shares[0] * alone[0] + shares[1] * alone[1]) / sum(shares)
        torch.testing.assert_close(evaluate_once(blended(base(family), [one, two], shares, AVERAGE), family), mean, rtol=0, atol=1e-4)
    only = blended(base(family), [one, two], (0.3, 0.0), AVERAGE)
    assert torch.equal(run(only, family), run(applied(base(family), one), family))


@FEW
def test_the_sum_is_that_of_the_banks(family):
    one, two = trained(family, seed=5), trained(family, seed=6)
    both = run(blended(base(family), [one, two], (0.7, 0.4), SUM), family)
    chained = applied(applied(base(family), one, strength=0.7), two, strength=0.4)
    torch.testing.assert_close(both, run(chained, family), rtol=OF_IT, atol=ROUNDING)
    twice = run(blended(base(family), [one, one], (0.5, 0.5), SUM), family)
    torch.testing.assert_close(twice, run(applied(base(family), one), family), rtol=0, atol=ROUNDING)
    shorter = trained(family, LENGTHS[family] - 3, seed=7)
    assert run(blended(base(family), [one, shorter], (0.5, 0.5), SUM), family).isfinite().all()


def test_blends_that_mean_nothing():
    one, two = trained("sd15", seed=5), trained("sd15", seed=6)
    with pytest.raises(ValueError, match="add up to 0"):
        blended(base("sd15"), [one, two], (1.0, -1.0), AVERAGE)
    for mode in (AVERAGE, SUM):
        assert torch.equal(run(blended(base("sd15"), [one, two], (0.0, 0.0), mode), "sd15"), run(base("sd15"), "sd15"))
        assert torch.equal(run(blended(base("sd15"), [one, two], (1.0, 1.0), mode, strength=0.0), "sd15"), run(base("sd15"), "sd15"))


# Evaluations of the model


def count_evaluations(patcher):
    """Have a clone count how often the model itself is evaluated."""
    counted, calls = patcher.clone(), []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    return counted, calls


def test_cfg_one_takes_one_evaluation_a_step_and_an_average_one_a_prompt(caplog):
    counted, calls = count_evaluations(applied(base("sd15"), trained("sd15")))
    run(counted, "sd15", steps=3)
    assert len(calls) == 3 and not caplog.messages
    counted, calls = count_evaluations(blended(base("sd15"), [trained("sd15"), trained("sd15", seed=6)], (1, 1), AVERAGE))
    run(counted, "sd15", steps=3)
    assert len(calls) == 6
    run(counted, "sd15", steps=1, cfg=3.0)
    assert any("this run has CFG 3" in message for message in caplog.messages)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_layers_are_asked_once_a_run_what_they_make_of_a_prompt(family):
    own, asked = model(family), []
    for path in attention_modules(own.model):
        own.model.diffusion_model.get_submodule(path).register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
    patched = applied(own, trained(family))
    modules = len(attention_modules(own.model))
    for _ in range(2):
        asked.clear()
        run(patched, family, steps=3)
        assert len(asked) == 3 * modules + modules and asked.count(LENGTHS[family] + 1) == modules


@EVERY_WAY
def test_what_a_run_keeps_is_what_it_reserves(family, monkeypatch):
    monkeypatch.setattr(learned_prompt_patch, "WORTH_RESERVING", 1)
    seen, prompts = {}, [trained(family, seed=seed) for seed in (5, 6)]

    def look(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        seen["run"] = next(value for value in options.values() if isinstance(value, learned_prompt_patch._Run))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def shape(executor, model, noise_shape, *args, **kwargs):
        seen["shape"] = noise_shape
        return executor(model, noise_shape, *args, **kwargs)

    patched = blended(base(family), prompts, (1.0, 1.0), AVERAGE)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "shape", shape)
    run(patched, family, steps=3)
    kept = sum(tensor.nbytes for made in seen["run"].made for tensor in made.tensors.values())
    paths, terms = attention_modules(patched.model), [[Term(LearnedPrompt.of(prompt))] for prompt in prompts]
    assert kept == sum(kept_bytes(anatomy_of(patched.model).kind, len(paths), each, torch.float32) for each in terms)
    assert seen["shape"] == reserve(patched, list(latent_shape(family)), kept)
    monkeypatch.undo()
    run(patched, family, steps=1)
    assert list(seen["shape"]) == list(latent_shape(family))


def test_a_published_prompt_for_flux_keeps_half_a_gigabyte():
    prompt = Term(LearnedPrompt(torch.zeros(1, 512, 3072), torch.ones(57)))
    assert kept_bytes("flux", 57, [prompt], torch.bfloat16) == pytest.approx(0.54e9, rel=0.02)
    assert kept_bytes("wan", 30, [Term(LearnedPrompt(torch.zeros(1, 226, 1536), torch.ones(30)))], torch.bfloat16) < 2e6


def test_a_prompt_goes_to_the_device_once_a_run(monkeypatch):
    moved, patched = [], applied(base("wan"), trained("wan"))
    original = Injection._tokens

    def tokens(injection, index, device):
        made = len(injection.made.tensors)
        found = original(injection, index, device)
        moved.append(len(injection.made.tensors) - made)
        return found

    monkeypatch.setattr(Injection, "_tokens", tokens)
    run(patched, "wan", steps=3)
    assert len(moved) == 3 * len(attention_modules(patched.model)) and sum(moved) == 1


# Others on the same model


def test_every_pass_of_an_average_has_the_controlnet():
    one, two = trained("sd15", seed=5), trained("sd15", seed=6)
    # What a ControlNet hands to the host's UNet: the layers' features, which it takes out one by one.
    control = {"middle": [3 * torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(3))]}

    def controlled(patched):
        return evaluate_once(patched, "sd15", control={place: list(added) for place, added in control.items()})

    mean = (controlled(applied(base("sd15"), one)) + controlled(applied(base("sd15"), two))) / 2
    found = controlled(blended(base("sd15"), [one, two], (1.0, 1.0), AVERAGE))
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-4)
    assert (mean - evaluate_once(blended(base("sd15"), [one, two], (1.0, 1.0), AVERAGE), "sd15")).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_is_refused(first):
    def compiled(patcher):
        return TorchCompileModel.execute(patcher, "inductor").result[0]

    patched = compiled(applied(base("flux"), trained("flux"))) if first else applied(compiled(base("flux")), trained("flux"))
    with pytest.raises(ValueError, match="Apply Learned Prompt: 'model' goes through TorchCompileModel"):
        run(patched, "flux")


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_it_stacks_with_a_restoration_adapter(family):
    adapter, prompt = adapters.trained(family), trained(family)
    alone = run(adapters.applied(base(family), adapter, adapters.lq(family)), family)
    one = run(applied(adapters.applied(base(family), adapter, adapters.lq(family)), prompt), family)
    other = run(adapters.applied(applied(base(family), prompt), adapter, adapters.lq(family)), family)
    assert torch.equal(one, other)
    assert not torch.equal(one, alone) and not torch.equal(one, run(applied(base(family), prompt), family))
    blend = applied(adapters.applied(base(family), adapter, adapters.lq(family)), prompt, strength=0.0)
    assert torch.equal(run(blend, family), alone)


def test_a_lora_beside_the_weights_acts_on_a_prompt_as_one_in_them_does():
    lora, weights, own = DiffusionAdapter(base("flux").model, 2), trained("flux"), model("flux")
    lora.initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if ".up." in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    inside = with_lora(own, {name: tensor.detach() for name, tensor in lora.native().items()}, 1.0)
    expected, without = run(applied(inside, weights), "flux"), run(applied(own, weights), "flux")
    with lora.hooked(own.model), torch.no_grad():
        found = run(applied(own, weights), "flux")
    assert (expected - without).abs().max() > 100 * ROUNDING
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_it_goes_to_the_same_place_on_quantised_weights(family):
    weights, own = trained(family), model(family)
    plain = run(own, family)
    for path in attention_modules(own.model):
        layer = own.model.diffusion_model.get_submodule(path)
        layer.weight = Parameter(QuantizedTensor.from_float(layer.weight.detach(), "TensorCoreFP8Layout"), requires_grad=False)
    found = run(applied(own, weights), family)
    with by_hand(own, weights, family):
        expected = run(own, family)
    assert not torch.equal(run(own, family), plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_it_stacks_with_an_adapter_and_restoration_guidance():
    adapter, prompt = adapters.trained("sd3"), trained("sd3")
    guidance = RestorationGuidance(Restoration(weight=0.2, onset=0.1), DegradedLatent(latent=adapters.lq("sd3")))

    def stack(strength, guided):
        both = adapters.applied(applied(base("sd3"), prompt, strength=strength), adapter, adapters.lq("sd3"))
        return run(guidance.attach(both) if guided else both, "sd3", steps=4)

    results = [stack(strength, guided) for strength in (1.0, 0.0) for guided in (True, False)]
    assert all(not torch.equal(one, other) for index, one in enumerate(results) for other in results[:index])
    plain = guidance.attach(adapters.applied(base("sd3"), adapter, adapters.lq("sd3")))
    assert torch.equal(results[2], run(plain, "sd3", steps=4)) and torch.equal(stack(1.0, True), results[0])


@EVERY_WAY
def test_nothing_stays_behind(family):
    own = model(family, 3)
    weights, options = copy.deepcopy(own.model.state_dict()), copy.deepcopy(own.model_options)
    plain = run(own, family)
    patched = applied(applied(own, trained(family)), trained(family, seed=6))
    first = run(patched, family)
    assert not hooked(own.model)
    assert torch.equal(run(own, family), plain) and torch.equal(run(patched, family), first)
    assert own.model_options == options and not own.wrappers
    assert all(torch.equal(tensor, weights[name]) for name, tensor in own.model.state_dict().items())


def hooked(module):
    return [name for name, part in module.named_modules() if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)]


def test_nothing_stays_behind_when_an_evaluation_fails():
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    own = model("flux", 3)
    own.model.diffusion_model.final_layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        run(applied(own, trained("flux")), "flux")
    assert [name for name in hooked(own.model) if name != "diffusion_model.final_layer"] == []


# Training


def gradient_of(patched, prompt, family, step=None):
    """The gradient of a loss of one evaluation, or where `step` is given, the loss at a moved prompt."""
    if step is not None:
        with torch.no_grad():
            for p, move in zip(prompt.parameters(), step):
                p.add_(move)
    out = evaluate_once(patched, family)
    loss = (out.double() * torch.randn(out.shape, generator=torch.Generator().manual_seed(9))).sum()
    if step is None:
        return torch.autograd.grad(loss, list(prompt.parameters()))
    with torch.no_grad():
        for p, move in zip(prompt.parameters(), step):
            p.sub_(move)
    return float(loss.detach())


@pytest.mark.parametrize("checkpoint", [False, True])
@EVERY_WAY
def test_gradients_agree_with_finite_differences(family, checkpoint):
    own = model(family, 3)
    patched = for_training(checkpointed_blocks(own) if checkpoint else own)
    prompt = LearnedPrompt.of(trained(family, spread=0.3), trained=True)
    attach_prompt(patched, prompt)
    with gradients(), unshared_norm_inputs(own.model.diffusion_model):
        loaded_for_training(patched)
        found = gradient_of(patched, prompt, family)
        assert all(part.abs().max() > 0 for part in found)
        for p, part in zip(prompt.parameters(), found):
            direction = part / part.norm()
            far = 0.01 * p.numel() ** 0.5  # each number moves by a hundredth: well above rounding, well below curvature
            steps = [[sign * far * direction if q is p else torch.zeros_like(q) for q in prompt.parameters()] for sign in (1, -1)]
            up, down = (gradient_of(patched, prompt, family, step) for step in steps)
            assert (up - down) / (2 * far) == pytest.approx(float(part.norm()), rel=2e-2)
    assert not hooked(own.model)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_gradients_of_a_blend_of_checkpointed_runs(family):
    own, results = model(family, 3), []
    for checkpoint in (False, True):
        patched = for_training(own)
        prompts = [LearnedPrompt.of(trained(family, seed=seed, spread=0.3), trained=True) for seed in (5, 6)]
        attach_blend(patched, [(prompt, 1.0) for prompt in prompts], AVERAGE)
        patched = checkpointed_blocks(patched) if checkpoint else patched
        with gradients(), unshared_norm_inputs(own.model.diffusion_model):
            loaded_for_training(patched)
            loss = evaluate_once(patched, family).square().sum()
            results.append(torch.autograd.grad(loss, [p for prompt in prompts for p in prompt.parameters()]))
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert not hooked(own.model)


# Weights


def test_new_prompts():
    one, same, other = (fresh("sd15", seed=seed).tensors["prompts"] for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.std() == pytest.approx(0.02, rel=0.05) and not fresh("sd15").tensors["alphas"].any()
    lengths = {family: new_prompt(base(family).model).tensors["prompts"].shape[1] for family in EVERY}
    assert lengths == {"sd15": 16, "sdxl": 16, "sd3": 16, "flux": 512, "wan": 226}  # the tiny ones have no name
    assert [prompt_width(base(family).model) for family in EVERY] == [64, 64, 128, 32, 48]


def changed(weights, **changes):
    return Weights(**{"kind": weights.kind, "family": weights.family, "config": weights.config, "tensors": weights.tensors, "name": weights.name,
                      **changes})


@pytest.mark.parametrize(("changes", "words"), [
    (dict(kind="restoration_adapter"), "is of the kind restoration adapter"),
    (dict(family="WAN 1.3B"), "was made for WAN 1.3B, and 'model' is FLUX of width 32"),
    (dict(tensors={"prompts": torch.zeros(1, 7, 48), "alphas": torch.zeros(4)}), "tokens of width 48, and 'model' .* has 32"),
    (dict(tensors={"prompts": torch.zeros(1, 7, 32), "alphas": torch.zeros(5)}), "5 alphas, and 'model' .* has 4 attention modules"),
    (dict(tensors={"prompts": torch.zeros(7, 32), "alphas": torch.zeros(4)}), "a prompt of shape"),
    (dict(tensors={"prompts": torch.zeros(1, 7, 32)}), "a prompt of shape"),
    (dict(tensors={"prompts": torch.full((1, 7, 32), torch.nan), "alphas": torch.zeros(4)}), "not finite"),
    (dict(config={"length": 7, "t0": "late"}), "says that it was trained from t0 'late', and a number above 0 and up to 1 was expected"),
])  # fmt: skip
def test_prompts_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=f"{NODE}: .*{words}"):
        check_fit(changed(fresh("flux"), **changes), base("flux").model, NODE)
