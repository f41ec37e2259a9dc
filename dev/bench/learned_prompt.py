"""`python dev bench learned_prompt`: learned prompts on the diffusion bridge, on the lab, beside words, naive training, and the plain form; and video."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lab import headless

headless.boot()

import comfy.sample  # noqa: E402 - after boot
import comfy.samplers  # noqa: E402

from ...degradations.blur import bell_blur  # noqa: E402
from ...degradations.evaluation import degrade  # noqa: E402
from ...lab.photographs import evaluation_photograph  # noqa: E402
from ...lab.prior import load_lab_prior  # noqa: E402
from ...model_patches.host import weights_fingerprint  # noqa: E402
from ...model_patches.learned_prompt import LearnedPrompt  # noqa: E402
from ...model_patches.learned_prompt_patch import AVERAGE, SUM, attach_blend, attach_prompt  # noqa: E402
from ...model_patches.prompt_conditioning import PromptConditioning, conditioning_of  # noqa: E402
from ...model_patches.weights_file import Weights, load_weights  # noqa: E402
from ...samplers.bridge import T0, Bridge, bridge_sigmas  # noqa: E402
from ...training.checkpoint import open_run  # noqa: E402
from ...training.kinds import new_weights, trainee_of  # noqa: E402
from ...training.loop import describe_run, train  # noqa: E402
from ...training.settings import Settings  # noqa: E402
from ...training.sources import good_folder  # noqa: E402
from ...training.trainee import Models  # noqa: E402
from . import report  # noqa: E402
from .adapter import HOME, PICTURES, Watcher, training_pictures  # noqa: E402
from .panning import video_rows  # noqa: E402
from .published import TRAINED, store  # noqa: E402
from .remembered import RememberingVAE, SamePairs  # noqa: E402
from .scenes import SCENES, eight_bit, figures, over_scenes, seeded  # noqa: E402

DEGRADATIONS = ("noise", "lowlight", "haze", "blur")
# Weak noise, so that the blur cannot simply be divided out.
BLUR_SIGMA, BLUR_NOISE = 2.0, 2 / 255
MIXED, PARTS = "haze + noise", ("haze", "noise")
# What somebody would type who knows the lab's words: how the picture looks when it is restored.
WORDS = {"noise": "smooth fine sharp", "lowlight": "bright balanced colourful", "haze": "contrasty colourful vivid", "blur": "sharp detailed fine",
         MIXED: "contrasty colourful vivid smooth sharp"}  # fmt: skip
SEEDS = (0, 1, 2)
CROP, BATCH, STEPS, RATE = 128, 8, 600, 5e-2
# What the lab's texts have; the plain form may have more.
TOKENS = 16
# Form, tokens and rate of what is tried to see whether larger prompts and larger steps do more.
LARGER = (("bridge", TOKENS, RATE), ("bridge", TOKENS, 4 * RATE), ("plain form", TOKENS, 4 * RATE), ("plain form", 128, 4 * RATE),
          ("plain form", 512, 4 * RATE))  # fmt: skip
SAMPLING_STEPS = 20
PROMPT, PLAIN = "learned_prompt", "learned_prompt_conditioning"
# Kind and naive, by the name of what is trained.
FORMS = {"bridge": (PROMPT, False), "naive": (PROMPT, True), "plain form": (PLAIN, False)}


def damage(image: Tensor, degradation: str, seed: int) -> Tensor:
    """Degrade (B, H, W, 3) in 0..1: as in the zero-shot evaluation, or by the blur that is fixed here, or by haze and then noise."""
    if degradation == MIXED:
        return degrade(degrade(image, PARTS[0], seed), PARTS[1], seed + 1000)
    if degradation != "blur":
        return degrade(image, degradation, seed)
    noise = torch.stack([torch.randn(row.shape, generator=seeded(seed + index)) for index, row in enumerate(image)])
    return (bell_blur(image, BLUR_SIGMA) + BLUR_NOISE * noise).clamp(0, 1)


@dataclass(frozen=True)
class Damage:
    """One of the degradations where paired data expects a recipe."""

    name: str

    def apply(self, image: Tensor, seed: int) -> tuple[Tensor, list[str]]:
        """Degrade (1, H, W, 3); nothing is said of it."""
        return damage(image, self.name, seed % 2**31), []

    def to_json(self) -> str:
        """What tells runs apart."""
        return self.name


@dataclass(frozen=True)
class Run:
    """One training run."""

    prior: str
    degradation: str
    form: str
    rate: float
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        """A folder's name."""
        longer = f" {self.tokens} tokens" if self.tokens != TOKENS else ""
        return f"{self.prior} {self.degradation} {self.form} {self.rate:g}{longer}".replace("-", " ")


class Lab:
    """A prior, and what is trained on it."""

    def __init__(self, kind: str, steps: int) -> None:
        self.kind, self.steps = kind, steps
        model, clip, vae = load_lab_prior(kind)
        self.vae = RememberingVAE(vae, HOME / "bench" / f"latents-prompts-{weights_fingerprint(vae.patcher)[:12]}.safetensors")
        self.models = Models(model, clip, self.vae)
        self.sampling = model.get_model_object("model_sampling")

    def trained(self, run: Run) -> Weights:
        """Train, or go on, or take what an earlier run trained."""
        kind, naive = FORMS[run.form]
        weights = new_weights(kind, self.models, {"naive": naive, "length": run.tokens})
        trainee = trainee_of(weights, self.models)
        pairs = SamePairs(good_folder(training_pictures()), [Damage(run.degradation)], crop=CROP)
        settings = Settings(steps=self.steps, batch=BATCH, rate=run.rate, schedule="cosine", warmup=min(200, self.steps // 5), weight_decay=0.0, ema=0.98,
                            validate_every=0, checkpointing=False)
        description = report.of_this_code(describe_run(trainee, pairs, self.models, settings))
        folder = open_run(HOME / "bench" / "learned_prompt", run.name, description, self.steps)
        result = train(trainee, pairs, self.models, settings, folder, Watcher(run.name))
        self.vae.save()
        return Weights(kind, weights.family, trainee.config, result.tensors, run.name)

    def text(self, words: str) -> list:
        """CONDITIONING of a text."""
        return self.models.clip.encode_from_tokens_scheduled(self.models.clip.tokenize(words))

    def restore(self, picture: Tensor, seed: int, way: Way) -> Tensor:
        """Restore (1, H, W, 3) from its own latent under noise, with T0 as trained."""
        model = self.models.model.clone()
        if way.attach is not None:
            way.attach(model)
        conditioning = way.conditioning if way.conditioning is not None else self.text(way.words)
        raw = self.vae.vae.encode(picture)
        sampler = Bridge().sampler() if way.bridge else comfy.samplers.sampler_object("euler")
        sigmas, noise = bridge_sigmas(self.sampling, T0, SAMPLING_STEPS), torch.randn(raw.shape, generator=seeded(seed))
        with torch.inference_mode():
            raw = comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, conditioning, conditioning, raw, disable_pbar=True, seed=seed)
        return self.vae.decode(raw).reshape(picture.shape).clamp(0, 1)


@dataclass(frozen=True)
class Way:
    """How pictures are restored.

    Attributes:
        attach: hangs prompts on a clone of the model.
        words: the text.
        conditioning: in place of a text.
        bridge: walk the bridge, or from the same start and over the same sigmas with the host's Euler.
        runs: of the model in each step.
    """

    attach: Callable[[Any], None] | None = None
    words: str = ""
    conditioning: list | None = None
    bridge: bool = True
    runs: int = 1


def prompted(weights: Weights, **changes: Any) -> Way:
    """The way of one trained prompt, of either form."""
    if weights.kind == PLAIN:
        return Way(conditioning=conditioning_of(PromptConditioning.of(weights)), **changes)
    return Way(attach=lambda model: attach_prompt(model, LearnedPrompt.of(weights)), **changes)


def blended(weights: list[Weights], mode: str) -> Way:
    """The way of several prompts at once."""
    prompts = [(LearnedPrompt.of(each), 1.0) for each in weights]
    return Way(attach=lambda model: attach_blend(model, prompts, mode), runs=len(weights) if mode == AVERAGE else 1)


def evaluated(make: Callable[[Tensor, int], Tensor], degradation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures over scenes and seeds; the motorcycle pair is one scene."""
    def one(name: str, seed: int) -> dict[str, float]:
        clean = evaluation_photograph(name).permute(1, 2, 0)[None]
        return figures(make(eight_bit(damage(clean, degradation, seed)), seed), clean)

    return over_scenes(one, options.scenes, options.seeds)


def row_of(results: report.Results, lab: Lab, degradation: str, label: str, options: argparse.Namespace, way: Callable[[], Way],
           trained_as: str = "") -> dict[str, Any]:
    """One row of a table, from the results if it is there; `trained_as` names the runs that it depends on."""
    def make() -> dict[str, Any]:
        chosen = way()
        found = evaluated(lambda picture, seed: lab.restore(picture, seed, chosen), degradation, options)
        return {**found, "model_calls": SAMPLING_STEPS * chosen.runs}

    key = "|".join([lab.kind, degradation, label, trained_as, ",".join(options.scenes), str(options.seeds)])
    return {"method": label, "degradation": degradation, "prior": lab.kind, **results.get(key, make)}


def plain_rows(results: report.Results, lab: Lab, degradation: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What there is without any training."""
    damaged = results.get(f"{degradation}|degraded|{options.scenes}{options.seeds}", lambda: evaluated(lambda picture, seed: picture, degradation, options))
    rows = [{"method": "degraded", "degradation": degradation, "prior": "none", "model_calls": 0, **damaged}]
    rows.append(row_of(results, lab, degradation, "no prompt, bridge", options, Way))
    rows.append(row_of(results, lab, degradation, "words, bridge", options, lambda: Way(words=WORDS[degradation])))
    return rows


def table_of(lab: Lab, degradation: str, options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """Train what is needed and evaluate it."""
    rows = plain_rows(results, lab, degradation, options)
    for form, label, changes in (
        ("naive", "prompt trained naively, Euler", {"bridge": False}), ("naive", "prompt trained naively, bridge", {}),
        ("plain form", "plain form, bridge", {}), ("bridge", "prompt trained on the bridge", {}),
    ):  # fmt: skip
        run = Run(lab.kind, degradation, form, options.rate)
        named = f"{run.name} {lab.steps}"
        rows.append(row_of(results, lab, degradation, label, options, lambda run=run, changes=changes: prompted(lab.trained(run), **changes), named))
    if options.publish:
        publish(lab, degradation, options.rate)
    return rows


def larger_table(lab: Lab, degradation: str, options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """Prompts with more numbers, and larger steps in training."""
    rows = [plain_rows(results, lab, degradation, options)[1]]
    for form, tokens, rate in LARGER:
        run = Run(lab.kind, degradation, form, rate, tokens)
        row = row_of(results, lab, degradation, f"{form}, {tokens}", options, lambda run=run: prompted(lab.trained(run)), f"{run.name} {lab.steps}")
        rows.append({**row, "method": form, "tokens": tokens, "rate": rate})
    return rows


def mixed_table(lab: Lab, options: argparse.Namespace, results: report.Results, prompt_of: Callable[[str], Weights], named: str) -> list[dict[str, Any]]:
    """Two kinds of damage at once: each prompt alone, and both."""
    rows = plain_rows(results, lab, MIXED, options)
    for part in PARTS:
        rows.append(row_of(results, lab, MIXED, f"{part} prompt alone", options, lambda part=part: prompted(prompt_of(part)), named))
    for mode in (AVERAGE, SUM):
        label = f"{' and '.join(PARTS)} prompts, {mode}"
        rows.append(row_of(results, lab, MIXED, label, options, lambda mode=mode: blended([prompt_of(part) for part in PARTS], mode), named))
    return rows


def publish(lab: Lab, degradation: str, rate: float) -> None:
    """Store what was trained on the bridge in half precision where the pack's own weights lie."""
    store(lab.trained(Run(lab.kind, degradation, "bridge", rate)), published(degradation, lab.kind))


def published(degradation: str, prior: str) -> Any:
    """The file of one of the pack's own prompts."""
    return TRAINED / f"bridge_{degradation}_{prior}.safetensors"


def quick_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The committed prompts on coffee, without any training."""
    rows = []
    for prior in options.prior:
        lab = Lab(prior, 0)
        for degradation in options.degradation:
            file = published(degradation, prior)
            if not file.exists():
                continue
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
            results = report.Results(report.results_file("learned_prompt-quick"))
            rows += plain_rows(results, lab, degradation, options)
            rows.append(row_of(results, lab, degradation, "prompt trained on the bridge", options, lambda file=file: prompted(load_weights(file)), digest))
    return rows


LARGER_COLUMNS = ("method", "tokens", "rate", "degradation", "prior", "n", "seeds", "psnr", "psnr_std", "ssim", "haarpsi")
COLUMNS = ("method", "degradation", "prior", "n", "seeds", "psnr", "psnr_std", "ssim", "haarpsi", "seconds", "model_calls")
VIDEO_COLUMNS = ("way", "frames", "psnr", "jump_at_joins", "jump_elsewhere", "model_calls", "seconds")
INTRODUCTION = """## Learned prompts on the lab's {prior}: `python dev bench learned_prompt --prior {prior}`

A small-scale reproduction on the lab prior (lab/README.md). Prompts of 16 tokens with one alpha per attention module were trained on {pictures} pairs (the
lab's own pictures, crops of {crop} px, each degraded in one way), {steps} steps of {batch}, learning rate {rate:g}, ten times that for the alphas. Restored
with {sampling} steps from T0 0.4, cfg 1. The degradations are those of the zero-shot evaluation (noise 50, low light, haze), and a Gaussian blur of sigma 2
with noise of 2/255. "words": a text that says how the restored picture looks, in words the lab knows. "trained naively": on degraded latents under noise
(weighted as at T0), sampled with Euler steps over the same sigmas, and on the bridge. Four scenes, {seeds} seed(s); PSNR in dB; seconds a picture. Full-size models were checked for shapes only.
"""
LARGER_INTRODUCTION = """## Learned prompts, larger ones: `python dev bench learned_prompt --larger --prior {priors} --degradation {degradations}`

The tables above are of prompts of {tokens} tokens, as many as the lab's texts have, trained with a learning rate of {rate:g}. The plain form, an embedding in place
of a text, may have more. Otherwise all is as there.
"""
VIDEO = """## Learned prompts, video: `python dev bench learned_prompt`

A photograph under a panning camera, 33 frames of 64 px, encoded frame by frame by the lab's VAE (33 latent frames; from WAN's own VAE as many would be 129
frames of video), through a tiny WAN of random weights under a prompt of random numbers: it shows what windows do, not restoration. psnr: of each frame with the one before it after undoing the pan. jump: how much the difference from the clip sampled as a whole changes
from one frame to the next, in thousandths of a latent, where windows begin or end and in all other places.
"""


def main() -> None:
    """Train, evaluate, print; a run over all degradations, scenes and seeds writes the evidence of its priors."""
    parser = argparse.ArgumentParser(prog="python dev bench learned_prompt", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the committed prompts on coffee, one seed: a few minutes on two cores")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    parser.add_argument("--prior", nargs="+", default=["unet", "dit"], choices=["unet", "dit"])
    parser.add_argument("--degradation", nargs="+", default=list(DEGRADATIONS), choices=list(DEGRADATIONS))
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of every run")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--larger", action="store_true", help="only prompts with more tokens, and larger steps, at rates of their own")
    parser.add_argument("--publish", action="store_true", help="store the prompts as the pack's own weights")
    options = parser.parse_args()
    options.scenes, options.seeds = tuple(options.scenes), SEEDS[:options.seeds]
    if options.quick:
        options.scenes, options.seeds = ("coffee",), SEEDS[:1]
        rows = quick_rows(options)
        report.say(report.markdown(rows, COLUMNS))
    elif options.larger:
        rows = larger(options)
    else:
        rows = full(options)
    if options.json:
        report.say(json.dumps({"rows": rows}))


def larger(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The tables of larger prompts; over all scenes and seeds they are written into the evidence."""
    results = report.Results(report.results_file("learned_prompt"))
    labs = [Lab(prior, options.steps) for prior in options.prior]
    tables = [larger_table(lab, degradation, options, results) for lab in labs for degradation in options.degradation]
    introduction = LARGER_INTRODUCTION.format(priors=" ".join(options.prior), degradations=" ".join(options.degradation), tokens=TOKENS, rate=RATE)
    shown("learned_prompt larger", introduction, [report.markdown(rows, LARGER_COLUMNS) for rows in tables],
          (options.scenes, options.seeds) == (tuple(SCENES), SEEDS))
    return sum(tables, [])


def full(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All tables; a prior's section of the evidence is written when all of its degradations, scenes and seeds were asked for."""
    rows, results = [], report.Results(report.results_file("learned_prompt"))
    complete = (tuple(options.degradation), options.scenes, options.seeds) == (DEGRADATIONS, tuple(SCENES), SEEDS)
    for prior in options.prior:
        lab = Lab(prior, options.steps)
        found = [table_of(lab, degradation, options, results) for degradation in options.degradation]
        if set(PARTS) <= set(options.degradation):
            named = f"{options.steps} {options.rate:g}"
            found.append(mixed_table(lab, options, results, lambda part, lab=lab: lab.trained(Run(lab.kind, part, "bridge", options.rate)), named))
        introduction = INTRODUCTION.format(prior=prior, pictures=PICTURES, crop=CROP, steps=options.steps, batch=BATCH, rate=options.rate,
                                           sampling=SAMPLING_STEPS, seeds=len(options.seeds))
        shown(f"learned_prompt {prior}", introduction, [report.markdown(part, COLUMNS) for part in found], complete)
        rows += sum(found, [])
    video = video_rows()
    shown("learned_prompt video", VIDEO, [report.markdown(video, VIDEO_COLUMNS)], complete)
    return rows + video


def shown(section: str, introduction: str, tables: list[str], write: bool) -> None:
    """Print tables, and write them into the evidence."""
    report.say("\n".join(tables))
    if write:
        report.write_section(section, "\n".join([introduction, *tables]))


if __name__ == "__main__":
    main()
