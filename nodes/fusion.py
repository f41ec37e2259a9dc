"""Degradation-aware feature fusion (UniLDiff, arXiv 2507.23685): make one for a model, and apply it."""

from typing import TYPE_CHECKING

from torch import Tensor

from comfy_api.latest import io

from ..model_patches.daff import PRESETS
from ..model_patches.diffusion_adapter import with_lora_of
from ..model_patches.encoder_features import feature_channels
from ..model_patches.errors import telling
from ..model_patches.framing import rgb_pictures
from ..model_patches.fusion_patch import FusionPatch, check_fit, grown, inference_patcher, new_fusion
from ..model_patches.host import free_key, load_with
from ..model_patches.lq_condition import FeatureCondition
from ..model_patches.lq_encoder import check_feature_width, lq_vae
from ..model_patches.lq_pictures import encoded_pictures
from ..model_patches.weights_file import Weights
from .inputs import percent_inputs, seed_input, usable_mask
from .weights import WeightsSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

NEW, APPLY = "New Fusion", "Apply Degradation-Aware Fusion"


class NewFusion(io.ComfyNode):
    """Declares New Fusion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewFusion",
            display_name=NEW,
            category="restoration/fusion",
            description="Make an untrained degradation-aware fusion for your model: one network at its entrance that will learn to "
            "read the damaged picture, whatever the damage is. Connect it to Train.",
            search_aliases=["unildiff", "daff", "feature fusion", "all in one restoration", "train restoration", "degradation aware"],
            inputs=[
                io.Model.Input("model", tooltip="The model it is for: SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN. It will fit no other family."),
                io.Vae.Input("vae", tooltip="The model's VAE. Its encoder is what looks at the damaged picture."),
                io.Combo.Input(
                    "preset", options=list(reversed(PRESETS)), default="lite",
                    tooltip="lite: a small part of the model's own work, for training at home. published: as in the paper, two thirds of "
                    "SDXL's work.",
                ),
                io.Int.Input(
                    "lora_rank", default=0, min=0, max=512,
                    tooltip="Rank of a LoRA on self-attention that is trained along. 0 leaves it out, as does fine_tune: with neither, the "
                    "paper's first stage.",
                ),
                io.Boolean.Input(
                    "train_encoder", default=False,
                    tooltip="Train a copy of the VAE's encoder along, at a tenth of the rate: the paper's second stage. Makes the file "
                    "larger.",
                ),
                seed_input("Fixes the numbers it starts from. A fresh fusion changes nothing, whatever the seed."),
                io.Boolean.Input(
                    "fine_tune", default=False, advanced=True,
                    tooltip="Let all weights of the model learn in place of a LoRA, as the paper does in its second stage. Training then "
                    "holds four more copies of the model in full precision, and the file is as large as the model.",
                ),
                WeightsSocket.Input(
                    "weights", optional=True,
                    tooltip="A fusion from the first stage. It keeps what it has learned, its preset too, and gets the LoRA or fine_tune "
                    "and the encoder.",
                ),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The fusion, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", vae: "VAE", preset: str, lora_rank: int, train_encoder: bool, seed: int,
        fine_tune: bool = False, weights: Weights | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Return fresh weights, or given ones with more to train."""
        if weights is not None:
            check_fit(weights, model.model, NEW)
        with telling(f"{NEW}: 'vae':"):
            features = feature_channels(vae)
        if weights is None:
            with telling(f"{NEW}: 'model':"):
                weights = new_fusion(model.model, features, preset, seed)
        with telling(f"{NEW}: {weights.name}"):
            return io.NodeOutput(grown(weights, model.model, vae, lora_rank, train_encoder, seed, fine_tune))


class ApplyFusion(io.ComfyNode):
    """Declares Apply Degradation-Aware Fusion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendApplyDegradationAwareFusion",
            display_name=APPLY,
            category="restoration/fusion",
            description="Let a trained fusion show the damaged picture to your model while it samples. One fusion can have learned many "
            "kinds of damage and their mixtures: it reads from the picture which one it has.",
            search_aliases=[
                "unildiff", "daff", "all in one restoration", "restore photo", "denoise", "dehaze", "derain", "deblur", "low light",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model the fusion was trained on, or another fine-tune of the same family."),
                WeightsSocket.Input("weights", tooltip="The fusion, from Load Mend Weights or Train."),
                io.Image.Input("degraded", tooltip="The damaged picture, or frames of a video: one for all latents, or one each."),
                io.Vae.Input("vae", tooltip="The VAE the fusion was trained with, usually the model's own."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01,
                    tooltip="How much the model listens to the fusion. 0 is the model itself, without what else was trained along.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where the fusion acts; black parts are left to the model with its LoRA, if one was trained along."),
                io.Float.Input(
                    "lora_strength", default=1.0, min=-2.0, max=2.0, step=0.01, advanced=True,
                    tooltip="Strength of what was trained along, a LoRA or fine_tune; without either it does nothing.",
                ),
                *percent_inputs("What was trained along, a LoRA or fine_tune, acts all the time."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the fusion, for any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", weights: Weights, degraded: Tensor, vae: "VAE", strength: float, mask: Tensor | None = None,
        lora_strength: float = 1.0, start_percent: float = 0.0, end_percent: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the patched model."""
        anatomy = check_fit(weights, model.model, APPLY)
        if strength == 0:
            return io.NodeOutput(model.clone())
        pictures = rgb_pictures(degraded, APPLY, "degraded")
        with telling(f"{APPLY}: 'vae': {weights.name}"):
            check_feature_width(vae, weights.config["features"])
            seeing = lq_vae(vae, weights.tensors)
        features, again = encoded_pictures(vae, pictures, lambda given: seeing.encode(given).float(), APPLY)
        network = inference_patcher(weights, anatomy)
        patched = with_lora_of(model, weights, lora_strength)
        condition = FeatureCondition(free_key(patched, "mend_fusion"), features, usable_mask(mask, APPLY), APPLY, network.model.embed, again)
        FusionPatch(network.model, anatomy, condition, strength, start_percent, end_percent).attach(patched)
        load_with(patched, condition.key, [network])
        return io.NodeOutput(patched)


NODES = [NewFusion, ApplyFusion]
