"""`python dev bench degradation_space`: diffusion in the degradation space on the lab, beside image space, words, and parts left out."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...lab import headless

headless.boot()

from ...degradations.recipe import Recipe, Step  # noqa: E402 - after boot
from ...degradations.visual_ground import visual_ground  # noqa: E402
from ...lab.prior import load_lab_prior  # noqa: E402
from ...model_patches.degradation_estimator import KIND as ESTIMATOR  # noqa: E402
from ...model_patches.degradation_estimator import findings, mixed_tokens  # noqa: E402
from ...model_patches.degradation_model import DEVIATION, new_weights  # noqa: E402
from ...model_patches.degradation_tokenizer import KIND as TOKENIZER  # noqa: E402
from ...model_patches.degradation_tokenizer import SIZES, check_fit  # noqa: E402
from ...model_patches.host import weights_fingerprint  # noqa: E402
from ...model_patches.host_gradients import gradients  # noqa: E402
from ...model_patches.weights_file import Weights, load_weights  # noqa: E402
from ...training.checkpoint import open_run  # noqa: E402
from ...training.degradation_model import DegradationTrainee, ResidualDenoising  # noqa: E402
from ...training.denoising import Denoising  # noqa: E402
from ...training.loop import describe_run, train  # noqa: E402
from ...training.settings import Settings  # noqa: E402
from ...training.sources import good_folder  # noqa: E402
from ...training.trainee import Models  # noqa: E402
from ..cache import home  # noqa: E402
from . import degradation_oracle as oracle  # noqa: E402
from . import report  # noqa: E402
from .adapter import Watcher, training_pictures  # noqa: E402
from .degradation_findings import (  # noqa: E402
    BLIND,
    CEILINGS,
    COLUMNS,
    CONCATENATION,
    DEGRADED,
    DENOISER,
    FORMS,
    IMAGE,
    INPUTS,
    LATENT,
    MAIN,
    MEANS,
    METHODS_OF,
    ONE_STEP,
    PIXEL,
    SHOWN,
    TOLD_NOTHING,
    WORDS,
    asked,
    averages,
    evidence,
)
from .degradation_oracle import COMPOSITE, RECIPES, TASKS, degraded  # noqa: E402
from .published import TRAINED, full_weights, store, weights_of  # noqa: E402
from .remembered import FewPairs, RememberingEncoder, RememberingVAE  # noqa: E402
from .scenes import SCENES, figures, mean, over_scenes, seeded  # noqa: E402

SEEDS = (0, 1, 2)
RANK, CROP, STEPS, RATE = 32, 128, 1000, 1e-3
SAMPLING_STEPS = 10
HOME = home()
CHART = 11
# As Estimate Visual Instruction has it.
CONFIDENCE = 0.5
# What is changed from the model of the latent form; all are trained alike.
METHODS: dict[str, dict[str, Any]] = {
    LATENT: {"form": "latent"}, PIXEL: {"form": "pixel"}, IMAGE: {"form": "picture"}, WORDS: {"form": "latent", "instruction": "words"},
    DEGRADED: {"form": "latent", "instruction": "degraded"}, CONCATENATION: {"form": "latent", "bridge": "concatenation"}, SHOWN: {"form": "latent"},
    DENOISER: {"form": "latent", "fine_tune": True},
}
# What the command line calls them.
NAMES = {"latent": LATENT, "pixel": PIXEL, "image": IMAGE, "words": WORDS, "degraded": DEGRADED, "concatenation": CONCATENATION,
         "shown": SHOWN, "denoiser": DENOISER}
# Those that are told of nothing, and of the wrong thing.
MISTAKEN = tuple(INPUTS)
# A step on pixels costs many times one on latents.
BATCHES = {"unet": 8, "dit": 8, "pixel": 4}
# The forms that may be published.
PUBLISHED = FORMS | {"denoiser": DENOISER}


def training_recipes() -> list[Recipe]:
    """The tasks at several strengths, so that the chart has something to tell, and haze with noise upon it, which no sum of both is."""
    settings: dict[str, list[dict[str, Any]]] = {
        "gaussian noise": [{"sigma": sigma} for sigma in (15, 25, 35, 50)],
        "blur": [{}],
        "haze": [{"density": density} for density in (0.8, 1.2, 1.6)],
        "low light": [{"exposure": exposure} for exposure in (0.2, 0.25, 0.35)],
        "rain": [{"rain": rain} for rain in (0.35, 0.5, 0.7)],
        "jpeg": [{"quality": quality} for quality in (10, 20)],
    }
    tasks = [[Recipe((Step.of(kind, variant),)) for variant in variants] for kind, variants in settings.items()]
    tasks.append([
        Recipe((Step.of("haze", {"density": density}), Step.of("gaussian noise", {"sigma": sigma})))
        for density, sigma in ((0.8, 35), (1.2, 15), (1.2, 25), (1.6, 25))
    ])  # fmt: skip
    # A recipe is drawn with equal chances: every task counts the same.
    return [recipe for variants in tasks for recipe in variants for _ in range(12 // len(variants))]


@dataclass(frozen=True)
class Run:
    """One training run."""

    prior: str
    method: str
    steps: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.prior} {self.method} {self.steps}".replace(",", "")


class Shown(ResidualDenoising):
    """As usual: the residual is there under any noise."""

    noised = Denoising.noised


class ShownTrainee(DegradationTrainee):
    """Never sees noise alone in training."""

    OBJECTIVE = Shown


class Lab:
    """A prior, a tokenizer, and what was trained on them, one thing at a time."""

    def __init__(self, prior: str, codes: Weights) -> None:
        self.prior, self.codes = prior, codes
        model, clip, vae = load_lab_prior(prior)
        if prior != "pixel":  # whose latents are the pictures themselves
            vae = RememberingVAE(vae, HOME / "bench" / f"latents-degradation-{weights_fingerprint(vae.patcher)[:12]}.safetensors")
        self.models = Models(model, clip, vae)
        self.known: dict[str, DegradationTrainee] = {}
        self.seen: dict[tuple[str, str, int], Tensor] = {}

    def through_vae(self, damaged: Tensor, name: tuple[str, str, int]) -> Tensor:
        """Return a damaged picture through the VAE, which is asked once for each name."""
        if name not in self.seen:
            self.seen[name] = self.models.vae.decode(self.models.vae.encode(damaged)).clamp(0, 1)
        return self.seen[name]

    def fresh(self, run: Run) -> DegradationTrainee:
        """What a run starts from."""
        variant = dict(METHODS[run.method])
        weights = new_weights(self.models.model.model, self.codes, variant.pop("form"), "small", RANK, 0, **variant)
        return (ShownTrainee if run.method == SHOWN else DegradationTrainee)(weights, self.models)

    def trained(self, run: Run) -> DegradationTrainee:
        """Train, or go on, or take what an earlier run trained."""
        if run.name not in self.known:
            trainee = self.fresh(run)
            pairs = FewPairs(good_folder(training_pictures()), training_recipes(), crop=CROP)
            settings = Settings(steps=run.steps, batch=BATCHES[run.prior], rate=RATE, schedule="cosine", warmup=20, ema=0.98, validate_every=0, checkpointing=False)
            trainee.encoder = RememberingEncoder(trainee.encoder, HOME / "bench" / f"tokens-{trainee.config['codebook'][:12]}.safetensors")
            description = report.of_this_code(describe_run(trainee, pairs, self.models, settings))
            folder = open_run(HOME / "bench" / "degradation_space", run.name, description, run.steps)
            result = train(trainee, pairs, self.models, settings, folder, Watcher(run.name))
            if isinstance(self.models.vae, RememberingVAE):
                self.models.vae.save()
            trainee.encoder.save()
            trainee.load_state_dict(result.tensors)
            self.known = {run.name: trainee}
        return self.known[run.name]


@contextmanager
def attached(lab: Lab, trainee: DegradationTrainee) -> Iterator[None]:
    """The trainee on its models, without gradients."""
    with gradients(), trainee.attach(lab.models), torch.no_grad():
        yield


@dataclass(frozen=True)
class Way:
    """How a trained model is used.

    Attributes:
        told: what the instruction shows: "true", "null", "blind", or a degradation or several with commas.
        samples, cfg: of the sampler and the instruction.
        steps: of Euler; one gives the mean of all damage that the picture may have, E[y0 | LQ].
    """

    told: str = "true"
    samples: int = 1
    cfg: float = 1.0
    steps: int = SAMPLING_STEPS


def instruction(lab: Lab, trainee: DegradationTrainee, picture: Tensor, degradation: str, way: Way, estimator: Weights | None) -> Tensor:
    """Tokens of the chart that a way shows."""
    side = SIZES[lab.codes.config["size"]].chart
    chart = visual_ground(CHART, side)
    if way.told == "blind":
        return mixed_tokens(estimator, findings(estimator, picture, "bench")[0].present(CONFIDENCE))
    if way.told == "null":
        return trainee.instruction(chart, chart)
    named = degradation if way.told == "true" else way.told
    damaged, _ = (RECIPES | oracle.COMPOSITES)[named].apply(chart, CHART + 1)
    return trainee.instruction(damaged, chart)


def restore(lab: Lab, trainee: DegradationTrainee, picture: Tensor, degradation: str, words: str, seed: int, way: Way,
            estimator: Weights | None = None) -> Tensor:
    """Sample from pure noise, on the attached trainee."""
    vae = lab.models.vae
    sides = [side // vae.spacial_compression_encode() for side in picture.shape[1:3]]
    noise = torch.randn(1, vae.latent_channels, *sides, generator=seeded(seed))
    tokens = torch.zeros(1, 1, trainee.config["code_width"])
    text = words if trainee.config["instruction"] == "words" and way.told == "true" else ""
    if trainee.config["instruction"] != "words":
        tokens = instruction(lab, trainee, picture, degradation, way, estimator).float()
    return trainee.restored(picture, tokens, text, noise, way.steps, way.samples, way.cfg)


def evaluated(lab: Lab, trainee: DegradationTrainee, degradation: str, way: Way, options: argparse.Namespace,
              estimator: Weights | None = None) -> dict[str, Any]:
    """Figures over scenes and seeds, and how near the result is to the input and to the input through the VAE."""
    def one(name: str, seed: int) -> dict[str, float]:
        clean, damaged, words = degraded(name, degradation, seed)
        restored = restore(lab, trainee, damaged, degradation, words, seed, way, estimator)
        through = lab.through_vae(damaged, (name, degradation, seed))
        return {**figures(restored, clean), "to_input": figures(restored, damaged)["psnr"], "to_encoded_input": figures(restored, through)["psnr"]}

    return over_scenes(one, options.scenes, options.seeds)


def input_row(degradation: str, options: argparse.Namespace, results: report.Results) -> dict[str, Any]:
    """The damaged picture itself."""
    def make() -> dict[str, Any]:
        rows = []
        for scene in options.scenes:
            found = [degraded(name, degradation, seed) for name in SCENES[scene] for seed in options.seeds]
            rows.append(mean([figures(damaged, clean) for clean, damaged, _ in found]))
        return {**mean(rows), "seconds": 0.0, "n": len(rows), "seeds": len(options.seeds)}

    row = results.get(f"{degradation}|degraded|{options.scenes}|{options.seeds}", make)
    return {"method": "degraded", "degradation": degradation, "prior": "none", **row}


class Table:
    """Rows of one prior, each computed once.

    Args:
        lab: the prior.
        options: of the command.
        results: rows of earlier runs.
        estimator: for blind restoration; None leaves those rows out.
        given: published weights by method, in the place of training.
    """

    def __init__(self, lab: Lab, options: argparse.Namespace, results: report.Results, estimator: Weights | None,
                 given: dict[str, Weights] | None = None) -> None:
        self.lab, self.options, self.results, self.estimator, self.given = lab, options, results, estimator, given or {}

    def row(self, method: str, degradation: str, way: Way = Way(), label: str = "", seeds: tuple[int, ...] = ()) -> dict[str, Any] | None:
        """One row, over the command's seeds unless others are named; None where it is not to be measured and is not there."""
        run = Run(self.lab.prior, method, self.options.steps)
        options = argparse.Namespace(scenes=self.options.scenes, seeds=seeds or self.options.seeds)

        def make() -> dict[str, Any]:
            trainee = DegradationTrainee(self.given[method], self.lab.models) if method in self.given else self.lab.trained(run)
            with attached(self.lab, trainee):
                found = evaluated(self.lab, trainee, degradation, way, options, self.estimator)
            return {**found, "parameters": sum(p.numel() for p in trainee.parameters())}

        name = f"{run.prior} {_digest(self.given[method])}" if method in self.given else run.name
        blind = [_digest(self.estimator)] if way.told == "blind" else []
        key = "|".join([name, degradation, str(way), str(options.scenes), str(options.seeds), *blind])
        try:
            found = self.results.get(key, make)
        except report.NotMeasured:
            return None
        return {"method": method + (f", {label}" if label else ""), "degradation": degradation, "prior": self.lab.prior, **found}

    def methods(self) -> list[str]:
        """What is measured, as the table has it from top to bottom."""
        if self.options.published:
            return list(self.given)
        return [method for method in METHODS_OF[self.lab.prior] if not self.options.forms or method in [NAMES[name] for name in self.options.forms]]

    def rows(self) -> list[dict[str, Any]]:
        """All that the issue's table has, one trained model after another."""
        rows = [input_row(name, self.options, self.results) for name in (*TASKS, COMPOSITE)]
        for method in self.methods():
            rows += [self.row(method, name) for name in TASKS]
            if method in MISTAKEN:
                rows += self._mistaken(method)
            if method in MAIN:
                rows += self._uses(method)
        return [row for row in rows if row is not None]

    def _mistaken(self, method: str) -> list[dict[str, Any] | None]:
        """What a model does when it is told of nothing, and of damage that the picture has not. One seed tells."""
        one = self.options.seeds[:1]
        return [*(self.row(method, name, Way("null"), TOLD_NOTHING, one) for name in TASKS),
                *(self.row(method, name, Way(_other(name)), f"told of {_other(name)}", one) for name in TASKS)]

    def _uses(self, method: str) -> list[dict[str, Any] | None]:
        """Composite damage, blind restoration, and what less computing gives; of the pack's own weights, what more gives, too."""
        rows = [self.row(method, COMPOSITE, Way(told), f"told of {told}") for told in (COMPOSITE, "haze", "noise 25")]
        if self.estimator is not None:
            rows += [self.row(method, name, Way("blind"), BLIND) for name in (*TASKS, COMPOSITE)]
        rows += [self.row(method, name, Way(steps=1), ONE_STEP) for name in TASKS]
        if not self.given:
            return rows
        one = self.options.seeds[:1]
        rows += [self.row(method, name, Way(cfg=1.5), "instruction cfg 1.5", one) for name in TASKS]
        return [*rows, *(self.row(method, name, Way(samples=4), "mean of 4 samples", one) for name in TASKS)]


def _digest(weights: Weights) -> str:
    """Tell weights apart, for the names of rows."""
    digest = hashlib.sha256(json.dumps(weights.config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return f"{weights.kind} {digest.hexdigest()[:8]}"


def _other(degradation: str) -> str:
    """A mismatched instruction: for something that the picture has nothing of. Low light is noisy too."""
    return "noise 50" if degradation == "haze" else "haze"


def tokenizer_weights() -> Weights:
    """The lab's trained tokenizer.

    Raises:
        SystemExit: when there is none yet.
    """
    for file in sorted(TRAINED.glob("*.safetensors")):
        if file.is_file() and (weights := load_weights(file)).kind == TOKENIZER:
            check_fit(weights, "bench")
            return weights
    raise SystemExit("There is no trained degradation tokenizer in lab/trained yet. Run `python dev bench degradation_tokenizer --publish` first.")


def estimator_weights() -> Weights | None:
    """The lab's trained estimator, None where there is none yet."""
    found = [weights for file in sorted(TRAINED.glob("*.safetensors")) if (weights := load_weights(file)).kind == ESTIMATOR]
    return found[0] if found else None


def published(prior: str) -> dict[str, Weights]:
    """The pack's own degradation models for a prior, in full precision."""
    found = {}
    for form, method in PUBLISHED.items():
        file = _file(prior, form)
        if method in METHODS_OF[prior] and file.exists():
            found[method] = full_weights(file)
    return found


def publish(lab: Lab, steps: int, forms: list[str]) -> None:
    """Train, or go on, and store the weights in half precision where the pack's own lie; forms that the prior is not for are left out."""
    for form in (form for form in forms if PUBLISHED[form] in METHODS_OF[lab.prior]):
        trainee = lab.trained(Run(lab.prior, PUBLISHED[form], steps))
        weights, file = weights_of(trainee), _file(lab.prior, form)
        assert float(weights.tensors[DEVIATION]) > 0
        store(weights, file)
        report.say(f"{file.name}: {steps} steps")


def _file(prior: str, form: str) -> Path:
    return TRAINED / f"degradation_{form}_{prior}.safetensors"


def ceiling_rows(lab_vae: Any, options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """The oracle's table, from the results if it is there."""
    keys = {name: f"ceiling|{name}|{options.scenes}|{options.seeds}" for name in RECIPES}
    missing = [name for name, key in keys.items() if key not in results.rows]
    found = {row["degradation"]: row for row in (oracle.ceilings(lab_vae, options.scenes, options.seeds, missing) if missing else [])}
    return [results.get(key, lambda name=name: {**found[name], "psnr": found[name]["figures"][f"{found[name]['better']} form"]["psnr"]})
            for name, key in keys.items()]


def main() -> None:
    """Print the ceilings, train, evaluate, print, and write the evidence of a full run; or train what is published."""
    parser = argparse.ArgumentParser(prog="python dev bench degradation_space", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ceilings and the committed weights on coffee, one seed")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    parser.add_argument("--ceilings", action="store_true", help="print the ceilings and stop")
    parser.add_argument("--prior", nargs="+", default=list(METHODS_OF), choices=list(METHODS_OF))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of every run")
    parser.add_argument("--published", action="store_true", help="measure the weights that come with the pack, without writing evidence; nothing is trained")
    parser.add_argument("--measured", action="store_true", help="write the evidence of what is measured already, and measure nothing")
    parser.add_argument("--forms", nargs="+", choices=list(NAMES), metavar="FORM",
                        help=f"train and measure these only, without writing evidence, to share the work among processes: {', '.join(NAMES)}")
    parser.add_argument("--publish", nargs="+", choices=list(PUBLISHED), metavar="FORM",
                        help=f"train these forms only ({', '.join(PUBLISHED)}), store them as the pack's own weights, and stop")
    options = parser.parse_args()
    # First of all: the code that is loaded now is what rows and trained runs are known by.
    results_file = _results_file(options)
    if options.publish:
        codes = tokenizer_weights()
        for prior in options.prior:
            publish(Lab(prior, codes), options.steps, options.publish)
        return
    options.published |= options.quick
    options.scenes, options.seeds = (("coffee",), SEEDS[:1]) if options.quick else (tuple(SCENES), SEEDS[:options.seeds])
    writes = not (options.published or options.forms)
    results = report.Results(results_file, measure=not options.measured)
    rows = ceiling_rows(load_lab_prior("unet")[2], options, results)
    better = {row["degradation"]: row["better"] for row in rows}
    report.say(report.markdown(rows, oracle.COLUMNS))
    if writes:
        report.write_section("degradation_space ceilings", "\n".join([CEILINGS, report.markdown(rows, oracle.COLUMNS)]))
    for prior in [] if options.ceilings else options.prior:
        given = published(prior) if options.published else {}
        if options.published and not given:
            continue
        own = Table(Lab(prior, tokenizer_weights()), options, results, estimator_weights(), given).rows()
        rows += own
        report.say("\n".join([*asked(own, better), report.markdown(averages(own), MEANS), report.markdown(own, COLUMNS)]))
        if writes:
            report.write_section(f"degradation_space {prior}", evidence(own, prior, options, better, _settings(prior)))
    if writes:
        report.keep_rows(results)
    if options.json:
        report.say(json.dumps({"rows": rows}))


def _settings(prior: str) -> dict[str, Any]:
    """What the evidence says of training and sampling."""
    change = "with all weights of the prior" if prior == "pixel" else f"with LoRA of rank {RANK}"
    return {"batch": BATCHES[prior], "crop": CROP, "rate": RATE, "change": change, "sampling": SAMPLING_STEPS}


def _results_file(options: argparse.Namespace) -> Path:
    if not options.quick:
        return report.results_file("degradation_space")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(TRAINED.glob("*.safetensors")))).hexdigest()[:12]
    return HOME / "bench" / f"degradation_space-quick-{digest}-{report.fingerprint()}.jsonl"


if __name__ == "__main__":
    main()
