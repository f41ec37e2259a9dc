"""A NAFNet (arXiv 2204.04676) on the degraded picture alone, of the experts' size: what their data and budget give without a VAE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model_patches.experts import NAFBlock
from ...model_patches.host import trained_operations
from ...model_patches.window_grid import Windows
from ...training.detail_experts import SSIM_WEIGHT, SSIM_WINDOW
from ...training.trainee import Batch, Models

# As many parameters as the lite experts of the lab's VAE.
WIDTHS, BLOCKS, MIDDLE = (20, 40), (2, 3), 3
KERNEL = 3


class NAFNet(nn.Module):
    """Two levels down, a middle, two levels up; adds to its input. About as many parameters as the lite experts of the lab's VAE."""

    def __init__(self) -> None:
        super().__init__()
        ops, widths = trained_operations, (*WIDTHS, 2 * WIDTHS[-1])
        self.first, self.last = ops.Conv2d(3, widths[0], 3, padding=1), ops.Conv2d(widths[0], 3, 3, padding=1)
        self.down = nn.ModuleList(_blocks(width, count) for width, count in zip(WIDTHS, BLOCKS))
        self.halve = nn.ModuleList(ops.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self.middle = _blocks(widths[-1], MIDDLE)
        self.enlarge = nn.ModuleList(ops.Conv2d(b, 4 * a, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(_blocks(width, 1) for width in WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), sides divisible by 4 -> the same."""
        h, kept = self.first(x), []
        for blocks, halve in zip(self.down, self.halve):
            h = _run(blocks, h)
            kept.append(h)
            h = halve(h)
        h = _run(self.middle, h)
        for blocks, enlarge, skip in zip(reversed(self.up), reversed(self.enlarge), reversed(kept)):
            h = _run(blocks, F.pixel_shuffle(enlarge(h), 2) + skip)
        return x + self.last(h)


class NAFNetTrainee:
    """Trains like the experts, on L1 and SSIM."""

    kind, family, config = "nafnet", "none", {"widths": list(WIDTHS)}

    def __init__(self, seed: int = 0) -> None:
        self.network = NAFNet()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                zero = name.endswith("bias") or name.split(".")[-2] in ("zero", "zero2", "last")
                bound = 0.0 if zero else p[0].numel() ** -0.5
                p.copy_(torch.empty(p.shape).uniform_(-1, 1, generator=generator) * bound)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""
        yield from self.network.parameters()

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """It needs no model."""
        yield

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """The experts' loss less their balance."""
        from kornia.metrics import ssim

        restored, clean = self.network(batch.degraded.movedim(-1, 1)), batch.clean.movedim(-1, 1)
        error = F.l1_loss(restored, clean)
        return error + SSIM_WEIGHT * (1 - ssim(restored, clean, SSIM_WINDOW).mean()), {"l1": float(error.detach())}

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Restore."""
        return self.restored(batch.degraded)

    def restored(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1 -> the same."""
        return self.network(pictures.movedim(-1, 1)).movedim(1, -1).clamp(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights."""
        return dict(self.network.state_dict())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.network.load_state_dict(tensors)


def _blocks(width: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(NAFBlock(width, KERNEL, trained_operations) for _ in range(count))


def _run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    windows = Windows(0, (x.shape[2], x.shape[3]))
    for block in blocks:
        x = block(x, windows)
    return x
