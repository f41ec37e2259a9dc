"""Blocks that are computed twice give the gradients of blocks that are computed once, and keep less in between."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mend.model_patches.host import evaluate, loaded_for_training, model_conds
from mend.model_patches.host_checkpoints import checkpointed_blocks
from mend.model_patches.host_gradients import gradients, unshared_norm_inputs
from mend.tests import tiny_models

SIGMA = 0.4
BLOCKS = {"sd3": [("double_block", 2)], "flux": [("double_block", 2), ("single_block", 2)], "wan": [("double_block", 2)]}
# A layer in the midst of the model, which learns a small change of its output.
LEARNING = {"sd15": "middle_block.1.proj_in", "sdxl": "middle_block.1.proj_in", "sd3": "joint_blocks.0.x_block.attn.proj",
            "flux": "double_blocks.0.img_attn.proj", "wan": "blocks.0.self_attn.o"}  # fmt: skip


class Experiment:
    """A tiny model, an input, and a factor in one of its layers; what is looked at is a fixed random projection of the prediction."""

    def __init__(self, family, **changes):
        self.family, self.patcher = family, tiny_models.model(family, **changes)
        own = torch.Generator().manual_seed(4)
        self.x, self.look, self.way = (torch.randn(tiny_models.latent_shape(family), generator=own) for _ in range(3))
        self.conditioning = tiny_models.conditioning(family)

    def value(self, patcher, x, factor):
        """The projection of what the model predicts at x."""
        layer = patcher.model.diffusion_model.get_submodule(LEARNING[self.family])
        handle = layer.register_forward_hook(lambda module, args, out: out * factor)
        conds = {name: cond.process_cond(batch_size=1, area=None).cond for name, cond in model_conds(patcher.model, self.conditioning, x).items()}
        try:
            value = (evaluate(patcher, x, torch.tensor([SIGMA]), conds) * self.look).sum()
            if not value.requires_grad:
                return value
            # The second run of the blocks is part of the backward pass, and needs the hook too.
            return value, torch.autograd.grad(value, [x, factor])
        finally:
            handle.remove()

    def gradient(self, patcher):
        """Value, gradients by input and factor, and how many numbers were kept for the backward pass."""
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with gradients(), unshared_norm_inputs(patcher.model.diffusion_model), saved_tensors_hooks(keep, lambda tensor: tensor):
            loaded_for_training(patcher)
            x, factor = self.x.clone().requires_grad_(), torch.ones((), requires_grad=True)
            value, (by_x, by_factor) = self.value(patcher, x, factor)
        return value.detach(), by_x, by_factor, sum(kept)

    def difference(self, patcher, size):
        """How the value changes along a direction, by central differences."""
        with gradients(), torch.no_grad():
            loaded_for_training(patcher)
            ends = [self.value(patcher, self.x + sign * size * self.way, torch.ones(())) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * size)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gradients_are_those_without(family):
    experiment = Experiment(family)
    plain, checkpointed = experiment.gradient(experiment.patcher.clone()), experiment.gradient(checkpointed_blocks(experiment.patcher))
    # The same operations on the same numbers, once more: equal bit for bit on a CPU with one thread.
    assert all(torch.equal(one, other) for one, other in zip(plain[:3], checkpointed[:3]))
    assert plain[1].abs().max() > 0 and plain[2].abs() > 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gradients_are_true(family):
    experiment = Experiment(family)
    patcher = checkpointed_blocks(experiment.patcher)
    _, by_x, _, _ = experiment.gradient(patcher)
    expected = experiment.difference(patcher, 1e-2)
    # Central differences of steps h in float32: rounding of about 1e-6 of the value over h, and h squared times the third derivative.
    assert float((by_x * experiment.way).sum()) == pytest.approx(float(expected), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_less_is_kept(family):
    experiment = Experiment(family, **({"depth": 4} if family in ("sd3", "flux") else {"num_layers": 4} if family == "wan" else {}))
    plain, checkpointed = experiment.gradient(experiment.patcher.clone()), experiment.gradient(checkpointed_blocks(experiment.patcher))
    assert checkpointed[3] < plain[3] / 2


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_without_gradients_nothing_changes(family):
    experiment = Experiment(family)
    with torch.inference_mode():
        patchers = experiment.patcher.clone(), checkpointed_blocks(experiment.patcher)
        one, other = (experiment.value(patcher, experiment.x, torch.ones(())) for patcher in patchers)
    assert torch.equal(one, other)
    assert "forward_timestep_embed_patch" not in experiment.patcher.model_options["transformer_options"].get("patches", {})
    assert not experiment.patcher.model_options["transformer_options"].get("patches_replace")


@pytest.mark.parametrize("family", BLOCKS)
def test_other_replacements_stay_and_stay_outside(family):
    experiment, calls = Experiment(family), []
    patcher = experiment.patcher.clone()

    def noting(args, extra):
        calls.append(args["transformer_options"].get("block_index"))
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.5}

    for kind, count in BLOCKS[family]:
        for index in range(count):
            patcher.set_model_patch_replace(noting, "dit", kind, index)
    plain = experiment.gradient(patcher)
    count, before = len(calls), list(calls)
    calls.clear()
    checkpointed = experiment.gradient(checkpointed_blocks(patcher))
    assert all(torch.equal(one, other) for one, other in zip(plain[:3], checkpointed[:3]))
    assert count > 0 and calls == before, "they are called once a block, not again in the backward pass"


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_patches_within_a_block_see_the_same_block_both_times(family):
    experiment, seen = Experiment(family), []
    patcher = experiment.patcher.clone()

    def place(options):
        return options.get("block"), options.get("block_type"), options.get("block_index"), options.get("transformer_index")

    def note_unet(n, context, value, extra_options):
        seen.append(place(extra_options))
        return n, context, value

    def note_flux(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.append(place(extra_options))
        return {}

    patcher.set_model_patch(note_flux if family == "flux" else note_unet, "attn1_patch")
    experiment.gradient(patcher)
    once = list(seen)
    seen.clear()
    experiment.gradient(checkpointed_blocks(patcher))
    assert seen[: len(once)] == once and sorted(map(str, seen[len(once):])) == sorted(map(str, once)) and len(set(once)) == len(once) > 1


def test_other_handlers_of_unet_layers_stay():
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    experiment, calls = Experiment("sd15"), []

    def louder(layer, x, emb, *rest):
        calls.append(layer)
        return layer(x, emb) * 1.1

    values = []
    for first in (True, False):
        patcher = experiment.patcher.clone() if first else checkpointed_blocks(experiment.patcher)
        patcher.set_model_patch((ResBlock, louder), "forward_timestep_embed_patch")
        values.append(experiment.gradient(checkpointed_blocks(patcher) if first else patcher))
    assert calls and all(torch.equal(one, other) for one, other in zip(values[0][:3], values[1][:3]))


def test_models_without_known_blocks_are_refused():
    class Strange(torch.nn.Module):
        pass

    patcher = tiny_models.model("sd15")
    patcher.model.diffusion_model = Strange()
    with pytest.raises(ValueError, match="gradient checkpointing does not know models of the kind BaseModel. Switch it off"):
        checkpointed_blocks(patcher)
