"""`python dev bench degradation_tokenizer`: the lab's degradation tokenizer and estimator, trained by the pack's own loop, and measured.

Runs go on where they stopped.

Both learn what dev/bench/degradation_space.py needs: haze, rain, low light, blur, noise and JPEG at the levels of degradations/scales.py.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...lab import headless

headless.boot()

from ...degradations.recipe import Recipe  # noqa: E402 - after boot
from ...degradations.scales import SCALES, Scale, recipe_of  # noqa: E402
from ...degradations.visual_ground import visual_ground  # noqa: E402
from ...lab.photographs import TRAINING, training_photographs  # noqa: E402
from ...model_patches import degradation_tokenizer as tokenizer  # noqa: E402
from ...model_patches.degradation_estimator import findings  # noqa: E402
from ...model_patches.degraded_picture import reframed  # noqa: E402
from ...model_patches.weights_file import Weights, load_weights  # noqa: E402
from ...training import kinds  # noqa: E402
from ...training.checkpoint import open_run  # noqa: E402
from ...training.degradation_estimator import new_estimator  # noqa: E402
from ...training.degradation_tokenizer import new_tokenizer  # noqa: E402
from ...training.loop import Progress, describe_run, train  # noqa: E402
from ...training.pairs import Pairs  # noqa: E402
from ...training.seeding import mixed  # noqa: E402
from ...training.settings import Settings  # noqa: E402
from ...training.sources import good_folder  # noqa: E402
from ...training.trainee import Models  # noqa: E402
from . import report  # noqa: E402
from .adapter import HOME, Watcher, training_pictures  # noqa: E402
from .published import TRAINED, halved, store  # noqa: E402

NODE = "python dev bench"
STEPS, ESTIMATOR_STEPS = 900, 500
BATCH, RATE, EMA = 4, 2e-3, 0.99
ESTIMATOR_BATCH, ESTIMATOR_RATE, ESTIMATOR_CROP = 16, 2e-3, 128
RUNS = HOME / "bench" / "tokenizer"
FILES = {kind: TRAINED / f"{kind}.safetensors" for kind in ("degradation_tokenizer", "degradation_estimator")}
FEW, PHOTOGRAPH = ("astronaut.png", "chelsea.png", "rocket.jpg"), 256


@dataclass(frozen=True)
class Plan:
    """How something is trained: crop in pixels, samples a step, learning rate, steps in all, minutes at most this time, seed."""

    crop: int
    batch: int
    rate: float
    steps: int
    minutes: float
    seed: int


def recipes(scales: tuple[Scale, ...] = SCALES) -> list[Recipe]:
    """Each kind of damage alone at half steps of its scale, and a few that often come together."""
    alone = [recipe_of({scale.kind: place / 2}, scales) for scale in scales for place in range(1, 2 * len(scale.levels) + 1)]
    together = [{"haze": 2.0, "gaussian noise": 2.0}, {"low light": 2.0, "gaussian noise": 1.5}, {"blur": 1.5, "jpeg": 2.0}, {"rain": 2.0, "jpeg": 1.5}]
    return alone + [recipe_of(places, scales) for places in together]


def train_tokenizer(steps: int, folder: Path = RUNS, minutes: float = math.inf, seed: int = 0) -> Weights:
    """Train the lab tokenizer for so many steps, or go on, or take what an earlier run trained; more steps go on where fewer ended.

    Args:
        steps: in all.
        folder: of the run.
        minutes: after which to stop for now, with what is reached.
        seed: of weights and run.
    """
    return _trained(new_tokenizer({"size": "lab", "seed": seed}), Plan(64, BATCH, RATE, steps, minutes, seed), folder, "tokenizer")


def train_estimator(trained: Weights, steps: int, folder: Path = RUNS, minutes: float = math.inf, seed: int = 0) -> Weights:
    """Train the lab estimator of a trained tokenizer likewise."""
    plan = Plan(ESTIMATOR_CROP, ESTIMATOR_BATCH, ESTIMATOR_RATE, steps, minutes, seed)
    return _trained(new_estimator(trained, seed, NODE), plan, folder, f"estimator {tokenizer.fingerprint(trained)[:8]}")


def separation(weights: Weights, layouts: int = 8, first: int = 10**6, scales: tuple[Scale, ...] = SCALES) -> dict[str, float]:
    """Tell kinds of damage, and kinds with their levels, by the nearest mean instruction: the part that is right on layouts not in the means."""
    tokens = {
        (scale.kind, level): torch.stack([_summary(weights, scale, level, first + index) for index in range(2 * layouts)])
        for scale in scales for level in range(1, len(scale.levels) + 1)
    }  # fmt: skip
    centres = {label: rows[:layouts].mean(0) for label, rows in tokens.items()}
    known = torch.stack(list(centres.values()))
    guessed = [(label, list(centres)[int((known - row).square().sum(-1).argmin())]) for label, rows in tokens.items() for row in rows[layouts:]]
    return {
        "kind": sum(label[0] == guess[0] for label, guess in guessed) / len(guessed),
        "kind and level": sum(label == guess for label, guess in guessed) / len(guessed),
    }


def estimated(weights: Weights, pictures: list[Tensor], scales: tuple[Scale, ...] = SCALES, seed: int = 0) -> dict[str, float]:
    """Say how often the estimator finds exactly the one kind of damage there is, and how far off its place is then, on pictures (H, W, 3)."""
    right, off, clean, count = 0, [], 0, 0
    for index, picture in enumerate(pictures):
        clean += not findings(weights, picture[None], NODE)[0].present(0.5)
        for number, scale in enumerate(scales):
            for level in range(1, len(scale.levels) + 1):
                damaged = recipe_of({scale.kind: level}, scales).apply(picture[None], mixed(seed, scale.kind, index, level))[0]
                found = findings(weights, damaged, NODE)[0].present(0.5)
                right += found.keys() == {number}
                off += [abs(found[number] - level)] if number in found else []
                count += 1
    return {"right": right / count, "off by": sum(off) / max(1, len(off)), "clean": clean / len(pictures)}


def reconstruction(weights: Weights, charts: int = 8, first: int = 2 * 10**6) -> dict[str, float]:
    """Say how well fresh clean charts come back, in dB, and which part of the codes they need."""
    trainee = kinds.trainee_of(weights, Models())
    used, errors = set(), []
    with torch.no_grad(), trainee.attach(Models()):
        encoder = trainee.network.encoder
        for index in range(charts):
            chart = visual_ground(first + index, trainee.size.chart).movedim(-1, 1)
            features = encoder.features(chart)
            codes = encoder.codebook(features)
            chosen = tokenizer.nearest(features, codes)
            used |= set(chosen.flatten().tolist())
            errors.append((trainee.network.decoder(codes[chosen]).clamp(0, 1) - chart).square().mean())
    return {"psnr": float(-10 * torch.stack(errors).mean().log10()), "use": len(used) / trainee.size.codes}


def _summary(weights: Weights, scale: Scale, level: int, seed: int) -> Tensor:
    """Mean and mean size of the tokens of a fresh chart after damage."""
    chart = visual_ground(seed, tokenizer.SIZES[weights.config["size"]].chart)
    damaged = recipe_of({scale.kind: level}).apply(chart, mixed(seed, scale.kind, level))[0]
    tokens = tokenizer.difference(weights, damaged, chart)[0]
    return torch.cat([tokens.mean(0), tokens.abs().mean(0)])


class _Timed(Watcher):
    """Prints how a run goes, and stops it when its time is over."""

    def __init__(self, name: str, minutes: float) -> None:
        super().__init__(name)
        self.until = time.monotonic() + 60 * minutes

    def stepped(self, progress: Progress) -> None:
        """A line every 50 steps, with what the trainee has to say."""
        super().stepped(progress)
        if progress.step % 50 == 0:
            report.say("    " + ", ".join(f"{name} {value:.3g}" for name, value in progress.figures.items()))

    def stop(self) -> bool:
        """When time is over."""
        return time.monotonic() > self.until


def _trained(weights: Weights, plan: Plan, folder: Path, name: str) -> Weights:
    models = Models()
    trainee = kinds.trainee_of(weights, models)
    pairs = Pairs(good_folder(training_pictures()), recipes(), crop=plan.crop)
    settings = Settings(steps=plan.steps, batch=plan.batch, rate=plan.rate, warmup=20, ema=EMA, seed=plan.seed, validate_every=0)
    run = open_run(folder, name, describe_run(trainee, pairs, models, settings), plan.steps)
    result = train(trainee, pairs, models, settings, run, _Timed(name, plan.minutes))
    return Weights(weights.kind, weights.family, trainee.config, result.tensors, f"{name} after {result.step} steps")


def measured(codes: Weights, estimator: Weights, pictures: list[Tensor]) -> dict[str, float]:
    """Return the figures of both, by name."""
    whole = any(name.startswith(tokenizer.DECODER) for name in codes.tensors)
    rebuilt = {f"charts, {name}": value for name, value in reconstruction(codes).items()} if whole else {}
    told = {f"nearest instruction, {name}": value for name, value in separation(codes).items()}
    return rebuilt | told | {f"estimator, {name}": value for name, value in estimated(estimator, pictures).items()}


def main() -> None:
    """Train both, or take the pack's own, and print codes in use, how well instructions and estimates tell damage apart."""
    parser = argparse.ArgumentParser(prog="python dev bench degradation_tokenizer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure the committed weights, on a few photographs")
    parser.add_argument("--json", action="store_true", help="end with the rows, one for each figure, as one line of JSON")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the tokenizer")
    parser.add_argument("--estimator-steps", type=int, default=ESTIMATOR_STEPS, help="training steps of the estimator")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training each, after which to stop with what is reached; the same command goes on")
    parser.add_argument("--publish", action="store_true", help="store both as the pack's own weights")
    options = parser.parse_args()
    if options.quick:
        codes, estimator = (load_weights(file) for file in FILES.values())
    else:
        codes = train_tokenizer(options.steps, minutes=options.minutes)
        estimator = train_estimator(halved(codes), options.estimator_steps, minutes=options.minutes)
    pictures = photographs(FEW if options.quick else TRAINING)
    found = measured(codes, estimator, pictures)
    report.say(f"{codes.name} and {estimator.name}, on {len(pictures)} training photographs:")
    for name, value in found.items():
        report.say(f"  {name}: {value:.3g}")
    if options.publish and not options.quick:
        for weights in (codes, estimator):
            store(weights, FILES[weights.kind])
    if options.json:
        report.say(json.dumps({"rows": [{"figure": name, "value": value} for name, value in found.items()]}))


def photographs(names: tuple[str, ...]) -> list[Tensor]:
    """Return the middles of photographs, (H, W, 3): the estimator has learned from crops of them, with other damage."""
    known = training_photographs()
    return [reframed(known[name].movedim(0, -1)[None], (PHOTOGRAPH, PHOTOGRAPH))[0] for name in names]


if __name__ == "__main__":
    main()
