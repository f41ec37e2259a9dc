"""Pictures made from a seed: what the lab trains on besides a handful of photographs.

A scene is a stack of textured, shaded leaves (the dead leaves model of natural images) in a palette borrowed from photographs; other kinds
are 1/f fields, oriented textures, shaded solids and lettering. Everything is numpy on one random generator, so a seed is a picture.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 256


def picture(rng: np.random.Generator, palettes: list[np.ndarray], side: int = SIDE) -> np.ndarray:
    """Draw one picture.

    Args:
        rng: source of every choice.
        palettes: arrays (n, 3) of colours in 0..1 to choose leaf colours from.
        side: width and height in pixels.

    Returns:
        (side, side, 3) float32 in 0..1.
    """
    palette = _jitter_palette(rng, palettes[rng.integers(len(palettes))]) if rng.random() < 0.8 else _random_palette(rng)
    kind = rng.choice(["leaves", "field", "stripes", "solids", "letters"], p=[0.6, 0.08, 0.1, 0.14, 0.08])
    image = _PAINTERS[kind](rng, palette, side)
    return _finish(rng, image)


def pink_noise(rng: np.random.Generator, side: int, slope: float) -> np.ndarray:
    """Return a (side, side) field with amplitude spectrum 1/f**slope, zero mean and unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency**slope
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(side, side))
    return (field / (field.std() + 1e-8)).astype(np.float32)


def palettes_of(photographs: list[np.ndarray], rng: np.random.Generator, count: int = 60) -> list[np.ndarray]:
    """Sample small palettes from crops of photographs, each (n, 3): leaves then wear colours that occur together."""
    palettes = []
    for _ in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        flat = photograph.reshape(-1, 3)
        palettes.append(flat[rng.integers(len(flat), size=rng.integers(4, 24))].astype(np.float32))
    return palettes


def _jitter_palette(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    gain = rng.uniform(0.6, 1.5) * rng.uniform(0.85, 1.15, 3)
    return np.clip(palette[:, order] * gain + rng.uniform(-0.05, 0.1), 0, 1).astype(np.float32)


def _random_palette(rng: np.random.Generator) -> np.ndarray:
    grey = rng.beta(1.2, 1.5, (rng.integers(3, 16), 1))
    chroma = rng.normal(0, rng.uniform(0.02, 0.25), (len(grey), 3))
    return np.clip(grey + chroma, 0, 1).astype(np.float32)


def _colour(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    return np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 0.03, 3), 0, 1).astype(np.float32)


def _texture(rng: np.random.Generator, bank: list[np.ndarray], height: int, width: int) -> np.ndarray:
    field = bank[rng.integers(len(bank))]
    top, left = rng.integers(field.shape[0] - height + 1), rng.integers(field.shape[1] - width + 1)
    patch = field[top:top + height, left:left + width]
    return patch[::-1] if rng.random() < 0.5 else patch


def _texture_bank(rng: np.random.Generator, side: int) -> list[np.ndarray]:
    bank = [pink_noise(rng, side, rng.uniform(0.6, 2.0)) for _ in range(3)]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(2):
        angle, period = rng.uniform(0, np.pi), rng.uniform(3, 40)
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + 1.5 * rng.random() * bank[0])
        bank.append((wave * rng.uniform(0.5, 1.5)).astype(np.float32))
    return bank


def _mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a soft-edged (height, width) shape: ellipse, box, polygon or blob."""
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j].astype(np.float32)
    shape = rng.integers(4)
    if shape == 0:
        inside = 1 - np.hypot(x, y)
    elif shape == 1:
        inside = 1 - np.maximum(abs(x), abs(y)) / 0.9
    elif shape == 2:
        inside = np.full_like(x, 1.0)
        for angle in rng.uniform(0, 2 * np.pi, rng.integers(3, 7)):
            inside = np.minimum(inside, rng.uniform(0.3, 0.9) - x * np.cos(angle) - y * np.sin(angle))
    else:
        angle = np.arctan2(y, x)
        radius = 0.7 + sum(rng.uniform(-0.12, 0.12) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 7))
        inside = radius - np.hypot(x, y)
    softness = rng.choice([1.0, 1.0, 1.5, 4.0]) * 2 / min(height, width)
    return np.clip(inside / softness + 0.5, 0, 1)


def _shade(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0, 0.35)
    bulge = (1 - x * x - y * y) * rng.uniform(-0.2, 0.3) if rng.random() < 0.5 else 0
    return 1 + slope + bulge


def _paint(rng: np.random.Generator, canvas: np.ndarray, palette: np.ndarray, bank: list[np.ndarray], size: tuple[int, int], at: tuple[int, int]) -> None:
    side = canvas.shape[0]
    (height, width), (top, left) = size, at
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, side), min(left + width, side)
    if y1 - y0 < 2 or x1 - x0 < 2:
        return
    window = np.s_[y0 - top:y1 - top, x0 - left:x1 - left]
    mask = _mask(rng, height, width)[window][..., None]
    colour = _colour(rng, palette) * _shade(rng, height, width)[window][..., None]
    if rng.random() < 0.3:
        blend = np.linspace(0, 1, y1 - y0, dtype=np.float32)[:, None, None]
        colour = colour * (1 - blend) + _colour(rng, palette) * blend
    texture = _texture(rng, bank, y1 - y0, x1 - x0)[..., None] * rng.choice([0, 0.015, 0.03, 0.06, 0.12]) * (0.4 + colour.mean())
    region = canvas[y0:y1, x0:x1]
    if rng.random() < 0.3:
        shadow = np.roll(mask, (rng.integers(-4, 5), rng.integers(-4, 5)), (0, 1)) * rng.uniform(0.1, 0.5)
        region *= 1 - shadow
    region += mask * (colour + texture - region)


def _leaves(rng: np.random.Generator, palette: np.ndarray, side: int) -> np.ndarray:
    bank = _texture_bank(rng, side)
    canvas = _field(rng, palette, side)
    if rng.random() < 0.5:
        horizon = int(side * rng.uniform(0.2, 0.8))
        canvas[horizon:] = _field(rng, palette, side)[horizon:]
    count = int(rng.choice([6, 12, 25, 60, 120]))
    largest = side * rng.uniform(0.3, 0.9)
    for rank in range(count):
        radius = max(4.0, largest / (1 + rank * rng.uniform(0.02, 0.3)))
        height, width = (max(3, int(radius * rng.uniform(0.3, 1.2))) for _ in range(2))
        height, width = min(height, side - 1), min(width, side - 1)
        _paint(rng, canvas, palette, bank, (height, width), tuple(rng.integers(-height // 2, side - height // 3, 1)) + tuple(rng.integers(-width // 2, side - width // 3, 1)))
    return canvas


def _field(rng: np.random.Generator, palette: np.ndarray, side: int) -> np.ndarray:
    weight = pink_noise(rng, side, rng.uniform(1.0, 2.2))[..., None]
    low, high = _colour(rng, palette), _colour(rng, palette)
    mix = 1 / (1 + np.exp(-weight * rng.uniform(0.5, 2.5)))
    canvas = (low + (high - low) * mix) * _shade(rng, side, side)[..., None]
    return canvas.astype(np.float32)


def _stripes(rng: np.random.Generator, palette: np.ndarray, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    canvas = _field(rng, palette, side)
    for _ in range(rng.integers(1, 4)):
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 60)
        warp = pink_noise(rng, side, 1.8) * rng.uniform(0, 6)
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle) + warp) / period)
        mask = np.clip(wave * rng.uniform(1, 8), -1, 1)[..., None] * 0.5 + 0.5
        canvas += mask * rng.uniform(0.2, 0.8) * (_colour(rng, palette) - canvas)
    return canvas


def _solids(rng: np.random.Generator, palette: np.ndarray, side: int) -> np.ndarray:
    """Spheres and cylinders under one light, with cast shadows: smooth shading as in photographs of things."""
    canvas = _field(rng, palette, side)
    bank = _texture_bank(rng, side)
    light = rng.normal(0, 1, 3)
    light /= np.linalg.norm(light)
    light[2] = abs(light[2])
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(rng.integers(2, 9)):
        radius = side * rng.uniform(0.06, 0.3)
        u, v = (x - rng.uniform(0, side)) / radius, (y - rng.uniform(0, side)) / radius / rng.uniform(0.5, 2.5)
        round_part = u * u + (v * v if rng.random() < 0.6 else 0 * v)
        edge = np.clip((1 - np.maximum(round_part, abs(v))) * radius / 2, 0, 1)[..., None]
        depth = np.sqrt(np.clip(1 - round_part, 0, 1))
        lit = np.clip(u * light[0] + v * light[1] + depth * light[2], 0, 1)
        shine = lit ** rng.uniform(10, 60) * rng.uniform(0, 0.7)
        colour = _colour(rng, palette) * (0.25 + 0.9 * lit[..., None]) + shine[..., None]
        colour = colour + bank[0][..., None] * rng.uniform(0, 0.05)
        canvas *= 1 - 0.4 * np.clip(1.3 - np.hypot(u + light[0], v - 0.3), 0, 1)[..., None]
        canvas += edge * (colour - canvas)
    return canvas


def _letters(rng: np.random.Generator, palette: np.ndarray, side: int) -> np.ndarray:
    canvas = _leaves(rng, palette, side) if rng.random() < 0.5 else _field(rng, palette, side)
    page = Image.new("L", (side, side))
    draw = ImageDraw.Draw(page)
    alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?")
    for _ in range(rng.integers(1, 9)):
        text = "".join(rng.choice(alphabet, rng.integers(2, 16)))
        draw.text(tuple(int(v) for v in rng.integers(-10, side - 20, 2)), text, fill=255, font=ImageFont.load_default(int(rng.integers(9, 70))))
    if rng.random() < 0.3:
        page = page.rotate(float(rng.uniform(-90, 90)))
    mask = np.asarray(page, np.float32)[..., None] / 255
    return canvas + mask * (_colour(rng, palette) - canvas)


def _finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Give light, contrast and lens: exposure spread as in photographs, a vignette, sometimes a soft focus."""
    image = np.clip(image, 0, 1)
    image = image ** rng.uniform(0.7, 1.5)
    low, high = np.percentile(image, [1, 99])
    if rng.random() < 0.7:
        image = (image - low) / max(high - low, 0.15) * rng.uniform(0.75, 1.0) + rng.uniform(0, 0.06)
    if rng.random() < 0.25:
        side = image.shape[0]
        y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
        image = image * (1 - rng.uniform(0, 0.4) * (x * x + y * y)[..., None])
    image = np.clip(image, 0, 1)
    if rng.random() < 0.35:
        small = Image.fromarray((image * 255).astype(np.uint8))
        factor = rng.uniform(0.3, 0.9)
        reduced = small.resize((int(image.shape[1] * factor),) * 2, Image.Resampling.BOX)
        image = np.asarray(reduced.resize(small.size, Image.Resampling.BICUBIC), np.float32) / 255
    return image.astype(np.float32)


_PAINTERS = {"leaves": _leaves, "field": _field, "stripes": _stripes, "solids": _solids, "letters": _letters}
