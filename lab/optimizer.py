"""The lab's optimiser: Muon for matrices and filters, AdamW for the rest.

These small stacks without normalisation are badly conditioned; orthogonalised updates reached in 136 steps of the VAE what AdamW reached in
about five times as many. torch has a Muon of its own, which goes through the matrices one by one in bfloat16: on a CPU that took twice as long
as the network itself. Here all matrices of one shape are orthogonalised together, in float32.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

WARMUP = 50
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonAdam:
    """Muon on a two-dimensional view of every filter bank, AdamW on vectors, tables and embeddings."""

    def __init__(self, module: nn.Module, peak: float) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.peak = peak
        self.filters = [p for name, p in trained if _by_muon(name, p)]
        self.momenta = [torch.zeros_like(_matrix(p.data)) for p in self.filters]
        others = [p for name, p in trained if not _by_muon(name, p)]
        self.adam = torch.optim.AdamW(others, lr=peak / 2, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, loss: Tensor, step: int, steps: int) -> None:
        """Take one step down the gradient of `loss`, at the rate that belongs to `step` of `steps`."""
        rate = min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        self.adam.param_groups[0]["lr"] = self.peak / 2 * rate
        for p in self.filters:
            p.grad = None
        self.adam.zero_grad()
        loss.backward()
        self._orthogonal_step(self.peak * rate)
        self.adam.step()

    @torch.no_grad()
    def _orthogonal_step(self, rate: float) -> None:
        """Move every matrix that has a gradient; updates have the root mean square that AdamW's would have (0.2 of the rate)."""
        groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, momentum in zip(self.filters, self.momenta):
            if p.grad is not None:
                gradient = _matrix(p.grad.contiguous(memory_format=_format(p)))
                momentum.lerp_(gradient, 1 - MOMENTUM)
                groups[momentum.shape].append((_matrix(p.data), gradient.lerp(momentum, MOMENTUM)))
        for shape, rows in groups.items():
            for (matrix, _), update in zip(rows, orthogonalised(torch.stack([update for _, update in rows]))):
                matrix.add_(update, alpha=-0.2 * rate * max(shape) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        """Return the optimisers' tensors by name."""
        adam = {f"adam.{index}.{key}": value for index, values in self.adam.state_dict()["state"].items() for key, value in values.items()}
        return adam | {f"muon.{index}.momentum": value for index, value in enumerate(self.momenta)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        adam: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, index, name = key.split(".", 2)
            if part == "adam":
                adam.setdefault(int(index), {})[name] = value
            else:
                self.momenta[int(index)].copy_(value)
        self.adam.load_state_dict({"state": adam, "param_groups": self.adam.state_dict()["param_groups"]})


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrices to (n, rows, columns), roughly: singular values come out between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _by_muon(name: str, p: Tensor) -> bool:
    """Word vectors are a table, and modulation is a third of a transformer's matrices for little work: AdamW does for both."""
    return p.ndim > 1 and not name.startswith("words.") and "adaLN_modulation" not in name


def _format(p: Tensor) -> torch.memory_format:
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _matrix(p: Tensor) -> Tensor:
    """View (out, in, kh, kw) as (out, everything else) without copying, whichever way it lies in memory."""
    if _format(p) == torch.channels_last:
        p = p.permute(0, 2, 3, 1)
    return p.view(p.shape[0], -1)
