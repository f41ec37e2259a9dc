"""Test charts that went through what a sample's picture went through: what visual instructions are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..degradations.operators import OPERATORS
from ..degradations.recipe import REAL_ESRGAN, Recipe
from .seeding import mixed

REAL_ESRGAN_WORDS = ("blurry", "noisy", "compressed", "low resolution")
# What a degradation leaves beside what it is named for: dark exposures are noisy too.
ASIDE = {"low light": ("noisy",)}


def charts(recipe: Recipe, recipes: Sequence[Recipe], seed: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chart, the same chart degraded, and once more degraded by something else, all (side, side, 3) in 0..1.

    Its layout is drawn from the seed too. Its noise, rain and depth are others than the picture's, as they are when somebody restores: with
    the same ones a model could read the picture's noise off the chart. Only where the seed decides how strong the damage is do both share
    it.

    Args:
        recipe: of the sample.
        recipes: among which one that has nothing in common with it is drawn for the third; the clean chart stands for it where there is
            none.
        seed: that the recipe was applied to the sample with.
        side: of the chart, in pixels.
    """
    from ..degradations.visual_ground import visual_ground

    chart = visual_ground(mixed(seed, "chart"), side).reshape(1, side, side, 3)
    drawn = any(step.kind == REAL_ESRGAN for step in recipe.steps)
    damaged, _ = recipe.apply(chart, seed if drawn else mixed(seed, "chart damage"))
    others = [other for other in recipes if not _words(other) & _words(recipe)]
    number = mixed(seed, "other chart")
    other = others[number % len(others)].apply(chart, number)[0] if others else chart
    return chart[0], damaged[0], other[0]


def stacked(rows: list[Tensor | None]) -> Tensor | None:
    """Put charts into a batch; None where there are none."""
    return None if any(row is None for row in rows) else torch.stack(rows)


def _words(recipe: Recipe) -> set[str]:
    """All words that a recipe's degradations may leave, or that would be true of what they leave."""
    return {word for step in recipe.steps for word in (*_named(step.kind), *ASIDE.get(step.kind, ()))}


def _named(kind: str) -> tuple[str, ...]:
    return REAL_ESRGAN_WORDS if kind == REAL_ESRGAN else OPERATORS[kind].words
