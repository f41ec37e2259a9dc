"""Training that survives being killed: modules, their averages and the optimiser in one safetensors file."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .optimizer import MuonAdam


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


def save_run(file: Path, step: int, module: nn.Module, average: Average, optimizer: MuonAdam) -> None:
    """Write the whole state of a run atomically."""
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.shadow.items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.state().items()}
    tensors["step"] = torch.tensor(step)
    temporary = file.with_suffix(".tmp")
    save_file({k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, temporary)
    os.replace(temporary, file)


def load_run(file: Path, module: nn.Module, average: Average, optimizer: MuonAdam) -> int:
    """Restore what save_run wrote and return the step to go on from; 0 when there is no file."""
    if not file.exists():
        return 0
    tensors = load_file(file)
    module.load_state_dict(_under(tensors, "module."))
    for name, value in _under(tensors, "average.").items():
        average.shadow[name].copy_(value)
    optimizer.load(_under(tensors, "optimizer."))
    return int(tensors["step"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
