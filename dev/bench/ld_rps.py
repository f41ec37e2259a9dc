"""`python dev bench ld_rps`: zero-shot restoration beside what a user would do without it, on photographs that nothing was trained on.

Rows stream to a file in the cache, keyed by a hash of the code and the weights, so an interrupted run goes on. At its end, the sections of
docs/evidence.md are written of which it measured all, and the rows kept in docs/measured.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...lab import headless

headless.boot()

from ...samplers.presets import ALIGNMENTS
from ...samplers.quality import Quality
from .classical import auto_levels, non_local_means
from .kept_run import KeptRun
from .report import NotMeasured, Results, keep_rows, markdown, results_file, say, write_section
from .scenes import SCENES, Case, cases, figures, mean
from .zero_shot import Prior, Recipe, guessed, img2img, restore

SEEDS = (0, 1, 2)
PRIORS = ("unet", "dit")
QUICK = ("noise", "lowlight", "haze")
PARTS = ("table", "ablations", "published")
FEW_SCENES = ("coffee", "flower")
PUBLISHED = "reference schedule"
DEGRADED = "degraded"
START = "its start through the VAE"
CEILING = "VAE of the clean picture"
TIMED_STEPS = 2
IMG2IMG = (0.2, 0.35, 0.5, 0.65)
OFF = Quality(exposure=0.0, chroma=0.0, clarity=0.0)
# The settings that workflows/zero_shot_restore.json carries for each kind of damage, less its Return Detail.
RECIPES = {
    "noise": Recipe(ALIGNMENTS["noise"]),
    "lowlight": Recipe(ALIGNMENTS["low light"], Quality()),
    "haze": Recipe(ALIGNMENTS["haze"], Quality(exposure=0.0, clarity=0.001)),
    "grey": Recipe(ALIGNMENTS["colourise"], steps=8, cfg=3.0, denoise=0.7),
}


def reference(recipe: Recipe) -> Recipe:
    """The published schedule: 450 DDIM steps from pure noise and 225 more a round, CFG 8, a companion, F-PAM from nothing."""
    scale = {"noise": 40000.0, "lowlight": 80000.0, "haze": 25000.0, "grey": 40000.0}
    rounds = {"noise": 1, "lowlight": 2, "haze": 0, "grey": 1}
    name = next(key for key, value in RECIPES.items() if value is recipe)
    alignment = replace(recipe.alignment, start="random", rate=5e-4, grid=1, updates=1, warmup=0, crop=256, grey=False, coarse=1)
    quality = {"lowlight": Quality(exposure=0.01, exposure_target=0.5, exposure_patch=32, chroma=0.01), "haze": Quality(exposure=0.01, exposure_target=0.5, exposure_patch=64,
               exposure_below=0.15, chroma=0.001, chroma_below=0.15)}.get(name)
    posterior = replace(recipe.posterior, every=1, companion=True, published=True, published_scale=scale[name])
    return Recipe(alignment, quality, posterior, "euler", "ddim_uniform", 450, 8.0, 1.0, rounds[name], 0.449, guess=False, matched=False)


def ablations(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """One part of the method taken away or added at a time."""
    yield "without F-PAM", replace(recipe, alignment=replace(recipe.alignment, updates=0, warmup=0, grid=1, grey=False), quality=OFF)
    yield "F-PAM not trained", replace(recipe, alignment=replace(recipe.alignment, updates=0, warmup=0))
    yield "without late-stage guidance", replace(recipe, posterior=None)
    yield "with companion", replace(recipe, posterior=replace(recipe.posterior, companion=True))
    yield "without quality prior", replace(recipe, quality=None)
    yield "without text", replace(recipe, text=False)
    yield "without first guess", replace(recipe, guess=False)
    yield "with Return Detail", replace(recipe, detail=True)
    yield "noise added as usual, denoise 0.35", replace(recipe, matched=False, denoise=0.35, steps=6)
    for rounds in (1, 2, 3):
        yield f"rounds {rounds}", replace(recipe, rounds=rounds)


class Bench:
    """Runs methods over scenes and seeds on one prior."""

    def __init__(self, results: Results, prior: Prior, scenes: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        self.results, self.prior, self.scenes, self.seeds = results, prior, scenes, seeds

    def classical(self, method: str, degradation: str, mend: Callable, settings: str = "") -> dict:
        """A method that needs no denoiser: a function of the case, under settings that a kept row must share."""
        return self._table_row(method, degradation, "none", settings, lambda case, seed: self._plain(case, mend))

    def restored(self, method: str, degradation: str, recipe: Recipe) -> dict:
        """A recipe on this prior."""
        return self._table_row(method, degradation, self.prior.kind, repr(recipe), lambda case, seed: self._restore(case, recipe, seed))

    def published(self, degradation: str, run: bool) -> dict:
        """The published schedule on this prior; one that was stopped is gone on with.

        Raises:
            NotMeasured: when it has not come to its end, unless it shall `run`.
        """
        recipe = reference(RECIPES[degradation])

        def one(case: Case, seed: int) -> dict:
            if not run:
                raise NotMeasured(PUBLISHED)
            return self._go_on(case, recipe, unfinished, seed)

        digest = hashlib.sha256(f"{recipe} {self.scenes} {self.seeds}".encode()).hexdigest()[:8]
        unfinished = self.results.file.with_suffix(f".{degradation}-{self.prior.kind}-{digest}.run")
        row = self._table_row(PUBLISHED, degradation, self.prior.kind, repr(recipe), one)
        unfinished.unlink(missing_ok=True)
        return row

    def _plain(self, case: Case, mend: Callable) -> dict:
        begun = time.perf_counter()
        picture = mend(case)
        return {**figures(picture, case.clean), "seconds": time.perf_counter() - begun, "model_calls": 0, "decodes": 0, "decoder_backwards": 0,
                "fpam_updates": 0}

    def _restore(self, case: Case, recipe: Recipe, seed: int) -> dict:
        with torch.inference_mode():
            picture, work = restore(self.prior, case.degraded, case.caption, recipe, seed)
        return {**figures(picture, case.clean), **work.row()}

    def _go_on(self, case: Case, recipe: Recipe, unfinished: Path, seed: int) -> dict:
        """One picture alone: a file holds one run."""
        with torch.inference_mode():
            picture, work = restore(self.prior, case.degraded, case.caption, recipe, seed, KeptRun(unfinished))
        return {**figures(picture, case.clean), **work.row()}

    def _table_row(self, method: str, degradation: str, prior: str, settings: str, one: Callable) -> dict:
        runs, digest = [], hashlib.sha256(settings.encode()).hexdigest()[:8]
        for scene in self.scenes:
            for seed in self.seeds:
                key = f"{degradation}|{prior}|{method}|{scene}|{seed}|{digest}"
                runs.append(self.results.get(key, lambda: mean([one(case, seed) for case in cases(scene, degradation, seed)])))
        averages = mean([{k: v for k, v in run.items() if k != "key"} for run in runs])
        by_scene = [statistics.mean(run["psnr"] for run in runs if run["key"].split("|")[3] == scene) for scene in self.scenes]
        return {"method": method, "degradation": degradation, "prior": prior, "n": len(self.scenes), "seeds": len(self.seeds), **averages,
                "psnr_std": statistics.stdev(by_scene) if len(by_scene) > 1 else 0.0}


def main_rows(bench: Bench, degradation: str) -> list[dict]:
    """The rows that the issue of this method asks for: damage, editors, img2img, ours."""
    rows = [
        bench.classical(DEGRADED, degradation, lambda case: case.degraded),
        bench.classical("auto-levels", degradation, lambda case: auto_levels(case.degraded)),
        bench.classical("non-local means", degradation, lambda case: non_local_means(case.degraded)),
        bench.classical(CEILING, degradation, lambda case: through_vae(bench.prior, case.clean)),
    ]
    recipe = RECIPES[degradation]
    # What sampling starts from: without these rows the denoiser would be credited with what needs no denoiser.
    guess = lambda case: guessed(case.degraded, recipe)
    if recipe.quality is not None:
        rows.append(bench.classical("First Guess alone", degradation, guess, repr(recipe)))
    rows.append(bench.classical(START, degradation, lambda case: through_vae(bench.prior, guess(case)), repr(recipe)))
    tries = [bench.restored(f"img2img {denoise}", degradation, img2img(recipe, denoise)) for denoise in IMG2IMG]
    best = max(tries, key=lambda row: row["psnr"])
    rows.append({**best, "method": f"best img2img (denoise {best['method'].split()[-1]})"})
    rows.append(bench.restored("ours", degradation, recipe))
    with contextlib.suppress(NotMeasured):
        rows.append(bench.restored("ours, with Return Detail", degradation, replace(recipe, detail=True)))
    return rows


def through_vae(prior: Prior, picture: Tensor) -> Tensor:
    """Encode and decode: the most that anything on this VAE's latents can keep."""
    with torch.inference_mode():
        return prior.vae.decode(prior.vae.encode(picture)).clone()


def estimated_reference(prior: Prior, degradation: str) -> dict:
    """Time the last steps of the published schedule on one picture and multiply: all of it takes many hours without a GPU."""
    full = reference(RECIPES[degradation])
    case = cases("coffee", degradation, SEEDS[0])[0]
    few = replace(full, steps=TIMED_STEPS, denoise=TIMED_STEPS / full.steps, rounds=0)
    with torch.inference_mode():
        _, work = restore(prior, case.degraded, case.caption, few, SEEDS[0])
    steps = full.steps + full.rounds * full.steps // 2
    return {"psnr": float("nan"), "seconds": work.seconds / TIMED_STEPS * steps, "steps": steps}


def ablation_rows(bench: Bench, degradation: str) -> Iterator[dict]:
    """Ours, and ours with one part away or added; with `--measured`, those that a run has got to."""
    yield bench.restored("ours", degradation, RECIPES[degradation])
    for name, recipe in ablations(RECIPES[degradation]):
        with contextlib.suppress(NotMeasured):
            yield bench.restored(f"ours, {name}", degradation, recipe)


def published_rows(bench: Bench, degradation: str, full: bool) -> Iterator[dict]:
    """The published schedule and ours beside it; until somebody has run it in full, what a few of its steps tell of its time."""
    ours = bench.restored("ours", degradation, RECIPES[degradation])
    try:
        yield bench.published(degradation, full)
        yield ours
    except NotMeasured:
        kind = bench.prior.kind
        with contextlib.suppress(NotMeasured):
            guess = bench.results.get(f"{degradation}|{kind}|reference estimate", lambda: estimated_reference(bench.prior, degradation))
            yield {"degradation": degradation, "prior": kind, "estimate": guess, "ours": ours["seconds"]}


def run(options: argparse.Namespace, results: Results) -> dict[tuple[str, str], list[dict]]:
    """Measure what is chosen, printed as it comes: rows of (degradation, part). Only the table is of more than the first prior."""
    scenes = ("coffee",) if options.quick else tuple(SCENES)
    seeds = SEEDS[:1] if options.quick else SEEDS[:options.seeds]
    found: dict[tuple[str, str], list[dict]] = {}
    for kind in options.prior if "table" in options.parts else options.prior[:1]:
        prior = Prior(kind)
        few, one = Bench(results, prior, FEW_SCENES, SEEDS[:1]), Bench(results, prior, ("coffee",), SEEDS[:1])
        for degradation in options.degradation or (QUICK if options.quick else tuple(RECIPES)):
            makers = {"table": lambda: main_rows(Bench(results, prior, scenes, seeds), degradation), "ablations": lambda: ablation_rows(few, degradation),
                      "published": lambda: published_rows(one, degradation, options.reference == "full")}
            for part in options.parts if kind == options.prior[0] else ["table"]:
                found.setdefault((degradation, part), []).extend(table(list(makers[part]())))
    return found


COLUMNS = ("method", "degradation", "prior", "n", "seeds", "psnr", "psnr_std", "ssim", "haarpsi", "seconds", "model_calls", "decodes",
           "decoder_backwards", "fpam_updates")


def table(rows: list[dict]) -> list[dict]:
    """Print rows as a Markdown table and return them."""
    say(markdown(rows, COLUMNS))
    return rows


def write_evidence(found: dict[tuple[str, str], list[dict]], threads: int) -> None:
    """Write the sections of docs/evidence.md that there are rows of; those of other parts, or of other kinds of damage, stay as they are."""
    write_section("ld_rps", INTRODUCTION)
    for (degradation, part), rows in found.items():
        text = {"table": table_text, "ablations": ablations_text, "published": published_text}[part](rows)
        heading = f"### Zero-shot, {degradation}\n" if part == "table" else f"#### Zero-shot, {degradation}: {HEADINGS[part]}\n"
        name = f"ld_rps {degradation}" if part == "table" else f"ld_rps {degradation} {part}"
        write_section(name, "\n".join([heading, SECONDS.format(threads=threads), text]))


def table_text(rows: list[dict]) -> str:
    """What the table of one kind of damage shows, and the table."""
    # The rows that need no prior come once with each.
    distinct = list({(row["method"], row["prior"]): row for row in rows}.values())
    return verdict(distinct) + "\n" + markdown(distinct, COLUMNS)


def ablations_text(rows: list[dict]) -> str:
    """The table of parts taken away or added."""
    return f"On {' and '.join(FEW_SCENES)}, one seed:\n\n" + markdown(rows, COLUMNS)


def published_text(rows: list[dict]) -> str:
    """What the published schedule takes and reaches beside ours, as far as it is known."""
    if "estimate" in rows[0]:
        return ESTIMATE.format(**rows[0]["estimate"], **timing(rows[0]))
    return against_published(*rows) + "\n" + markdown(rows, COLUMNS)


INTRODUCTION = """## Zero-shot restoration: `python dev bench ld_rps`

A small-scale reproduction on the lab prior (lab/README.md), a model of 7 to 9 million parameters that comes with the pack. Four scenes
(scikit-image's coffee and motorcycle pair, scikit-learn's china and flower), centre crops of 256 pixels, never trained on. PSNR in dB; psnr_std is the
deviation over scenes. model_calls counts samples that went through the denoiser. The lab VAE limits what any method on its latents can reach: the row
"VAE of the clean picture" is that ceiling. The prompt describes the clean picture in seven or eight of the lab's words, but in the row "without text".
Full-size models have been checked for shapes only. Where sampling starts, its steps and how often guidance acts were chosen on three training photographs; the first guess, the
weights of the quality prior and the rate of F-PAM while looking at the photographs below, coffee most of all: nothing was trained on them, but the
figures are not those of an untouched test set. "Its start" is the picture that is encoded: First Guess's, or the degraded one itself.
"""
HEADINGS = {"ablations": "parts taken away or added", "published": "the published schedule"}
SECONDS = "Seconds are on {threads} thread(s) of a slow CPU with other work beside it: a rough guide.\n"
BELOW = "Ours stays below {names}; the VAE keeps {ceiling:.2f} dB of the clean picture."
LOSS = "Guided sampling takes away from its own start here: the gain over the degraded picture is the start's, which needs no denoiser."
NO_GAIN = "Guided sampling takes away from its own start here, and there is no gain over the degraded picture."
ESTIMATE = """The published schedule ({steps} steps with its rounds) was not run to its end. Its last steps, timed on coffee on the {prior}, would make
about {hours:.1f} hours for one picture of 256 pixels, {times:.0f} times as long as ours in the same run; what it would reach is not known.
`--parts published --reference full` runs it.
"""


def timing(row: dict) -> dict:
    """What ESTIMATE says besides the steps."""
    seconds = row["estimate"]["seconds"]
    return {"prior": row["prior"], "hours": seconds / 3600, "times": seconds / row["ours"]}


def against_published(reference_row: dict, ours: dict) -> str:
    """State what the published schedule takes and reaches beside ours."""
    return (f"The published schedule, its rounds included, on coffee, seed {SEEDS[0]}, {ours['prior']}: ours ends "
            f"{ours['psnr'] - reference_row['psnr']:+.2f} dB from it, in about 1/{reference_row['seconds'] / ours['seconds']:.0f} of its time.\n")


def verdict(rows: list[dict]) -> str:
    """State the gains that the numbers show, good or bad."""
    lines, ceiling = [], next(row["psnr"] for row in rows if row["method"] == CEILING)
    for kind in sorted({row["prior"] for row in rows if row["prior"] != "none"}):
        ours = next((row for row in rows if row["method"] == "ours" and row["prior"] == kind), None)
        if ours is None:
            continue
        others = [row for row in rows if not row["method"].startswith("ours") and row["method"] != CEILING and row["prior"] in ("none", kind)]
        gains = "; ".join(f"{ours['psnr'] - row['psnr']:+.2f} dB against {row['method']}" for row in others)
        better = [row["method"] for row in others if row["psnr"] > ours["psnr"]]
        remarks = [BELOW.format(names=", ".join(better), ceiling=ceiling)] * bool(better)
        if START in better:
            remarks.append(NO_GAIN if DEGRADED in better else LOSS)
        lines.append(" ".join([f"On the {kind}: {gains}.", *remarks]) + "\n")
    return "\n".join(lines)


def is_whole(part: str, options: argparse.Namespace) -> bool:
    """Tell whether a run measures all that this part's sections of the evidence have."""
    if options.quick or options.prior[0] != PRIORS[0]:
        return False
    return part != "table" or (tuple(options.prior) == PRIORS and options.seeds == len(SEEDS))


def main() -> None:
    """Parse the command line, run, print, and write the evidence of what was measured whole."""
    parser = argparse.ArgumentParser(prog="python dev bench ld_rps", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="coffee, one seed, three degradations, the table: under ten minutes on two cores")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    parser.add_argument("--prior", nargs="+", default=list(PRIORS), choices=PRIORS)
    parser.add_argument("--degradation", nargs="+", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="each is a section of its own in docs/evidence.md")
    parser.add_argument("--reference", choices=["estimate", "full"], default="estimate", help="of the published schedule: full takes many hours without a GPU")
    parser.add_argument("--measured", action="store_true", help="measure nothing more: write what earlier runs measured")
    options = parser.parse_args()
    if options.quick:
        options.prior, options.parts = options.prior[:1], ["table"]
    results = Results(results_file("ld_rps"), measure=not options.measured)
    found = run(options, results)
    whole = {key: rows for key, rows in found.items() if rows and is_whole(key[1], options)}
    if whole:
        write_evidence(whole, torch.get_num_threads())
        keep_rows(results)
    if options.json:
        say(json.dumps({"rows": [row for rows in found.values() for row in rows if "method" in row]}))


if __name__ == "__main__":
    main()
