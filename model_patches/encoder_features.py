"""How the host's VAE encoders are built, as far as their last features go. Part of what host.py stands for.

UniLDiff (arXiv 2507.23685) shows the denoiser what an encoder knows of the degraded picture before it is squeezed into a latent: the output
of its middle block, (B, C, h, w) at the latent's resolution. What turns that into a latent is called the head here.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.sd import VAE


def feature_channels(vae: "VAE") -> int:
    """Return the width of the features.

    Raises:
        ValueError: for a VAE whose encoder is not known here.
    """
    vae.throw_exception_if_invalid()
    return _head(vae.first_stage_model)[1]


def features(first_stage_model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the features of pixels, which are as the model's own `encode` takes them; gradients flow through."""
    head, _ = _head(first_stage_model)
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        first_stage_model.encode(pixels)
    finally:
        handle.remove()
    # Pictures may come in pieces of the batch, videos in pieces of time.
    return torch.cat(caught, 2 if caught[0].ndim == 5 else 0)


def feature_vae(vae: "VAE") -> "VAE":
    """Return a VAE whose `encode` gives features instead of latents, in the host's memory and with its tiles; `vae` stays as it is.

    Raises:
        ValueError: for a VAE whose encoder is not known here.
    """
    changed = copy.copy(vae)
    changed.latent_channels, changed.first_stage_model = feature_channels(vae), _Seeing(vae.first_stage_model)
    return changed


class _Seeing:
    """Stands where the host expects a first stage model."""

    def __init__(self, first_stage_model: nn.Module) -> None:
        self.first_stage_model = first_stage_model

    def encode(self, pixels: Tensor) -> Tensor:
        return features(self.first_stage_model, pixels)


def _head(first_stage_model: nn.Module) -> tuple[nn.Module, int]:
    """Return the first layer of the head and the width of what goes into it."""
    layers = getattr(first_stage_model, "taesd_encoder", None)
    if type(layers).__name__ == "Encoder":
        return layers[-1], layers[-1].in_channels
    encoder = getattr(first_stage_model, "encoder", None)
    if getattr(encoder, "norm_out", None) is not None and hasattr(encoder, "mid"):
        return encoder.norm_out, encoder.norm_out.num_channels
    if type(encoder).__name__ == "Encoder3d" and len(encoder.head) == 3:
        return encoder.head[0], encoder.head[2].in_channels
    raise ValueError(f"VAEs of the kind {type(first_stage_model).__name__} are not supported. "
                     "Use that of SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN.")
