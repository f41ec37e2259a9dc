"""Detail experts on the lab's VAE: what they add to a plain decode, after which restorer, how they share the work, and what they cost.

`python dev bench detail_experts` trains the experts alone, or takes those of the pack (`--shipped`), and measures them on latents of clean photographs and,
if asked, after LD-RPS. What they add after fusion are rows of `python dev bench unildiff`. With `--alone`: what the same budget gives to experts
without a latent and to another network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...lab import headless

headless.boot()

import comfy.sd  # noqa: E402 - after boot
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402

from ...lab.prior import load_lab_prior  # noqa: E402
from ...model_patches.daem import SIZES  # noqa: E402
from ...model_patches.detail_decoder import ExpertRun  # noqa: E402
from ...model_patches.detail_experts import inference_patcher, new_weights  # noqa: E402
from ...model_patches.experts import KERNELS, Routed  # noqa: E402
from ...model_patches.host_gradients import gradients  # noqa: E402
from ...model_patches.vae_sites import skips, vae_anatomy  # noqa: E402
from ...model_patches.weights_file import Weights  # noqa: E402
from ...model_patches.window_grid import Windows  # noqa: E402
from ...training.checkpoint import open_run  # noqa: E402
from ...training.detail_experts import DetailExpertsTrainee  # noqa: E402
from ...training.loop import describe_run, train  # noqa: E402
from ...training.pairs import Pairs  # noqa: E402
from ...training.settings import Settings  # noqa: E402
from ...training.sources import good_folder  # noqa: E402
from ...training.trainee import Batch, Models, Trainee  # noqa: E402
from . import fusion, nafnet, report  # noqa: E402
from .adapter import HOME, Watcher, training_pictures  # noqa: E402
from .full_size import SD_VAE  # noqa: E402
from .fusion import TASKS, evaluated  # noqa: E402
from .ld_rps import RECIPES as ZERO_SHOT  # noqa: E402
from .published import TRAINED, full_weights, store, weights_of  # noqa: E402
from .scenes import SCENES  # noqa: E402
from .zero_shot import Prior, restore  # noqa: E402

# Crops of one window: what is learned is what a window does, and no time goes into fading.
SIZE, WINDOW, CROP, BATCH, RATE, STEPS = "lite", 64, 64, 8, 8e-3, 2000
SEEDS = (0, 1, 2)
FILE = TRAINED / "detail_experts.safetensors"
EXPERTS, WITHOUT_LATENT, NAFNET = "DAEM", "DAEM, latent zeroed", "NAFNet on LQ alone"
# Tasks that the zero-shot method has a recipe for.
ZERO_SHOT_TASKS = {"noise": "noise", "haze": "haze", "low light": "lowlight"}
# (damaged picture (1, H, W, 3), seed) -> raw latent.
Latents = Callable[[Tensor, int], Tensor]


class WithoutLatent(DetailExpertsTrainee):
    """Experts that have to do with the degraded picture alone."""

    def latents(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.encode(batch.clean))


def lab_models() -> Models:
    """The lab's VAE, which both priors share."""
    return Models(vae=load_lab_prior("unet")[2])


def fresh(models: Models) -> Weights:
    """Untrained experts. The lab has no features that people see by, so the perceptual distance is left out."""
    return new_weights(models.vae, SIZE, WINDOW, seed=0, perceptual=0.0)


def trained(method: str, models: Models, steps: int = STEPS, pictures: Path | None = None, rate: float = RATE, crop: int = CROP) -> Trainee:
    """Train one of the three methods, or go on, or take what an earlier run trained.

    Args:
        method: EXPERTS, WITHOUT_LATENT or NAFNET; all see the same pictures in the same order.
        models: from `lab_models`.
        steps: of training.
        pictures: a folder of good pictures; the lab's training pictures in two sizes without it.
        rate: learning rate.
        crop: side of the crops.
    """
    makers = {EXPERTS: lambda: DetailExpertsTrainee(fresh(models), models), WITHOUT_LATENT: lambda: WithoutLatent(fresh(models), models),
              NAFNET: nafnet.NAFNetTrainee}
    trainee = makers[method]()
    pairs = Pairs(good_folder(pictures or two_sizes()), list(TASKS.values()), crop=crop)
    settings = Settings(steps=steps, batch=BATCH, rate=rate, schedule="cosine", warmup=20, ema=0.98, validate_every=0, checkpointing=False)
    description = report.of_this_code({**describe_run(trainee, pairs, models, settings), "method": method})
    folder = open_run(HOME / "bench" / "experts", f"{method} {rate:g}".replace(",", ""), description, steps)
    result = train(trainee, pairs, models, settings, folder, Watcher(method))
    trainee.load_state_dict(result.tensors)
    return trainee


def two_sizes() -> Path:
    """Write the lab's training pictures beside the same at half the size: small crops of the large ones alone are smoother than photographs are."""
    folder = HOME / "bench" / "pictures_in_two_sizes"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(training_pictures().glob("*.png")):
        if not (folder / f"half_{file.name}").exists():
            shutil.copyfile(file, folder / file.name)
            with Image.open(file) as picture:
                half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
            half.save(folder / "half.part", "PNG")
            (folder / "half.part").replace(folder / f"half_{file.name}")
    return folder


@contextmanager
def attached(trainee: Trainee, models: Models) -> Iterator[None]:
    """The trainee on the VAE, without gradients."""
    with gradients(), trainee.attach(models), torch.no_grad():
        yield


def committed(models: Models) -> DetailExpertsTrainee:
    """The experts that come with the pack."""
    return DetailExpertsTrainee(full_weights(FILE), models)


class Memory:
    """Latents that were made once: several rows decode the same ones."""

    def __init__(self, make: Latents) -> None:
        self.make, self.kept = make, {}

    def __call__(self, picture: Tensor, seed: int) -> Tensor:
        """Return the raw latent."""
        key = hashlib.sha256(picture.contiguous().numpy().tobytes() + str(seed).encode()).hexdigest()
        if key not in self.kept:
            self.kept[key] = self.make(picture, seed).clone()
        return self.kept[key]


def rows(results: report.Results, models: Models, trainee: DetailExpertsTrainee, source: str, latents: dict[str, Latents], scenes: Sequence[str],
         seeds: Sequence[int], made_by: str = "") -> list[dict[str, Any]]:
    """Decode the latents of a restorer plainly and with experts: two rows for every task.

    Args:
        results: rows that are measured already.
        models: the lab's VAE.
        trainee: attached.
        source: what to call the restorer.
        latents: by task.
        scenes, seeds: what to measure.
        made_by: what the latents depend on besides, for the names of rows.
    """
    found, digest = [], _digest(trainee)
    for task, make in latents.items():
        make, of = Memory(make), f"{task}|{scenes}|{seeds}|{fusion.recipes_digest()}|{made_by}"
        plain = results.get(f"{source}|plain decode|{of}",
                            lambda: evaluated(lambda picture, seed: _plain(models, make(picture, seed)), task, scenes, seeds))
        with_experts = results.get(f"{source}|{EXPERTS}|{of}|{digest}",
                                   lambda: evaluated(lambda picture, seed: trainee.restored(make(picture, seed), picture).cpu(), task, scenes, seeds))
        for decode, row in (("plain", plain), (EXPERTS, with_experts)):
            found.append({"method": source, "decode": decode, "task": task, "gain": row["psnr"] - plain["psnr"], **row})
    return found


def alone_rows(results: report.Results, models: Models, steps: int, scenes: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What the same budget gives without a latent: experts that get zeros, and a NAFNet of their size."""
    found = []
    for method in (WITHOUT_LATENT, NAFNET):
        learned = f"{steps}|{SIZE}|{WINDOW}|{CROP}|{BATCH}|{RATE}|{nafnet.WIDTHS}|{fusion.recipes_digest()}"
        keys = {task: f"{method}|{task}|{learned}|{scenes}|{seeds}" for task in TASKS}
        if all(key in results.rows for key in keys.values()):
            found += [{"method": method, "decode": "-", "task": task, **results.rows[key]} for task, key in keys.items()]
            continue
        trainee = trained(method, models, steps)
        with attached(trainee, models):
            for task, key in keys.items():
                row = results.get(key, lambda: evaluated(lambda picture, seed: _alone(trainee, picture), task, scenes, seeds))
                found.append({"method": method, "decode": "-", "task": task, **row})
    return found


ALONE = """## What the latent is worth to detail experts: `python dev bench detail_experts --alone`

The pack's experts decode latents of the clean photographs; beside them, trained on the same pictures for as many steps ({steps}), the same experts with the
latent zeroed and a NAFNet of their size, which see the damaged picture only. What these reach is not the latent's. Four scenes, {seeds} seed(s), never
trained on.
"""


def alone_table(options: argparse.Namespace) -> str:
    """Experts with their latent, and what is reached without one, by task and in the mean."""
    models, results = lab_models(), report.Results(report.results_file("detail_experts"))
    trainee = committed(models)
    with attached(trainee, models):
        found = rows(results, models, trainee, "of the clean picture", clean_latents(models, options.scenes), options.scenes, options.seeds)
    found += alone_rows(results, models, options.steps, options.scenes, options.seeds)
    return report.markdown([*found, *means(found)], COLUMNS)


def means(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and decode: the mean over its tasks."""
    made = []
    for method, decode in dict.fromkeys((row["method"], row["decode"]) for row in found):
        own = [row for row in found if (row["method"], row["decode"]) == (method, decode)]
        names = [name for name in ("psnr", "gain", "ssim", "haarpsi", "gmsd") if all(name in row for row in own)]
        made.append({"method": method, "decode": decode, "task": "mean", **{name: sum(row[name] for row in own) / len(own) for name in names}})
    return made


def clean_latents(models: Models, scenes: Sequence[str]) -> dict[str, Latents]:
    """The latents of the clean photographs: the best that a restorer could leave."""
    by_picture: dict[str, Tensor] = {}

    def encoded(task: str) -> Latents:
        def make(picture: Tensor, seed: int) -> Tensor:
            for name in (name for scene in scenes for name in SCENES[scene]):
                clean, damaged = fusion.case(name, task, seed)
                if torch.equal(damaged, picture):
                    if name not in by_picture:
                        by_picture[name] = models.vae.encode(clean).float()
                    return by_picture[name]
            raise LookupError("a picture that is not among the evaluation photographs")

        return make

    return {task: encoded(task) for task in TASKS}


def zero_shot_latents(kind: str) -> dict[str, Latents]:
    """LD-RPS on the lab's prior, with the recipes of `python dev bench ld_rps`, for the tasks that have one."""
    prior = Prior(kind)
    prior.vae = _LastLatent(prior.vae)

    def sampled(recipe: Any) -> Latents:
        def make(picture: Tensor, seed: int) -> Tensor:
            with torch.inference_mode():
                restore(prior, picture, "", recipe, seed)
            return prior.vae.latent.clone()

        return make

    return {task: sampled(ZERO_SHOT[name]) for task, name in ZERO_SHOT_TASKS.items()}


def zero_shot_digest() -> str:
    """Tell sets of recipes apart, for the names of rows."""
    return hashlib.sha256(repr(ZERO_SHOT).encode()).hexdigest()[:8]


class _LastLatent:
    """A VAE that remembers what it decoded last, and is the given one in all else."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.latent = vae, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def decode(self, latent: Tensor) -> Tensor:
        self.latent = latent
        return self.vae.decode(latent)


def shares(trainee: DetailExpertsTrainee, models: Models, scenes: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Return how much of the pictures each expert worked on, for each task and at each place, on latents of the clean photographs."""
    found, latents = [], clean_latents(models, scenes)
    for task, make in latents.items():
        counts: dict[str, list[Tensor]] = {}
        for name in (name for scene in scenes for name in SCENES[scene]):
            _, damaged = fusion.case(name, task, seed)
            _, run = trainee.decode(make(damaged, seed), damaged)
            for place, routed in run.routed.items():
                counts.setdefault(place, []).append(routed.chosen.mean((0, 2, 3)))
        for place, chosen in counts.items():
            found.append({"task": task, "place": place, **{f"k{k}": float(share) for k, share in zip(KERNELS, torch.stack(chosen).mean(0))}})
    whole = {f"k{k}": sum(row[f"k{k}"] for row in found) / len(found) for k in KERNELS}
    return [*found, {"task": "all", "place": "all", **whole}]


SHARES = ("task", "place", *(f"k{k}" for k in KERNELS))


def shares_table(found: list[dict[str, Any]]) -> str:
    """Markdown, in percent."""
    return report.markdown([{name: f"{100 * value:.0f} %" if isinstance(value, float) else value for name, value in row.items()} for row in found], SHARES)


# Cost

COST_SIDE, COST_REPEATS = 192, 3
COSTS = ("decode", "parameters", "gmac", "of_plain", "seconds", "time_of_plain")


def cost_rows(side: int = COST_SIDE) -> list[dict[str, Any]]:
    """Time and operations of one decode at the size of SD's AutoencoderKL with random weights, on one processor core; the smallest of a few times."""
    module = AutoencoderKL(ddconfig=dict(SD_VAE), embed_dim=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02 if p.ndim > 1 else torch.ones(p.shape))
    vae = comfy.sd.VAE(sd=module.state_dict(), config={"params": {"ddconfig": dict(SD_VAE), "embed_dim": 4}})
    model, latent = vae.first_stage_model, torch.randn(1, 4, side // 8, side // 8, generator=generator)
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    with torch.inference_mode():
        plain = _cost("plain", lambda: model.decode(latent), 0)
        found = [plain, _cost("encoder features, once a picture", lambda: skips(model, pixels), 0)]
        seen, anatomy = skips(model, pixels), vae_anatomy(vae)
        for size in SIZES:
            weights = new_weights(vae, size)
            network = inference_patcher(weights, anatomy).model
            # However many windows a picture has, no more than this can be asked of it.
            for daem in network.sites.values():
                daem.router = EveryExpert(daem.router)
            run = ExpertRun(network, seen)
            with run.behind(model, anatomy.sites):
                found.append(_cost(f"{EXPERTS}, {size}, all experts at work", lambda: model.decode(latent), sum(t.numel() for t in weights.tensors.values())))
    for row in found:
        row |= {"of_plain": row["gmac"] / plain["gmac"], "time_of_plain": row["seconds"] / plain["seconds"]}
    return found


def cost_table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    shown = [{**row, "of_plain": f"{100 * row['of_plain']:.0f} %", "time_of_plain": f"{row['time_of_plain']:.2f}", "seconds": f"{row['seconds']:.2f}"} for row in found]
    return report.markdown(shown, COSTS)


class EveryExpert(torch.nn.Module):
    """A router that lets all experts work everywhere."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, windows: Windows, noise: Tensor | None = None) -> Routed:
        """As the router's own, but nobody is left out."""
        routed = self.router(x, windows, noise)
        return replace(routed, chosen=torch.ones_like(routed.chosen), weights=routed.probabilities.to(x))


def _cost(name: str, run: Callable[[], Any], parameters: int) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter:
        run()
    times = []
    for _ in range(COST_REPEATS):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return {"decode": name, "parameters": parameters, "gmac": counter.get_total_flops() / 2e9, "seconds": min(times)}


def _plain(models: Models, latent: Tensor) -> Tensor:
    return models.vae.decode(latent).clamp(0, 1).cpu()


def _alone(trainee: Trainee, picture: Tensor) -> Tensor:
    if isinstance(trainee, nafnet.NAFNetTrainee):
        return trainee.restored(picture)
    return trainee.restored(torch.zeros_like(trainee.encode(picture)), picture).cpu()


def _digest(trainee: Trainee) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(trainee.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# On its own

COLUMNS = ("method", "decode", "task", "n", "seeds", "psnr", "psnr_std", "gain", "ssim", "haarpsi", "gmsd")
INTRODUCTION = """## Detail experts by themselves: `python dev bench {command}`

A small-scale reproduction on the lab's VAE (lab/README.md): experts of size {size}, {steps} steps of {batch} crops of {crop} px, learning rate {rate:g},
from pictures, whole and at half their size, with one of the damages {tasks}. They see the damaged photographs, and decode
latents "of the clean picture", the best that a restorer could leave, or those of LD-RPS with the recipes of `python dev bench ld_rps` for the three
tasks that have one (`--after`, with its number of seeds).
The column gain is PSNR less that of the plain decode of the same latents, in dB; GMSD is better when smaller. Four scenes, {seeds} seed(s), never trained on.
"""


def own_rows(trainee: DetailExpertsTrainee, models: Models, results: report.Results, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure attached experts by restorer and task, with their means."""
    scenes = options.scenes
    found = rows(results, models, trainee, "of the clean picture", clean_latents(models, scenes), scenes, options.seeds)
    for kind in options.after:
        found += rows(results, models, trainee, f"LD-RPS, {kind}", zero_shot_latents(kind), scenes, options.seeds[:options.after_seeds], zero_shot_digest())
    return [*found, *means(found)]


def own_tables(found: list[dict[str, Any]], trainee: DetailExpertsTrainee, models: Models, scenes: tuple[str, ...]) -> list[str]:
    """The figures of attached experts, who worked where, and the cost."""
    return [report.markdown(found, COLUMNS), "Which expert worked on how much of the pictures:\n", shares_table(shares(trainee, models, scenes)),
            f"One decode at the size of SD's AutoencoderKL, random weights, {COST_SIDE} px, one processor core:\n", cost_table(cost_rows())]


def main() -> None:
    """Train the experts, or go on, publish them if asked, and measure them; a run over all scenes and seeds writes the evidence."""
    parser = argparse.ArgumentParser(prog="python dev bench detail_experts", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--crop", type=int, default=CROP)
    parser.add_argument("--pictures", type=Path, help="a folder of good pictures; the lab's training pictures in two sizes without it")
    parser.add_argument("--publish", action="store_true", help="store the weights in lab/trained")
    parser.add_argument("--shipped", action="store_true", help="measure the experts that come with the pack, and train nothing")
    parser.add_argument("--cost", action="store_true", help="print the cost of a decode, and train nothing")
    parser.add_argument("--alone", action="store_true", help="measure the pack's experts beside what learns as long without a latent")
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--after", nargs="*", default=[], choices=["unet", "dit"], help="decode after LD-RPS on these priors, too")
    parser.add_argument("--after-seeds", type=int, default=len(SEEDS), help="seeds of that: a sampling takes about half a minute")
    parser.add_argument("--quick", action="store_true", help="the experts that come with the pack, on coffee, one seed")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: the rows")
    options = parser.parse_args()
    if options.quick:
        options.shipped, options.scenes, options.seeds = True, ["coffee"], 1
    if options.cost:
        report.say(cost_table(cost_rows()))
        return
    options.scenes, options.seeds = tuple(options.scenes), SEEDS[:options.seeds]
    whole = (options.scenes, options.seeds, options.pictures) == (tuple(SCENES), SEEDS, None)
    if options.alone:
        table = alone_table(options)
        report.say(table)
        if whole:
            report.write_section("detail_experts alone", "\n".join([ALONE.format(steps=options.steps, seeds=len(options.seeds)), table]))
        return
    models = lab_models()
    trainee = committed(models) if options.shipped else trained(EXPERTS, models, options.steps, options.pictures, options.rate, options.crop)
    if options.publish:
        store(weights_of(trainee), FILE)
    with attached(trainee, models):
        found = own_rows(trainee, models, report.Results(report.results_file("detail_experts")), options)
        parts = own_tables(found, trainee, models, options.scenes)
    report.say("\n".join(parts))
    if whole:
        introduction = INTRODUCTION.format(command=" ".join(["detail_experts", *sys.argv[1:]]), size=SIZE, steps=options.steps, batch=BATCH,
                                           crop=options.crop, rate=options.rate, tasks=", ".join(TASKS), seeds=len(options.seeds))
        report.write_section("detail_experts", "\n".join([introduction, *parts]))
    if options.json:
        report.say(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
