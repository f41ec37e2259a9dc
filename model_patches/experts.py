"""Detail experts and their router (UniLDiff, arXiv 2507.23685, section 3): of four small networks with other receptive fields, one works at
each place.

The router sees pooled features and pooled high frequencies. As published it chooses once for a picture; here it may choose once for a
window, with a cross-fade to the next one, so that tiles agree and a picture may be mended in different ways in different places.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host import cast_like
from .window_grid import Windows

KERNELS = (3, 5, 7, 9)
# How fast a router in training follows the mean and deviation of what it sees, a part a step.
FOLLOWING = 0.05
# In roots and quotients, for places where all channels are zero and features that never change.
EPSILON = 1e-6
# Least contrast, as a share of a feature's root mean square; less is the rounding of pictures and of half precision, not detail.
LEAST_CONTRAST = 0.005


def normalised(x: Tensor) -> Tensor:
    """Normalise (B, C, h, w) over channels at each place; gains and offsets are left to the layer that follows."""
    if x.dtype == torch.float16:  # which cannot hold the squares of numbers that decoders hold
        return normalised(x.float()).to(x)
    x = x - x.mean(1, keepdim=True)
    return x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt()


def window_statistics(x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return the mean of each channel of (B, C, h, w) by windows, (B, C, rows, columns), and the deviation of all together, (B, 1, rows, columns)."""
    wide = x.float()  # half precision cannot hold the squares of numbers that decoders hold
    mean, power = windows.mean(wide), windows.mean(wide.square().mean(1, keepdim=True))
    variance = (power - mean.square().mean(1, keepdim=True)).clamp_min(0) + LEAST_CONTRAST**2 * power + EPSILON
    return mean.to(x), variance.sqrt().to(x)


def laplacian(x: Tensor) -> Tensor:
    """What a place differs from its eight neighbours by, times 8."""
    from kornia.filters import laplacian as kornia_laplacian  # the neighbours less the place

    return -kornia_laplacian(x, 3, "replicate", normalized=False)


class NAFBlock(nn.Module):
    """Two gated branches without activations; both start as nothing, since their last layers start at zero.

    Args:
        channels: in and out.
        kernel: side of the depth-wise convolution.
    """

    def __init__(self, channels: int, kernel: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.open = operations.Conv2d(channels, 2 * channels, 1, **factory)
        self.depthwise = operations.Conv2d(2 * channels, 2 * channels, kernel, padding=kernel // 2, groups=2 * channels, **factory)
        self.attend = operations.Conv2d(channels, channels, 1, **factory)
        self.zero = operations.Conv2d(channels, channels, 1, **factory)
        self.widen = operations.Conv2d(channels, 2 * channels, 1, **factory)
        self.zero2 = operations.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """(B, channels, h, w) -> the same."""
        y = _gated(self.depthwise(self.open(normalised(x))))
        x = x + self.zero(y * windows.spread(self.attend(windows.mean(y))))
        return x + self.zero2(_gated(self.widen(normalised(x))))


class Expert(nn.Module):
    """E_i(x) times S(x), through a narrow rank.

    Args:
        width: of x and S(x).
        rank: of the NAFBlock.
        kernel: of its depth-wise convolution.
    """

    def __init__(self, width: int, rank: int, kernel: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.down = operations.Conv2d(width, rank, 1, **factory)
        self.share = operations.Conv2d(width, rank, 1, **factory)
        self.block = NAFBlock(rank, kernel, operations, **factory)
        self.up = operations.Conv2d(rank, width, 1, **factory)

    def forward(self, x: Tensor, shared: Tensor, windows: Windows) -> Tensor:
        """(B, width, h, w) twice -> the same."""
        return self.up(self.block(self.down(x), windows) * F.silu(self.share(shared)))


@dataclass(frozen=True)
class Routed:
    """What a router decided; all (B, experts, rows, columns) of windows.

    Attributes:
        weights: the chosen expert's probability, 0 for the others.
        chosen: 1 for the chosen expert, 0 for the others.
        probabilities: of all, without noise.
        load: how likely each would be chosen under new noise; None without noise.
    """

    weights: Tensor
    chosen: Tensor
    probabilities: Tensor
    load: Tensor | None


class Router(nn.Module):
    """Top-1 of Softmax(W x + xi), where x are the mean and the high frequencies of a window and xi is noise in training.

    x is standardised: less its mean over the windows of training, by its deviation. What features have in common is far larger than what they
    differ in and would choose one expert for all of them; and noise as large as the paper's would hide that until it is gone.

    Args:
        width: of the features.
        experts: to choose from; the noise deviates by 1 / experts.
    """

    def __init__(self, width: int, experts: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.experts = experts
        self.content = operations.Linear(width, experts, **factory)
        self.detail = operations.Linear(width, 2 * width, **factory)
        self.embed = operations.Linear(2 * width, width, **factory)
        self.frequency = operations.Linear(width, experts, **factory)
        self.register_buffer("mean", torch.zeros(2 * width, **factory))
        self.register_buffer("deviation", torch.ones(2 * width, **factory))

    def forward(self, x: Tensor, windows: Windows, noise: Tensor | None = None) -> Routed:
        """Route (B, width, h, w); noise is standard normal, (B, experts, rows, columns), and what is routed with it is learned from."""
        content, high = windows.mean(x).movedim(1, -1), windows.mean(F.gelu(laplacian(x))).movedim(1, -1)
        seen = torch.cat([content, self.embed(F.gelu(self.detail(high)))], -1)
        if noise is not None:
            self._follow(seen.detach())
        content, frequency = ((seen - cast_like(self.mean, seen)) / (cast_like(self.deviation, seen) + EPSILON)).chunk(2, -1)
        logits = (self.content(content) + self.frequency(frequency)).movedim(-1, 1).float()
        scale = 1 / self.experts
        noisy = logits if noise is None else logits + noise.to(logits) * scale
        chosen = F.one_hot(noisy.argmax(1), self.experts).movedim(-1, 1).to(logits)
        weights = noisy.softmax(1) * chosen
        load = None if noise is None else _load(logits, noisy, scale)
        return Routed(weights.to(x.dtype), chosen.to(x.dtype), logits.softmax(1), load)

    def _follow(self, seen: Tensor) -> None:
        """Take (B, rows, columns, 2 width) of a step of training into mean and deviation.

        Batch normalisation would use the batch's own, and a batch may be one window.
        """
        rows = seen.flatten(0, -2).to(self.mean)
        mean = self.mean.lerp(rows.mean(0), FOLLOWING)
        deviation = self.deviation.square().lerp((rows - mean).square().mean(0), FOLLOWING).sqrt()
        # Of a step that is not finite nothing is learned, and what follows would never come back from it.
        finite = (mean + deviation).isfinite().all()
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.deviation.copy_(torch.where(finite, deviation, self.deviation))


def _load(logits: Tensor, noisy: Tensor, deviation: float) -> Tensor:
    """The chance that each expert beats the best of the others under new noise of its own (arXiv 1701.06538, appendix A)."""
    best, second = noisy.topk(2, 1)[0].split(1, 1)
    to_beat = torch.where(noisy >= best, second, best).detach()
    return torch.special.ndtr((logits - to_beat) / deviation)


def balance(routed: Routed) -> Tensor:
    """The auxiliary loss: 0.5 CV^2 of the experts' importance and 0.5 CV^2 of their load, over all windows of a batch."""
    loss = 0.5 * _variation(routed.probabilities)
    return loss if routed.load is None else loss + 0.5 * _variation(routed.load)


def _variation(shares: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' sums."""
    sums = shares.sum((0, 2, 3))
    return sums.var(correction=0) / (sums.mean().square() + 1e-10)


def _gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b
