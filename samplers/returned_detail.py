"""Fine detail that a VAE drops, given back to a restored picture from the picture that was encoded; grain stays behind.

    x' = x + strength * w * (g - D(E(g))),    w = max(0, 1 - (TRUST s)^2 / mean square of the difference nearby)

x is the restored picture, g the one that was encoded, s its grain: a Wiener filter on what coding alone took away. Where the difference is
no larger than grain explains, nothing comes back; what the model itself has changed stays changed.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_patches.framing import frame_pictures, unframe_pictures
from .grain import grain_of

if TYPE_CHECKING:
    from comfy.sd import VAE

NODE = "Return Detail"
# Pixels to each side over which the difference is averaged, and how far above the measured grain detail has to stand: grain that coding
# kept in part, or that is coarser than the measure sees, shall not come back.
RADIUS = 4
TRUST = 1.5


def returned_detail(restored: Tensor, start: Tensor, coded: Tensor, strength: float = 1.0, grain: float = 0.0) -> Tensor:
    """Return the restored picture with the detail that coding dropped.

    Args:
        restored: (1, H, W, 3) in 0..1.
        start: (1, H, W, 3), the picture whose latent sampling began at.
        coded: (1, H, W, 3), the same through the VAE and back.
        strength: of what is given back; 0 returns `restored`.
        grain: deviation of the noise in `start`, 0..1; 0 measures it.
    """
    dropped = (start - coded).movedim(-1, 1)
    floor = (TRUST * (grain or grain_of(start.movedim(-1, 1)).deviation)) ** 2
    energy = F.avg_pool2d(dropped.square().mean(1, keepdim=True), 2 * RADIUS + 1, 1, RADIUS, count_include_pad=False)
    weight = torch.where(energy > floor, 1 - floor / energy.clamp(min=1e-12), 0.0)
    return (restored + strength * (weight * dropped).movedim(1, -1)).clamp(0, 1)


def coded(vae: "VAE", picture: Tensor) -> Tensor:
    """Return what (1, H, W, 3) in 0..1 is after the VAE and back, in its own size."""
    framed, frame = frame_pictures(picture, multiple=vae.spacial_compression_encode(), node=NODE, name="start")
    decoded = vae.decode(vae.encode(framed))
    return unframe_pictures(decoded.reshape(-1, *decoded.shape[-3:])[:1].float().clamp(0, 1), frame, NODE)
