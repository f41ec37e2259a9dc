"""`python dev bench unildiff`: UniLDiff's two parts on the lab, fusion (DAFF) while sampling and detail experts (DAEM) while decoding.

Everything is trained on the lab's training pictures and evaluated on photographs that nothing was trained on. What was trained and measured
is kept in the cache, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import detail_experts, fusion, report
from .scenes import SCENES

SEEDS = (0, 1, 2)
COLUMNS = ("method", "decode", "task", "prior", "n", "seeds", "psnr", "psnr_std", "gain", "ssim", "haarpsi", "gmsd")
SUMMARY = ("method", "decode", "prior", "psnr", "gain", "ssim", "haarpsi", "gmsd")
INTRODUCTION = """## UniLDiff: `python dev bench unildiff --prior {prior}`

A small-scale reproduction on the lab prior (lab/README.md). One set of weights for {tasks}. The adapter learns with a
LoRA of rank {rank} in {fusion_steps} steps of {fusion_batch} crops of {fusion_crop} px; DAFF in as many on the same crops, the first {alone} alone, the others with
such a LoRA or, where it says so, with all weights of the denoiser at a tenth of the rate. Sampled from pure noise in {sampling} Euler steps
without a prompt. Detail experts are those that come with the pack; `python dev bench detail_experts` prints which expert works where and what they cost;
with `--alone`, what other networks reach on the same budget.
Four scenes, seeds as named; PSNR in dB, GMSD is better when smaller. The column gain is PSNR less that of the plain decode of the same
latents. Latents "of the clean picture" are what no restorer can do better than: the plain decode of them is the ceiling that the VAE sets to all others.
LD-RPS runs with the recipes of `python dev bench ld_rps`, which were chosen on these photographs.
"""


def expert_rows(options: argparse.Namespace, results: report.Results, trainee: detail_experts.DetailExpertsTrainee,
                labs: dict[str, fusion.FusionLab]) -> list[dict[str, Any]]:
    """Plain decode and decode with experts after every restorer."""
    models = detail_experts.lab_models()
    with detail_experts.attached(trainee, models):
        clean = detail_experts.clean_latents(models, options.scenes)
        found = _with_prior("none", detail_experts.rows(results, models, trainee, "of the clean picture", clean, options.scenes, options.seeds))
        for kind in options.prior:
            zero_shot = detail_experts.zero_shot_latents(kind)
            # Half a minute a sampling: one seed.
            found += _with_prior(kind, detail_experts.rows(results, models, trainee, f"LD-RPS, {kind}", zero_shot, options.scenes, options.seeds[:1],
                                                           detail_experts.zero_shot_digest()))
    for lab in labs.values():
        found += _with_prior(lab.kind, rows_after_fusion(options, results, trainee, models, lab))
    return found


def rows_after_fusion(options: argparse.Namespace, results: report.Results, trainee: detail_experts.DetailExpertsTrainee, models: Any,
                      lab: fusion.FusionLab) -> list[dict[str, Any]]:
    """The same after one prior's fusion, which is trained only where a row is missing."""
    run = fusion.Run(lab.kind, fusion.DAFF)

    def rows(restorer: Any = None) -> list[dict[str, Any]]:
        def sampled(picture: Any, seed: int) -> Any:
            return fusion.sampled(restorer, picture, seed)

        return detail_experts.rows(results, models, trainee, f"{fusion.DAFF}, {lab.kind}", dict.fromkeys(fusion.TASKS, sampled), options.scenes, options.seeds,
                                   f"{run.name} {lab.steps} {fusion.BUDGET}")

    try:
        with results.only_known():
            return rows()
    except report.NotMeasured:
        if not results.measure:
            raise
    restorer = lab.trained(run)
    with fusion.attached(lab, restorer), detail_experts.attached(trainee, models):
        return rows(restorer)


def averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over tasks of each method and decode; of LD-RPS over the tasks it has recipes for."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row.get("decode", "plain"), row.get("prior", "none")), []).append(row)
    numbers = ("psnr", "gain", "ssim", "haarpsi", "gmsd")
    return [{"method": method, "decode": decode, "prior": prior,
             **{name: sum(row[name] for row in group) / len(group) for name in numbers if all(name in row for row in group)}}
            for (method, decode, prior), group in groups.items()]  # fmt: skip


def measured(options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """All rows of a full run, training what is needed."""
    labs = {kind: fusion.FusionLab(kind, options.steps) for kind in options.prior}
    rows: list[dict[str, Any]] = []
    for lab in labs.values():
        rows += fusion.rows(lab, results, options.scenes, options.seeds)
    rows += expert_rows(options, results, detail_experts.committed(detail_experts.lab_models()), labs)
    if options.publish:
        for kind, lab in labs.items():
            fusion.publish(lab, fusion.Run(kind, fusion.DAFF))
    return _distinct(rows)


def train_only(options: argparse.Namespace) -> None:
    """Train single methods; a later run finds them trained."""
    for kind in options.prior:
        for method in options.train:
            fusion.FusionLab(kind, options.steps).trained(fusion.Run(kind, method))


def quick(options: argparse.Namespace, results: report.Results) -> list[dict[str, Any]]:
    """The committed experts on coffee, on latents of the clean picture."""
    models = detail_experts.lab_models()
    trainee = detail_experts.committed(models)
    with detail_experts.attached(trainee, models):
        latents = detail_experts.clean_latents(models, options.scenes)
        return _with_prior("none", detail_experts.rows(results, models, trainee, "of the clean picture", latents, options.scenes, options.seeds))


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Everything as Markdown."""
    return ["Means over tasks:\n", report.markdown(averages(rows), SUMMARY), "Task by task:\n", report.markdown(rows, COLUMNS)]


def _with_prior(prior: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prior": prior, **row} for row in rows]


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The damaged pictures themselves come once with each prior."""
    return list({(row["method"], row.get("decode"), row["task"], row.get("prior")): row for row in rows}.values())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python dev bench unildiff", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the committed experts on coffee, one seed, without any training")
    parser.add_argument("--prior", nargs="+", default=["unet", "dit"], choices=["unet", "dit"])
    parser.add_argument("--steps", type=int, default=fusion.STEPS, help="of training, for fusion and adapter")
    parser.add_argument("--measured", action="store_true", help="write the evidence of what is measured already, and measure nothing")
    parser.add_argument("--train", nargs="+", choices=fusion.METHODS, help="train these only, to share the work among processes")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--publish", action="store_true", help="store the trained fusion in lab/trained")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    options.seeds, options.scenes = SEEDS[:options.seeds], tuple(options.scenes)
    if options.quick:
        options.seeds, options.scenes = SEEDS[:1], ("coffee",)
    return options


def main() -> None:
    """Train, evaluate, print, and write the evidence of a full run."""
    options = _options()
    results = report.Results(report.results_file("unildiff"), measure=not options.measured)
    if options.train:
        train_only(options)
        return
    rows = quick(options, results) if options.quick else measured(options, results)
    parts = tables(rows)
    report.say("\n".join(parts))
    if not options.quick:
        introduction = INTRODUCTION.format(prior=" ".join(options.prior), tasks=", ".join(fusion.TASKS), fusion_steps=options.steps,
                                           fusion_batch=fusion.BATCH, fusion_crop=fusion.CROP, alone=round(fusion.ALONE * options.steps),
                                           rank=fusion.RANK, sampling=fusion.SAMPLING_STEPS)
        report.write_section("unildiff", "\n".join([introduction, *parts]))
        report.keep_rows(results)
    if options.json:
        report.say(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
