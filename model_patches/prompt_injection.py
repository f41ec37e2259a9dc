"""Where learned prompts go into each family of models (YPT, arXiv 2604.04924, and its public code). Part of what host.py stands for.

FLUX, SD3: attention reads linear(text + alpha P). The layer is linear, so linear(alpha P) - linear(0) is added to what it made of the text;
    that holds on quantised weights too. In FLUX's single blocks the same layer begins the MLP, whose part stays as it is.
WAN: the cross-attention runs once more with P added to the text, out = attn(h, text) + alpha attn(h, text + P).
UNets: cross-attention reads text + alpha P.

Rows of a text behind the end of P stay as they are. On UNets a text shorter than P is told as often as it fits, and P shorter than a text
is repeated: attention does not notice repetition, and the host repeats texts of its own accord.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import attention_place
from .learned_prompt import LearnedPrompt

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

# Marks the rows that a layer is given to learn what it makes of them, so that hooks of several prompts leave one another's alone.
_PROBE = "mend_prompt_probe"


@dataclass(frozen=True)
class Term:
    """One prompt of an evaluation, which acts with `weight` times its alphas."""

    prompt: LearnedPrompt
    weight: float = 1.0

    def alphas(self) -> list[Any]:
        """Return the weighted alphas: plain numbers, which no backward pass must keep, unless they are learning."""
        if self.prompt.alphas.requires_grad:
            return list(self.prompt.alphas * self.weight)
        return [alpha * self.weight for alpha in self.prompt.alphas.tolist()]


@dataclass
class Made:
    """What is computed once a run. It belongs to the run and goes with it."""

    tensors: dict[tuple, Tensor] = field(default_factory=dict)

    def get(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` returned for this key; while gradients flow it is made anew every time."""
        if torch.is_grad_enabled():
            return make()
        if key not in self.tensors:
            self.tensors[key] = make()
        return self.tensors[key]


class Injection:
    """Prompts whose effects add up, in one evaluation.

    Args:
        terms: the prompts; at least one.
        made: of the run.
    """

    def __init__(self, terms: list[Term], made: Made) -> None:
        self.terms, self.made = terms, made
        self.alphas = [list(of_module) for of_module in zip(*(term.alphas() for term in terms))]

    def hooks(self, model: "BaseModel", kind: str, paths: list[str], text: int) -> list[Any]:
        """Hang them on a transformer and return the handles.

        Args:
            model: the host's.
            kind: of its anatomy.
            paths: of its attention modules.
            text: tokens of its text.
        """
        handles = []
        for path, alphas in zip(paths, self.alphas):
            module = model.diffusion_model.get_submodule(path)
            if kind == "wan":
                handles.append(module.register_forward_hook(self._attend_again(alphas), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(self._add_to_text(path, alphas, text)))
        return handles

    def _add_to_text(self, path: str, alphas: list[Any], text: int) -> Callable:
        def add(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            x = args[0]
            if getattr(x, _PROBE, False):
                return None
            change = self.made.get((path, text, x.device, x.dtype), lambda: self._change(layer, x, alphas, text))
            if torch.is_grad_enabled():
                return out + F.pad(change, (0, out.shape[2] - change.shape[2], 0, out.shape[1] - change.shape[1]))
            out[:, :change.shape[1], :change.shape[2]] += change
            return out

        return add

    def _change(self, layer: nn.Module, x: Tensor, alphas: list[Any], text: int) -> Tensor:
        """Return what alpha P changes of q, k and v, (1, rows, 3 D)."""
        rows = self._summed(alphas, x.device, min(text, max(term.prompt.length for term in self.terms)))
        probe = torch.cat([rows, torch.zeros_like(rows[:1])]).unsqueeze(0).to(x.dtype)
        setattr(probe, _PROBE, True)
        made = layer(probe)[..., :3 * rows.shape[-1]]
        return made[:, :-1] - made[:, -1:]

    def _attend_again(self, alphas: list[Any]) -> Callable:
        def add(attention: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            h, context = args
            # Image-to-video models are told the first picture before the text.
            before = (kwargs.get("context_img_len") or 0) if hasattr(attention, "k_img") else 0
            for index, alpha in enumerate(alphas):
                if not _nothing(alpha):
                    rows = _fitted(self._tokens(index, context.device), context.shape[1] - before)
                    told = (context + F.pad(rows, (0, 0, before, 0))).to(context.dtype)
                    out = out + alpha * attention.forward(h, told, **kwargs)
            return out

        return add

    def told(self, options: dict[str, Any], paths: list[str]) -> dict[str, Any]:
        """Return the host's transformer_options of one evaluation of a UNet, with the prompts in its cross-attention."""
        patches = options.get("patches", {})
        patch = self._add_to_context({attention_place(path): index for index, path in enumerate(paths)})
        return {**options, "patches": {**patches, "attn2_patch": [*patches.get("attn2_patch", ()), patch]}}

    def _add_to_context(self, places: dict[tuple, int]) -> Callable:
        def add(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            index = places.get((*extra["block"], extra["block_index"]))
            if index is None or all(_nothing(alpha) for alpha in self.alphas[index]):
                return n, context, value
            changed = self._changed(context, index)
            return n, changed, changed if value is context else self._changed(value, index)

        return add

    def _changed(self, context: Tensor, index: int) -> Tensor:
        rows = context.shape[1]
        for term in self.terms:
            rows = max(rows, term.prompt.length) if term.prompt.length % rows == 0 else rows
        change = self.made.get((index, rows, context.device), lambda: self._summed(self.alphas[index], context.device, rows, repeat=True))
        return (context.repeat(1, rows // context.shape[1], 1) + change).to(context.dtype)

    def _summed(self, alphas: list[Any], device: torch.device, rows: int, repeat: bool = False) -> Tensor:
        """Return the sum of all alpha P, (rows, D)."""
        return sum(alpha * _fitted(self._tokens(index, device), rows, repeat) for index, alpha in enumerate(alphas))

    def _tokens(self, index: int, device: torch.device) -> Tensor:
        """Return P (L, D) of a term on a device: prompts are kept on the CPU, and go to the device once a run."""
        return self.made.get(("tokens", index, device), lambda: self.terms[index].prompt.prompts[0].to(device))


def kept_bytes(kind: str, modules: int, terms: list[Term], dtype: torch.dtype) -> int:
    """Return how much a run keeps of prompts that add up: what `Made` comes to hold.

    Args:
        kind: of the model's anatomy.
        modules: how many attention modules it has.
        terms: the prompts.
        dtype: that the model computes in.
    """
    prompts = [term.prompt.prompts for term in terms]
    rows, width = max(prompt.shape[1] for prompt in prompts), prompts[0].shape[2]
    q_k_v = 3 * dtype.itemsize
    each = {"flux": q_k_v, "sd3": q_k_v, "unet": prompts[0].itemsize, "wan": 0}[kind]
    return modules * rows * width * each + sum(prompt.nbytes for prompt in prompts)


def _nothing(alpha: Any) -> bool:
    return isinstance(alpha, float) and alpha == 0


def _fitted(tokens: Tensor, rows: int, repeat: bool = False) -> Tensor:
    """Cut (L, D) to so many rows, or fill them with zeros; or with repetitions where that comes out even."""
    if repeat and rows % len(tokens) == 0:
        return tokens.repeat(rows // len(tokens), 1)
    return F.pad(tokens[:rows], (0, 0, 0, max(0, rows - len(tokens))))
