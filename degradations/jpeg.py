"""JPEG compression that gradients can pass through."""

import torch
from torch import Tensor


def compress(pictures: Tensor, quality: float = 30.0) -> Tensor:
    """Encode and decode (B, H, W, 3) in 0..1 at a quality of 1..100, with half the colour resolution.

    kornia's codec (Reich et al., arXiv 2309.06978) replaces rounding by a cubic that gradients can pass; the file itself is not made.
    """
    from kornia.enhance import jpeg_codec_differentiable

    planes = pictures.clamp(0, 1).movedim(-1, 1).contiguous()
    return jpeg_codec_differentiable(planes, torch.tensor([float(quality)]).to(planes)).movedim(1, -1).clamp(0, 1)
