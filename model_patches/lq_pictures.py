"""Damaged pictures for a VAE that knows videos: the sampled latent tells whether they are the frames of one video or separate pictures."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .host_vae import latent_frames, video_pictures

if TYPE_CHECKING:
    from comfy.sd import VAE

# How pictures are encoded for so many latent frames.
Encoding = Callable[[int], Tensor]


def encoded_pictures(vae: "VAE", pictures: Tensor, encode: Callable[[Tensor], Tensor], node: str) -> tuple[Tensor, Encoding | None]:
    """Encode pictures now as they are most likely meant, and tell how to encode them for another number of latent frames.

    Args:
        vae: the user's.
        pictures: (N, H, W, 3) in 0..1.
        encode: gives (N, C, h, w), or (1, C, T, h, w) where the VAE takes them for one video.
        node: whom messages name.

    Returns:
        what is encoded, and None where that is all there is. The other gives (N, C, 1, h, w) for one latent frame, and raises a ValueError
        for a video of another length.
    """
    def encoded(pictures: Tensor) -> Tensor:
        latents = encode(pictures)
        if not latents.isfinite().all():
            raise ValueError(f"{node}: 'vae' gives NaN or infinite values. Run it in a higher precision (start ComfyUI with --fp32-vae).")
        return latents

    if video_pictures(vae, 2) == 2:  # it knows pictures only
        return encoded(pictures), None
    count = len(pictures)

    @cache
    def singly() -> Tensor:
        return torch.cat([encoded(picture) for picture in pictures.split(1)])

    def again(frames: int) -> Tensor:
        if frames == 1:
            return singly()
        raise ValueError(f"{node}: 'degraded' holds {count} and the latent is a video of {video_pictures(vae, frames)} pictures. "
                         "Give every frame of it.")

    return singly() if latent_frames(vae, count) == 1 else encoded(pictures), again
