"""`python dev bench guidance_picture`: docs/restoration_guidance.jpg, one photograph restored by the committed adapter across w and a."""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from . import report
from .adapter import BEST, NOISE, Lab, Restoration, Run, Way, attached, degraded, figures, restore
from .published import TRAINED, full_weights

ONSETS, WEIGHTS = (0.8, 0.5), (0.0, 0.05, 0.1, 0.2, 0.4)
SCENE, SEED, GAP = "coffee", 0, 4
FILE = report.PACK / "docs" / "restoration_guidance.jpg"


def labelled(picture: Tensor, text: str) -> Image.Image:
    """Return (1, H, W, 3) in 0..1 with a line of text in its lower corner."""
    image = Image.fromarray((picture[0].numpy() * 255).round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, image.height - 16, image.width // 2, image.height), fill=(0, 0, 0))
    draw.text((3, image.height - 14), text, fill=(255, 255, 255))
    return image


def cells() -> list[list[Image.Image]]:
    """Restore with every pair of settings: a row for each onset a, a column for each weight w."""
    lab = Lab("dit", 0)
    trainee = lab.trainee(Run("dit", NOISE, BEST, 0.0), full_weights(TRAINED / "noise_dit.safetensors"))
    clean, damaged, words = degraded(SCENE, NOISE, SEED)
    rows = []
    with attached(lab, trainee):
        for onset in ONSETS:
            rows.append([])
            for weight in WEIGHTS:
                picture = restore(lab, trainee, damaged, words, SEED, Way(guidance=Restoration(weight=weight, onset=onset)))
                text = f"w {weight:g}  a {onset:g}  {figures(picture, clean)['psnr']:.1f} dB"
                report.say(text)
                rows[-1].append(labelled(picture, text))
    return rows


def main() -> None:
    """Write the picture."""
    argparse.ArgumentParser(prog="python dev bench guidance_picture", description=__doc__).parse_args()
    rows = cells()
    width, height = rows[0][0].size
    page = Image.new("RGB", (len(WEIGHTS) * (width + GAP) - GAP, len(ONSETS) * (height + GAP) - GAP), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image, (x * (width + GAP), y * (height + GAP)))
    page.save(FILE, quality=88)


if __name__ == "__main__":
    main()
