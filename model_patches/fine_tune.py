"""A full fine-tune of the denoiser: what all of its linear and convolution layers learn, kept as differences from their weights.

The differences learn as parallel branches on the layers' outputs, like a LoRA, and are stored in the host's own keys for them, so that the
host applies them like a LoRA file.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion_adapter import PREFIX, DiffusionAdapter, branched

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

# Learning rate of a fine-tune beside that of what is new.
FINE_TUNE_RATE = 0.1
CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Difference(nn.Module):
    """What one layer learns; nothing at first.

    Args:
        layer: linear or a convolution; only its shapes are read.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        linear = isinstance(layer, nn.Linear)
        shape = (layer.out_features, layer.in_features) if linear else layer.weight.shape  # quantised weights may be packed
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = None if layer.bias is None else nn.Parameter(torch.zeros(shape[0]))

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what is added to the layer's output for its input x."""
        weight, bias = self.weight.to(x), None if self.bias is None else self.bias.to(x)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(layer, kind))
        return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class FineTune(nn.Module):
    """Differences of all linear and convolution layers of a model; norms stay as they are.

    Args:
        model: only its shapes are read.
    """

    def __init__(self, model: "BaseModel") -> None:
        super().__init__()
        layers = model.diffusion_model.named_modules()
        found = {path: Difference(layer) for path, layer in layers if isinstance(layer, (nn.Linear, *CONVOLUTIONS))}
        self.paths = tuple(found)
        self.differences = nn.ModuleList(found.values())

    def hooked(self, model: "BaseModel") -> AbstractContextManager[None]:
        """Add the differences to the model's layers for as long as the context is open."""
        return branched(model, dict(zip(self.paths, self.differences)))

    def native(self) -> dict[str, Tensor]:
        """Return the differences under the host's keys."""
        tensors: dict[str, Tensor] = {}
        for path, difference in zip(self.paths, self.differences):
            tensors[f"{PREFIX}{path}.diff"] = difference.weight
            if difference.bias is not None:
                tensors[f"{PREFIX}{path}.diff_b"] = difference.bias
        return tensors

    def load_native(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `native` returned."""
        with torch.no_grad():
            for name, own in self.native().items():
                own.copy_(tensors[name])


def model_change(model: "BaseModel", config: Mapping[str, Any]) -> FineTune | DiffusionAdapter | None:
    """Build what a file's config ("fine_tune", "rank") lets the model's own weights learn; still empty."""
    if config.get("fine_tune"):
        return FineTune(model)
    return DiffusionAdapter(model, config["rank"]) if config["rank"] else None
