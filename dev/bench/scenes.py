"""The evaluation photographs as scenes, and the figures that every benchmark prints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import piq
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from ...degradations.evaluation import degrade
from ...lab.photographs import evaluation_photograph

# The motorcycle pair shows one scene from two sides: its figures are averaged and count once.
SCENES = {"coffee": ("coffee",), "china": ("china",), "flower": ("flower",), "motorcycle": ("motorcycle_left", "motorcycle_right")}
# What somebody would type who looks at the damaged picture and knows the lab's words: subject, colours, light under normal conditions.
CAPTIONS = {
    "coffee": "orange brown red warm round subject-centre detailed",
    "china": "bright white red blue detailed subject-centre top-light symmetric",
    "flower": "orange yellow green vivid warm round subject-centre detailed",
    "motorcycle": "grey brown red balanced detailed crowded subject-centre",
}


@dataclass(frozen=True)
class Case:
    """One damaged photograph.

    Attributes:
        clean, degraded: (1, H, W, 3) in 0..1.
        caption: words for the prompt.
    """

    clean: Tensor
    degraded: Tensor
    caption: str


@lru_cache(maxsize=64)
def cases(scene: str, degradation: str, seed: int) -> tuple[Case, ...]:
    """Return the photographs of a scene under one of the four fixed degradations, as 8-bit files would hold them."""
    made = []
    for name in SCENES[scene]:
        clean = evaluation_photograph(name).permute(1, 2, 0)[None]
        made.append(Case(clean, eight_bit(degrade(clean, degradation, seed)), CAPTIONS[scene]))
    return tuple(made)


def eight_bit(image: Tensor) -> Tensor:
    """Round to the 256 values of a saved file."""
    return (image.clamp(0, 1) * 255).round() / 255


def figures(image: Tensor, clean: Tensor) -> dict[str, float]:
    """Return PSNR (dB), SSIM and HaarPSI of (1, H, W, 3) pictures in 0..1."""
    image = eight_bit(image.detach())
    error = (image - clean).square().mean().item()
    a, b = image.movedim(-1, 1), clean.movedim(-1, 1)
    return {
        "psnr": -10 * float(np.log10(max(error, 1e-12))),
        "ssim": float(structural_similarity(image[0].numpy(), clean[0].numpy(), channel_axis=-1, data_range=1.0)),
        "haarpsi": float(piq.haarpsi(a, b, data_range=1.0)),
    }


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Average dictionaries of numbers key by key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} if rows else {}


def over_scenes(one: Callable[[str, int], dict[str, float]], scenes: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Average one(photograph, seed) over scenes and seeds; the motorcycle pair is one scene. `psnr_std` is the deviation over scenes."""
    begun = time.monotonic()
    of_scene = [[one(name, seed) for name in SCENES[scene] for seed in seeds] for scene in scenes]
    rows, count = [mean(found) for found in of_scene], sum(map(len, of_scene))
    spread = torch.tensor([row["psnr"] for row in rows]).std(unbiased=False).item()
    return {**mean(rows), "psnr_std": spread, "seconds": (time.monotonic() - begun) / count, "n": len(scenes), "seeds": len(seeds)}


def seeded(seed: int) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)
