"""A photograph under a panning camera, through a tiny WAN of random weights under a prompt: what windows do to a video on the bridge.

Every frame of the clip is a latent frame of its own, made by the lab's VAE of pictures; from WAN's VAE as many would be 129 frames of video.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models

from ...lab.photographs import evaluation_photograph
from ...lab.prior import load_lab_prior
from ...model_patches.learned_prompt import LearnedPrompt, new_prompt
from ...model_patches.learned_prompt_patch import attach_prompt
from ...samplers.bridge import Bridge, bridge_sigmas

FRAMES, SIDE, SHIFT, STEPS = 33, 64, 8, 8
# In frames of a video with four to a latent frame: 17 latent frames, of which neighbours share 8.
WINDOW, OVERLAP = 65, 32
LENGTH, SHARED = 17, 8
TOKENS, ALPHA = 7, 0.5
# A network of random weights takes no noise away: as much as this leaves the picture to be seen.
NOISE = 0.02
# Pixels to a cell of the lab's latents, which is how far the camera goes in a frame.
CELL = 8
TINY_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 96, "num_heads": 4, "ffn_dim": 192, "num_layers": 3, "freq_dim": 32, "text_dim": 40, "in_dim": 16,
    "out_dim": 16, "patch_size": (1, 2, 2), "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip


def tiny_wan() -> comfy.model_patcher.ModelPatcher:
    """The host's text-to-video network with seeded random weights."""
    config = comfy.supported_models.WAN21_T2V(dict(TINY_WAN))
    config.set_inference_dtype(torch.float32, None)
    model, generator = comfy.model_base.WAN21(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.diffusion_model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else torch.ones_like(p) if name.endswith("weight") else 0.01 * noise)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def prompted(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone under a seeded prompt whose alphas are as large as trained ones become."""
    patched, made = model.clone(), new_prompt(model.model, TOKENS)
    prompt = LearnedPrompt(made.tensors["prompts"], torch.full_like(made.tensors["alphas"], ALPHA))
    attach_prompt(patched, prompt)
    return patched


def moving_noise(channels: int) -> Tensor:
    """(1, channels, FRAMES, SIDE / CELL, SIDE / CELL): a little noise that moves with what the camera sees, and so is no difference of frames."""
    side, step = SIDE // CELL, SHIFT // CELL
    field = NOISE * torch.randn(1, channels, side, side + step * (FRAMES - 1), generator=torch.Generator().manual_seed(2))
    return torch.stack([field[..., step * frame:step * frame + side] for frame in range(FRAMES)], 2)


def clip() -> Tensor:
    """(FRAMES, SIDE, SIDE, 3) in 0..1: a window that moves SHIFT pixels a frame over a photograph."""
    length = SIDE + SHIFT * (FRAMES - 1)
    photograph = evaluation_photograph("coffee", length).permute(1, 2, 0)
    top = (length - SIDE) // 2
    return torch.stack([photograph[top:top + SIDE, SHIFT * frame:SHIFT * frame + SIDE] for frame in range(FRAMES)])


def consistency(frames: Tensor) -> Tensor:
    """PSNR in dB of each frame with the one before it after undoing the pan, (FRAMES - 1,)."""
    error = (frames[1:, :, :-SHIFT] - frames[:-1, :, SHIFT:]).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()


def joins() -> list[int]:
    """Frames before which a window begins or after which one ends."""
    starts = [*range(0, FRAMES - LENGTH, LENGTH - SHARED), FRAMES - LENGTH]
    return sorted({start for start in starts if start} | {start + LENGTH for start in starts if start + LENGTH < FRAMES})


@torch.no_grad()
def video_rows() -> list[dict[str, Any]]:
    """The clip as a whole, by windows, and frame by frame, under one prompt and noise: what differs is what the model says.

    jump_at_joins and jump_elsewhere: how much the difference from the whole clip changes from one frame to the next, in thousandths of a latent.
    """
    vae, model = load_lab_prior("dit")[2], prompted(tiny_wan())
    raw = torch.cat([vae.encode(frame[None]) for frame in clip()]).movedim(0, 1)[None]
    calls: list[int] = []

    def count(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        calls.append(given["input"].shape[2])
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(count)
    text = [[torch.randn(1, 7, TINY_WAN["text_dim"], generator=torch.Generator().manual_seed(1)), {}]]
    sigmas, noise = bridge_sigmas(model.get_model_object("model_sampling"), steps=STEPS), moving_noise(raw.shape[1])

    def walk(latent: Tensor, noise: Tensor, bridge: Bridge) -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample_custom(model, noise, 1.0, bridge.sampler(), sigmas, text, text, latent, disable_pbar=True)

    ways = {
        "whole clip": lambda: walk(raw, noise, Bridge()),
        "windows": lambda: walk(raw, noise, Bridge(window=WINDOW, overlap=OVERLAP)),
        "windows without overlap": lambda: walk(raw, noise, Bridge(window=WINDOW, overlap=0)),
        "frame by frame": lambda: torch.cat([walk(*frame, Bridge()) for frame in zip(raw.split(1, 2), noise.split(1, 2))], 2),
    }
    rows, whole, places = [], torch.empty(0), torch.tensor(joins()) - 1
    apart = torch.ones(FRAMES - 1, dtype=torch.bool).index_fill(0, places, False)
    for name, restore in ways.items():
        calls.clear()
        begun = time.process_time()
        found = restore()
        seconds = time.process_time() - begun
        whole = found if not rows else whole
        frames = torch.cat([vae.decode(frame) for frame in found[0].movedim(1, 0).split(1)]).reshape(FRAMES, SIDE, SIDE, 3)
        jumps = 1000 * (found - whole).diff(dim=2).square().mean((0, 1, 3, 4)).sqrt()
        rows.append({"way": name, "frames": found.shape[2], "psnr": float(consistency(frames).mean()), "jump_at_joins": float(jumps[places].mean()),
                     "jump_elsewhere": float(jumps[apart].mean()), "model_calls": len(calls), "seconds": seconds})  # fmt: skip
    return rows
