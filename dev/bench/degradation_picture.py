"""`python dev bench degradation_picture`: docs/degradation_pixels.jpg, one photograph restored on the lab's model of pixels.

It trains as `python dev bench degradation_space --prior pixel` does, or takes what that has trained.
"""

import argparse

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


def columns(lab: Lab) -> list[Tensor]:
    """Return a picture (2 H + GAP, W, 3) for each kind of damage: damaged above, restored below."""
    trainee = lab.trained(Run(lab.prior, DENOISER, STEPS))
    found = []
    with attached(lab, trainee):
        for damage in DAMAGE:
            clean, damaged, words = degraded(SCENE, damage, SEED)
            restored = restore(lab, trainee, damaged, damage, words, SEED, Way())
            report.say(f"{damage}: {figures(damaged, clean)['psnr']:.1f} -> {figures(restored, clean)['psnr']:.1f} dB")
            found.append(torch.cat([damaged[0], torch.ones(GAP, clean.shape[2], 3), restored[0]]))
    return found


def main() -> None:
    """Write the picture."""
    argparse.ArgumentParser(prog="python dev bench degradation_picture", description=__doc__).parse_args()
    # Now, while as much is loaded as where degradation_space asks for it: then its trained run is found.
    report.code()
    parts = columns(Lab("pixel", tokenizer_weights()))
    white = torch.ones(len(parts[0]), GAP, 3)
    page = torch.cat([part for column in parts for part in (column, white)][:-1], 1)
    Image.fromarray((page * 255).round().byte().numpy()).save(FILE, quality=88)


if __name__ == "__main__":
    main()
