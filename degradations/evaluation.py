"""The four degradations of the zero-shot evaluation. They are fixed: every benchmark reuses them unchanged."""

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("noise", "lowlight", "haze", "grey")
REC709 = (0.2126, 0.7152, 0.0722)


def degrade(image: Tensor, name: str, seed: int = 0) -> Tensor:
    """Damage pictures the way the evaluation does.

    Args:
        image: (B, H, W, 3) in 0..1.
        name: one of NAMES.
        seed: fixes the noise and the haze's depth; picture b of a batch uses seed + b.

    Returns:
        (B, H, W, 3) in 0..1.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _OPERATORS:
        raise ValueError(f"unknown degradation {name!r}; choose one of {', '.join(NAMES)}")
    rows = [_OPERATORS[name](picture, torch.Generator().manual_seed(seed + index)) for index, picture in enumerate(image)]
    return torch.stack(rows).clamp(0, 1)


def _normal(image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(image.shape, generator=generator).to(image)


def _noise(image: Tensor, generator: torch.Generator) -> Tensor:
    return image + 50 / 255 * _normal(image, generator)


def _lowlight(image: Tensor, generator: torch.Generator) -> Tensor:
    return 0.25 * image**2.2 + 5 / 255 * _normal(image, generator)


def _haze(image: Tensor, generator: torch.Generator) -> Tensor:
    """Atmospheric scattering J t + A (1 - t), t = exp(-1.2 d): d falls from top to bottom and wavers smoothly."""
    height, width = image.shape[:2]
    ramp = torch.linspace(1, 0, height)[:, None].expand(height, width)
    coarse = torch.randn(1, 1, 5, 5, generator=generator)
    waver = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0, 0]
    depth = (ramp + 0.15 * waver).clamp(0, 1.5)
    transmission = torch.exp(-1.2 * depth).to(image)[..., None]
    return image * transmission + 0.85 * (1 - transmission)


def _grey(image: Tensor, generator: torch.Generator) -> Tensor:
    return (image * image.new_tensor(REC709)).sum(-1, keepdim=True).expand_as(image)


_OPERATORS = {"noise": _noise, "lowlight": _lowlight, "haze": _haze, "grey": _grey}
