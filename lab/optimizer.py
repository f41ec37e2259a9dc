"""The lab's optimiser: torch's Muon for matrices and filters, AdamW for the rest.

These small stacks without normalisation are badly conditioned; orthogonalised updates reached in 136 steps of the VAE what AdamW reached in
about five times as many.
"""

import math

import torch
from torch import Tensor, nn

WARMUP = 50


class MuonAdam:
    """Muon on a two-dimensional view of every filter bank, AdamW on vectors, tables and embeddings."""

    def __init__(self, module: nn.Module, peak: float) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.peak = peak
        self.filters = [p for name, p in trained if p.ndim > 1 and not name.startswith("words.")]
        self.views = [nn.Parameter(_matrix(p.data)) for p in self.filters]
        others = [p for name, p in trained if p.ndim == 1 or name.startswith("words.")]
        self.muon = torch.optim.Muon(self.views, lr=peak, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, lr=peak / 2, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, loss: Tensor, step: int, steps: int) -> None:
        """Take one step down the gradient of `loss`, at the rate that belongs to `step` of `steps`."""
        rate = min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        self.muon.param_groups[0]["lr"], self.adam.param_groups[0]["lr"] = self.peak * rate, self.peak / 2 * rate
        for p in self.filters:
            p.grad = None
        self.adam.zero_grad()
        loss.backward()
        for p, view in zip(self.filters, self.views):
            view.grad = None if p.grad is None else _matrix(p.grad.contiguous(memory_format=_format(p)))
        self.muon.step()
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Return the optimisers' tensors by name."""
        return {f"{name}.{index}.{key}": value for name, optimizer in self._parts() for index, values in optimizer.state_dict()["state"].items()
                for key, value in values.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        states: dict[str, dict[int, dict[str, Tensor]]] = {"muon": {}, "adam": {}}
        for key, value in tensors.items():
            part, index, name = key.split(".", 2)
            states[part].setdefault(int(index), {})[name] = value
        for name, optimizer in self._parts():
            optimizer.load_state_dict({"state": states[name], "param_groups": optimizer.state_dict()["param_groups"]})

    def _parts(self) -> tuple[tuple[str, torch.optim.Optimizer], ...]:
        return ("muon", self.muon), ("adam", self.adam)


def _format(p: Tensor) -> torch.memory_format:
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _matrix(p: Tensor) -> Tensor:
    """View (out, in, kh, kw) as (out, everything else) without copying, whichever way it lies in memory."""
    if _format(p) == torch.channels_last:
        p = p.permute(0, 2, 3, 1)
    return p.view(p.shape[0], -1)
