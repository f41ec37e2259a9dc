"""`python dev bench adapter_time`: how long an evaluation of the lab's denoisers takes with an adapter, and with the host's ControlNet."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from ...lab import headless

headless.boot()

from ...model_patches.host import batched_conds, evaluate, for_training, loaded_for_training, model_conds  # noqa: E402 - after boot
from . import report  # noqa: E402
from .adapter import CONTROLNET, NOISE, Lab, Run, attached  # noqa: E402
from .scenes import seeded  # noqa: E402

PIXELS, ROUNDS, SIGMA = 512, 30, 0.7
ADAPTER = "adapter"
COLUMNS = ("model", "method", "milliseconds", "of_base")
INTRODUCTION = """## What a Restoration Adapter takes: `python dev bench adapter_time`

One evaluation of the lab's denoisers on the latent of a picture of {pixels} pixels, batch 1, on {threads} thread(s) of a CPU: the fastest of {rounds}, taken
in turn with those it is compared with, texts encoded beforehand. "adapter" is of the size "small"; a LoRA is merged into the model's weights
and takes nothing. ControlNet is the host's class for this UNet. Full-size models were counted (above), not timed.
"""


def evaluations(lab: Lab) -> dict[str, Callable[[], Any]]:
    """One evaluation each way, by name."""
    cells = PIXELS // 8
    x, pixels = torch.randn(1, 16, cells, cells, generator=seeded(0)), torch.rand(1, PIXELS, PIXELS, 3, generator=seeded(1))
    sigma, model = torch.tensor([SIGMA]), lab.models.model
    conds = batched_conds([model_conds(model.model, lab.models.clip.encode_from_tokens_scheduled(lab.models.clip.tokenize("")), x)])
    bare = for_training(model)
    loaded_for_training(bare)
    ways: dict[str, Callable[[], Any]] = {"base": lambda: evaluate(bare, x, sigma, conds)}
    for method in (ADAPTER, *([CONTROLNET] if lab.kind == "unet" else [])):
        trainee = lab.trainee(Run(lab.kind, NOISE, method, 0.0))
        with attached(lab, trainee):
            extra = trainee._extra(pixels, torch.zeros_like(x))
            patched = trainee.denoising.patched
        ways[method] = lambda patched=patched, extra=extra: evaluate(patched, x, sigma, conds | extra)
    return ways


def measure(kind: str) -> list[dict[str, Any]]:
    """The rows of one prior."""
    ways = evaluations(Lab(kind, 0))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for name in [*ways] * ROUNDS:
            begun = time.perf_counter()
            ways[name]()
            taken[name].append(time.perf_counter() - begun)
    # Other work on the machine only ever adds.
    fastest = {name: min(seconds) for name, seconds in taken.items()}
    return [{"model": f"lab {kind}", "method": name, "milliseconds": 1000 * seconds, "of_base": f"{100 * seconds / fastest['base']:.0f} %"}
            for name, seconds in fastest.items()]


def main() -> None:
    """Print the table and write it into docs/evidence.md."""
    parser = argparse.ArgumentParser(prog="python dev bench adapter_time", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="do not write the evidence")
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    options = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("this counts a processor's seconds; hide the GPU (CUDA_VISIBLE_DEVICES=) and start again")
    rows = [row for kind in ("unet", "dit") for row in measure(kind)]
    table = report.markdown(rows, COLUMNS)
    report.say(table)
    if not options.quick:
        introduction = INTRODUCTION.format(pixels=PIXELS, rounds=ROUNDS, threads=torch.get_num_threads())
        report.write_section("adapter_time", f"{introduction}\n{table}")
    if options.json:
        report.say(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
