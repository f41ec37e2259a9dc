"""The second-order degradations of Real-ESRGAN (arXiv 2107.10833, section 3): what is drawn, and what it does to a picture."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import jpeg, kernels, noise, resizing
from .blur import convolve
from .operators import Words
from .seeding import chance, choice, generators, uniform

Range = tuple[float, float]

KERNEL_SIZES = tuple(range(7, 22, 2))
KERNELS = (
    ("gaussian", True), ("gaussian", False), ("generalised", True), ("generalised", False), ("plateau", True), ("plateau", False),
)  # fmt: skip
KERNEL_CHANCES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
SINC_CHANCE, FINAL_SINC_CHANCE = 0.1, 0.8
GENERALISED_BETA, PLATEAU_BETA = (0.5, 4.0), (1.0, 2.0)
GAUSSIAN_CHANCE, GREY_CHANCE = 0.5, 0.4
RESIZE_FIRST_CHANCE = 0.5
DIRECTIONS = ("up", "down", "keep")


@dataclass(frozen=True)
class StageSettings:
    """What one of the two stages draws from: chances 0..1, and ranges that are drawn from uniformly.

    Attributes:
        blur_chance: of any blur at all.
        sigma: deviation of the kernel, in pixels.
        resize_chances: of enlarging, shrinking and keeping the size.
        resize: from the strongest shrinking to the strongest enlargement.
        noise: deviation of Gaussian noise, in levels of 255.
        poisson: strength of Poisson noise.
        quality: of the JPEG compression.
    """

    blur_chance: float
    sigma: Range
    resize_chances: tuple[float, float, float]
    resize: Range
    noise: Range
    poisson: Range
    quality: Range


FIRST_RESIZE_CHANCES, SECOND_RESIZE_CHANCES = (0.2, 0.7, 0.1), (0.3, 0.4, 0.3)
PRESETS = {
    "standard": (
        StageSettings(1.0, (0.2, 3.0), FIRST_RESIZE_CHANCES, (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
        StageSettings(0.8, (0.2, 1.5), SECOND_RESIZE_CHANCES, (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ),
    "mild": (
        StageSettings(1.0, (0.2, 3.0), FIRST_RESIZE_CHANCES, (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
        StageSettings(0.5, (0.2, 1.5), SECOND_RESIZE_CHANCES, (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100)),
    ),
}


@dataclass(frozen=True)
class Blur:
    """A kernel as drawn. `shape` is one of kernels.SHAPES or sinc; angle in degrees; cutoff in radians per pixel."""

    shape: str
    size: int
    isotropic: bool = True
    sigma: float = 0.0
    across: float = 0.0
    angle: float = 0.0
    beta: float = 1.0
    cutoff: float = 0.0

    def kernel(self) -> Tensor:
        """Return (1, size, size)."""
        if self.shape == "sinc":
            return kernels.sinc(self.size, self.cutoff)
        return kernels.bell(self.size, self.sigma, self.across, self.angle, self.shape, self.beta)


@dataclass(frozen=True)
class Stage:
    """One stage as drawn. `noise` is gaussian or poisson and `level` its deviation of 255 or its strength."""

    blur: Blur | None
    direction: str
    factor: float
    method: str
    noise: str
    level: float
    grey: bool
    quality: float


@dataclass(frozen=True)
class Recipe:
    """Everything drawn for one picture but the noise itself."""

    first: Stage
    second: Stage
    final_blur: Blur | None
    final_method: str
    resize_first: bool


def draw(preset: str, generator: torch.Generator) -> Recipe:
    """Draw what happens to one picture.

    Raises:
        ValueError: for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    first, second = (_draw_stage(settings, generator) for settings in PRESETS[preset])
    final_blur = _draw_sinc(choice(generator, KERNEL_SIZES), math.pi / 3, generator) if chance(generator, FINAL_SINC_CHANCE) else None
    return Recipe(first, second, final_blur, choice(generator, resizing.METHODS), chance(generator, RESIZE_FIRST_CHANCE))


def follow(recipe: Recipe, picture: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """Apply a recipe.

    Args:
        recipe: from `draw`.
        picture: (1, H, W, 3) in 0..1.
        scale: how many times smaller both sides become.
        generator: for the noise.

    Returns:
        (1, H // scale, W // scale, 3), at least one pixel a side, in multiples of 1/255.
    """
    height, width = picture.shape[1:3]
    size = _scaled(height, width, 1 / scale)
    picture = _blurred(picture, recipe.first.blur)
    picture = resizing.resize(picture, _scaled(height, width, recipe.first.factor), recipe.first.method)
    picture = jpeg.compress(_noisy(picture, recipe.first, generator), recipe.first.quality)
    picture = _blurred(picture, recipe.second.blur)
    picture = resizing.resize(picture, _scaled(height, width, recipe.second.factor / scale), recipe.second.method)
    picture = _noisy(picture, recipe.second, generator)
    if recipe.resize_first:
        picture = _blurred(resizing.resize(picture, size, recipe.final_method), recipe.final_blur)
        picture = jpeg.compress(picture, recipe.second.quality)
    else:
        picture = jpeg.compress(picture, recipe.second.quality)
        picture = _blurred(resizing.resize(picture, size, recipe.final_method), recipe.final_blur)
    return (picture.clamp(0, 1) * 255).round() / 255


def degrade(pictures: Tensor, preset: str = "standard", scale: int = 4, seed: int = 0) -> tuple[Tensor, Words]:
    """Damage pictures, each by a recipe of its own.

    Args:
        pictures: (B, H, W, 3) in 0..1.
        preset: one of PRESETS.
        scale: how many times smaller both sides become.
        seed: fixes everything random; picture b of a batch uses seed + b.

    Returns:
        (B, H // scale, W // scale, 3), at least one pixel a side, in 0..1, and the words that describe it.

    Raises:
        ValueError: for an unknown preset.
    """
    rows = [
        follow(draw(preset, generator), picture[None].float(), scale, generator)
        for picture, generator in zip(pictures, generators(seed, len(pictures)), strict=True)
    ]
    words = ("blurry", "noisy", "compressed")
    return torch.cat(rows).to(pictures.dtype), (*words, "low resolution") if scale > 1 else words


def _draw_stage(settings: StageSettings, generator: torch.Generator) -> Stage:
    blur = _draw_blur(settings, generator) if chance(generator, settings.blur_chance) else None
    direction = choice(generator, DIRECTIONS, settings.resize_chances)
    low, high = {"up": (1.0, settings.resize[1]), "down": (settings.resize[0], 1.0), "keep": (1.0, 1.0)}[direction]
    factor, method = uniform(generator, low, high), choice(generator, resizing.METHODS)
    kind = "gaussian" if chance(generator, GAUSSIAN_CHANCE) else "poisson"
    level = uniform(generator, *(settings.noise if kind == "gaussian" else settings.poisson))
    grey = chance(generator, GREY_CHANCE)
    return Stage(blur, direction, factor, method, kind, level, grey, uniform(generator, *settings.quality))


def _draw_blur(settings: StageSettings, generator: torch.Generator) -> Blur:
    size = choice(generator, KERNEL_SIZES)
    if chance(generator, SINC_CHANCE):
        return _draw_sinc(size, math.pi / 3 if size < 13 else math.pi / 5, generator)
    shape, isotropic = choice(generator, KERNELS, KERNEL_CHANCES)
    sigma = uniform(generator, *settings.sigma)
    across = sigma if isotropic else uniform(generator, *settings.sigma)
    angle = 0.0 if isotropic else uniform(generator, -180, 180)
    betas = {"gaussian": (1.0, 1.0), "generalised": GENERALISED_BETA, "plateau": PLATEAU_BETA}[shape]
    return Blur(shape, size, isotropic, sigma, across, angle, uniform(generator, *betas))


def _draw_sinc(size: int, lowest: float, generator: torch.Generator) -> Blur:
    return Blur("sinc", size, cutoff=uniform(generator, lowest, math.pi))


def _scaled(height: int, width: int, factor: float) -> resizing.Size:
    # The small addend keeps 1/3 of 9 at 3.
    return max(1, int(height * factor + 1e-6)), max(1, int(width * factor + 1e-6))


def _blurred(picture: Tensor, blur: Blur | None) -> Tensor:
    return picture if blur is None else convolve(picture, blur.kernel())


def _noisy(picture: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    add = noise.gaussian_noise if stage.noise == "gaussian" else noise.poisson_noise
    return add(picture, [generator], stage.level, stage.grey).clamp(0, 1)
