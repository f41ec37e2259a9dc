"""The blocks of degradation-aware feature fusion (UniLDiff, arXiv 2507.23685): FLUX's double and single streams, without positions."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host import attention

HEAD = 64
MLP_RATIO = 4
TIME_CHANNELS = 256
EPS = 1e-6


def time_code(time: Tensor) -> Tensor:
    """Return (B, 256) cosines and sines of times (B,) in 0..1000."""
    half = TIME_CHANNELS // 2
    omega = torch.exp(torch.arange(half, device=time.device, dtype=torch.float32) * (-math.log(10000) / half))
    angle = time.float()[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the code of the time."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.into = operations.Linear(TIME_CHANNELS, width, **factory)
        self.out = operations.Linear(width, width, **factory)

    def forward(self, code: Tensor) -> Tensor:
        """(B, 256) -> (B, 1, width), ready for modulations."""
        return F.silu(self.out(F.silu(self.into(code)))).unsqueeze(1)


class QKNorm(nn.Module):
    """Splits q, k and v into heads and brings q and k to length, head by head."""

    def __init__(self, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.query_norm = operations.RMSNorm(HEAD, eps=EPS, **factory)
        self.key_norm = operations.RMSNorm(HEAD, eps=EPS, **factory)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 C) -> three of (B, C / HEAD, N, HEAD)."""
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class Stream(nn.Module):
    """One of the two streams of a double-stream block: all of it but the attention, which they share."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.modulation = operations.Linear(width, 6 * width, **factory)
        self.norm1 = operations.LayerNorm(width, elementwise_affine=False, eps=EPS, **factory)
        self.qkv = operations.Linear(width, 3 * width, **factory)
        self.split = QKNorm(operations, **factory)
        self.proj = operations.Linear(width, width, **factory)
        self.norm2 = operations.LayerNorm(width, elementwise_affine=False, eps=EPS, **factory)
        self.into = operations.Linear(width, MLP_RATIO * width, **factory)
        self.out = operations.Linear(MLP_RATIO * width, width, **factory)

    def finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Add what was attended to and the MLP of it."""
        gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.proj(attended)
        return x + gate2 * self.out(F.gelu(self.into(modulated(self.norm2(x), shift2, scale2)), approximate="tanh"))


class DoubleStreamBlock(nn.Module):
    """Two streams with weights of their own and one attention over the tokens of both, those of the degraded picture first."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.lq = Stream(width, operations, **factory)
        self.latent = Stream(width, operations, **factory)

    def forward(self, latent: Tensor, lq: Tensor, time: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        """Return both streams (B, N, width), updated."""
        parts, rest = [], []
        for stream, x in ((self.lq, lq), (self.latent, latent)):
            shift, scale, *others = stream.modulation(time).chunk(6, -1)
            parts.append(stream.split(stream.qkv(modulated(stream.norm1(x), shift, scale))))
            rest.append(others)
        attended = attention(*(torch.cat(pair, 2) for pair in zip(*parts)), options)
        lq_attended, latent_attended = attended.split([lq.shape[1], latent.shape[1]], 1)
        return self.latent.finish(latent, latent_attended, rest[1]), self.lq.finish(lq, lq_attended, rest[0])


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the streams joined channel by channel: f + g * Linear2(A, phi(M))."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.width = width
        self.modulation = operations.Linear(width, 3 * width, **factory)
        self.norm = operations.LayerNorm(width, elementwise_affine=False, eps=EPS, **factory)
        self.into = operations.Linear(width, (3 + MLP_RATIO) * width, **factory)
        self.split = QKNorm(operations, **factory)
        self.out = operations.Linear((1 + MLP_RATIO) * width, width, **factory)

    def forward(self, x: Tensor, time: Tensor, options: dict) -> Tensor:
        """(B, N, width) -> the same."""
        shift, scale, gate = self.modulation(time).chunk(3, -1)
        qkv, hidden = self.into(modulated(self.norm(x), shift, scale)).split([3 * self.width, MLP_RATIO * self.width], -1)
        attended = attention(*self.split(qkv), options)
        return x + gate * self.out(torch.cat([attended, F.gelu(hidden, approximate="tanh")], -1))


class LastLayer(nn.Module):
    """Modulated normalisation and a linear layer."""

    def __init__(self, width: int, out_width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.modulation = operations.Linear(width, 2 * width, **factory)
        self.norm = operations.LayerNorm(width, elementwise_affine=False, eps=EPS, **factory)
        self.linear = operations.Linear(width, out_width, **factory)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, out_width)."""
        shift, scale = self.modulation(time).chunk(2, -1)
        return self.linear(modulated(self.norm(x), shift, scale))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale normalised tokens."""
    return x * (1 + scale) + shift
