"""`python dev bench fusion_cost`: parameters and operations of degradation-aware feature fusion on full-size models, counted on meta tensors."""

from __future__ import annotations

from typing import Any

import torch

from ...lab import headless

headless.boot()

from comfy.cli_args import args  # noqa: E402 - after boot

args.use_pytorch_cross_attention = True  # the other implementations ask for free memory, which meta tensors have no device for

import comfy.ops  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402

from ...model_patches.anatomy import anatomy_of  # noqa: E402
from ...model_patches.daff import DAFF, PRESETS, layout_of  # noqa: E402
from ...model_patches.encoder_features import features  # noqa: E402
from .full_size import FULL_SIZE, SD_VAE, count_command, empty, macs, parameters  # noqa: E402

PIXELS, FEATURES = 512, 512
INTRODUCTION = """## What degradation-aware feature fusion costs: `python dev bench fusion_cost`

Counted on the host's full-size networks without weights (meta tensors), one evaluation of a picture of 512 pixels. The condition embedding and the LQ
encoder run once a picture, not once a step; the encoder is a copy of the user's own VAE encoder, here that of SD and SDXL. Nothing here was trained or
timed.
"""


def step_macs(network: DAFF) -> float:
    """One evaluation of the fusion."""
    cells, layout = PIXELS // 8, network.layout
    x = empty(1, (cells // layout.patch) ** 2, layout.channels) if layout.tokens else empty(1, layout.channels, cells, cells)
    return macs(lambda: network(x, empty(1, layout.embedding, cells, cells), empty(1), {}))


def encoder_row() -> dict[str, Any]:
    """The LQ encoder of SD and SDXL."""
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=dict(SD_VAE), embed_dim=4).half()
    cost = macs(lambda: features(vae, empty(1, 3, PIXELS, PIXELS)))
    # The hook sees the middle block's output, and what runs after it is next to nothing.
    unused = parameters(vae.encoder.norm_out) + parameters(vae.encoder.conv_out)
    return {"model": "SD, SDXL", "part": "LQ encoder, once a picture", "parameters": parameters(vae.encoder) - unused, "gmac": cost / 1e9, "of_base": None}


def measure(names: list[str]) -> list[dict[str, Any]]:
    """Count everything."""
    rows = []
    for name in names:
        size = FULL_SIZE[name]
        model = size.build()
        base = macs(lambda: model.diffusion_model(size.latent(PIXELS), empty(1), transformer_options={}, **size.inputs()))
        rows.append({"model": name, "part": "base", "parameters": parameters(model.diffusion_model), "gmac": base / 1e9, "of_base": 1.0})
        for preset in PRESETS:
            with torch.device("meta"):
                network = DAFF(layout_of(anatomy_of(model), preset, FEATURES), comfy.ops.manual_cast, dtype=torch.float16)
            cost = step_macs(network)
            rows.append({"model": name, "part": f"fusion, {preset}", "parameters": parameters(network), "gmac": cost / 1e9, "of_base": cost / base})
            embedding = macs(lambda: network.embed(empty(1, FEATURES, PIXELS // 8, PIXELS // 8)))
        rows.append({"model": name, "part": "condition embedding, once a picture", "parameters": parameters(network.embedding),
                     "gmac": embedding / 1e9, "of_base": None})  # fmt: skip
    return [*rows, encoder_row()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | part | parameters (M) | GMAC at 512 px | of base |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        share = "" if r["of_base"] is None else f"{100 * r['of_base']:.1f} %"
        lines.append(f"| {r['model']} | {r['part']} | {r['parameters'] / 1e6:.1f} | {r['gmac']:.1f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it into docs/evidence.md."""
    count_command("fusion_cost", __doc__, INTRODUCTION, ["SDXL"], measure, table)


if __name__ == "__main__":
    main()
