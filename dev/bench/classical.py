"""What a user could do without any model: auto-levels and non-local means."""

import numpy as np
import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor

from ...samplers.grain import noise_level


def auto_levels(image: Tensor) -> Tensor:
    """Per-channel percentile stretch (0.5 % to 99.5 %), as image editors do; (1, H, W, 3) in 0..1."""
    flat = image.reshape(-1, 3)
    low, high = torch.quantile(flat, 0.005, dim=0), torch.quantile(flat, 0.995, dim=0)
    return ((image - low) / (high - low).clamp(min=1e-3)).clamp(0, 1)


def non_local_means(image: Tensor) -> Tensor:
    """scikit-image's fast non-local means at the strength that the measured noise suggests; (1, H, W, 3) in 0..1."""
    sigma = noise_level(image.movedim(-1, 1))
    mended = denoise_nl_means(image[0].numpy(), h=0.8 * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True, channel_axis=-1)
    return torch.from_numpy(mended.astype(np.float32))[None].clamp(0, 1)
