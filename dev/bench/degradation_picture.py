"""`python dev bench degradation_picture`: docs/degradation_pixels.jpg, one photograph restored on the lab's model of pixels.

It trains as `python dev bench degradation_space --prior pixel` does, or takes what that has trained.
"""

import argparse
import json
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import report
from .degradation_findings import DENOISER
from .degradation_oracle import degraded
from .degradation_space import STEPS, Lab, Run, Way, attached, restore, tokenizer_weights
from .scenes import figures

FILE = report.PACK / "docs" / "degradation_pixels.jpg"
SCENE, SEED, DAMAGE = "coffee", 0, ("rain", "noise 25", "haze")
GAP = 4
# With --quick: enough to see that all of it works, not to restore anything.
QUICK_STEPS, QUICK_WAY = 2, Way(steps=1)


def columns(lab: Lab, steps: int, way: Way) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return a picture (2 H + GAP, W, 3) for each kind of damage, damaged above, restored below, and the rows of both."""
    trainee = lab.trained(Run(lab.prior, DENOISER, steps))
    found, rows = [], []
    with attached(lab, trainee):
        for damage in DAMAGE:
            clean, damaged, words = degraded(SCENE, damage, SEED)
            restored = restore(lab, trainee, damaged, damage, words, SEED, way)
            pair = [{"method": method, "degradation": damage, **figures(picture, clean)} for method, picture in (("degraded", damaged), (DENOISER, restored))]
            report.say(f"{damage}: {pair[0]['psnr']:.1f} -> {pair[1]['psnr']:.1f} dB")
            found.append(torch.cat([damaged[0], torch.ones(GAP, clean.shape[2], 3), restored[0]]))
            rows += pair
    return found, rows


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python dev bench degradation_picture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} training steps, one of sampling; the picture goes to the cache folder, not to docs")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    options = parser.parse_args()
    # Now, while as much is loaded as where degradation_space asks for it: then its trained run is found.
    report.code()
    parts, rows = columns(Lab("pixel", tokenizer_weights()), *((QUICK_STEPS, QUICK_WAY) if options.quick else (STEPS, Way())))
    white = torch.ones(len(parts[0]), GAP, 3)
    page = torch.cat([part for column in parts for part in (column, white)][:-1], 1)
    file = report.picture_file(FILE, options.quick)
    Image.fromarray((page * 255).round().byte().numpy()).save(file, quality=88)
    report.say(str(file))
    if options.json:
        report.say(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
