"""Sixty-odd words for what a picture looks like, and the rules that read them off a picture.

The words are the lab's language: its denoisers were trained with them, so they steer it as prompts steer a large model.
"""

import numpy as np

COLOURS = ("black", "grey", "white", "red", "orange", "brown", "yellow", "green", "cyan", "blue", "purple", "pink")
# What can be wrong with a picture, as the degradations say it. The lab's own training never uses these: they are there for what learns on it.
DAMAGE = ("noisy", "blurry", "ringing", "motion", "focus", "low", "resolution", "quality", "compressed", "hazy", "rainy", "snowy", "faded")
WORDS = (
    "dark", "dim", "balanced", "bright", "glowing",
    "flat", "soft", "contrasty",
    "colourless", "muted", "colourful", "vivid",
    *COLOURS,
    "warm", "cool", "neutral",
    "lit-left", "lit-right", "lit-top", "lit-bottom", "lit-centre", "lit-evenly",
    "smooth", "fine", "grainy", "rough", "busy",
    "horizontal", "vertical", "diagonal", "woven",
    "sharp", "blurred",
    "empty", "sparse", "detailed", "crowded",
    "round", "square", "tall", "wide", "small-subject", "large-subject", "subject-left", "subject-right", "subject-centre",
    "top-light", "top-dark", "top-blue", "bottom-light", "bottom-dark", "bottom-green",
    "symmetric", "two-tone",
    *DAMAGE,
)
PAD = len(WORDS)
LENGTH = 16
_INDEX = {word: index for index, word in enumerate(WORDS)}


def token_ids(text: str) -> list[int]:
    """Return LENGTH ids for the known words of a text, in order; unknown words are skipped, the rest is padding."""
    ids = [_INDEX[word] for word in text.lower().replace(",", " ").replace(".", " ").split() if word in _INDEX]
    return (ids + [PAD] * LENGTH)[:LENGTH]


def describe(image: np.ndarray) -> list[str]:
    """Read the words off a picture.

    Args:
        image: (H, W, 3) in 0..1, sides divisible by 4.

    Returns:
        Words in the order of their groups, brightness first.
    """
    height, width = image.shape[:2]
    small = image.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))
    grey = small @ np.array([0.2126, 0.7152, 0.0722], image.dtype)
    words = [_step(grey.mean(), (0.15, 0.3, 0.5, 0.7), WORDS[0:5]), _step(grey.std(), (0.1, 0.2), WORDS[5:8])]
    words += _colour_words(small, grey) + _light_words(grey)
    words += _texture_words(image, grey) + _subject_words(small) + _layout_words(small, grey)
    return words


def _step(value: float, limits: tuple[float, ...], words: tuple[str, ...]) -> str:
    return words[int(np.searchsorted(limits, value))]


def _hue_names(small: np.ndarray) -> np.ndarray:
    """Name every pixel: index into COLOURS."""
    high, low = small.max(-1), small.min(-1)
    chroma = high - low
    red, green, blue = small[..., 0], small[..., 1], small[..., 2]
    safe = np.maximum(chroma, 1e-4)
    hue = np.select([high == red, high == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4) * 60
    name = np.select([hue < 15, hue < 45, hue < 70, hue < 165, hue < 200, hue < 260, hue < 310, hue < 345], [3, 4, 6, 7, 8, 9, 10, 11], 3)
    name = np.where((name == 4) & (high < 0.6), 5, name)
    return np.where(chroma < 0.08, np.select([high < 0.2, high < 0.75], [0, 1], 2), np.where(high < 0.15, 0, name))


def _colour_words(small: np.ndarray, grey: np.ndarray) -> list[str]:
    share = np.bincount(_hue_names(small).ravel(), minlength=len(COLOURS)) / grey.size
    words = [COLOURS[index] for index in np.argsort(-share)[:3] if share[index] > 0.12]
    words.append(_step(float((small.max(-1) - small.min(-1)).mean()), (0.02, 0.12, 0.3), WORDS[8:12]))
    warmth = float(small[..., 0].mean() - small[..., 2].mean())
    return words + [_step(warmth, (-0.04, 0.04), ("cool", "neutral", "warm"))]


def _light_words(grey: np.ndarray) -> list[str]:
    height, width = grey.shape
    mean = grey.mean() + 1e-4
    inner = grey[height // 4:-(height // 4), width // 4:-(width // 4)].mean()
    parts = {"lit-left": grey[:, :width // 2].mean(), "lit-right": grey[:, width // 2:].mean(), "lit-top": grey[:height // 2].mean(),
             "lit-bottom": grey[height // 2:].mean(), "lit-centre": inner}
    best = max(parts, key=lambda name: parts[name])
    return [best if parts[best] > 1.12 * mean else "lit-evenly"]


def _texture_words(image: np.ndarray, grey: np.ndarray) -> list[str]:
    full = image.mean(-1)
    fine = float(np.abs(np.diff(full, axis=0)).mean() + np.abs(np.diff(full, axis=1)).mean())
    across, down = np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1]
    coarse = float(np.abs(across).mean() + np.abs(down).mean())
    words = [_step(fine, (0.01, 0.025, 0.05, 0.09), WORDS[33:38]), "sharp" if fine > 0.42 * coarse else "blurred"]
    xx, yy, xy = (across * across).mean(), (down * down).mean(), (across * down).mean()
    if (xx - yy) ** 2 + 4 * xy * xy > 0.09 * (xx + yy) ** 2:
        words.append("diagonal" if 2 * abs(xy) > abs(xx - yy) else "vertical" if xx > yy else "horizontal")
    elif coarse > 0.12:
        words.append("woven")
    edges = float((np.hypot(across, down) > 0.08).mean())
    return words + [_step(edges, (0.03, 0.12, 0.3), ("empty", "sparse", "detailed", "crowded"))]


def _subject_words(small: np.ndarray) -> list[str]:
    """Shape of what differs from the border of the picture."""
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]]).mean(0)
    distance = np.linalg.norm(small - border, axis=-1)
    inside = distance > max(0.12, 1.2 * distance.mean())
    share = inside.mean()
    if share < 0.02:
        return []
    rows, columns = np.nonzero(inside)
    tall, wide = rows.std() + 1e-3, columns.std() + 1e-3
    words = ["small-subject" if share < 0.15 else "large-subject"]
    words.append(_step(float(columns.mean() / inside.shape[1]), (0.42, 0.58), ("subject-left", "subject-centre", "subject-right")))
    if max(tall, wide) > 1.4 * min(tall, wide):
        return words + ["tall" if tall > wide else "wide"]
    # A disc fills pi / 4 of the box around it, a square all of it.
    box = (np.ptp(np.percentile(rows, (1, 99))) + 1) * (np.ptp(np.percentile(columns, (1, 99))) + 1)
    return words + ["round" if inside.sum() < 0.88 * box else "square"]


def _layout_words(small: np.ndarray, grey: np.ndarray) -> list[str]:
    third = grey.shape[0] // 3
    words = []
    for name, part, light in (("top", small[:third], grey[:third]), ("bottom", small[-third:], grey[-third:])):
        if light.mean() > grey.mean() + 0.08:
            words.append(f"{name}-light")
        elif light.mean() < grey.mean() - 0.08:
            words.append(f"{name}-dark")
        red, green, blue = part.mean((0, 1))
        if name == "top" and blue > max(red, green) + 0.03:
            words.append("top-blue")
        if name == "bottom" and green > max(red, blue) + 0.03:
            words.append("bottom-green")
    if np.corrcoef(grey.ravel(), grey[:, ::-1].ravel())[0, 1] > 0.7:
        words.append("symmetric")
    middle = np.abs(grey - (np.percentile(grey, 5) + np.percentile(grey, 95)) / 2)
    if grey.std() > 0.1 and (middle > 0.8 * grey.std()).mean() > 0.75:
        words.append("two-tone")
    return words
