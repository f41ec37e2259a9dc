"""Paired data: good pictures with degraded ones, cut out, mirrored and damaged as a generator says."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..degradations.recipe import Recipe
from ..degradations.seeding import uniform
from .charts import charts, stacked
from .decoding import UnreadableError
from .screening import screen
from .sources import NODE, Sample, Source
from .trainee import Batch, Pair

log = logging.getLogger(__name__)

MULTIPLE = 16
LEAST_TO_HOLD_OUT, LARGEST_SHARE_HELD_OUT = 10, 10
VALIDATION_SEED = 2507
VERSION = 1


@dataclass(frozen=True)
class Draw:
    """All that is random in a pair, drawn before a picture is read, so that it does not depend on the picture.

    Attributes:
        down, right: place of the crop, 0..1.
        mirror: below 0.5 the picture is mirrored, if it may be.
        recipe: which recipe, 0..1.
        seed: of the recipe.
    """

    down: float
    right: float
    mirror: float
    recipe: float
    seed: int

    @classmethod
    def of(cls, generator: torch.Generator) -> "Draw":
        """Always draw the same number of random numbers."""
        places = [uniform(generator, 0, 1) for _ in range(4)]
        return cls(*places, int(torch.randint(2**63 - 1, (), generator=generator)))


class Pairs:
    """Pictures of a source as pairs for training and validation; they are read when asked for.

    Held out for validation are pictures that a hash of their names picks, at most a tenth. Of fewer than ten none is held out, and those
    that are trained on also validate. `pair` and `validation` may be called from several threads.

    Args:
        source: where the pictures come from.
        recipes: degradations for pictures that have no degraded partner; each sample draws one of them.
        crop: side of the square that is cut out, in pixels; a multiple of 16.
        flip: mirror half of the samples.
        held_out: how many pictures are held out at most.

    Raises:
        ValueError: when a recipe is needed and missing, a setting is out of range, or no picture can be used.
    """

    def __init__(self, source: Source, recipes: Sequence[Recipe] = (), crop: int = 256, flip: bool = True, held_out: int = 8) -> None:
        _check(source, recipes, crop, held_out)
        samples, self.left_out = screen(source, crop)
        self.place, self.recipes, self.crop, self.flip = source.place, tuple(recipes), crop, flip
        self.training, self.held_out = _split(samples, held_out)
        self.chart_side = 0
        if recipes:
            import kornia  # noqa: F401 - here, since threads that import it at the same time can meet it half made
        self._named: set[str] = set()
        if not self.held_out:
            log.info("%s: no picture is held out; validation uses training pictures (%s).", NODE, self.place)
        if recipes and all(sample.degraded for sample in samples):
            log.warning("%s: degradations are not used: every picture in %s has a degraded one already.", NODE, self.place)

    def __len__(self) -> int:
        """Return how many pictures are trained on."""
        return len(self.training)

    @property
    def validation_count(self) -> int:
        """Return how many different pairs `validation` has."""
        return len(self.held_out or self.training)

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """Return a sample; the same state of the generator gives the same bits.

        Args:
            index: of the picture, counted around. Where it cannot be read the next one that can takes its place.
            generator: decides crop, mirroring and degradation; the same count of numbers is drawn whatever happens.

        Raises:
            ValueError: when no picture can be read any more.
        """
        draw = Draw.of(generator)
        return self._first_readable(self.training, index, lambda sample: self._cut(sample, draw, self.flip))

    def validation(self, index: int) -> Pair:
        """Return a pair for validation, always the same: the centre of a picture, by recipes in turn, with a seed of its own.

        Raises:
            ValueError: when no picture can be read any more.
        """
        recipes = max(1, len(self.recipes))
        draw = Draw(0.5, 0.5, 1.0, (index % recipes + 0.5) / recipes, VALIDATION_SEED + index)
        return self._first_readable(self.held_out or self.training, index, lambda sample: self._cut(sample, draw, False))

    def fingerprint(self) -> str:
        """Return a digest of names, lengths and captions of all pictures and of all settings, but not of where the pictures lie."""
        pictures = [
            [sample.name, sample.good.stamp(), sample.degraded.stamp() if sample.degraded else None, sample.caption]
            for sample in [*self.training, *self.held_out]
        ]
        recipes = [recipe.to_json() for recipe in self.recipes]
        settings = {"crop": self.crop, "flip": self.flip, "held_out": len(self.held_out), "recipes": recipes}
        content = {"version": VERSION, "settings": settings, "pictures": pictures}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def with_charts(self, side: int) -> "Pairs":
        """Return the same pairs, each with a test chart of that side in pixels, and the chart after what happens to the picture.

        Raises:
            ValueError: when pictures have degraded partners, whose degradation nobody can do to a chart.
        """
        partners = sum(sample.degraded is not None for sample in [*self.training, *self.held_out])
        if partners:
            raise ValueError(f"{NODE}: {partners} pictures in {self.place} come with degraded ones, and how those were degraded cannot be "
                             "shown on a test chart. Give good pictures alone, and connect degradations.")
        charted = copy.copy(self)
        charted.chart_side = side
        return charted

    def summary(self) -> str:
        """Return counts in words, a line each."""
        captions = sum(bool(sample.caption) for sample in [*self.training, *self.held_out])
        held_out = f"{len(self.held_out)} held out for validation" if self.held_out else "none held out: validation uses training pictures"
        lines = [f"{_counted(len(self.training), 'picture')} to train on, {held_out}", f"{captions} with a caption"]
        lines += [entry.text() for entry in self.left_out]
        return "\n".join([*lines, *([f"{_counted(len(self.recipes), 'recipe')} of degradations"] if self.recipes else [])])

    @staticmethod
    def collate(pairs: Sequence[Pair]) -> Batch:
        """Make one batch; see `collate`."""
        return collate(pairs)

    def _first_readable(self, samples: Sequence[Sample], index: int, cut: Callable[[Sample], Pair]) -> Pair:
        for step in range(len(samples)):
            sample = samples[(index + step) % len(samples)]
            try:
                return cut(sample)
            except UnreadableError as error:
                self._warn(sample, error)
        raise ValueError(f"{NODE}: none of the {len(samples)} pictures in {self.place} can be read any more. The log says why.")

    def _warn(self, sample: Sample, error: UnreadableError) -> None:
        if sample.name not in self._named:
            self._named.add(sample.name)
            log.warning("%s: %s in %s cannot be read (%s); the next picture takes its place.", NODE, sample.name, self.place, error)

    def _cut(self, sample: Sample, draw: Draw, flip: bool) -> Pair:
        clean = sample.good.pixels()
        degraded = sample.degraded.pixels() if sample.degraded else clean
        if clean.shape != degraded.shape or min(clean.shape[:2]) < self.crop:
            raise UnreadableError(f"it is {_size(clean)} pixels now, its degraded picture {_size(degraded)}, and the crop {self.crop}")
        # The host runs nodes in inference mode, whose tensors no later training step could use.
        with torch.inference_mode(False), torch.no_grad():
            target = _window(clean, draw, self.crop, flip)
            if sample.degraded:
                return Pair(target, _window(degraded, draw, self.crop, flip), sample.caption)
            recipe = self.recipes[int(draw.recipe * len(self.recipes))]
            damaged, words = recipe.apply(target[None], draw.seed)
            pair = Pair(target, damaged[0], sample.caption, ", ".join(words))
            if not self.chart_side:
                return pair
            chart, damaged, other = charts(recipe, self.recipes, draw.seed, self.chart_side)
            return replace(pair, chart=chart, degraded_chart=damaged, other_chart=other)


def collate(pairs: Sequence[Pair]) -> Batch:
    """Put pairs of one size into a batch, in their order."""
    with torch.inference_mode(False), torch.no_grad():
        return Batch(
            torch.stack([pair.clean for pair in pairs]), torch.stack([pair.degraded for pair in pairs]),
            tuple(pair.caption for pair in pairs), tuple(pair.words for pair in pairs),
            stacked([pair.chart for pair in pairs]), stacked([pair.degraded_chart for pair in pairs]),
            stacked([pair.other_chart for pair in pairs]),
        )  # fmt: skip


def preview(pairs: Pairs, count: int = 4) -> Tensor:
    """Return (at most count, crop, 2 * crop, 3) in 0..1: samples from all over the source, the degraded picture left of the good one."""
    count = min(count, len(pairs))
    samples = [pairs.pair(place * len(pairs) // count, torch.Generator().manual_seed(place)) for place in range(count)]
    return torch.stack([torch.cat([pair.degraded, pair.clean], 1) for pair in samples])


def _check(source: Source, recipes: Sequence[Recipe], crop: int, held_out: int) -> None:
    if crop < MULTIPLE or crop % MULTIPLE:
        raise ValueError(f"{NODE}: crop is {crop}; it has to be a multiple of {MULTIPLE}.")
    if held_out < 0:
        raise ValueError(f"{NODE}: held_out is {held_out}; it has to be 0 or more.")
    if not recipes and not all(sample.degraded for sample in source.samples):
        raise ValueError(f"{NODE}: degradations is not connected, and {source.place} has good pictures without degraded ones. Connect the "
                         f"degradation output of Degrade Image or Real-ESRGAN Degradation, or give degraded pictures too.")  # fmt: skip


def _split(samples: Sequence[Sample], held_out: int) -> tuple[list[Sample], list[Sample]]:
    """Return what is trained on and what is held out, both in the given order."""
    count = 0 if len(samples) < LEAST_TO_HOLD_OUT else min(held_out, len(samples) // LARGEST_SHARE_HELD_OUT)
    by_hash = sorted(samples, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())
    chosen = {sample.name for sample in by_hash[len(by_hash) - count:]}
    return [sample for sample in samples if sample.name not in chosen], [sample for sample in samples if sample.name in chosen]


def _window(pixels: np.ndarray, draw: Draw, crop: int, flip: bool) -> Tensor:
    """Cut (crop, crop, 3) in 0..1 out of a picture."""
    top, left = (int(place * (side - crop + 1)) for place, side in zip((draw.down, draw.right), pixels.shape[:2], strict=True))
    window = pixels[top:top + crop, left:left + crop]
    if flip and draw.mirror < 0.5:
        window = window[:, ::-1]
    white = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    return torch.from_numpy(np.array(window, np.float32, order="C")).div_(white).clamp_(0, 1)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
