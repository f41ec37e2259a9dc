"""Diffusion Restoration Adapter (arXiv 2502.20679): make one for a model, and apply it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from comfy_api.latest import io

from ..model_patches.adapter_patch import AdapterPatch, check_fit, inference_patcher, new_weights
from ..model_patches.diffusion_adapter import with_lora_of
from ..model_patches.errors import telling
from ..model_patches.framing import rgb_pictures
from ..model_patches.host import free_key, load_with
from ..model_patches.lq_condition import LatentCondition
from ..model_patches.lq_pictures import Encoding, encoded_pictures
from ..model_patches.robust_encoder import encoder_tensors, with_encoder
from ..model_patches.weights_file import Weights
from .inputs import percent_inputs, seed_input, usable_mask
from .weights import WeightsSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

NEW, APPLY = "New Restoration Adapter", "Apply Restoration Adapter"
SIZES = {"full": "full", "small": "small", "LoRA only": "none"}


class NewRestorationAdapter(io.ComfyNode):
    """Declares New Restoration Adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewRestorationAdapter",
            display_name=NEW,
            category="restoration/adapter",
            description="Make an untrained restoration adapter for your model: small networks that will learn to read the damaged picture, and "
            "a LoRA that tunes the model to them. Connect it to Train.",
            search_aliases=["restoration adapter", "controlnet alternative", "train restoration", "lora", "diffusion adapter"],
            inputs=[
                io.Model.Input("model", tooltip="The model it is for: SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN. It will fit no other family."),
                io.Combo.Input(
                    "size", options=list(SIZES), default="full",
                    tooltip="full: as published. small: about half of it on UNets, for small models or little memory. LoRA only: no adapters.",
                ),
                io.Int.Input("lora_rank", default=32, min=0, max=512, tooltip="Rank of the LoRA on self-attention. 0 leaves it out."),
                seed_input("Fixes the numbers it starts from. A fresh adapter changes nothing, whatever the seed."),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="When connected, a copy of its encoder is trained along, to look through strong damage. Makes the file larger.",
                ),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The untrained adapter, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: "ModelPatcher", size: str, lora_rank: int, seed: int, vae: "VAE | None" = None) -> io.NodeOutput:
        """Return fresh weights."""
        if SIZES[size] == "none" and not lora_rank:
            raise ValueError(f"{NEW}: with size 'LoRA only' and lora_rank 0 there is nothing to train. Raise lora_rank, or choose another size.")
        if SIZES[size] == "none" and vae is not None:
            raise ValueError(f"{NEW}: 'vae' is connected, but with size 'LoRA only' nothing looks at the damaged picture. "
                             "Disconnect it, or choose another size.")
        with telling(f"{NEW}: 'model':"):
            weights = new_weights(model.model, SIZES[size], lora_rank, seed)
        if vae is not None:
            with telling(f"{NEW}: 'vae':"):
                weights.tensors.update(encoder_tensors(vae))
        return io.NodeOutput(weights)


class ApplyRestorationAdapter(io.ComfyNode):
    """Declares Apply Restoration Adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendApplyRestorationAdapter",
            display_name=APPLY,
            category="restoration/adapter",
            description="Let a trained restoration adapter show the damaged picture to your model while it samples, so that it paints the same "
            "picture without the damage. Several can be chained.",
            search_aliases=["restoration adapter", "apply adapter", "restore photo", "denoise", "deblur", "super resolution", "controlnet"],
            inputs=[
                io.Model.Input("model", tooltip="The model the adapter was trained on, or another fine-tune of the same family."),
                WeightsSocket.Input("weights", tooltip="The adapter, from Load Mend Weights or Train."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01,
                    tooltip="How much the model listens to the adapter. 0 is the model itself, without the LoRA too.",
                ),
                io.Float.Input(
                    "lora_strength", default=1.0, min=-2.0, max=2.0, step=0.01,
                    tooltip="Strength of the LoRA that was trained along. Usually the same as strength.",
                ),
                io.Image.Input("degraded", optional=True, tooltip="The damaged picture, or frames of a video. Needs vae."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the model, to encode the damaged picture."),
                io.Latent.Input("latent", optional=True, tooltip="Instead of degraded and vae: the damaged picture as it was encoded."),
                io.Mask.Input("mask", optional=True, tooltip="White where the adapter acts; black parts are left to the model with its LoRA."),
                *percent_inputs("The LoRA that was trained along acts all the time."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the adapter, for any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", weights: Weights, strength: float, lora_strength: float, degraded: Tensor | None = None,
        vae: "VAE | None" = None, latent: dict | None = None, mask: Tensor | None = None, start_percent: float = 0.0, end_percent: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the patched model."""
        anatomy = check_fit(weights, model.model, APPLY)
        if strength == 0:
            return io.NodeOutput(model.clone())
        patched = with_lora_of(model, weights, lora_strength)
        if weights.config["size"] != "none":

            def seen(raw: Tensor) -> Tensor:
                if raw.is_nested or raw.shape[1] != anatomy.latent_channels:
                    found = "of several parts" if raw.is_nested else f"of {raw.shape[1]} channels"
                    raise ValueError(f"{APPLY}: the degraded latent is {found}, and {anatomy.family} has {anatomy.latent_channels} channels. "
                                     "Use the VAE of this model.")
                return model.get_model_object("process_latent_in")(raw)

            c_lq, again = cls._latent(weights, degraded, vae, latent, seen)
            network = inference_patcher(weights, anatomy)
            condition = LatentCondition(free_key(patched, "mend_adapter"), c_lq, usable_mask(mask, APPLY), APPLY, again)
            AdapterPatch(network.model, anatomy, condition, strength, start_percent, end_percent).attach(patched)
            load_with(patched, condition.key, [network])
        return io.NodeOutput(patched)

    @classmethod
    def _latent(
        cls, weights: Weights, degraded: Tensor | None, vae: "VAE | None", latent: dict | None, seen: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Encoding | None]:  # fmt: skip
        """Return the damaged picture's latent as the model sees it, and the same for other numbers of frames."""
        if latent is not None:
            if degraded is not None:
                raise ValueError(f"{APPLY}: both 'latent' and 'degraded' are connected. Disconnect one of them.")
            return seen(latent["samples"]), None
        if degraded is None or vae is None:
            missing = "'degraded'" if degraded is None else "'vae'"
            raise ValueError(f"{APPLY}: {missing} is not connected. Connect the damaged picture and the model's VAE, or its latent instead.")
        pictures = rgb_pictures(degraded, APPLY, "degraded")
        with telling(f"{APPLY}: 'vae': {weights.name}"):
            encoder = with_encoder(vae, weights.tensors)
        return encoded_pictures(vae, pictures, lambda given: seen(encoder.encode(given)), APPLY)


NODES = [NewRestorationAdapter, ApplyRestorationAdapter]
