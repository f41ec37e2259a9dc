"""Degradations one after another, as data: what a chain of nodes stands for, and what training does to its pictures."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import limits, operators, real_esrgan, resizing
from .operators import Words

REAL_ESRGAN = "real-esrgan"
KINDS = (*operators.OPERATORS, REAL_ESRGAN)
Setting = bool | int | float | str
# What is not a setting but comes with each picture. A recipe lets haze make up its depth.
NOT_SETTINGS = ("pictures", "generators", "depth", "seed")


@dataclass(frozen=True)
class Step:
    """One degradation.

    Attributes:
        kind: one of KINDS.
        settings: all settings of that kind, sorted by name.
    """

    kind: str
    settings: tuple[tuple[str, Setting], ...]

    @classmethod
    def of(cls, kind: str, settings: Mapping[str, Any]) -> "Step":
        """Check settings and fill in those that are not given.

        Raises:
            ValueError: for an unknown kind or setting, or a value of the wrong type or out of range.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown degradation {kind!r}; choose one of {', '.join(KINDS)}")
        known = defaults(kind)
        unknown = sorted(settings.keys() - known.keys())
        if unknown:
            raise ValueError(f"the degradation {kind!r} has no setting {unknown[0]!r}; it has {', '.join(known)}")
        full = {**known, **settings}
        return cls(kind, tuple((name, _checked(kind, name, full[name], known[name])) for name in sorted(known)))

    def apply(self, pictures: Tensor, seed: int) -> tuple[Tensor, Words]:
        """Damage (B, H, W, 3) in 0..1; picture b uses seed + b, and a step that does not keep the size leaves it smaller."""
        settings = dict(self.settings)
        if self.kind != REAL_ESRGAN:
            return operators.degrade(pictures, self.kind, seed, **settings)
        keep_size = settings.pop("keep_size")
        degraded, words = real_esrgan.degrade(pictures, seed=seed, **settings)
        return enlarged(degraded, pictures) if keep_size else degraded, words


@dataclass(frozen=True)
class Recipe:
    """Steps in the order in which they happen. None leave a picture as it is."""

    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> "Recipe":
        """Return this recipe with one more step."""
        return Recipe((*self.steps, step))

    def apply(self, pictures: Tensor, seed: int) -> tuple[Tensor, Words]:
        """Damage pictures.

        Args:
            pictures: (B, H, W, 3) in 0..1.
            seed: fixes everything random. Picture b of a batch is what it would be alone with seed + b, bit for bit.

        Returns:
            (B, H, W, 3) in 0..1, enlarged bicubic if a step has left it smaller, and the words that describe it, each once.
        """
        rows, words = zip(*(self._one(picture[None], seed + index) for index, picture in enumerate(pictures)), strict=True)
        return torch.cat(rows), tuple(dict.fromkeys(word for row in words for word in row))

    def to_json(self) -> list[dict[str, Setting]]:
        """Return plain JSON: [{"kind": "jpeg", "quality": 30.0}, ...], with every setting spelt out."""
        return [{"kind": step.kind, **dict(step.settings)} for step in self.steps]

    @classmethod
    def from_json(cls, value: Any) -> "Recipe":
        """Read what `to_json` returned, or a string of it; settings that are missing have their defaults.

        Raises:
            ValueError: naming the step and what is wrong with it.
        """
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"a recipe of degradations is not JSON: {error}") from error
        if not isinstance(value, list):
            raise ValueError(f'a recipe of degradations has to be a list of steps such as {{"kind": "jpeg", "quality": 30}}, not {value!r}')
        return cls(tuple(_step(position, given) for position, given in enumerate(value, 1)))

    def _one(self, picture: Tensor, seed: int) -> tuple[Tensor, Words]:
        degraded, said = picture, ()
        for position, step in enumerate(self.steps):
            degraded, words = step.apply(degraded, _step_seed(seed, position))
            said += words
        return enlarged(degraded, picture), said


def enlarged(degraded: Tensor, pictures: Tensor) -> Tensor:
    """Bring degraded pictures back to the size of the given ones, bicubic, as diffusion restorers want it."""
    return resizing.resize(degraded, (pictures.shape[1], pictures.shape[2]), "bicubic").clamp(0, 1)


def defaults(kind: str) -> dict[str, Setting]:
    """Return the settings of a kind by name, at what they are where nothing else is said."""
    apply = real_esrgan.degrade if kind == REAL_ESRGAN else operators.OPERATORS[kind].apply
    found = {name: entry.default for name, entry in inspect.signature(apply).parameters.items() if name not in NOT_SETTINGS}
    return {**found, "keep_size": True} if kind == REAL_ESRGAN else found


def _step(position: int, given: Any) -> Step:
    if not isinstance(given, dict) or not isinstance(given.get("kind"), str):
        raise ValueError(f'step {position} of a recipe has to be an object such as {{"kind": "jpeg", "quality": 30}}, not {given!r}')
    try:
        return Step.of(given["kind"], {name: value for name, value in given.items() if name != "kind"})
    except ValueError as error:
        raise ValueError(f"step {position} of a recipe: {error}") from error


def _checked(kind: str, name: str, value: Any, default: Setting) -> Setting:
    where = f"{name} of the degradation {kind!r}"
    if isinstance(default, (bool, str)):
        if name in limits.OPTIONS and value not in limits.OPTIONS[name]:
            raise ValueError(f"{where} is {value!r}; choose one of {', '.join(limits.OPTIONS[name])}")
        if not isinstance(value, type(default)):
            raise ValueError(f"{where} is {value!r}; it has to be true or false")
        return value
    low, high = limits.RANGES[name]
    whole = isinstance(default, int)
    numeric = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not numeric or not low <= value <= high:
        raise ValueError(f"{where} is {value!r}; it has to be a {'whole ' if whole else ''}number from {low:g} to {high:g}")
    return value if whole else float(value)


def _step_seed(seed: int, position: int) -> int:
    # Two noises of one seed would be the same noise twice.
    return int.from_bytes(hashlib.blake2b(f"{seed % 2**64}/{position}".encode(), digest_size=8).digest(), "little")
