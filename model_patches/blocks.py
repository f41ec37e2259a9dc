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


def block_replacement(patcher: "ModelPatcher", place: tuple[str, int]) -> Callable | None:
    """Return what a patcher calls in place of a transformer's block, such as ("double_block", 0); None for the block itself."""
    return patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {}).get(place)


def visit_blocks(patcher: "ModelPatcher", anatomy: Anatomy, sites: list[Site], key: str, visit: Visit, skips: bool = False) -> None:
    """Have `visit` change what leaves the blocks before `sites`, on a patcher that is the caller's own clone.

    Args:
        patcher: changed.
        anatomy: of its model.
        sites: some of the anatomy's.
        key: transformer_options that lack it pass untouched, so that whoever opens a model evaluation decides whether anything happens.
        visit: called with features that it must not change in place.
        skips: what `visit` returns after a UNet's input blocks goes over its skip connections too.
    """
    if anatomy.kind == "unet":
        _visit_unet(patcher, sites, key, visit, skips)
        return
    for site in sites:
        _visit_transformer(patcher, site, key, visit, anatomy.kind)


def changed_picture(x: Tensor, tokens: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change (B, N, C) the first `tokens` tokens, those of the picture itself; FLUX puts those of reference pictures behind them."""
    if x.shape[1] == tokens:
        return change(x)
    return torch.cat([change(x[:, :tokens]), x[:, tokens:]], 1)


def _visit_unet(patcher: "ModelPatcher", sites: list[Site], key: str, visit: Visit, skips: bool) -> None:
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
    patcher.set_model_patch(leave_input, "input_block_patch" if skips else "input_block_patch_after_skip")
    patcher.set_model_patch(enter_output, "output_block_patch")


def _visit_transformer(patcher: "ModelPatcher", site: Site, key: str, visit: Visit, kind: str) -> None:
    number = (f"{site.kind}_block", site.index)
    earlier = block_replacement(patcher, number)

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

    WAN hands its blocks six modulation vectors, each a linear map of the embedding: the first stands for it. Where every frame has a time
    of its own, the last frame's counts, since a given first frame is told to be clean.
    """
    return vec[:, -1, 0] if kind == "wan" else vec


def visit_entry(patcher: "ModelPatcher", anatomy: Anatomy, key: str, visit: Callable[[Tensor, dict], Tensor]) -> None:
    """Have `visit` change what enters the first block, on a patcher that is the caller's own clone.

    That is what leaves the first convolution of a UNet (B, C, h, w), for the main path and the skip alike, or the patch embedding of a
    transformer: its picture tokens (B, N, C), positions included where the model adds them there.

    Args:
        patcher: changed.
        anatomy: of its model.
        key: transformer_options that lack it pass untouched.
        visit: called with a feature that it must not change in place, and transformer_options.
    """
    if anatomy.kind == "unet":
        def enter_input(h: Tensor, options: dict) -> Tensor:
            return visit(h, options) if key in options and options["block"][1] == 0 else h

        patcher.set_model_patch(enter_input, "input_block_patch")
        return
    number = ("double_block", 0)
    earlier = block_replacement(patcher, number)

    def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options = args["transformer_options"]
        if key in options:
            args = {**args, "img": visit(args["img"], options)}
        return extra["original_block"](args) if earlier is None else earlier(args, extra)

    patcher.set_model_patch_replace(block, "dit", *number)
