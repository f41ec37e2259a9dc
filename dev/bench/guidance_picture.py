"""`python dev bench guidance_picture`: docs/restoration_guidance.jpg, one photograph restored by the committed adapter across w and a."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from . import report
from .adapter import BEST, NOISE, Lab, Restoration, Run, Way, attached, degraded, figures, restore
from .published import TRAINED, full_weights

ONSETS, WEIGHTS = (0.8, 0.5), (0.0, 0.05, 0.1, 0.2, 0.4)
SCENE, SEED, GAP = "coffee", 0, 4
# With --quick: the first row, without guidance and with the most of it.
QUICK_ONSETS, QUICK_WEIGHTS = ONSETS[:1], (WEIGHTS[0], WEIGHTS[-1])
FILE = report.PACK / "docs" / "restoration_guidance.jpg"


def labelled(picture: Tensor, text: str) -> Image.Image:
    """Return (1, H, W, 3) in 0..1 with a line of text in its lower corner."""
    image = Image.fromarray((picture[0].numpy() * 255).round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, image.height - 16, image.width // 2, image.height), fill=(0, 0, 0))
    draw.text((3, image.height - 14), text, fill=(255, 255, 255))
    return image


def cells(onsets: tuple[float, ...], weights: tuple[float, ...]) -> tuple[list[list[Image.Image]], list[dict[str, Any]]]:
    """Restore with every pair of settings: a row of pictures for each onset a, a column for each weight w; and the figures of all."""
    lab = Lab("dit", 0)
    trainee = lab.trainee(Run("dit", NOISE, BEST, 0.0), full_weights(TRAINED / "noise_dit.safetensors"))
    clean, damaged, words = degraded(SCENE, NOISE, SEED)
    pictures, rows = [], []
    with attached(lab, trainee):
        for onset in onsets:
            pictures.append([])
            for weight in weights:
                picture = restore(lab, trainee, damaged, words, SEED, Way(guidance=Restoration(weight=weight, onset=onset)))
                rows.append({"method": BEST, "weight": weight, "onset": onset, **figures(picture, clean)})
                text = f"w {weight:g}  a {onset:g}  {rows[-1]['psnr']:.1f} dB"
                report.say(text)
                pictures[-1].append(labelled(picture, text))
    return pictures, rows


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python dev bench guidance_picture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two restorations; the picture goes to the cache folder, not to docs")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    options = parser.parse_args()
    pictures, rows = cells(*((QUICK_ONSETS, QUICK_WEIGHTS) if options.quick else (ONSETS, WEIGHTS)))
    width, height = pictures[0][0].size
    page = Image.new("RGB", (len(pictures[0]) * (width + GAP) - GAP, len(pictures) * (height + GAP) - GAP), (255, 255, 255))
    for y, row in enumerate(pictures):
        for x, image in enumerate(row):
            page.paste(image, (x * (width + GAP), y * (height + GAP)))
    file = report.picture_file(FILE, options.quick)
    page.save(file, quality=88)
    report.say(str(file))
    if options.json:
        report.say(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
