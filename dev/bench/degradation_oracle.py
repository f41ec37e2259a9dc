"""How far each form of degradation diffusion can get: the true residual, through the VAE. Part of `python dev bench degradation_space`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...degradations.recipe import Recipe, Step
from ...lab.photographs import evaluation_photograph
from . import report
from .scenes import SCENES, eight_bit, figures, mean

if TYPE_CHECKING:
    from comfy.sd import VAE

RECIPES = {
    "noise 25": Recipe((Step.of("gaussian noise", {"sigma": 25}),)),
    "noise 50": Recipe((Step.of("gaussian noise", {"sigma": 50}),)),
    "blur": Recipe((Step.of("blur", {}),)),
    "haze": Recipe((Step.of("haze", {}),)),
    "low light": Recipe((Step.of("low light", {}),)),
    "rain": Recipe((Step.of("rain", {}),)),
    "JPEG": Recipe((Step.of("jpeg", {"quality": 10}),)),
    "fading": Recipe((Step.of("fading", {}),)),
}
# What training and its tables are about; fading stands for smooth damage among the ceilings only.
TASKS = tuple(name for name in RECIPES if name != "fading")
COMPOSITE = "haze + noise"
COMPOSITES = {COMPOSITE: Recipe((Step.of("haze", {}), Step.of("gaussian noise", {"sigma": 25})))}
COLUMNS = ("degradation", "degraded", "latent form", "pixel form", "better")


def degraded(name: str, degradation: str, seed: int) -> tuple[Tensor, Tensor, str]:
    """An evaluation photograph, clean and damaged, (1, 256, 256, 3), and the words for the damage."""
    clean = evaluation_photograph(name).permute(1, 2, 0)[None]
    damaged, words = (RECIPES | COMPOSITES)[degradation].apply(clean, seed)
    return clean, eight_bit(damaged), ", ".join(words)


class Oracle:
    """Both forms, given the truth.

    Args:
        vae: of the lab.
    """

    def __init__(self, vae: "VAE") -> None:
        self.vae, self.nothing = vae, None

    @torch.inference_mode()
    def latent(self, clean: Tensor) -> Tensor:
        """Dec(E(LQ) - (E(LQ) - E(HQ))), which is the clean picture through the VAE, whatever the damage."""
        return self.vae.decode(self.vae.encode(clean)).clamp(0, 1)

    @torch.inference_mode()
    def pixel(self, clean: Tensor, damaged: Tensor) -> Tensor:
        """LQ - 2 (Dec(E(r)) - Dec(E(0))) with r = (LQ - HQ) / 2 in -1..1; decoders answer in 0..1, which is half of that."""
        if self.nothing is None:
            self.nothing = self.vae.decode(self.vae.encode(torch.full_like(clean, 0.5)))
        return (damaged - 2 * (self.vae.decode(self.vae.encode((damaged - clean + 1) / 2)) - self.nothing)).clamp(0, 1)


def ceilings(vae: "VAE", scenes: Sequence[str], seeds: Sequence[int], names: Sequence[str] = tuple(RECIPES)) -> list[dict[str, Any]]:
    """PSNR of what is damaged, and of both forms given the truth, averaged over scenes and seeds."""
    rows, oracle = [], Oracle(vae)
    decoded = {name: oracle.latent(degraded(name, names[0], 0)[0]) for scene in scenes for name in SCENES[scene]}
    for degradation in names:
        found: dict[str, list[dict[str, float]]] = {"degraded": [], "latent form": [], "pixel form": []}
        for scene in scenes:
            of_scene: dict[str, list[dict[str, float]]] = {column: [] for column in found}
            for name in SCENES[scene]:
                for seed in seeds:
                    clean, damaged, _ = degraded(name, degradation, seed)
                    of_scene["degraded"].append(figures(damaged, clean))
                    of_scene["latent form"].append(figures(decoded[name], clean))
                    of_scene["pixel form"].append(figures(oracle.pixel(clean, damaged), clean))
            for column, values in of_scene.items():
                found[column].append(mean(values))
        means = {column: mean(values) for column, values in found.items()}
        row = {column: f"{values['psnr']:.2f} / {values['ssim']:.3f}" for column, values in means.items()}
        better = max(("latent", "pixel"), key=lambda form: means[f"{form} form"]["psnr"])
        rows.append({"degradation": degradation, **row, "better": better, "figures": means})
        report.say(f"  {degradation}: " + ", ".join(f"{column} {row[column]}" for column in found) + f"; {better}")
    return rows
