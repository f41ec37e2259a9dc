"""Gradients through the host's models, which load and run under inference mode. Part of what host.py stands for."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import comfy.conds
import comfy.model_management
import comfy.ops

from .evaluation_hooks import installed


@contextmanager
def gradients() -> Iterator[None]:
    """Let autograd work inside the host's inference mode; tensors made outside must be cloned before they are used within."""
    management = comfy.model_management
    before = management.in_training
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training = before


def plain_weights(module: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Turn inference tensors among a frozen module's weights into normal ones of the same values, in place.

    Weights loaded under inference mode cannot take part in a backward pass. This is the one lasting change the pack makes to a shared
    model. Layers that the host feeds on demand keep theirs, whether named or not: a copy of a file that is mapped would take its memory.

    Args:
        module: changed.
        but: parts of it that stay as they are.
    """
    left = {id(part) for part in but}
    with torch.inference_mode(False):
        for part in module.modules():
            if id(part) in left or _on_demand(part):
                continue
            for name, p in list(part._parameters.items()):
                if p is not None and p.is_inference():
                    normal = nn.Parameter(p.clone(), requires_grad=False)
                    # The host notes on weights in which precision they run.
                    vars(normal).update(vars(p))
                    part._parameters[name] = normal
            for name, b in list(part._buffers.items()):
                if b is not None and b.is_inference():
                    part._buffers[name] = b.clone()


def casting_layers(module: nn.Module, device: torch.device | None = None) -> list[nn.Module]:
    """Return the layers that fetch their weights for each use; with a device, those whose weights do not lie there."""
    layers = [part for part in module.modules() if isinstance(part, comfy.ops.CastWeightBiasOp)]
    if device is None:
        return layers
    return [layer for layer in layers if _on_demand(layer) or any(_elsewhere(p, device) for p in layer.parameters(recurse=False))]


def _elsewhere(p: Tensor, device: torch.device) -> bool:
    return p.device.type != device.type or (p.device.index or 0) != (device.index or 0)


def _on_demand(part: nn.Module) -> bool:
    return hasattr(part, "_v")


@contextmanager
def copied_weights(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Have layers compute with copies of their weights, which a backward pass may keep.

    What the host fetches for a layer can be an inference tensor from an earlier use, or memory that others use before the backward pass
    comes to it.
    """
    names = ("weight_function", "bias_function")
    kept = [(layer, name, vars(layer).get(name)) for layer in layers for name in names]
    try:
        for layer, name, _ in kept:
            setattr(layer, name, [*getattr(layer, name), torch.clone])
        yield
    finally:
        for layer, name, own in kept:
            if own is not None:
                setattr(layer, name, own)
            else:
                vars(layer).pop(name, None)


def plain(value: Any) -> Any:
    """Clone inference tensors anywhere inside conds (lists, dicts, the host's COND objects)."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, comfy.conds.CONDRegular):
        return value._copy_with(plain(value.cond))
    return value


@contextmanager
def unshared_norm_inputs(diffusion_model: nn.Module) -> Iterator[None]:
    """FLUX adds to its streams in place after a norm has kept them for the backward pass: give its norms copies while gradients flow."""
    names = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")
    blocks = [*getattr(diffusion_model, "double_blocks", ()), *getattr(diffusion_model, "single_blocks", ())]
    norms = [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]
    with installed(lambda: [norm.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])) for norm in norms]):
        yield


# The host's implementations of attention that have a backward pass; some of the others that users may choose have none.
_WITH_GRADIENT = ("attention_basic", "attention_sub_quad", "attention_split", "attention_xformers", "attention_pytorch")


def differentiable_attention(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """Return options under which attention has gradients: torch's own takes the place of implementations that may have none."""
    from comfy.ldm.modules.attention import attention_pytorch

    def attend(chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return (chosen if chosen.__name__ in _WITH_GRADIENT else attention_pytorch)(*args, **kwargs)

    return {**transformer_options, "optimized_attention_override": attend}
