"""`python dev bench adapter`: Restoration Adapters on the lab, beside the host's ControlNet, their parts alone, and restoration guidance."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...lab import headless

headless.boot()

import comfy.sample  # noqa: E402 - after boot
import comfy.samplers  # noqa: E402

from ...degradations.recipe import Recipe, Step  # noqa: E402
from ...lab.photographs import evaluation_photograph  # noqa: E402
from ...lab.pictures import Pictures  # noqa: E402
from ...lab.prior import load_lab_prior  # noqa: E402
from ...lab.vocabulary import describe  # noqa: E402
from ...model_patches.adapter_patch import new_weights  # noqa: E402
from ...model_patches.host import weights_fingerprint  # noqa: E402
from ...model_patches.host_gradients import gradients  # noqa: E402
from ...model_patches.weights_file import Weights  # noqa: E402
from ...samplers.degraded_latent import DegradedLatent  # noqa: E402
from ...samplers.matched_start import MatchedStart, latent_noise  # noqa: E402
from ...samplers.restoration_guidance import Restoration, RestorationGuidance  # noqa: E402
from ...training.checkpoint import open_run  # noqa: E402
from ...training.loop import Progress, describe_run, train  # noqa: E402
from ...training.restoration_adapter import RestorationAdapterTrainee  # noqa: E402
from ...training.settings import Settings  # noqa: E402
from ...training.sources import good_folder  # noqa: E402
from ...training.state import Validation  # noqa: E402
from ...training.trainee import Models  # noqa: E402
from ..cache import home  # noqa: E402
from . import report  # noqa: E402
from .controlnet import ControlNetTrainee  # noqa: E402
from .published import TRAINED, full_weights, store, weights_of  # noqa: E402
from .remembered import RememberingVAE, SamePairs  # noqa: E402
from .scenes import SCENES, figures, mean, over_scenes, seeded  # noqa: E402

NOISE, MIXTURE = "noise 50", "Real-ESRGAN mild x2"
RECIPES = {
    NOISE: Recipe((Step.of("gaussian noise", {"sigma": 50}),)),
    MIXTURE: Recipe((Step.of("real-esrgan", {"preset": "mild", "scale": 2}),)),
}
SEEDS = (0, 1, 2)
RANK, CROP, BATCH, STEPS = 8, 128, 8, 400
# What is published has learned longer than what is compared.
LONG_STEPS = 1200
RATES = (3e-4, 1e-3, 3e-3)
SAMPLING_STEPS = 10
MATCHED_STEPS, LEAST_NOISE = 4, 0.1
PICTURES = 1200
HOME = home()
METHODS = {"adapter + LoRA": ("small", RANK), "adapter": ("small", 0), "LoRA": ("none", RANK)}
CONTROLNET = "ControlNet"
BEST = "adapter + LoRA"
UNTRAINED = "no adapter, noise-matched start"
PUBLISHED = (("dit", NOISE), ("unet", NOISE))


@dataclass(frozen=True)
class Run:
    """One training run."""

    prior: str
    degradation: str
    method: str
    rate: float

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.prior} {self.degradation} {self.method} {self.rate:g}".replace("+", "and").replace("-", " ")


def compared_runs(prior: str, degradation: str) -> Iterator[Run]:
    """What is trained to find the best rate: at all of them on noise, at the highest elsewhere."""
    for method in (BEST, *([CONTROLNET] if prior == "unet" else [])):
        for rate in RATES if degradation == NOISE else RATES[-1:]:
            yield Run(prior, degradation, method, rate)


def training_pictures() -> Path:
    """Write the lab's training pictures with their captions as a user would have them: a folder of files."""
    folder = HOME / "bench" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(PICTURES, seed=1)
    for index in range(PICTURES):
        file = folder / f"{index:05}.png"
        if not file.with_suffix(".txt").exists():
            picture = pictures[index]
            Image.fromarray(picture).save(file)
            file.with_suffix(".txt").write_text(" ".join(describe(picture.astype("float32") / 255)), encoding="utf-8")
    return folder


class Lab:
    """A prior with what was trained on it, one thing at a time."""

    def __init__(self, kind: str, steps: int) -> None:
        self.kind, self.steps = kind, steps
        model, clip, vae = load_lab_prior(kind)
        self.models = Models(model, clip, RememberingVAE(vae, HOME / "bench" / f"latents-{weights_fingerprint(vae.patcher)[:12]}.safetensors"))

    def with_steps(self, steps: int) -> "Lab":
        """Return the same prior for runs of so many steps."""
        longer = copy.copy(self)
        longer.steps = steps
        return longer

    def trainee(self, run: Run, weights: Weights | None = None) -> RestorationAdapterTrainee:
        """What a run trains, fresh or from a file."""
        if run.method == CONTROLNET:
            return ControlNetTrainee(self.models, seed=0)
        size, rank = METHODS[run.method]
        return RestorationAdapterTrainee(weights or new_weights(self.models.model.model, size, rank, seed=0), self.models)

    def trained(self, run: Run) -> RestorationAdapterTrainee:
        """Train, or go on, or take what an earlier run trained."""
        trainee = self.trainee(run)
        pairs = SamePairs(good_folder(training_pictures()), [RECIPES[run.degradation]], crop=CROP)
        settings = Settings(steps=self.steps, batch=BATCH, rate=run.rate, schedule="cosine", warmup=20, ema=0.98, validate_every=0, checkpointing=False)
        description = report.of_this_code(describe_run(trainee, pairs, self.models, settings))
        folder = open_run(HOME / "bench" / "adapter", run.name, description, self.steps)
        result = train(trainee, pairs, self.models, settings, folder, Watcher(run.name))
        self.models.vae.save()
        trainee.load_state_dict(result.tensors)
        return trainee


class Watcher:
    """Prints how a run goes."""

    def __init__(self, name: str) -> None:
        self.name, self.losses = name, []

    def stepped(self, progress: Progress) -> None:
        """A line every 50 steps."""
        self.losses.append(progress.loss)
        if progress.step % 50 == 0:
            report.say(f"  {self.name}: step {progress.step}/{progress.steps}, loss {sum(self.losses[-50:]) / 50:.4f}, {progress.seconds_left:.0f} s left")

    def validated(self, validation: Validation, page: Tensor) -> None:
        """Nothing: the evaluation photographs decide."""

    def stop(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Way:
    """How a trained restorer is used.

    Attributes:
        cfg, words: guidance away from the words of the degradation; at cfg 1 there is none.
        guidance: of samplers/restoration_guidance.py, or None.
        matched: start at the encoded picture and the noise it brings, as Noise-Matched Start does, in MATCHED_STEPS steps.
    """

    cfg: float = 1.0
    words: bool = False
    guidance: Restoration | None = None
    # The label of a row tells it apart: older rows keep their keys.
    matched: bool = field(default=False, repr=False)


def degraded(name: str, degradation: str, seed: int) -> tuple[Tensor, Tensor, str]:
    """An evaluation photograph, clean and damaged, (1, 256, 256, 3), and the words for the damage."""
    clean = evaluation_photograph(name).permute(1, 2, 0)[None]
    damaged, words = RECIPES[degradation].apply(clean, seed)
    return clean, (damaged.clamp(0, 1) * 255).round() / 255, ", ".join(words)


def restore(lab: Lab, trainee: RestorationAdapterTrainee, picture: Tensor, words: str, seed: int, way: Way) -> Tensor:
    """Sample from pure noise, or from the picture, on the attached trainee."""
    model = trainee.restoring(picture)
    if way.guidance is not None:
        model = RestorationGuidance(way.guidance, DegradedLatent(picture, lab.models.vae)).attach(model)
    noise = torch.randn(1, 16, picture.shape[1] // 8, picture.shape[2] // 8, generator=seeded(seed))
    positive, negative = trainee.denoising.conditioning(""), trainee.denoising.conditioning(words if way.words else "")
    if way.matched:
        start = MatchedStart.of([latent_noise(lab.models.model, lab.models.vae, picture)], LEAST_NOISE, seed)
        latent, sigmas = lab.models.vae.encode(picture), start.sigmas(model.get_model_object("model_sampling"), MATCHED_STEPS)
        raw = comfy.sample.sample_custom(model, start.generate_noise({"samples": latent}), way.cfg, comfy.samplers.sampler_object("euler"), sigmas, positive,
                                         negative, latent, disable_pbar=True, seed=seed)
    else:
        raw = comfy.sample.sample(model, noise, SAMPLING_STEPS, way.cfg, "euler", "simple", positive, negative, torch.zeros_like(noise), disable_pbar=True,
                                  seed=seed)
    return lab.models.vae.decode(raw).reshape(picture.shape).clamp(0, 1)


MATCHED = Way(matched=True)
WAYS = (("cfg 1.5", Way(cfg=1.5)), ("cfg 1.5 away from the words", Way(cfg=1.5, words=True)), ("noise-matched start", MATCHED))


@contextmanager
def attached(lab: Lab, trainee: RestorationAdapterTrainee) -> Iterator[None]:
    """The trainee on its models, without gradients."""
    with gradients(), trainee.attach(lab.models), torch.no_grad():
        yield


def evaluated(make: Callable[[Tensor, str, int], Tensor], degradation: str, scenes: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Figures over scenes and seeds; the motorcycle pair is one scene."""
    def one(name: str, seed: int) -> dict[str, float]:
        clean, damaged, words = degraded(name, degradation, seed)
        return figures(make(damaged, words, seed), clean)

    return over_scenes(one, scenes, seeds)


def row_of(results: report.Results, lab: Lab, run: Run, label: str, options: argparse.Namespace, way: Way, trained: Callable[[], Any]) -> dict[str, Any]:
    """One row of a table, from the results if it is there."""
    def make() -> dict[str, Any]:
        trainee = trained()
        with attached(lab, trainee):
            found = evaluated(lambda picture, words, seed: restore(lab, trainee, picture, words, seed, way), run.degradation, options.scenes, options.seeds)
        steps = MATCHED_STEPS if way.matched else SAMPLING_STEPS
        parameters = 0 if run.method == UNTRAINED else sum(p.numel() for p in trainee.parameters())
        return {**found, "parameters": parameters, "model_calls": steps * (1 + (way.cfg != 1))}

    key = "|".join([run.name, label, str(lab.steps), str(way), ",".join(options.scenes), str(options.seeds)])
    return {"method": label, "degradation": run.degradation, "prior": run.prior, "rate": run.rate, **results.get(key, make)}


def plain_rows(results: report.Results, lab: Lab, degradation: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The damaged picture itself, the same through the VAE, and the clean one through the VAE."""
    def coded(picture: Tensor) -> Tensor:
        return lab.models.vae.decode(lab.models.vae.encode(picture)).clamp(0, 1)

    def through_vae(name: str) -> dict[str, Any]:
        clean = evaluation_photograph(name).permute(1, 2, 0)[None]
        return figures(coded(clean), clean)

    damaged = results.get(f"{degradation}|degraded|{options.scenes}{options.seeds}",
                          lambda: evaluated(lambda picture, words, seed: picture, degradation, options.scenes, options.seeds))
    coded_only = results.get(f"{degradation}|degraded through the VAE|{options.scenes}{options.seeds}",
                             lambda: evaluated(lambda picture, words, seed: coded(picture), degradation, options.scenes, options.seeds))
    ceiling = results.get(f"ceiling|{options.scenes}", lambda: {**mean([mean([through_vae(n) for n in SCENES[s]]) for s in options.scenes]), "seconds": 0.0})
    return [{"method": "degraded", "degradation": degradation, "prior": "none", **damaged},
            {"method": "degraded through the VAE", "degradation": degradation, "prior": "none", **coded_only},
            {"method": "VAE of the clean picture", "degradation": degradation, "prior": "none", **ceiling}]


def table_of(lab: Lab, degradation: str, options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """Train what is needed and evaluate it; of several rates only the best is shown, and used for what follows."""
    rows = plain_rows(results, lab, degradation, options)
    one_seed = argparse.Namespace(**{**vars(options), "seeds": options.seeds[:1]})
    best: dict[str, tuple[float, Run]] = {}
    for run in compared_runs(lab.kind, degradation):
        found = row_of(results, lab, run, run.method, one_seed, Way(), lambda run=run: lab.trained(run))["psnr"]
        if run.method not in best or found > best[run.method][0]:
            best[run.method] = (found, run)
    run = best[BEST][1]
    parts = [replace(run, method=method) for method in METHODS if method != BEST]
    for each in (*(chosen for _, chosen in best.values()), *parts):
        rows.append(row_of(results, lab, each, each.method, options, Way(), lambda each=each: lab.trained(each)))
    for label, way in WAYS:
        rows.append(row_of(results, lab, run, f"{BEST}, {label}", options, way, lambda: lab.trained(run)))
    if CONTROLNET in best:
        beside = best[CONTROLNET][1]
        rows.append(row_of(results, lab, beside, f"{CONTROLNET}, noise-matched start", options, MATCHED, lambda: lab.trained(beside)))
    plain = replace(run, method=UNTRAINED)
    rows.append(row_of(results, lab, plain, UNTRAINED, options, MATCHED, lambda: lab.trainee(replace(run, method=BEST))))
    if lab.kind == options.prior[0] and degradation == NOISE:
        rows += grid_of(lab, run, one_seed, results)
    if (lab.kind, degradation) in PUBLISHED:
        longer = lab.with_steps(LONG_STEPS)
        for label, way in ((f"{LONG_STEPS} steps", Way()), (f"{LONG_STEPS} steps, noise-matched start", MATCHED)):
            rows.append(row_of(results, longer, run, f"{BEST}, {label}", options, way, lambda: longer.trained(run)))
        if options.publish:
            publish(longer, run)
    return rows


def grid_of(lab: Lab, run: Run, options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """Restoration guidance: fidelity over weight and onset."""
    rows = []
    for weight in (0.0, 0.02, 0.05, 0.1, 0.2):
        for onset in (0.5, 0.8):
            way = Way(guidance=Restoration(weight=weight, onset=onset))
            row = row_of(results, lab, run, f"restoration guidance, w {weight:g}, a {onset:g}", options, way, lambda: lab.trained(run))
            rows.append(row)
    return rows


def publish(lab: Lab, run: Run) -> None:
    """Store trained weights in half precision where the pack's own weights lie."""
    trainee = lab.trained(run)
    name = {NOISE: "noise", MIXTURE: "real_esrgan"}[run.degradation]
    store(weights_of(trainee), TRAINED / f"{name}_{run.prior}.safetensors")


def quick_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The committed weights on coffee, without any training."""
    rows = []
    for prior in options.prior:
        for degradation, name in ((NOISE, "noise"), (MIXTURE, "real_esrgan")):
            file = TRAINED / f"{name}_{prior}.safetensors"
            if not file.exists():
                continue
            lab, run = Lab(prior, 0), Run(prior, degradation, BEST, 0.0)
            results = report.Results(HOME / "bench" / f"adapter-quick-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}-{report.fingerprint()}.jsonl")
            rows += plain_rows(results, lab, degradation, options)
            full = full_weights(file)
            rows.append(row_of(results, lab, run, BEST, options, Way(), lambda lab=lab, run=run, full=full: lab.trainee(run, full)))
    return rows


COLUMNS = ("method", "degradation", "prior", "n", "seeds", "parameters", "rate", "psnr", "psnr_std", "ssim", "haarpsi", "seconds", "model_calls")
INTRODUCTION = """## Restoration Adapters: `python dev bench adapter`

A small-scale reproduction on the lab prior (lab/README.md). Everything was trained on the same {pictures} pictures (the lab's own kind: procedural ones
and crops of its training photographs, each cropped and degraded in one way), crops of {crop} px, {steps} steps of {batch} samples unless the row says
otherwise, at the best of the learning rates {rates} on noise, at the highest elsewhere. The best rate was chosen on the evaluation photographs with one
seed, for adapters and ControlNet alike. Restored from
pure noise with {sampling} Euler steps, no prompt, except where "noise-matched start" says that sampling began at the encoded picture, in
{matched} steps. The lab's VAE alone takes much noise away: "degraded through the VAE" is what coding does without any
denoiser. Four scenes, {seeds} seed(s); PSNR in dB. "small" adapters with LoRA of rank {rank}.
Full-size models were counted (above), not trained.

Restoration guidance on one photograph, from `python dev bench guidance_picture`:

![One photograph restored with different weights and onsets of restoration guidance](restoration_guidance.jpg)
"""


def write_evidence(tables: list[str], options: argparse.Namespace) -> None:
    """Write this measurement's section of docs/evidence.md."""
    introduction = INTRODUCTION.format(pictures=PICTURES, crop=CROP, steps=options.steps, batch=BATCH, rates=", ".join(f"{rate:g}" for rate in RATES),
                                       sampling=SAMPLING_STEPS, matched=MATCHED_STEPS, rank=RANK, seeds=len(options.seeds))
    report.write_section("adapter", "\n".join([introduction, *tables]))


def main() -> None:
    """Train, evaluate, print, and write the evidence of a full run."""
    parser = argparse.ArgumentParser(prog="python dev bench adapter", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the committed weights on coffee, one seed: under ten minutes on two cores")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    parser.add_argument("--prior", nargs="+", default=["unet", "dit"], choices=["unet", "dit"])
    parser.add_argument("--degradation", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of every run")
    parser.add_argument("--publish", action="store_true", help="store the best adapters as the pack's own weights")
    options = parser.parse_args()
    options.scenes, options.seeds = tuple(SCENES), SEEDS[:options.seeds]
    if options.quick:
        options.scenes, options.seeds = ("coffee",), SEEDS[:1]
        rows = quick_rows(options)
        report.say(report.markdown(rows, COLUMNS))
    else:
        rows, tables = [], []
        results = report.Results(report.results_file("adapter"))
        for prior in options.prior:
            lab = Lab(prior, options.steps)
            for degradation in options.degradation:
                found = table_of(lab, degradation, options, results)
                rows += found
                tables.append(report.markdown(found, COLUMNS))
                report.say(tables[-1])
        write_evidence(tables, options)
    if options.json:
        report.say(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
