"""Training that survives being killed: modules, their averages and the optimiser in one safetensors file."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .optimizer import MuonAdam


class OtherRun(SystemExit):
    """An unfinished run was made with something else; whoever cannot go on without it ends the command with this message."""


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Blend in the current parameters; early steps count more so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            if name not in self.shadow:
                continue
            self.shadow[name].lerp_(p, 1 - decay)


def save_run(file: Path, step: int, module: nn.Module, average: Average, optimizer: MuonAdam, made_with: dict[str, str]) -> None:
    """Write the whole state of a run atomically, with what it was `made_with`: all that a run must have in common with one that goes on."""
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.shadow.items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.state().items()}
    tensors["step"] = torch.tensor(step)
    temporary = file.with_suffix(".tmp")
    save_file({k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, temporary, made_with)
    os.replace(temporary, file)


def load_run(file: Path, module: nn.Module, average: Average, optimizer: MuonAdam, made_with: dict[str, str]) -> int:
    """Restore what save_run wrote and return the step to go on from; 0 when there is no file.

    Raises:
        OtherRun: the file is of a run that was made with something else.
    """
    if not file.exists():
        return 0
    with safe_open(file, "pt") as opened:
        found = opened.metadata() or {}
    if found != made_with:
        there, here = (", ".join(f"{name} {value}" for name, value in sorted(of.items())) or "nothing known" for of in (found, made_with))
        raise OtherRun(f"{file} is of a run with other settings ({there}; now {here}). Delete it to begin anew, or name its settings.")
    tensors = load_file(file)
    module.load_state_dict(_under(tensors, "module."))
    for name, value in _under(tensors, "average.").items():
        average.shadow[name].copy_(value)
    optimizer.load(_under(tensors, "optimizer."))
    return int(tensors["step"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
