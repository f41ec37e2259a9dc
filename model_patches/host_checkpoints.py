"""Blocks of the host's denoisers that keep nothing for the backward pass and compute it again. Part of what host.py stands for."""

from collections.abc import Callable
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import block_replacement

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def checkpointed_blocks(patcher: "ModelPatcher") -> "ModelPatcher":
    """Return a clone whose blocks keep no activations for the backward pass but compute them again.

    For UNets, and transformers whose blocks can be replaced (SD3, FLUX, WAN). Patches that others have put around a block stay outside of
    it. FLUX needs unshared_norm_inputs as ever, until the backward pass is over.

    Raises:
        ValueError: for other models.
    """
    patched, diffusion_model = patcher.clone(), patcher.model.diffusion_model
    if hasattr(diffusion_model, "input_blocks"):
        _checkpoint_unet(patched)
        return patched
    lists = {"joint_blocks": "double_block", "double_blocks": "double_block", "single_blocks": "single_block", "blocks": "double_block"}
    sizes = [(kind, len(getattr(diffusion_model, name))) for name, kind in lists.items() if hasattr(diffusion_model, name)]
    if not sizes:
        raise ValueError(f"gradient checkpointing does not know models of the kind {type(patcher.model).__name__}. Switch it off.")
    # The host checkpoints every replaced block of SD3 by itself.
    run = _run_block if hasattr(diffusion_model, "joint_blocks") else _run_checkpointed
    for kind, size in sizes:
        for index in range(size):
            _put_inside(patched, kind, index, run)
    return patched


def _put_inside(patcher: "ModelPatcher", kind: str, index: int, run: Callable[[Callable, dict], dict]) -> None:
    """Have `run` call one of a transformer's blocks, inside of whatever replaces that block already."""
    earlier = block_replacement(patcher, (kind, index))

    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        def inner(args: dict[str, Any]) -> dict[str, Any]:
            return run(extra["original_block"], args)

        return inner(args) if earlier is None else earlier(args, {**extra, "original_block": inner})

    patcher.set_model_patch_replace(replacement, "dit", kind, index)


def _run_block(block: Callable, args: dict[str, Any]) -> dict[str, Any]:
    return block(args)


def _run_checkpointed(block: Callable, args: dict[str, Any]) -> dict[str, Any]:
    if not torch.is_grad_enabled():
        return block(args)
    block, options = _bound_now(block), dict(args["transformer_options"])
    # FLUX writes into the streams it is given, which the second run must find as they were.
    return checkpoint(lambda: block({**args, **_copied_streams(args), "transformer_options": dict(options)}), use_reentrant=False)


def _copied_streams(args: dict[str, Any]) -> dict[str, Tensor]:
    return {name: args[name].clone() for name in ("img", "txt") if isinstance(args.get(name), Tensor)}


def _bound_now(function: Callable) -> Callable:
    """Copy a closure with what its variables hold now: the host's name the block of a loop that has moved on by the backward pass."""
    cells = getattr(function, "__closure__", None)
    if cells is None:
        return function
    own = tuple(CellType(cell.cell_contents) for cell in cells)
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, own)


def _checkpoint_unet(patcher: "ModelPatcher") -> None:
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, forward_timestep_embed

    def handler(layer: nn.Module, x: Tensor, emb: Tensor, context: Tensor, options: dict, *rest: Any) -> Tensor:
        handlers = [entry for entry in options["patches"]["forward_timestep_embed_patch"] if entry[1] is not handler]
        before, after = {**options, "patches": {**options["patches"], "forward_timestep_embed_patch": handlers}}, {}

        def run(x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
            own = dict(before)
            x = forward_timestep_embed([layer], x, emb, context, own, *rest)
            after.update(own)
            return x

        x = checkpoint(run, x, emb, context, use_reentrant=False) if torch.is_grad_enabled() else run(x, emb, context)
        options.update({name: value for name, value in after.items() if name != "patches"})
        return x

    patcher.set_model_patch(((ResBlock, SpatialTransformer), handler), "forward_timestep_embed_patch")
