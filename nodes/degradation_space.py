"""Diffusion in the degradation space (Defusion, arXiv 2506.16960): the model predicts damage, and it is taken from the picture."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

import comfy.samplers
from comfy_api.latest import io

from ..model_patches.degradation_condition import DegradationCondition
from ..model_patches.degradation_model import (
    DEVIATION,
    DegradationPatch,
    check_cell,
    check_fit,
    checked_instruction,
    inference_patcher,
    new_weights,
)
from ..model_patches.degradation_tokenizer import Instruction
from ..model_patches.degradation_tokenizer import check_fit as check_tokenizer
from ..model_patches.degraded_picture import ATTACHMENT, Degradation, DegradedPicture
from ..model_patches.diffusion_adapter import with_lora_of
from ..model_patches.errors import telling
from ..model_patches.framing import rgb_pictures
from ..model_patches.host import WrappersMP, free_key, load_with
from ..model_patches.irb import SIZES
from ..model_patches.weights_file import Weights
from ..samplers.degradation_space import NODE as SAMPLER
from ..samplers.degradation_space import DegradationSpaceSampler, check_inner, degradation_of, demand_degradation_space
from .inputs import percent_inputs, samples_of, seed_input, usable_mask
from .visual_instruction import MendInstruction
from .weights import WeightsSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

NEW, APPLY, REMOVE = "New Degradation Model", "Apply Degradation Diffusion", "Remove Degradation"
FORMS = ("latent", "pixel")


class NewDegradationModel(io.ComfyNode):
    """Declares New Degradation Model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewDegradationModel",
            display_name=NEW,
            category="restoration/instruction",
            description="Make an untrained degradation model for your model: networks that look at the damaged picture and at a visual "
            "instruction, and a LoRA that turns the model from painting pictures to painting damage. Connect it to Train.",
            search_aliases=["defusion", "degradation diffusion", "train restoration", "visual instruction", "all in one restoration"],
            inputs=[
                io.Model.Input("model", tooltip="The model it is for: SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN. It will fit no other family."),
                WeightsSocket.Input(
                    "tokenizer", tooltip="A trained degradation tokenizer, from Load Mend Weights or Train. It becomes part of the file."
                ),
                io.Combo.Input(
                    "form", options=list(FORMS), default="latent",
                    tooltip="latent: for noise, rain, JPEG and blur. pixel: for smooth damage (haze, low light, fading); keeps the rest of "
                    "the picture. If your VAE is weak, as the lab's is, try pixel for blur and JPEG too.",
                ),
                io.Combo.Input(
                    "size", options=list(SIZES), default="full",
                    tooltip="full: on UNets as wide as the model, on others narrower. small: half as wide as full, for small models or little memory.",
                ),
                io.Int.Input("lora_rank", default=32, min=0, max=512, tooltip="Rank of the LoRA on self-attention. 0 leaves it out, as does fine_tune."),
                seed_input("Fixes the numbers it starts from. A fresh one changes nothing, whatever the seed."),
                io.Boolean.Input(
                    "fine_tune", default=False, advanced=True,
                    tooltip="Let all weights of the model learn in place of a LoRA. Training then holds four more copies of the model in "
                    "full precision, and the file is as large as the model.",
                ),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The untrained degradation model, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", tokenizer: Weights, form: str, size: str, lora_rank: int, seed: int, fine_tune: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        """Return fresh weights."""
        check_tokenizer(tokenizer, NEW)
        with telling(f"{NEW}: 'model':"):
            return io.NodeOutput(new_weights(model.model, tokenizer, form, size, lora_rank, seed, fine_tune))


class ApplyDegradationDiffusion(io.ComfyNode):
    """Declares Apply Degradation Diffusion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendApplyDegradationDiffusion",
            display_name=APPLY,
            category="restoration/instruction",
            description="Have your model find the damage that a visual instruction shows in a picture. Sample it through Degradation Space "
            "Sampler, and finish with Remove Degradation. Where the instruction does not match, it is trained to change nothing.",
            search_aliases=[
                "defusion", "degradation diffusion", "restore photo", "denoise", "dehaze", "deblur", "derain", "all in one restoration",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the weights were trained on, or another fine-tune of the same family."),
                WeightsSocket.Input("weights", tooltip="A degradation model, from Load Mend Weights or Train."),
                MendInstruction.Input(
                    "instruction", tooltip="What the damage looks like: from Encode, Blend or Estimate Visual Instruction."
                ),
                io.Image.Input("degraded", tooltip="The damaged picture, of any size: one for all latents of a batch, or one each."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01,
                    tooltip="How much of the damage that is found is removed; above 1 more than that. At 0 nothing is removed, but in the latent form "
                    "the picture still goes through the VAE.",
                ),
                io.Float.Input(
                    "instruction_cfg", default=1.0, min=0.0, max=10.0, step=0.1,
                    tooltip="Above 1 the instruction is exaggerated, for damage that is only half found. 1 is off; anything else takes "
                    "twice the time.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White where damage is removed. Black parts keep the picture as it is, to the bit."
                ),
                *percent_inputs("This is about the networks: the LoRA or fine-tune among the weights acts throughout."),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For the guider or SamplerCustom that has Degradation Space Sampler, and Remove "
                    "Degradation."
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", weights: Weights, instruction: Instruction, degraded: Tensor, vae: "VAE", strength: float,
        instruction_cfg: float, mask: Tensor | None = None, start_percent: float = 0.0, end_percent: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the patched model."""
        plan = check_fit(weights, model.model, APPLY)
        if model.get_attachment(ATTACHMENT) is not None:
            raise ValueError(f"{APPLY}: 'model' already comes from {APPLY}, and a model can look for the damage of one picture only. For "
                             "two kinds of damage, combine their instructions with Blend Visual Instructions.")
        check_cell(weights.config["cell"], vae, APPLY)
        tokens = checked_instruction(weights, instruction, APPLY)
        picture = DegradedPicture(rgb_pictures(degraded, APPLY, "degraded"), vae, APPLY)
        patched, network = with_lora_of(model, weights), inference_patcher(weights, plan)
        condition = DegradationCondition(free_key(patched, "mend_degradation"), picture, tokens, instruction_cfg, APPLY)
        DegradationPatch(network.model, plan, condition, start_percent, end_percent).attach(patched)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, f"{condition.key}_space", demand_degradation_space)
        load_with(patched, condition.key, [network])
        deviation = float(weights.tensors[DEVIATION])
        patched.set_attachments(ATTACHMENT, Degradation(picture, weights.config["form"], deviation, strength, usable_mask(mask, APPLY)))
        return io.NodeOutput(patched)


class SampleDegradationSpace(io.ComfyNode):
    """Declares Degradation Space Sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendDegradationSpaceSampler",
            display_name=SAMPLER,
            category="restoration/instruction",
            description="Lets any sampler run on damage instead of pictures, for a model from Apply Degradation Diffusion. What you see "
            "while it runs, and what comes out, is the restored picture.",
            search_aliases=["defusion", "degradation space", "residual sampler", "average samples"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to run, such as euler from KSamplerSelect."),
                io.Int.Input(
                    "samples", default=1, min=1, max=16,
                    tooltip="How many samples of the damage are averaged: 2 to 4 are truer to the picture and smoother, and take as many "
                    "times longer. Where the schedule ends before the noise does (the high half of SplitSigmas) it is one.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, sampler: comfy.samplers.Sampler, samples: int) -> io.NodeOutput:
        """Return the sampler."""
        check_inner(sampler)
        return io.NodeOutput(DegradationSpaceSampler(sampler, samples))


class RemoveDegradation(io.ComfyNode):
    """Declares Remove Degradation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendRemoveDegradation",
            display_name=REMOVE,
            category="restoration/instruction",
            description="Take the damage that was sampled away from the damaged picture. Use it in place of VAE Decode after Degradation "
            "Space Sampler: it returns the size you put in and, in the pixel form, leaves alone what did not change.",
            search_aliases=["defusion", "subtract residual", "decode degradation", "vae decode"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from Apply Degradation Diffusion; it knows the damaged picture, the VAE, the form and the "
                    "mask."
                ),
                io.Latent.Input("samples", tooltip="What was sampled with that model."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The restored picture, as large as the damaged one.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: "ModelPatcher", samples: dict[str, Any]) -> io.NodeOutput:
        """Return the restored pictures."""
        return io.NodeOutput(degradation_of(model, REMOVE).removed(model, samples_of(samples, REMOVE, "samples")))


NODES = [NewDegradationModel, ApplyDegradationDiffusion, SampleDegradationSpace, RemoveDegradation]
