"""Very small models of each family, built through the host's own classes with seeded random weights, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
from comfy.ldm.models.autoencoder import AutoencoderKL

Conditioning = list[list[Any]]

CHANNELS = {"sd15": 4, "sdxl": 4, "sd3": 16, "flux": 16, "wan": 16}
FAMILIES = tuple(CHANNELS)
SDXL_POOLED = 32


def initialise(module: torch.nn.Module, seed: int = 0, spread: float = 0.05) -> None:
    """Gives every parameter a seeded value: gains 1, other vectors near 0, matrices normal with this spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * spread)
            elif name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(noise * 0.01)
        for name, buffer in module.named_buffers():
            if "pos_embed" in name and buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * spread)


def unet_config(channels: int, depth: int, linear: bool, adm: int | None = None) -> dict[str, Any]:
    """A two-level UNet with attention on the lower one."""
    config: dict[str, Any] = dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=channels, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[0, depth], transformer_depth_output=[0, 0, depth, depth], transformer_depth_middle=depth,
        context_dim=64, use_spatial_transformer=True, use_linear_in_transformer=linear, adm_in_channels=adm,
        use_checkpoint=False, legacy=False, use_temporal_attention=False, use_temporal_resblock=False,
    )  # fmt: skip
    return config if adm is None else {**config, "num_classes": "sequential"}


def sd15_model(**changes: Any) -> comfy.model_base.BaseModel:
    """An eps-prediction UNet."""
    config = comfy.supported_models.SD15({**unet_config(32, 1, linear=False), **changes})
    return comfy.model_base.BaseModel(ready(config), model_type=comfy.model_base.ModelType.EPS)


def sdxl_model(**changes: Any) -> comfy.model_base.BaseModel:
    """An eps-prediction UNet with a pooled text vector and sizes."""
    config = comfy.supported_models.SDXL({**unet_config(64, 2, linear=True, adm=SDXL_POOLED + 6 * 256), **changes})
    return comfy.model_base.SDXL(ready(config))


def sd3_model(**changes: Any) -> comfy.model_base.BaseModel:
    """A flow model of two joint blocks."""
    width = 64 * changes.get("depth", 2)
    context = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": width}}
    settings = dict(
        in_channels=16, out_channels=16, patch_size=2, depth=2, input_size=None, adm_in_channels=64, context_embedder_config=context,
        num_patches=256, pos_embed_max_size=16, pos_embed_scaling_factor=None, qk_norm="rms", x_block_self_attn_layers=[],
    )  # fmt: skip
    return comfy.model_base.SD3(ready(comfy.supported_models.SD3({**settings, **changes})))


def flux_model(**changes: Any) -> comfy.model_base.BaseModel:
    """A flow model of two double and two single blocks, with a guidance embedding."""
    settings = dict(
        image_model="flux", hidden_size=32, num_heads=2, axes_dim=[8, 4, 4], mlp_ratio=2.0, theta=10000, in_channels=16, out_channels=16,
        context_in_dim=48, vec_in_dim=24, patch_size=2, depth=2, depth_single_blocks=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
    )  # fmt: skip
    return comfy.model_base.Flux(ready(comfy.supported_models.Flux({**settings, **changes})))


def wan_model(**changes: Any) -> comfy.model_base.BaseModel:
    """A text-to-video flow model of two blocks."""
    settings = dict(
        image_model="wan2.1", model_type="t2v", dim=48, num_heads=2, ffn_dim=64, num_layers=2, freq_dim=32, text_dim=40, in_dim=16, out_dim=16,
        patch_size=(1, 2, 2), window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
    )  # fmt: skip
    return comfy.model_base.WAN21(ready(comfy.supported_models.WAN21_T2V({**settings, **changes})))


def ready(config: Any) -> Any:
    """A model configuration set to full precision."""
    config.set_inference_dtype(torch.float32, None)
    return config


BUILDERS: dict[str, Callable[..., comfy.model_base.BaseModel]] = {
    "sd15": sd15_model,
    "sdxl": sdxl_model,
    "sd3": sd3_model,
    "flux": flux_model,
    "wan": wan_model,
}


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of this family, which computes in this precision. `changes` go into its configuration, for example depth=3."""
    inner = BUILDERS[family](**changes)
    initialise(inner.diffusion_model, seed)
    inner.diffusion_model.to(dtype).dtype = dtype
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(inner, load_device=device, offload_device=comfy.model_management.unet_offload_device())


def conditioning(family: str, seed: int = 1) -> Conditioning:
    """A CONDITIONING of the shape this family's tiny model takes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    match family:
        case "sd15":
            return [[noise(1, 77, 64), {}]]
        case "sdxl":
            return [[noise(1, 77, 64), {"pooled_output": noise(1, SDXL_POOLED)}]]
        case "sd3":
            return [[noise(1, 20, 64), {"pooled_output": noise(1, 64)}]]
        case "flux":
            return [[noise(1, 7, 48), {"pooled_output": noise(1, 24), "guidance": 3.5}]]
        case "wan":
            return [[noise(1, 7, 40), {}]]
    raise ValueError(f"no tiny family {family}; there are {', '.join(FAMILIES)}")


def latent_shape(family: str, batch: int = 1, height: int = 8, width: int = 8, frames: int = 1) -> tuple[int, ...]:
    """The shape of this family's latents; sizes are in latent cells."""
    return (batch, CHANNELS[family], *((frames,) if family == "wan" else ()), height, width)


def latent(
    family: str, batch: int = 1, height: int = 8, width: int = 8, frames: int = 1, seed: int | None = None
) -> dict[str, torch.Tensor]:
    """A LATENT of zeros, or of seeded noise."""
    shape = latent_shape(family, batch, height, width, frames)
    if seed is None:
        return {"samples": torch.zeros(shape)}
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def vae(channels: int = 4, seed: int = 3) -> comfy.sd.VAE:
    """A VAE of the usual autoencoder, eight pixels to a cell."""
    shape = dict(
        double_z=True, z_channels=channels, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1, 1],
        num_res_blocks=1, attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    weights = AutoencoderKL(ddconfig=dict(shape), embed_dim=channels)
    initialise(weights, seed)
    made = comfy.sd.VAE(sd=weights.state_dict(), config={"params": {"ddconfig": shape, "embed_dim": channels}})
    made.latent_channels = channels
    return made
