"""Loading the lab prior through the host's own classes, so that it behaves like any other model."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils

from .denoisers import PIXEL, TEXT_WIDTH, UNET, position_codes
from .vocabulary import LENGTH, PAD, WORDS, token_ids

WEIGHTS = Path(__file__).parent / "weights"
VAE = WEIGHTS / "vae.safetensors"
KINDS = ("unet", "dit", "pixel")
# What a sample of each pixel costs beside one of each latent cell, by the host's estimate of memory; that of its own models of pixels.
PIXEL_MEMORY = 0.044


class LabLatent(comfy.latent_formats.SD3):
    """SD3's scale and shift, with the lab VAE's own preview colours."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_decoder_name = None


class WordTokenizer:
    """Turns a text into the ids of the words the lab knows; the host's tokenizer interface."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict = {}) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        """Return one list of (id, weight) for the host to hand to WordEncoder."""
        return {"lab": [[(index, 1.0) for index in token_ids(text)]]}

    def untokenize(self, token_weight_pair: list) -> list:
        """Pair every token with its word."""
        return [(pair, "" if pair[0] == PAD else WORDS[pair[0]]) for pair in token_weight_pair]

    def state_dict(self) -> dict:
        """Nothing is learned here."""
        return {}


class WordEncoder(nn.Module):
    """Looks up the words' vectors; the host's text encoder interface."""

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype | None = None, model_options: dict = {}) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        self.words = nn.Module()
        self.words.table = nn.Parameter(torch.empty(len(WORDS) + 1, TEXT_WIDTH, device=device, dtype=torch.float32), requires_grad=False)

    def set_clip_options(self, options: dict) -> None:
        """The lab has no layers to choose from."""

    def reset_clip_options(self) -> None:
        """The lab has no layers to choose from."""

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
        """Return (context (1, LENGTH, width), pooled (1, width)) as training made them."""
        ids = torch.tensor([index for index, _ in tokens["lab"][0]])[:LENGTH]
        context = comfy.ops.cast_to_input(self.words.table, torch.empty(0))[ids]
        known = (ids != PAD).unsqueeze(-1)
        pooled = (context * known).sum(0) / known.sum().clamp(min=1)
        device = comfy.model_management.intermediate_device()
        return context.unsqueeze(0).to(device), pooled.unsqueeze(0).to(device)

    def load_sd(self, sd: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load "words.table"."""
        result = self.load_state_dict(sd, strict=False)
        return result.missing_keys, result.unexpected_keys


def load_lab_prior(kind: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Load the lab's denoiser of a kind with its text encoder and VAE.

    Args:
        kind: "unet" (eps-prediction), "dit" (flow matching) or "pixel" (flow matching on pixels, whose VAE is the host's for such models).

    Returns:
        MODEL, CLIP and VAE as the host's loaders return them.
    """
    return load_lab_denoiser(kind), _load_words(_weights(kind)[1]), _load_vae(kind)


def load_lab_denoiser(kind: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load the denoiser alone; hosts that fetch weights on demand ask here for one whose weights stay, to train on."""
    sd, _ = _weights(kind)
    if kind == "dit":
        sd["model.diffusion_model.pos_embed"] = position_codes().half()
        model = comfy.sd.load_diffusion_model_state_dict(sd, model_options={}, disable_dynamic=disable_dynamic)
    else:
        model = _load_unet(kind, sd, disable_dynamic)
    model.model.latent_format = _latent_format(kind)
    model.cached_patcher_init = (load_lab_denoiser, (kind,))
    return model


def _weights(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a denoiser, and those of its text encoder."""
    sd = comfy.utils.load_torch_file(str(WEIGHTS / f"{kind}.safetensors"), safe_load=True)
    return sd, {k: sd.pop(k).float() for k in list(sd) if k.startswith("words.")}


def _latent_format(kind: str) -> comfy.latent_formats.LatentFormat:
    if kind == "pixel":
        return comfy.latent_formats.ChromaRadiance()
    _, metadata = comfy.utils.load_torch_file(str(VAE), safe_load=True, return_metadata=True)
    latent_format = LabLatent()
    if metadata and "mend.preview" in metadata:
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = json.loads(metadata["mend.preview"])
    return latent_format


def _load_vae(kind: str) -> comfy.sd.VAE:
    if kind == "pixel":
        return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE), safe_load=True))
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(VAE),))
    return vae


def _load_unet(kind: str, sd: dict[str, Tensor], disable_dynamic: bool) -> comfy.model_patcher.ModelPatcher:
    """The host has no detector for a UNet of this size, so its class is given the configuration that training used."""
    management = comfy.model_management
    sd = {k.removeprefix("model.diffusion_model."): v for k, v in sd.items()}
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    layout, kind_of_model = (PIXEL, comfy.model_base.ModelType.FLOW) if kind == "pixel" else (UNET, comfy.model_base.ModelType.EPS)
    config = comfy.supported_models.SD15(dict(layout))
    config.unet_config = dict(layout)
    parameters = sum(v.numel() for v in sd.values())
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=[torch.float16, torch.bfloat16, torch.float32], weight_dtype=torch.float16)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device, [torch.float16, torch.bfloat16, torch.float32]))
    if kind == "pixel":
        config.memory_usage_factor = PIXEL_MEMORY
    base = comfy.model_base.BaseModel(config, kind_of_model, device=offload_device)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(base, load_device=load_device, offload_device=offload_device)
    base.diffusion_model.load_state_dict(sd, assign=patcher.is_dynamic())
    return patcher


def _load_words(words: dict[str, Tensor]) -> comfy.sd.CLIP:
    class Target:
        params: dict = {}
        clip = WordEncoder
        tokenizer = WordTokenizer

    return comfy.sd.CLIP(Target, state_dict=[words])
