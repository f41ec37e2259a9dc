"""`python dev bench adapter_cost`: parameters and operations of adapters and ControlNet on full-size models, counted on meta tensors."""

from __future__ import annotations

from typing import Any

import torch

from ...lab import headless

headless.boot()

from comfy.cli_args import args  # noqa: E402 - after boot

args.use_pytorch_cross_attention = True  # the other implementations ask for free memory, which meta tensors have no device for

import comfy.cldm.cldm  # noqa: E402
import comfy.ops  # noqa: E402

from ...model_patches.anatomy import anatomy_of  # noqa: E402
from ...model_patches.diffusion_adapter import DiffusionAdapter  # noqa: E402
from ...model_patches.restoration_adapter import RestorationAdapter, adapter_sites  # noqa: E402
from .full_size import FULL_SIZE, META, SDXL_UNET, FullSize, Model, count_command, empty, macs, parameters  # noqa: E402

PIXELS, RANK = 1024, 32
PAPER = {"SDXL": 157e6, "SD3 medium": 80e6}

INTRODUCTION = """## What a Restoration Adapter costs: `python dev bench adapter_cost`

Counted on the host's full-size networks without weights (meta tensors), one evaluation of a picture of 1024 pixels. A LoRA of rank 32 is part of the
parameters; it is merged into the model's weights and costs no operations. Nothing here was trained or timed. The paper reports 157 million parameters
for SDXL and 80 million for SD3. ControlNet is the host's class for SDXL.
"""


def base_macs(size: FullSize, model: Model) -> float:
    """One evaluation of the denoiser."""
    x = size.latent(PIXELS)
    return macs(lambda: model.diffusion_model(x, empty(1), transformer_options={}, **size.inputs()))


def adapter_macs(size: FullSize, model: Model, network: RestorationAdapter) -> float:
    """All adapters of one evaluation, on features of the sizes that the model has there."""
    anatomy = anatomy_of(model)
    side = PIXELS // 8

    def run() -> None:
        features = {"stem": network.embed(size.latent(PIXELS))}
        for site in adapter_sites(anatomy):
            places = side // site.scale
            x_t = empty(1, places * places, site.channels) if network.tokens else empty(1, site.channels, places, places)
            network.change(site.name, features, x_t, empty(1, anatomy.emb))

    return macs(run)


def controlnet_row(size: FullSize, base: float) -> dict[str, Any]:
    """The host's ControlNet for SDXL."""
    config = {k: v for k, v in SDXL_UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, **META)
    x, inputs = size.latent(PIXELS), size.inputs()
    cost = macs(lambda: network(x, empty(1, 3, PIXELS, PIXELS), empty(1), inputs["context"], inputs["y"]))
    return row("SDXL", "ControlNet", parameters(network), cost, base)


def row(model: str, method: str, count: int, cost: float, base: float) -> dict[str, Any]:
    """One line of the table."""
    paper = PAPER.get(model) if method.startswith("adapter +") else None
    return {"model": model, "method": method, "parameters": count, "gmac": cost / 1e9, "of_base": cost / base, "of_paper": paper and count / paper}


def measure(names: list[str]) -> list[dict[str, Any]]:
    """Count everything."""
    rows = []
    for name in names:
        size = FULL_SIZE[name]
        model = size.build()
        base = base_macs(size, model)
        rows.append(row(name, "base", parameters(model.diffusion_model), base, base))
        with torch.device("meta"):
            network = RestorationAdapter(anatomy_of(model), "full", comfy.ops.manual_cast, dtype=torch.float16)
            small = RestorationAdapter(anatomy_of(model), "small", comfy.ops.manual_cast, dtype=torch.float16) if not network.tokens else None
            lora = parameters(DiffusionAdapter(model, RANK))
        rows.append(row(name, f"adapter + LoRA {RANK}", parameters(network) + lora, adapter_macs(size, model, network), base))
        if small is not None:
            rows.append(row(name, f"small adapter + LoRA {RANK}", parameters(small) + lora, adapter_macs(size, model, small), base))
        if name == "SDXL":
            rows.append(controlnet_row(size, base))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | part | parameters (M) | GMAC at 1024 px | of base | of the paper's parameters |", "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        paper = "" if not r["of_paper"] else f"{100 * r['of_paper']:.1f} %"
        lines.append(f"| {r['model']} | {r['method']} | {r['parameters'] / 1e6:.1f} | {r['gmac']:.0f} | {100 * r['of_base']:.1f} % | {paper} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it into docs/evidence.md."""
    count_command("adapter_cost", __doc__, INTRODUCTION, ["SDXL", "SD3 medium"], measure, table)


if __name__ == "__main__":
    main()
