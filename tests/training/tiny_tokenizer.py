"""A tokenizer small enough for tests, and charts for it."""

import torch

from mend.degradations.scales import recipe_of
from mend.degradations.visual_ground import visual_ground
from mend.model_patches.degradation_tokenizer import Size
from mend.training.degradation_tokenizer import new_tokenizer
from mend.training.trainee import Batch

TINY = Size(patch=4, widths=(16, 16), blocks=1, codes=32, width=16, chart=32, critic=(16, 16), critic_start=2)


def tokenizer(monkeypatch, **config):
    """Fresh weights of a size that only tests know."""
    from mend.model_patches import degradation_tokenizer

    monkeypatch.setitem(degradation_tokenizer.SIZES, "tiny", TINY)
    return new_tokenizer({"size": "tiny", **config})


def charts(count=2, kind="gaussian noise", place=3.0, size=TINY.chart):
    """Clean and degraded ones."""
    clean = torch.cat([visual_ground(seed, size) for seed in range(count)])
    return clean, recipe_of({kind: place}).apply(clean, 1)[0]


def batch(count=2):
    """Charts, and pictures that are charts too."""
    clean, degraded = charts(count)
    return Batch(clean, degraded, ("",) * count, ("noisy",) * count, clean, degraded)
