"""Test charts for visual instructions (Defusion, arXiv 2506.16960, section 3): what a degradation does is shown on a "visual ground".

The paper uses parts of a commercial chart, whose artwork is copyrighted. These are drawn from public facts: the kinds of elements it has
(concentric, random, natural, colour blocks), the densities of its grey steps, and the distributions of dead leaves.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .seeding import choice, uniform

SMALLEST = 32
LEAST_TILES, MOST_TILES = 2, 4
LEAST_BLOCK, MOST_COLUMNS, MOST_ROWS = 10, 8, 6
LEAST_RADIUS, LARGEST_RADIUS = 2.0, 64.0
# How often a place is covered on average, which leaves one in three thousand bare.
LAYERS = 8
BLOCK, LEAVES_AT_ONCE = 64, 64
SLANT = 5.0
# Optical densities of the grey steps: the reflectance is 10 to the power of minus these.
DENSITIES = (0.06, 0.12, 0.19, 0.26, 0.33, 0.41, 0.49, 0.58, 0.67, 0.77, 0.88, 1.00, 1.13, 1.28, 1.44, 1.63, 1.86, 2.12, 2.46, 3.00)
# sRGB in levels of 20: skin, foliage, sky and flowers; pure and mixed colours; white to black.
COLOURS = (
    (9, 6, 5), (15, 12, 10), (8, 10, 12), (7, 9, 5), (10, 10, 14), (8, 15, 13), (17, 10, 3), (6, 7, 13), (15, 7, 8), (7, 5, 8), (13, 15, 5),
    (18, 13, 4), (4, 5, 12), (6, 12, 6), (14, 4, 5), (19, 16, 2), (15, 7, 12), (2, 11, 13), (19, 19, 19), (16, 16, 16), (13, 13, 13),
    (10, 10, 10), (7, 7, 7), (4, 4, 4),
)  # fmt: skip


def visual_ground(seed: int, size: int = 256) -> Tensor:
    """Draw a chart of 2 x 2 to 4 x 4 tiles, every family among them.

    Args:
        seed: decides layout and contents; any 64 bits.
        size: of a side, in pixels.

    Returns:
        (1, size, size, 3) in 0..1.

    Raises:
        ValueError: for a size below 32.
    """
    if size < SMALLEST:
        raise ValueError(f"a chart has sides of {SMALLEST} pixels or more, not {size}")
    generator = torch.Generator().manual_seed(seed % 2**64)
    rows, columns, families = layout(generator)
    order = iter(families)
    strips = [
        torch.cat([FAMILIES[next(order)](bottom - top, right - left, generator) for left, right in pairwise(_edges(size, columns))], 1)
        for top, bottom in pairwise(_edges(size, rows))
    ]
    return torch.cat(strips)[None].clamp(0, 1)


def layout(generator: torch.Generator) -> tuple[int, int, list[str]]:
    """Draw rows, columns and the family of each tile, row by row: each of the four at least once."""
    rows, columns = (int(torch.randint(LEAST_TILES, MOST_TILES + 1, (), generator=generator)) for _ in range(2))
    more = torch.randint(len(FAMILIES), (rows * columns - len(FAMILIES),), generator=generator)
    drawn = torch.cat([torch.arange(len(FAMILIES)), more])[torch.randperm(rows * columns, generator=generator)]
    return rows, columns, [tuple(FAMILIES)[index] for index in drawn]


def concentric(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A sinusoidal Siemens star, or a zone plate: (height, width, 3)."""
    side = min(height, width)
    down, right = uniform(generator, -0.1, 0.1) * side, uniform(generator, -0.1, 0.1) * side
    y = torch.arange(height)[:, None] - (height - 1) / 2 - down
    x = torch.arange(width)[None] - (width - 1) / 2 - right
    radius = (y * y + x * x).sqrt()
    phase = uniform(generator, 0, 2 * math.pi)
    if uniform(generator, 0, 1) < 0.5:
        finest = min(144.0, math.pi * side / 3)
        cycles = round(uniform(generator, min(36.0, finest / 2), finest))
        period = 2 * math.pi * radius / cycles
        wave = torch.cos(cycles * torch.atan2(y, x) + phase)
    else:
        finest = uniform(generator, 0.5, 1) * math.pi / side
        period = math.pi / (finest * radius).clamp(min=1e-3)
        wave = torch.cos(finest * radius**2 + phase)
    # Lines too fine for the pixels would be seen as others that are not there.
    wave = wave * (period - 2).clamp(0, 1)
    dark, light = (torch.tensor([uniform(generator, low, low + 0.3)] * 3) for low in (0.0, 0.7))
    if uniform(generator, 0, 1) < 0.3:
        dark, light = (torch.rand(3, generator=generator) for _ in range(2))
    return torch.lerp(dark, light, 0.5 + 0.5 * wave[..., None])


def random(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Dead leaves: discs over each other, of radii with a density of r^-3, of colours around a middle grey: (height, width, 3)."""
    contrast = uniform(generator, 0.1, 0.5)
    largest = min(LARGEST_RADIUS, max(height, width) / 2)
    spread = LEAST_RADIUS**-2 - largest**-2
    area = 2 * math.pi * math.log(largest / LEAST_RADIUS) / spread
    draws = torch.rand(LEAVES_AT_ONCE + math.ceil(LAYERS * height * width / area), 6, generator=generator)
    radius = (LEAST_RADIUS**-2 - draws[:, 0] * spread).rsqrt()
    centre = draws[:, 1:3] * (torch.tensor([height, width]) + 2 * radius[:, None]) - radius[:, None]
    colour = 0.5 + contrast * (2 * draws[:, 3:] - 1)
    picture = torch.empty(height, width, 3)
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            block = picture[top:top + BLOCK, left:left + BLOCK]
            block.copy_(_leaves(centre - torch.tensor([top, left]), radius, colour, *block.shape[:2]))
    return picture


def natural(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise with a power of 1/f^1.8, as photographs have, in three colours and often with a grain in one direction: (height, width, 3)."""
    side = max(height, width)
    noise = torch.fft.rfft2(torch.randn(3, side, side, generator=generator))
    down, right = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    angle, stretch = uniform(generator, 0, math.pi), uniform(generator, 1, 4)
    along, across = right * math.cos(angle) + down * math.sin(angle), down * math.cos(angle) - right * math.sin(angle)
    frequency = ((along * stretch) ** 2 + across**2).sqrt().clamp(min=1 / side)
    waves = torch.fft.irfft2(noise * frequency**-0.9, s=(side, side))[:, :height, :width]
    waves = waves - waves.mean((1, 2), keepdim=True)
    waves = waves / waves.std((1, 2), keepdim=True).clamp(min=1e-6)
    # Mostly brightness, some colour.
    mixing = torch.rand(3, 3, generator=generator) * 0.5 - 0.25
    mixing[:, 0] = 1
    middle, contrast = 0.3 + 0.4 * torch.rand(3, generator=generator), uniform(generator, 0.08, 0.2)
    return (middle + contrast * torch.einsum("ci,ihw->hwc", mixing, waves)).clamp(0, 1)


def colour_blocks(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Patches of colour and steps of grey, on a grid that is turned a little so that their edges are slanted: (height, width, 3)."""
    columns, rows = (min(most, max(2, side // LEAST_BLOCK)) for side, most in ((width, MOST_COLUMNS), (height, MOST_ROWS)))
    colours = torch.cat([torch.tensor(COLOURS) / 20, _greys()])
    colours = colours[torch.randperm(len(colours), generator=generator)]
    angle = math.radians(choice(generator, (-SLANT, SLANT)))
    y = (torch.arange(height)[:, None] + 0.5) / height - 0.5
    x = (torch.arange(width)[None] + 0.5) / width - 0.5
    column = ((x * math.cos(angle) - y * math.sin(angle) + 0.5) * columns).floor().clamp(0, columns - 1).long()
    row = ((y * math.cos(angle) + x * math.sin(angle) + 0.5) * rows).floor().clamp(0, rows - 1).long()
    return colours[(row * columns + column) % len(colours)]


FAMILIES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "concentric": concentric, "random": random, "natural": natural, "colour blocks": colour_blocks,
}  # fmt: skip


def _leaves(centre: Tensor, radius: Tensor, colour: Tensor, height: int, width: int) -> Tensor:
    """Paint the discs that reach into a block, the first ones in front: (height, width, 3)."""
    nearest = centre.clamp(torch.zeros(2), torch.tensor([height - 1.0, width - 1.0]))
    near = ((centre - nearest).square().sum(-1) <= radius**2).nonzero()[:, 0]
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2).float()
    picture, bare = torch.full((height * width, 3), 0.5), torch.arange(height * width)
    # From the front to the back, so that what is covered needs no more looking at.
    for leaves in near.split(LEAVES_AT_ONCE):
        inside = (grid[bare, None] - centre[leaves]).square().sum(-1) <= radius[leaves] ** 2
        covered = inside.any(1)
        picture[bare[covered]] = colour[leaves[inside[covered].int().argmax(1)]]
        bare = bare[~covered]
    return picture.reshape(height, width, 3)


def _edges(size: int, parts: int) -> list[int]:
    return [index * size // parts for index in range(parts + 1)]


def _greys() -> Tensor:
    """The grey steps in sRGB, (20, 3)."""
    light = 10.0 ** -torch.tensor(DENSITIES)
    encoded = torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return encoded[:, None].expand(-1, 3)
