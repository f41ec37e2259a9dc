"""The Visual Instruction Adapter (Defusion, arXiv 2506.16960): a second cross-attention beside that over the text, over an instruction.

UNets get a copy of every text attention, with queries, keys, values and an output of its own, and a gate that starts at zero; the text path
stays. In transformers that mix text and picture in one attention there is nothing to copy: there the picture's tokens attend to the
instruction after each block.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import Site, attention_place
from .first_weights import fill
from .host import attention

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

HEAD = 64
# Widths of a transformer's attention at most, and of what it attends to.
TOKEN_WIDTH = {"full": 512, "small": 256}
CONTEXT_WIDTH = 256
# From a wave of two charts' length to the finest that a chart of 32 tokens a side can hold.
OCTAVES = 5


@dataclass(frozen=True)
class Attended:
    """One place for an attention over the instruction.

    Attributes:
        name: for files, such as "input4_0" or "double3".
        width: of the feature there.
        heads, head: of the attention.
        context: width of what it attends to.
        path: of the text attention it copies, below diffusion_model; empty for none.
    """

    name: str
    width: int
    heads: int
    head: int
    context: int
    path: str = ""


def attended_places(model: "BaseModel", sites: tuple[Site, ...], size: str, unet: bool) -> tuple[Attended, ...]:
    """Return where a model gets attentions: in a UNet beside those over the text (small: half of their heads), else after every block.

    Raises:
        ValueError: for a UNet without text attention.
    """
    if not unet:
        width = sites[0].channels
        inner = min(width if size == "full" else max(1, width // 2), TOKEN_WIDTH[size])
        heads = max(1, inner // HEAD)
        return tuple(Attended(site.name, width, heads, inner // heads, min(width, CONTEXT_WIDTH)) for site in sites)
    places = tuple(_copied(path, layer, size) for path, layer in model.diffusion_model.named_modules() if path.endswith(".attn2"))
    if not places:
        raise ValueError("this UNet has no attention over a text, beside which the visual instruction could be read.")
    return places


def _copied(path: str, layer: nn.Module, size: str) -> Attended:
    heads = layer.heads if size == "full" else max(1, layer.heads // 2)
    return Attended("{}{}_{}".format(*attention_place(path)), layer.to_q.in_features, heads, layer.dim_head, layer.to_k.in_features, path)


def place_of(options: dict[str, Any]) -> str:
    """Return the name of the attention that a UNet is at."""
    kind, number = options["block"][:2]
    return f"{kind}{number}_{options['block_index']}"


class InstructionAttention(nn.Module):
    """One attention over the instruction."""

    def __init__(self, place: Attended, operations: Any, **factory: Any) -> None:
        super().__init__()
        inner = place.heads * place.head
        self.heads, self.normed = place.heads, not place.path
        self.to_q = operations.Linear(place.width, inner, bias=False, **factory)
        self.to_k = operations.Linear(place.context, inner, bias=False, **factory)
        self.to_v = operations.Linear(place.context, inner, bias=False, **factory)
        self.to_out = operations.Linear(inner, place.width, **factory)
        self.gate = nn.Parameter(torch.empty(place.width, **factory))

    def forward(self, h: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        """Return what is added to h (B, N, width), given the instruction (B, n, context)."""
        h = F.layer_norm(h, h.shape[-1:]) if self.normed else h
        q, k, v = (self._split(layer(x)) for layer, x in ((self.to_q, h), (self.to_k, context), (self.to_v, context)))
        return self.gate.to(h) * self.to_out(attention(q, k, v, options))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class VisualInstructionAdapter(nn.Module):
    """All attentions of a model, and the way from the tokenizer's codes to what they attend to.

    Args:
        places: of the model.
        code_width: of the tokenizer's codes.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, places: tuple[Attended, ...], code_width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.project = operations.Linear(code_width, places[0].context, **factory)
        self.attentions = nn.ModuleDict({place.name: InstructionAttention(place, operations, **factory) for place in places})

    def embed(self, tokens: Tensor) -> Tensor:
        """Return what is attended to of tokens (B, N, code_width), any number of them."""
        context = self.project(tokens)
        return context + positions(tokens.shape[1], context.shape[-1]).to(context)

    def forward(self, name: str, h: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        """Return what is added at a place; the context (B / n, ...) is repeated n times."""
        return self.attentions[name](h, context.repeat(len(h) // len(context), 1, 1), options)


def positions(count: int, width: int) -> Tensor:
    """Return (count, width): sines of where tokens lie on their chart, which is as nearly square as their number allows."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    grid = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(count // rows) + 0.5) / (count // rows), indexing="ij")
    waves = math.pi * 2.0 ** torch.linspace(0, OCTAVES, -(-width // 4))
    angles = torch.cat([axis.reshape(-1, 1) * waves for axis in grid], 1)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


def initialise_adapter(module: VisualInstructionAdapter, places: tuple[Attended, ...], model: "BaseModel",
                       generator: torch.Generator) -> None:
    """Copy the text attentions' weights, the first heads where there are fewer here; fill the rest as torch would, gates with zero."""
    fill(module, generator, zero=("gate",))
    with torch.no_grad():
        layers = dict(model.diffusion_model.named_modules())
        for place in places:
            if place.path:
                _copy(module.attentions[place.name], layers[place.path])


def _copy(own: InstructionAttention, text: nn.Module) -> None:
    inner = own.to_q.out_features
    for name in ("to_q", "to_k", "to_v"):
        getattr(own, name).weight.copy_(getattr(text, name).weight[:inner].float())
    own.to_out.weight.copy_(text.to_out[0].weight[:, :inner].float())
    own.to_out.bias.copy_(text.to_out[0].bias.float())
