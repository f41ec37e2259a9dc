"""The Diffusion Adapter (arXiv 2502.20679, section 3.2): LoRA on the self-attention of the frozen denoiser.

It learns as parallel branches on the layers' outputs and is stored in the host's own LoRA keys, so that the host applies it like any other. Where the
host keeps q, k and v in one layer, each has factors of its own; the file holds them packed block-wise into one pair of rank 3 r.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import self_attention
from .evaluation_hooks import installed
from .host_lora import with_lora
from .weights_file import Weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

PREFIX = "diffusion_model."
# Of names in the host's keys: without anything in these nothing changes.
CHANGING = ("lora_B.weight", ".diff", ".diff_b")


class LoraLayer(nn.Module):
    """The factors of one linear layer.

    Args:
        in_features: of the layer.
        parts: lengths of the parts of its output that have factors of their own; later rows have none.
        rank: of each part.
    """

    def __init__(self, in_features: int, parts: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self.parts = parts
        self.down = nn.ParameterList(nn.Parameter(torch.empty(rank, in_features)) for _ in parts)
        self.up = nn.ParameterList(nn.Parameter(torch.empty(part, rank)) for part in parts)

    def forward(self, x: Tensor, out_features: int) -> Tensor:
        """(..., in_features) -> (..., out_features): what is added to the layer's output at alpha = rank."""
        change = torch.cat([F.linear(F.linear(x, down.to(x)), up.to(x)) for down, up in zip(self.down, self.up)], -1)
        return F.pad(change, (0, out_features - change.shape[-1]))

    def packed(self, out_features: int) -> tuple[Tensor, Tensor]:
        """Return lora_A (n r, in_features) and lora_B (out_features, n r), whose product stacks the parts' own products."""
        up = torch.block_diag(*self.up)
        return torch.cat(list(self.down)), F.pad(up, (0, 0, 0, out_features - up.shape[0]))

    def unpack(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Take back what `packed` returned."""
        rank, row = self.down[0].shape[0], 0
        with torch.no_grad():
            for index, part in enumerate(self.parts):
                self.down[index].copy_(lora_a[index * rank:(index + 1) * rank])
                self.up[index].copy_(lora_b[row:row + part, index * rank:(index + 1) * rank])
                row += part


class DiffusionAdapter(nn.Module):
    """LoRA of one rank on every self-attention layer of a model.

    Args:
        model: only its shapes are read.
        rank: of q, k, v and the output projection alike.
    """

    def __init__(self, model: "BaseModel", rank: int) -> None:
        super().__init__()
        layers = dict(model.diffusion_model.named_modules())
        self.paths = {path: layers[path].out_features for path in self_attention(model)}
        self.layers = nn.ModuleDict({_name(path): LoraLayer(layers[path].in_features, parts, rank) for path, parts in self_attention(model).items()})

    def initialise(self, generator: torch.Generator) -> None:
        """Down factors as torch's linear layers start, up factors zero: no change at first."""
        with torch.no_grad():
            for layer in self.layers.values():
                for down, up in zip(layer.down, layer.up):
                    bound = down.shape[1] ** -0.5
                    down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
                    up.zero_()

    def hooked(self, model: "BaseModel") -> AbstractContextManager[None]:
        """Add the branches to the model's layers for as long as the context is open."""
        return branched(model, {path: _branch(self.layers[_name(path)]) for path in self.paths})

    def native(self) -> dict[str, Tensor]:
        """Return the factors under the host's keys; alpha makes the scale 1."""
        tensors: dict[str, Tensor] = {}
        for path, out_features in self.paths.items():
            lora_a, lora_b = self.layers[_name(path)].packed(out_features)
            tensors |= {f"{PREFIX}{path}.lora_A.weight": lora_a, f"{PREFIX}{path}.lora_B.weight": lora_b,
                        f"{PREFIX}{path}.alpha": torch.tensor(float(lora_a.shape[0]))}
        return tensors

    def load_native(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `native` returned."""
        for path in self.paths:
            self.layers[_name(path)].unpack(tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"])


@contextmanager
def branched(model: "BaseModel", branches: Mapping[str, Callable[[nn.Module, Tensor], Tensor]]) -> Iterator[None]:
    """Add branch(layer, x) to the outputs of layers, named by their paths in the denoiser, for as long as the context is open."""
    layers = dict(model.diffusion_model.named_modules())
    with installed(lambda: [layers[path].register_forward_hook(_added(branch)) for path, branch in branches.items()]):
        yield


def lora_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a file that changes the model's own weights, in the host's keys."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def new_lora(model: "BaseModel", rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of a LoRA that changes nothing yet, in the host's keys; none for rank 0."""
    if not rank:
        return {}
    lora = DiffusionAdapter(model, rank)
    lora.initialise(generator)
    return {name: tensor.detach() for name, tensor in lora.native().items()}


def lora_of(weights: Weights) -> dict[str, Tensor]:
    """Return the LoRA or the fine-tune of a file in the host's keys; empty if it has none or none that would change anything."""
    tensors = lora_tensors(weights.tensors)
    return tensors if any(tensor.any() for name, tensor in tensors.items() if name.endswith(CHANGING)) else {}


def with_lora_of(patcher: "ModelPatcher", weights: Weights, strength: float = 1.0) -> "ModelPatcher":
    """Return a clone with the LoRA of a file; a plain one where there is none.

    What else is put on the model goes onto this clone: one that is cloned again dies with its host record left behind.
    """
    lora = lora_of(weights)
    return with_lora(patcher, lora, strength) if lora and strength else patcher.clone()


def _name(path: str) -> str:
    return path.replace(".", "-")


def _branch(lora: LoraLayer) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda layer, x: lora(x, layer.out_features)


def _added(branch: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda layer, args, out: out + branch(layer, args[0])
