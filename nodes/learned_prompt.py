"""Learned prompts (YPT, arXiv 2604.04924): make them, apply one or several to a model, and their plain form as conditioning."""

from typing import TYPE_CHECKING, Any

import torch

from comfy_api.latest import io

from ..model_patches import learned_prompt, prompt_conditioning
from ..model_patches.errors import telling
from ..model_patches.learned_prompt import LearnedPrompt
from ..model_patches.learned_prompt_patch import AVERAGE, NODE, SUM, attach_blend, attach_prompt
from ..model_patches.prompt_conditioning import PromptConditioning, conditioning_of
from ..model_patches.weights_file import Weights
from ..samplers.bridge import T0
from ..training import kinds
from ..training.trainee import Models
from .inputs import percent_inputs, seed_input
from .weights import WeightsSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

NEW, APPLY, BLEND, TELL = "New Learned Prompt", NODE, "Blend Learned Prompts", "Learned Prompt Conditioning"
ATTENTION, TEXT = "in the attention", "in place of the text"
FORMS = {ATTENTION: learned_prompt.KIND, TEXT: prompt_conditioning.KIND}
SLOTS = (1, 2, 3, 4)
ON_THE_BRIDGE = (
    "Counted along the model's whole schedule, of which the bridge walks the end only: at t0 0.4 from 0.76 (SD1.5, SDXL), 0.82 (SD3), 0.83 "
    "(FLUX) or 0.92 (WAN) to 1."
)


class NewLearnedPrompt(io.ComfyNode):
    """Declares New Learned Prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewLearnedPrompt",
            display_name=NEW,
            category="restoration/learned-prompt",
            description="Make an untrained learned prompt for your model: a small set of numbers that will learn to tell the model to "
            "restore, where words cannot. It is the smallest restorer that Mend can train. Connect it to Train.",
            search_aliases=["learned prompt", "prompt tuning", "soft prompt", "textual inversion", "embedding", "train restoration"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model it is for: SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN, which learns from still pictures. It will fit no "
                    "other family.",
                ),
                io.Combo.Input(
                    "form", options=list(FORMS), default=ATTENTION,
                    tooltip="in the attention: told anew in every layer, as published; for Apply Learned Prompt. in place of the text: one "
                    "embedding, weaker but usable with any sampling node; for Learned Prompt Conditioning.",
                ),
                io.Int.Input(
                    "length", default=0, min=0, max=4096,
                    tooltip="How many tokens it has. 0: as many as an empty text of this family, 512 on FLUX, 226 on WAN, 77 on SD and "
                    "SDXL.",
                ),
                seed_input("Fixes the numbers it starts from."),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="Text encoder, for a prompt in place of the text: it then starts near the empty text instead of at random.",
                ),
                io.Float.Input(
                    "t0", default=T0, min=0.01, max=1.0, step=0.01, advanced=True,
                    tooltip="How much noise restoring will start from, the paper's T0. It is trained for this value; give Bridge Sigmas "
                    "the same.",
                ),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The untrained prompt, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: "ModelPatcher", form: str, length: int, seed: int, clip: "CLIP | None" = None, t0: float = T0) -> io.NodeOutput:
        """Return fresh weights."""
        with telling(f"{NEW}:"):
            return io.NodeOutput(kinds.new_weights(FORMS[form], Models(model, clip), {"length": length, "seed": seed, "t0": t0}))


class ApplyLearnedPrompt(io.ComfyNode):
    """Declares Apply Learned Prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendApplyLearnedPrompt",
            display_name=APPLY,
            category="restoration/learned-prompt",
            description="Let a learned prompt tell your model to restore one kind of damage, such as blur, noise or haze. Sample with "
            "Bridge Sampler, an empty text and cfg 1. Prompt files as published for FLUX and WAN can be read too.",
            search_aliases=["learned prompt", "YPT", "restore photo", "restore video", "deblur", "dehaze", "denoise", "derain", "lowlight"],
            inputs=[
                io.Model.Input("model", tooltip="The model the prompt was trained on, or another fine-tune of the same family."),
                WeightsSocket.Input("weights", tooltip="The prompt, from Load Mend Weights or Train."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01,
                    tooltip="How strongly it acts. 0 is the model itself; above 1 damage may be overcorrected.",
                ),
                *percent_inputs(ON_THE_BRIDGE),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the prompt, for any sampler; at its best with Bridge Sampler."
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", weights: Weights, strength: float, start_percent: float = 0.0, end_percent: float = 1.0
    ) -> io.NodeOutput:
        """Return the patched model."""
        patched = model.clone()
        prompt = _prompt(weights, model, APPLY)
        if prompt.alphas.any():
            attach_prompt(patched, prompt, strength, start_percent, end_percent)
        return io.NodeOutput(patched)


def _optional_slots() -> list[io.Input]:
    inputs: list[io.Input] = []
    for slot in SLOTS[2:]:
        inputs += [
            WeightsSocket.Input(f"prompt_{slot}", optional=True, tooltip="One more prompt."),
            io.Float.Input(f"weight_{slot}", default=1.0, min=0.0, max=4.0, step=0.01, optional=True, tooltip="Its share."),
        ]
    return inputs


class BlendLearnedPrompts(io.ComfyNode):
    """Declares Blend Learned Prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendBlendLearnedPrompts",
            display_name=BLEND,
            category="restoration/learned-prompt",
            description="Let several learned prompts work on one picture that suffers from several kinds of damage, such as blur and low "
            "light. It takes the place of Apply Learned Prompt.",
            search_aliases=["learned prompt", "mixed degradations", "combine prompts", "merge prompts", "all in one restoration", "YPT"],
            inputs=[
                io.Model.Input("model", tooltip="The model the prompts were trained on, or another fine-tune of the same family."),
                WeightsSocket.Input("prompt_1", tooltip="A prompt for one kind of damage, from Load Mend Weights or Train."),
                io.Float.Input("weight_1", default=1.0, min=0.0, max=4.0, step=0.01, tooltip="The share of prompt_1. 0 leaves it out."),
                WeightsSocket.Input("prompt_2", tooltip="A prompt for another kind of damage."),
                io.Float.Input("weight_2", default=1.0, min=0.0, max=4.0, step=0.01, tooltip="The share of prompt_2. 0 leaves it out."),
                io.Combo.Input(
                    "mode", options=[AVERAGE, SUM], default=AVERAGE,
                    tooltip="average: the model runs once for each prompt in every step, and where they would go is averaged by weight, as "
                    "published. sum: the prompts are added up, each times its weight, in one run; faster, and stronger.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="How strongly all of them act. 0 is the model itself."
                ),
                *percent_inputs(ON_THE_BRIDGE),
                *_optional_slots(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the prompts, for any sampler; at its best with Bridge Sampler."
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", mode: str, strength: float, start_percent: float = 0.0, end_percent: float = 1.0, **slots: Any
    ) -> io.NodeOutput:
        """Return the patched model."""
        given = [slot for slot in SLOTS if slots.get(f"prompt_{slot}") is not None]
        prompts = [(_prompt(slots[f"prompt_{slot}"], model, BLEND), slots.get(f"weight_{slot}", 1.0)) for slot in given]
        patched = model.clone()
        if any(prompt.alphas.any() and weight for prompt, weight in prompts):
            attach_blend(patched, prompts, mode, strength, start_percent, end_percent, BLEND)
        return io.NodeOutput(patched)


class LearnedPromptConditioning(io.ComfyNode):
    """Declares Learned Prompt Conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendLearnedPromptConditioning",
            display_name=TELL,
            category="restoration/learned-prompt",
            description="Use a learned prompt of the plain form, one that was trained in place of the text, wherever a positive prompt "
            "goes. It takes the place of CLIP Text Encode.",
            search_aliases=["learned prompt", "embedding", "textual inversion", "soft prompt", "learned text", "YPT"],
            inputs=[
                WeightsSocket.Input("weights", tooltip="A prompt in place of the text, from Load Mend Weights or Train."),
                io.Model.Input("model", optional=True, tooltip="When connected, checks that the prompt fits this model."),
                io.Conditioning.Input(
                    "conditioning", optional=True,
                    tooltip="A text that is told as well, with the learned tokens behind it. Prompts are trained without one.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For the positive input of a sampler or guider. Use cfg 1.")
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, weights: Weights, model: "ModelPatcher | None" = None, conditioning: list | None = None) -> io.NodeOutput:
        """Return the conditioning."""
        prompt_conditioning.check_fit(weights, None if model is None else model.model, TELL)
        told = conditioning_of(PromptConditioning.of(weights))
        if conditioning is None:
            return io.NodeOutput(told)
        tokens, own = told[0][0], {name: value for name, value in told[0][1].items() if name != "pooled_output"}
        for text, _ in conditioning:
            if text.shape[2] != tokens.shape[2]:
                raise ValueError(f"{TELL}: 'conditioning' has width {text.shape[2]}, and {weights.name} (for {weights.family}) has "
                                 f"{tokens.shape[2]}. Encode the text with the text encoder of that model.")
        behind = [[torch.cat([text, tokens.to(text).expand(len(text), -1, -1)], 1), own | options] for text, options in conditioning]
        return io.NodeOutput(behind)


def _prompt(weights: Weights, model: "ModelPatcher", node: str) -> LearnedPrompt:
    """Check that a prompt fits and return it; made once for each object of weights."""
    learned_prompt.check_fit(weights, model.model, node)
    return weights.once(learned_prompt.KIND, lambda: LearnedPrompt.of(weights))


NODES = [NewLearnedPrompt, ApplyLearnedPrompt, BlendLearnedPrompts, LearnedPromptConditioning]
