"""Visual instructions (Defusion, arXiv 2506.16960): show a model what the damage looks like, on a test chart, instead of in words."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from comfy_api.latest import io

from ..degradations.operators import joined
from ..degradations.scales import from_json, recipe_of
from ..degradations.visual_ground import SMALLEST, visual_ground
from ..model_patches import degradation_model
from ..model_patches import degradation_tokenizer as tokenizer
from ..model_patches.degradation_estimator import findings, mixed_tokens
from ..model_patches.degradation_tokenizer import Instruction, blended, instruction_of
from ..model_patches.errors import telling
from ..model_patches.weights_file import Weights
from ..training.degradation_estimator import new_estimator
from ..training.degradation_tokenizer import new_tokenizer
from .inputs import seed_input
from .weights import WeightsSocket

MendInstruction = io.Custom("MEND_INSTRUCTION")
GROUND, ENCODE, BLEND = "Visual Ground", "Encode Visual Instruction", "Blend Visual Instructions"
ESTIMATE, NEW_ESTIMATOR = "Estimate Visual Instruction", "New Degradation Estimator"


class VisualGround(io.ComfyNode):
    """Declares Visual Ground."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendVisualGround",
            display_name=GROUND,
            category="restoration/instruction",
            description="Draws a test chart: stars and rings, overlapping discs, natural texture, colour and grey patches. Damage it with "
            "Degrade Image as your picture was damaged, and Encode Visual Instruction makes an instruction of the difference.",
            search_aliases=["test chart", "resolution chart", "siemens star", "dead leaves", "colour checker", "color chart", "defusion"],
            inputs=[
                seed_input("Decides which tiles there are, and where."),
                io.Int.Input(
                    "size", default=256, min=SMALLEST, max=2048,
                    tooltip="Side of the chart in pixels. Use the one the tokenizer was trained with: 256, or 128 for the lab's.",
                ),
            ],
            outputs=[io.Image.Output(
                display_name="chart", tooltip="The chart, clean. Keep it: the instruction needs it before and after the damage."
            )],
        )  # fmt: skip

    @classmethod
    def execute(cls, seed: int, size: int) -> io.NodeOutput:
        """Return the chart."""
        return io.NodeOutput(visual_ground(seed, size))


class EncodeVisualInstruction(io.ComfyNode):
    """Declares Encode Visual Instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendEncodeVisualInstruction",
            display_name=ENCODE,
            category="restoration/instruction",
            description="Makes a visual instruction of a test chart before and after damage: it tells a degradation model what to take "
            "away from your picture. Two equal charts mean: change nothing.",
            search_aliases=["visual instruction", "degradation tokens", "show the damage", "defusion", "vq-vae", "encode chart"],
            inputs=[
                WeightsSocket.Input(
                    "weights", tooltip="A degradation tokenizer, or the degradation model that is to read the instruction: it has its own."
                ),
                io.Image.Input(
                    "degraded", tooltip="The chart after the damage, from the last of the Degrade Image nodes. Several make a batch."
                ),
                io.Image.Input("clean", tooltip="The same chart before the damage, from Visual Ground."),
                io.String.Input(
                    "words", optional=True, force_input=True, tooltip="Words for the damage, from the last of the Degrade Image nodes."
                ),
            ],
            outputs=[MendInstruction.Output(display_name="instruction", tooltip="What the damage does, for a degradation model.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, weights: Weights, degraded: Tensor, clean: Tensor, words: str = "") -> io.NodeOutput:
        """Return the instruction."""
        if weights.kind != degradation_model.KIND:
            return io.NodeOutput(instruction_of(weights, degraded, clean, words, ENCODE))
        degradation_model.check_config(weights, ENCODE)
        own = weights.once(tokenizer.KIND, partial(degradation_model.tokenizer_of, weights))
        # Of a file in bf16 its tokens are not quite those that it was trained with, but near enough for itself.
        return io.NodeOutput(replace(instruction_of(own, degraded, clean, words, ENCODE), codebook=weights.config["codebook"]))


class BlendVisualInstructions(io.ComfyNode):
    """Declares Blend Visual Instructions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        weight = {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05, "round": False}
        return io.Schema(
            node_id="MendBlendVisualInstructions",
            display_name=BLEND,
            category="restoration/instruction",
            description="Adds two visual instructions, each times a weight, for pictures with two kinds of damage, or to ask for more or "
            "less. Where you can, damage one chart in both ways instead: that also shows what the second does to the first.",
            search_aliases=["mix instructions", "combine degradations", "composite damage", "instruction strength", "defusion"],
            inputs=[
                MendInstruction.Input("instruction_1", tooltip="An instruction."),
                MendInstruction.Input("instruction_2", tooltip="Another one, of the same tokenizer and a chart of the same size."),
                io.Float.Input("weight_1", **weight, tooltip="How much of the first. 0 leaves it out."),
                io.Float.Input("weight_2", **weight, tooltip="How much of the second. 0 leaves it out; below 0 it is taken away."),
            ],
            outputs=[MendInstruction.Output(display_name="instruction", tooltip="Both together, with the words of both.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, instruction_1: Instruction, instruction_2: Instruction, weight_1: float, weight_2: float) -> io.NodeOutput:
        """Return the sum."""
        return io.NodeOutput(blended([(instruction_1, weight_1), (instruction_2, weight_2)], BLEND))


class EstimateVisualInstruction(io.ComfyNode):
    """Declares Estimate Visual Instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendEstimateVisualInstruction",
            display_name=ESTIMATE,
            category="restoration/instruction",
            description="Looks at a damaged picture and makes a visual instruction for it, when you do not know what was done to it. Check "
            "the chart: its damage should look like the picture's. If it does not, make the chart yourself.",
            search_aliases=[
                "detect degradation", "blind restoration", "what is wrong", "degradation classifier", "auto instruction", "defusion",
            ],
            inputs=[
                WeightsSocket.Input("weights", tooltip="A degradation estimator, from Load Mend Weights or Train."),
                io.Image.Input(
                    "image", tooltip="The damaged picture at its own resolution: enlarging or shrinking it first changes noise and blur."
                ),
                io.Float.Input(
                    "confidence", default=0.5, min=0.0, max=1.0, step=0.05,
                    tooltip="Damage found with less confidence than this is left out. Raise it if it sees damage that is not there.",
                ),
            ],
            outputs=[
                MendInstruction.Output(display_name="instruction", tooltip="For a degradation model; a batch of pictures has one each."),
                io.Image.Output(display_name="chart", tooltip="A test chart with the damage that was found, one for each picture."),
                io.String.Output(
                    display_name="words",
                    tooltip="Words for it, such as 'hazy, noisy'; for a batch, one text with the words of all pictures. Empty if nothing was "
                    "found.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, weights: Weights, image: Tensor, confidence: float) -> io.NodeOutput:
        """Return instruction, chart and words."""
        found = [finding.present(confidence) for finding in findings(weights, image, ESTIMATE)]
        with telling(f"{ESTIMATE}: {weights.name} is of another version. Update the pack, or load another file:"):
            scales, chart = from_json(weights.config["scales"]), weights.config["chart"]
        clean, charts, words = visual_ground(chart["seed"], chart["size"]), [], ""
        for places in found:
            recipe = recipe_of({scales[kind].kind: place for kind, place in places.items()}, scales)
            damaged, new = recipe.apply(clean, chart["seed"])
            charts.append(damaged)
            words = joined(words, new)
        tokens = torch.cat([mixed_tokens(weights, places) for places in found])
        return io.NodeOutput(Instruction(tokens, weights.config["codebook"], words), torch.cat(charts), words)


class NewDegradationTokenizer(io.ComfyNode):
    """Declares New Degradation Tokenizer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewDegradationTokenizer",
            display_name="New Degradation Tokenizer",
            category="restoration/instruction",
            description="Make an untrained degradation tokenizer, which will learn to put test charts into codes. Connect it to Train, "
            "with Paired Data and the kinds of damage it shall know. Everything else that uses visual instructions is trained after it.",
            search_aliases=["degradation tokenizer", "vq-vae", "codebook", "train defusion", "visual instruction"],
            inputs=[
                io.Combo.Input(
                    "size", options=["full", "lab"], default="full",
                    tooltip="full: 256 tokens of 256 numbers from a chart of 256 pixels. lab: 256 of 64 from 128 pixels, for the lab "
                    "prior.",
                ),
                io.Boolean.Input(
                    "adversarial", default=True,
                    tooltip="Learn against a critic too, from step 10000 on (lab: 500), so that noise and texture are kept. Costs some "
                    "time.",
                ),
                seed_input("Fixes the numbers it starts from."),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The untrained tokenizer, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, size: str, adversarial: bool, seed: int) -> io.NodeOutput:
        """Return fresh weights."""
        return io.NodeOutput(new_tokenizer({"size": size, "adversarial": adversarial, "seed": seed}))


class NewDegradationEstimator(io.ComfyNode):
    """Declares New Degradation Estimator."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewDegradationEstimator",
            display_name=NEW_ESTIMATOR,
            category="restoration/instruction",
            description="Make an untrained degradation estimator, which will learn to see what is wrong with a picture: haze, rain, low "
            "light, blur, noise and JPEG. It takes along a bank of visual instructions made with your tokenizer. Connect it to Train.",
            search_aliases=["degradation estimator", "degradation classifier", "blind restoration", "train defusion", "instruction bank"],
            inputs=[
                WeightsSocket.Input(
                    "weights", tooltip="A trained degradation tokenizer. The estimator's instructions fit models that use the same."
                ),
                seed_input("Decides the chart of the bank, and the numbers it starts from."),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The untrained estimator, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, weights: Weights, seed: int) -> io.NodeOutput:
        """Return fresh weights."""
        return io.NodeOutput(new_estimator(weights, seed, NEW_ESTIMATOR))


NODES = [
    VisualGround, EncodeVisualInstruction, BlendVisualInstructions, EstimateVisualInstruction,
    NewDegradationTokenizer, NewDegradationEstimator,
]  # fmt: skip
