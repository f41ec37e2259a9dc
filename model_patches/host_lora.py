"""LoRA as the host knows and applies it, on quantised weights too. Part of what host.py stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sd
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.bypass import BypassForwardHook

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher


def is_quantised(patcher: "ModelPatcher") -> bool:
    """Tell whether any weight of a model is quantised, so that it can neither be changed in place nor have gradients go through it."""
    return any(isinstance(p, comfy.quant_ops.QuantizedTensor) for p in patcher.model.diffusion_model.parameters())


def with_lora(patcher: "ModelPatcher", tensors: dict[str, Tensor], strength: float) -> "ModelPatcher":
    """Return a clone with a LoRA in native keys; beside the weights where they are quantised, in them otherwise."""
    if not is_quantised(patcher):
        return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]
    patched, names = patcher.clone(), comfy.lora.model_lora_keys_unet(patcher.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names)
    beside = {key: change for key, change in loaded.items() if isinstance(key, str) and isinstance(change, WeightAdapterBase)}
    patched.add_patches({key: change for key, change in loaded.items() if key not in beside}, strength)
    branches = _LoraBranches(beside, strength)
    injection = comfy.patcher_extension.PatcherInjection(branches.inject, branches.eject)
    patched.set_injections(f"mend_lora_{len(patched.injections)}", [injection])
    return patched


class _LoraBranches:
    """LoRA beside the weights, as hooks: the host's own branches wrap `forward`, and of two that are not unwrapped in reverse one stays."""

    def __init__(self, adapters: dict[str, WeightAdapterBase], strength: float) -> None:
        self.adapters, self.strength = adapters, strength
        self.handles: dict[int, list[Any]] = {}

    def inject(self, patcher: "ModelPatcher") -> None:
        self.eject(patcher)
        self.handles[id(patcher.model)] = [self._hooked(patcher.model, key, adapter) for key, adapter in self.adapters.items()]

    def eject(self, patcher: "ModelPatcher") -> None:
        for handle in self.handles.pop(id(patcher.model), ()):
            handle.remove()

    def _hooked(self, model: "BaseModel", key: str, adapter: WeightAdapterBase) -> Any:
        layer = model.get_submodule(key.removesuffix(".weight"))
        # It tells the adapter its strength and what kind of layer it is on.
        branch = BypassForwardHook(layer, adapter, self.strength)
        branch._move_adapter_weights_to_device(comfy.model_management.get_torch_device(), model.get_dtype_inference())
        return layer.register_forward_hook(_lora_branch(adapter))


def _lora_branch(adapter: WeightAdapterBase) -> Callable:
    # GLoRA changes what goes into the layer too.
    whole = type(adapter).bypass_forward is not WeightAdapterBase.bypass_forward

    def add(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if whole:
            return out + adapter.bypass_forward(layer.forward, *args) - layer.forward(*args)
        return adapter.g(out + adapter.h(args[0], out))

    return add


@dataclass(frozen=True)
class LoraTarget:
    """What the host's LoRA loader patches under some name.

    Attributes:
        key: of the weight, in the model's state dict.
        rows: the first row and the number of rows that the name stands for in a fused layer; None for all.
        reorder: what must be done to the rows of a change first, such as swapping shift and scale; None for nothing.
    """

    key: str
    rows: tuple[int, int] | None = None
    reorder: Callable[[Tensor], Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether a change can be added to the weight as it is."""
        return self.rows is None and self.reorder is None


def lora_targets(model: "BaseModel") -> dict[str, LoraTarget]:
    """Return all names under which the host's LoRA loader knows weights of this model, without the ends such as `.lora_up.weight`."""
    weights, targets = set(model.state_dict()), {}
    for name, value in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, narrow, reorder = (value, None, None) if isinstance(value, str) else (*value, None)[:3]
        if key in weights:
            targets[name] = LoraTarget(key, None if narrow is None else narrow[1:], reorder)  # the host narrows rows only
    return targets


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the LoRA forms that the host knows by whole files, such as FLUX attention processors; other keys stay."""
    named: dict[str, Tensor] = {}
    for key, tensor in comfy.lora_convert.convert_lora(dict(tensors)).items():
        processor = ".processor.qkv_lora" in key or ".processor.proj_lora" in key
        named.update(comfy.lora_convert.convert_uso_lora({key: tensor}) if processor else {key: tensor})
    return named


def layer_shape(model: "BaseModel", key: str) -> tuple[int, ...]:
    """Return the shape of a weight as the layer means it: quantised weights may be stored in another one."""
    path, _, name = key.rpartition(".")
    layer = model.get_submodule(path)
    if name == "weight" and hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return tuple(getattr(layer, name).shape)
