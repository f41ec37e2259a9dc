"""The part of `python dev demo` that runs inside the environment: degrade a photograph, restore it on the host, measure."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import aiohttp
import numpy as np
import torch
from PIL import Image, ImageOps
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..degradations.evaluation import degrade
from .bench.scenes import CAPTIONS
from .console import say
from .queue_run import ProgressLines
from .workflow_client import Client, Result, queue_workflow
from .workflow_prompt import WorkflowError, read_workflow
from .workspace import PACK

WORKFLOW = PACK / "workflows" / "zero_shot_restore.json"
DEFAULT_SIDE = 256
LONGEST_SIDE = 512
MULTIPLE = 16
GAP = 4

# What the workflow is told about each degradation, as --set would tell it.
SETTINGS = {
    "noise": ["MendFPAMAlignment.preset=noise"],
    "lowlight": ["MendFPAMAlignment.preset=low light", "MendQualityPrior.exposure=0.001"],
    "haze": ["MendFPAMAlignment.preset=haze", "MendQualityPrior.clarity=0.001"],
    "grey": ["MendFPAMAlignment.preset=colourise", "MendNoiseMatchedStart.at_least=0.7", "MendNoiseMatchedStart.steps=8", "CFGGuider.cfg=3"],
}
# What the default photograph shows. A photograph of the user's gets no words: none are better than wrong ones.
CAPTION = f"What the Picture Shows.text={CAPTIONS['coffee']}"


def default_photograph() -> Image.Image:
    """The middle of a photograph that nothing here was trained on."""
    return centre_crop(Image.fromarray(data.coffee()), DEFAULT_SIDE, DEFAULT_SIDE)


def users_photograph(path: Path) -> Image.Image:
    """A photograph of the user's, made to fit."""
    try:
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError as error:
        raise WorkflowError(f"cannot read {path} as a picture: {error}") from error
    if max(photo.size) > LONGEST_SIDE:
        photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    width, height = (side // MULTIPLE * MULTIPLE for side in photo.size)
    if not width or not height:
        raise WorkflowError(f"{path} is too small: the demo needs at least {MULTIPLE} pixels on each side")
    return centre_crop(photo, width, height)


def centre_crop(photo: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture."""
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    return photo.crop((left, top, left + width, top + height))


def degraded(photo: Image.Image, kind: str, seed: int) -> Image.Image:
    """The photograph as the evaluation degrades it."""
    pixels = torch.from_numpy(np.asarray(photo, dtype=np.float32) / 255)[None]
    spoilt = degrade(pixels, kind, seed)[0].clamp(0, 1)
    return Image.fromarray((spoilt.numpy() * 255).round().astype(np.uint8))


def measure(picture: Image.Image, truth: Image.Image) -> dict[str, float]:
    """PSNR in dB and SSIM against the photograph."""
    ours, reference = np.asarray(picture), np.asarray(truth)
    return {
        "psnr": round(float(peak_signal_noise_ratio(reference, ours, data_range=255)), 3),
        "ssim": round(float(structural_similarity(reference, ours, data_range=255, channel_axis=2)), 4),
    }


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both pictures with a thin gap between them."""
    both = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both


async def restore(server: str, before: Path, settings: list[str], seed: int, folder: Path) -> tuple[Image.Image, Result]:
    """Queues the workflow on the degraded picture; returns the picture it saves."""
    lines = ProgressLines()
    async with Client(server) as client:
        try:
            result = await queue_workflow(client, read_workflow(WORKFLOW), settings=settings, inputs=[before], seed=seed, progress=lines)
        finally:
            lines.end()
        await client.save(result, folder)
    saved = [file["path"] for file in result.files if file["type"] == "output"]
    if not saved:
        raise WorkflowError(f"{WORKFLOW.name} saved no picture")
    with Image.open(saved[0]) as picture:
        return picture.convert("RGB"), result


def build_parser() -> argparse.ArgumentParser:
    """The options that `python dev demo` passes on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--degradation", choices=list(SETTINGS), default="noise")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--server", required=True)
    return parser


def demonstrate(options: argparse.Namespace) -> dict[str, object]:
    """Degrades, restores and measures; writes before.png, after.png and compare.png."""
    truth = users_photograph(options.input) if options.input else default_photograph()
    before = degraded(truth, options.degradation, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    before.save(options.out / "before.png")
    settings = SETTINGS[options.degradation] + ([] if options.input else [CAPTION]) + options.settings
    with tempfile.TemporaryDirectory() as folder:
        after, result = asyncio.run(restore(options.server, options.out / "before.png", settings, options.seed, Path(folder)))
    after.save(options.out / "after.png")
    side_by_side(before, after).save(options.out / "compare.png")
    return {"before": measure(before, truth), "after": measure(after, truth), "seconds": round(result.seconds, 1)}


def main() -> int:
    """Runs the demonstration and prints what it measured."""
    options = build_parser().parse_args()
    try:
        figures = demonstrate(options)
    except (WorkflowError, aiohttp.ClientError, OSError) as error:
        say(f"error: {error}")
        return 1
    before, after = figures["before"], figures["after"]
    sys.stdout.write(
        f"{options.degradation}: PSNR {before['psnr']:.2f} -> {after['psnr']:.2f} dB, SSIM {before['ssim']:.3f} -> {after['ssim']:.3f}"
    )
    sys.stdout.write(f", {figures['seconds']} s; {options.out / 'compare.png'}\n")
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
