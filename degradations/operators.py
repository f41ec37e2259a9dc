"""All single degradations by name, each with the words that describe what it leaves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import blur, colour, jpeg, noise, resizing, weather
from .low_light import low_light
from .seeding import generators

Words = tuple[str, ...]
VISIBLE = 0.5 / 255


@dataclass(frozen=True)
class Operator:
    """A degradation.

    Attributes:
        apply: takes (B, H, W, 3) in 0..1 and returns the same; where `seeded`, also one generator per picture.
        words: what a picture is afterwards.
        seeded: whether it draws random numbers.
    """

    apply: Callable[..., Tensor]
    words: Words
    seeded: bool = False


OPERATORS = {
    "gaussian noise": Operator(noise.gaussian_noise, ("noisy",), seeded=True),
    "poisson noise": Operator(noise.poisson_noise, ("noisy",), seeded=True),
    "blur": Operator(blur.bell_blur, ("blurry",)),
    "ringing": Operator(blur.sinc_filter, ("blurry", "ringing")),
    "motion blur": Operator(blur.motion_blur, ("motion blurred",)),
    "defocus": Operator(blur.defocus_blur, ("out of focus",)),
    "resize": Operator(resizing.lower_resolution, ("low resolution",)),
    "jpeg": Operator(jpeg.compress, ("compressed",)),
    "haze": Operator(weather.haze, ("hazy",), seeded=True),
    "low light": Operator(low_light, ("dark",), seeded=True),
    "rain": Operator(weather.rain, ("rainy",), seeded=True),
    "snow": Operator(weather.snow, ("snowy",), seeded=True),
    "fading": Operator(colour.fade, ("faded",)),
    "grey": Operator(colour.lose_colour, ("black and white",)),
}


def degrade(pictures: Tensor, kind: str, seed: int = 0, mask: Tensor | None = None, **settings: object) -> tuple[Tensor, Words]:
    """Damage pictures in one way.

    Args:
        pictures: (B, H, W, 3) in 0..1.
        kind: one of OPERATORS.
        seed: fixes everything random; picture b of a batch uses seed + b.
        mask: (1 or B, H, W, 1), 1 where the damage shows and 0 where pixels stay as they are; None for everywhere.
        settings: strengths, as the operator's function takes them.

    Returns:
        (B, H', W', 3) in 0..1, of the same size for everything but a resize that does not keep it, and the words that describe it:
        none if no pixel has changed by as much as 8 bits can show.

    Raises:
        ValueError: for an unknown kind, or a mask where the size changes.
    """
    if kind not in OPERATORS:
        raise ValueError(f"unknown degradation {kind!r}; choose one of {', '.join(OPERATORS)}")
    operator, pictures = OPERATORS[kind], pictures.clamp(0, 1)  # enlarged pictures can lie beyond
    drawn = [generators(seed, len(pictures))] if operator.seeded else []
    degraded = operator.apply(pictures.float(), *drawn, **settings).clamp(0, 1).to(pictures.dtype)
    if mask is not None:
        if degraded.shape != pictures.shape:
            raise ValueError(f"a mask cannot select where {kind} acts if it changes the size")
        degraded = torch.lerp(pictures, degraded, mask.to(pictures).expand_as(pictures))
    return degraded, operator.words if _differs(degraded, pictures) else ()


def joined(given: str, new: Words) -> str:
    """Return given words with the new ones appended, each once: "noisy" and ("noisy", "dark") make "noisy, dark"."""
    words = [word.strip() for word in given.split(",") if word.strip()]
    return ", ".join(dict.fromkeys([*words, *new]))


def _differs(degraded: Tensor, pictures: Tensor) -> bool:
    return degraded.shape != pictures.shape or bool((degraded - pictures).abs().amax() >= VISIBLE)
