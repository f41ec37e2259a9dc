"""Degradation-aware feature fusion on the lab, all in one: six kinds of damage by one set of weights, beside the adapter of the same budget.

The rows belong to `python dev bench unildiff`, which adds those of the detail experts: it calls `rows`, `trained`, `attached` and `sampled` here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import piq
import torch
from torch import Tensor

from ...degradations.scales import recipe_of
from ...lab import headless

headless.boot()

import comfy.sample  # noqa: E402 - after boot

from ...lab.photographs import evaluation_photograph  # noqa: E402
from ...model_patches.encoder_features import feature_channels, feature_vae  # noqa: E402
from ...model_patches.fusion_patch import grown, new_fusion  # noqa: E402
from ...model_patches.host import weights_fingerprint  # noqa: E402
from ...model_patches.weights_file import Weights  # noqa: E402
from ...training.checkpoint import open_run  # noqa: E402
from ...training.fusion import FusionTrainee  # noqa: E402
from ...training.loop import describe_run, train  # noqa: E402
from ...training.restoration_adapter import RestorationAdapterTrainee  # noqa: E402
from ...training.settings import Settings  # noqa: E402
from ...training.sources import good_folder  # noqa: E402
from ...training.trainee import Models  # noqa: E402
from . import report  # noqa: E402
from .adapter import HOME, Lab, Watcher, attached, new_weights, training_pictures  # noqa: E402
from .published import TRAINED, store, weights_of  # noqa: E402
from .remembered import RememberingVAE, SamePairs  # noqa: E402
from .scenes import SCENES, eight_bit, figures, over_scenes, seeded  # noqa: E402

TASKS = {
    "noise": recipe_of({"gaussian noise": 3}), "haze": recipe_of({"haze": 2}), "rain": recipe_of({"rain": 2}), "blur": recipe_of({"blur": 2}),
    "low light": recipe_of({"low light": 2}), "haze and noise": recipe_of({"haze": 2, "gaussian noise": 2}),
}  # fmt: skip
DAFF, WITHOUT_SINGLE, ADAPTER = "DAFF", "DAFF without the single stream", "adapter"
WHOLE = "DAFF and the whole denoiser"
METHODS = (ADAPTER, DAFF, WITHOUT_SINGLE, WHOLE)
RANK, CROP, BATCH, RATE, STEPS = 8, 128, 8, 3e-3, 1500
# A fusion learns alone for this part of the steps, then with the denoiser; the rate falls in the second stage only.
ALONE = 2 / 3
# What of it a run's name does not tell.
BUDGET = f"{BATCH}x{CROP} rank {RANK} {SamePairs.__name__}"
SAMPLING_STEPS = 10


@dataclass(frozen=True)
class Run:
    """One training run on all tasks."""

    prior: str
    method: str
    rate: float = RATE

    @property
    def name(self) -> str:
        """A folder's name."""
        stages = "" if self.method == ADAPTER else f" {ALONE:.2f} alone"
        return f"{self.prior} {self.method} {self.rate:g}{stages}".replace("-", " ")


class RememberingFusion(FusionTrainee):
    """Encodes every picture once; for an encoder that does not learn."""

    def __init__(self, weights: Weights, models: Models, seen: RememberingVAE) -> None:
        super().__init__(weights, models)
        self.seen = seen

    def _features(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return self.seen.encode(pictures.cpu()).float().to(self.models.model.load_device)


class FusionLab(Lab):
    """A prior with what was trained on it on all tasks, one method at a time.

    Args:
        kind: unet or dit.
        steps: of every training run.
    """

    def __init__(self, kind: str, steps: int = STEPS) -> None:
        super().__init__(kind, steps)
        vae = self.models.vae.vae
        self.channels = feature_channels(vae)
        self.seen = RememberingVAE(feature_vae(vae), HOME / "bench" / f"features-{weights_fingerprint(vae.patcher)[:12]}.safetensors")

    def trainee(self, run: Run, weights: Weights) -> RestorationAdapterTrainee:
        """What a run trains, from weights."""
        return RestorationAdapterTrainee(weights, self.models) if run.method == ADAPTER else RememberingFusion(weights, self.models, self.seen)

    def trained(self, run: Run) -> RestorationAdapterTrainee:
        """Train, or go on, or take what an earlier run trained: an adapter in one stage, a fusion in the paper's two."""
        model = self.models.model.model
        if run.method == ADAPTER:
            return self._learned(run.name, self.trainee(run, new_weights(model, "small", RANK, seed=0)), self.steps, run.rate)
        alone = round(ALONE * self.steps)
        fresh = new_fusion(model, self.channels, "lite", seed=0, single=run.method != WITHOUT_SINGLE)
        first = Run(self.kind, DAFF if run.method == WHOLE else run.method, run.rate)
        learned = weights_of(self._learned(f"{first.name} first stage", self.trainee(first, fresh), alone, run.rate, "constant"))
        both = grown(learned, model, self.models.vae, RANK, False, seed=0, fine_tune=run.method == WHOLE)
        return self._learned(run.name, self.trainee(run, both), self.steps - alone, run.rate)

    def _learned(self, name: str, trainee: RestorationAdapterTrainee, steps: int, rate: float, schedule: str = "cosine") -> RestorationAdapterTrainee:
        """The trainee after one run."""
        pairs = SamePairs(good_folder(training_pictures()), list(TASKS.values()), crop=CROP)
        settings = Settings(steps=steps, batch=BATCH, rate=rate, schedule=schedule, warmup=20, ema=0.98, validate_every=0, checkpointing=False)
        description = report.of_this_code(describe_run(trainee, pairs, self.models, settings))
        folder = open_run(HOME / "bench" / "fusion", name, description, steps)
        result = train(trainee, pairs, self.models, settings, folder, Watcher(name))
        for remembering in (self.models.vae, self.seen):
            remembering.save()
        trainee.load_state_dict(result.tensors)
        return trainee


def sampled(trainee: RestorationAdapterTrainee, picture: Tensor, seed: int) -> Tensor:
    """Return the raw latent (1, C, h, w) that an attached trainee makes of a damaged picture (1, H, W, 3), from pure noise and without a prompt."""
    noise = torch.randn(1, 16, picture.shape[1] // 8, picture.shape[2] // 8, generator=seeded(seed))
    empty = trainee.denoising.conditioning("")
    return comfy.sample.sample(trainee.restoring(picture), noise, SAMPLING_STEPS, 1.0, "euler", "simple", empty, empty, torch.zeros_like(noise),
                               disable_pbar=True, seed=seed)  # fmt: skip


def restored(trainee: RestorationAdapterTrainee, picture: Tensor, seed: int) -> Tensor:
    """The same, decoded plainly to (1, H, W, 3)."""
    return trainee.models.vae.decode(sampled(trainee, picture, seed)).reshape(picture.shape).clamp(0, 1)


def measures(image: Tensor, clean: Tensor) -> dict[str, float]:
    """Return PSNR (dB), SSIM, HaarPSI and GMSD (smaller is better) of (1, H, W, 3) pictures in 0..1."""
    a, b = (picture.movedim(-1, 1) for picture in (eight_bit(image.detach()), clean))
    return {**figures(image, clean), "gmsd": float(piq.gmsd(a, b, data_range=1.0))}


@lru_cache(maxsize=128)
def case(name: str, task: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return an evaluation photograph, clean and damaged, (1, 256, 256, 3), the damaged one as an 8-bit file holds it."""
    clean = evaluation_photograph(name).permute(1, 2, 0)[None]
    return clean, eight_bit(TASKS[task].apply(clean, seed)[0])


def evaluated(make: Callable[[Tensor, int], Tensor], task: str, scenes: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Figures of make(damaged, seed) over scenes and seeds; the motorcycle pair is one scene."""
    def one(name: str, seed: int) -> dict[str, float]:
        clean, damaged = case(name, task, seed)
        return measures(make(damaged, seed), clean)

    return over_scenes(one, scenes, seeds)


def rows(lab: FusionLab, results: report.Results, scenes: Sequence[str] = tuple(SCENES), seeds: Sequence[int] = (0, 1, 2),
         methods: Sequence[str] = METHODS, tasks: Sequence[str] = tuple(TASKS), rate: float = RATE) -> list[dict[str, Any]]:
    """Train what is needed and evaluate it: a row for every task and method, and one for the damaged picture itself.

    Where nothing is to be measured, methods that are not there are left out.

    Args:
        lab: one prior.
        results: rows that are measured already.
        scenes, seeds, methods, tasks: what to measure.
        rate: learning rate, of all methods.
    """
    found = [_row(results, lab, "LQ", task, scenes, seeds, None, lambda picture, seed: picture) for task in tasks]
    for method in methods:
        run = Run(lab.kind, method, rate)
        missing = [task for task in tasks if _key(run.name, lab, task, scenes, seeds) not in results.rows]
        if not missing:
            found += [_row(results, lab, method, task, scenes, seeds, run, None) for task in tasks]
        if not missing or not results.measure:
            continue
        trainee = lab.trained(run)
        count = sum(p.numel() for p in trainee.parameters())
        with attached(lab, trainee):
            for task in tasks:
                row = _row(results, lab, method, task, scenes, seeds, run, lambda picture, seed: restored(trainee, picture, seed), count)
                found.append(row)
    return found


def publish(lab: FusionLab, run: Run) -> None:
    """Store trained weights in half precision where the pack's own weights lie."""
    store(weights_of(lab.trained(run)), TRAINED / f"fusion_{run.prior}.safetensors")


def recipes_digest() -> str:
    """Tell sets of tasks apart, for the names of rows."""
    return hashlib.sha256(repr([(name, recipe.to_json()) for name, recipe in TASKS.items()]).encode()).hexdigest()[:8]


def _key(name: str, lab: FusionLab, task: str, scenes: Sequence[str], seeds: Sequence[int]) -> str:
    return "|".join([name, task, str(lab.steps), BUDGET, ",".join(scenes), str(tuple(seeds)), recipes_digest()])


def _row(results: report.Results, lab: FusionLab, method: str, task: str, scenes: Sequence[str], seeds: Sequence[int], run: Run | None,
         make: Callable[[Tensor, int], Tensor] | None, parameters: int = 0) -> dict[str, Any]:
    key = _key(run.name if run else "LQ", lab, task, scenes, seeds)
    row = results.get(key, lambda: {**evaluated(make, task, scenes, seeds), "parameters": parameters})
    return {"method": method, "task": task, "prior": lab.kind if run else "none", "rate": run.rate if run else 0.0, **row}

