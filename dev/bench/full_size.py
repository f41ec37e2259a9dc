"""The host's full-size denoisers on meta tensors: shapes and operations without a single weight, and how they are counted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import comfy.ops
from comfy.latent_formats import SD3, SDXL, Flux
from comfy.ldm.flux.model import Flux as FluxNetwork
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from . import report

META = {"dtype": torch.float16, "device": "meta", "operations": comfy.ops.manual_cast}
SDXL_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential", "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "num_head_channels": 64, "num_heads": -1, "legacy": False, "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SD15_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768, "adm_in_channels": None, "use_spatial_transformer": True, "use_linear_in_transformer": False, "num_heads": 8,
    "legacy": False, "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
# SD's and SDXL's AutoencoderKL.
SD_VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
SD3_MEDIUM = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 24, "input_size": None, "adm_in_channels": 2048, "qk_norm": None,
    "pos_embed_max_size": 192, "num_patches": 192 * 192, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}  # fmt: skip
FLUX_1 = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip


class Model(nn.Module):
    """What the pack reads of a host model: its denoiser and its latent format."""

    def __init__(self, diffusion_model: nn.Module, latent_format: object) -> None:
        super().__init__()
        self.diffusion_model, self.latent_format = diffusion_model, latent_format


@dataclass(frozen=True)
class FullSize:
    """A denoiser and how to call it.

    Attributes:
        build: returns it on meta tensors.
        inputs: latents (1, C, h, w) -> the other arguments of a call.
    """

    build: Callable[[], Model]
    channels: int
    inputs: Callable[[], dict[str, Tensor]]

    def latent(self, pixels: int) -> Tensor:
        """Latents of a square picture."""
        return empty(1, self.channels, pixels // 8, pixels // 8)


def empty(*shape: int) -> Tensor:
    """A half-precision tensor without values."""
    return torch.empty(shape, device="meta", dtype=torch.float16)


FULL_SIZE = {
    "SD1.5": FullSize(lambda: Model(UNetModel(**SD15_UNET, **META), SDXL()), 4, lambda: {"context": empty(1, 77, 768)}),
    "SDXL": FullSize(lambda: Model(UNetModel(**SDXL_UNET, **META), SDXL()), 4, lambda: {"context": empty(1, 77, 2048), "y": empty(1, 2816)}),
    "SD3 medium": FullSize(lambda: Model(OpenAISignatureMMDITWrapper(**SD3_MEDIUM, **META), SD3()), 16,
                           lambda: {"context": empty(1, 154, 4096), "y": empty(1, 2048)}),
    "FLUX.1": FullSize(lambda: Model(FluxNetwork(**FLUX_1, **META), Flux()), 16,
                       lambda: {"context": empty(1, 512, 4096), "y": empty(1, 768), "guidance": empty(1)}),
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    """Count them."""
    return sum(p.numel() for p in module.parameters())


def macs(run: Any) -> float:
    """Multiplications and additions of a call, in pairs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 2


def count_command(name: str, description: str, introduction: str, quick: list[str], measure: Callable[[list[str]], list[dict[str, Any]]],
                  table: Callable[[list[dict[str, Any]]], str]) -> None:
    """Run a command that counts: print its table and write it into docs/evidence.md.

    Args:
        name: of the command, and of its section.
        description: for --help.
        introduction: of the section.
        quick: the models of a quick run; otherwise all of FULL_SIZE.
        measure: names of models -> rows.
        table: rows -> Markdown.
    """
    parser = argparse.ArgumentParser(prog=f"python dev bench {name}", description=description)
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(quick)} only, and leave docs/evidence.md alone")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    rows = measure(quick if arguments.quick else list(FULL_SIZE))
    report.say(table(rows))
    if not arguments.quick:
        report.write_section(name, f"{introduction}\n{table(rows)}")
    if arguments.json:
        report.say(json.dumps({"rows": rows}))
