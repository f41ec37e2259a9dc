"""Act on the features that leave a denoiser's blocks, through the host's own attachments. Part of what host.py stands for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .anatomy import Anatomy, Site

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# (site, feature, timestep embedding, the host's transformer_options) -> feature. UNets give (B, C, h, w), transformers the picture's tokens
# (B, N, C).
Visit = Callable[[Site, Tensor, Tensor, dict], Tensor]


def visit_blocks(patcher: "ModelPatcher", anatomy: Anatomy, sites: list[Site], key: str, visit: Visit) -> None:
    """Have `visit` change what leaves the blocks before `sites`, on a patcher that is the caller's own clone.

    Args:
        patcher: changed.
        anatomy: of its model.
        sites: some of the anatomy's.
        key: transformer_options that lack it pass untouched, so that whoever opens a model evaluation decides whether anything happens.
        visit: called with features that it must not change in place.
    """
    if anatomy.kind == "unet":
        _visit_unet(patcher, sites, key, visit)
        return
    for site in sites:
        _visit_transformer(patcher, site, key, visit, anatomy.kind)


def _visit_unet(patcher: "ModelPatcher", sites: list[Site], key: str, visit: Visit) -> None:
    after, before = ({site.index: site for site in sites if site.kind == kind} for kind in ("input", "output"))
    emb_key = f"{key}_emb"

    def keep_emb(emb: Tensor, model_channels: int, options: dict) -> Tensor:
        if key in options:
            options[emb_key] = emb
        return emb

    def leave_input(h: Tensor, options: dict) -> Tensor:
        site = after.get(options["block"][1])
        return h if site is None or key not in options else visit(site, h, options[emb_key], options)

    def enter_output(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        site = before.get(options["block"][1])
        return (h if site is None or key not in options else visit(site, h, options[emb_key], options)), skip

    patcher.set_model_patch(keep_emb, "emb_patch")
    patcher.set_model_patch(leave_input, "input_block_patch_after_skip")
    patcher.set_model_patch(enter_output, "output_block_patch")


def _visit_transformer(patcher: "ModelPatcher", site: Site, key: str, visit: Visit, kind: str) -> None:
    replaced = patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    number = (f"{site.kind}_block", site.index)
    earlier = replaced.get(number)

    def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args) if earlier is None else earlier(args, extra)
        options = args["transformer_options"]
        if key not in options:
            return out
        tokens, emb = out["img"], _embedding(args["vec"], kind)
        if site.kind == "double":
            return {**out, "img": visit(site, tokens, emb, options)}
        text = options["img_slice"][0]
        return {**out, "img": torch.cat([tokens[:, :text], visit(site, tokens[:, text:], emb, options)], 1)}

    patcher.set_model_patch_replace(block, "dit", *number)


def _embedding(vec: Tensor, kind: str) -> Tensor:
    """Return (B, width).

    WAN hands its blocks six modulation vectors, each a linear map of the embedding: the first stands for it. Where every frame has a time of its own,
    the last frame's counts, since a given first frame is told to be clean.
    """
    return vec[:, -1, 0] if kind == "wan" else vec
