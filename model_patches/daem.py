"""DAEM, the Detail-Aware Expert Module of UniLDiff (arXiv 2507.23685, section 3), in the up blocks of a VAE decoder.

Latents drop fine detail. The decoder is therefore shown features that the VAE's own encoder has of the degraded picture, and four experts
decide what of them to take:

    h = enter((x - mean x) / |x|) + skip((e - mean e) / |e|);   s = h + attention(h)
    y = h + E_i(h) S(s);   y = y + cross-attention(y, s);   y = y + FFN(y);   x' = x + outer |x| leave(y)

`leave` starts at zero, so a fresh module leaves the decoder as it is. The paper puts that zero into the scalar `outer`. Behind it nothing
else has a gradient at first, and its own is the chance correlation of random features with the error, so that it hovers about zero. Means and deviations |x|, |e| are those of windows: the contrast of the degraded picture becomes that of the decoded one,
whatever haze, darkness or a decoder's numbers have made of it, while detail keeps its own strength from place to place. What the paper leaves
open follows the layers that are known of its relatives: rank dim / 8, but for narrow decoders 32, transposed attention of four heads, a
gated FFN. Where it sits was chosen here: after the last block of the decoder at a quarter, a half and all of the picture's
resolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import KERNELS, Expert, Routed, Router, normalised, window_statistics
from .first_weights import fill
from .host import cast_like
from .vae_sites import VaeSite
from .window_grid import Windows

HEADS = 4
# Channels of the decoder to one of an expert's rank, and the least rank.
RANK, LEAST_RANK = 8, 32


@dataclass(frozen=True)
class Layout:
    """How wide the modules are.

    Attributes:
        narrowing: the decoder's channels divided by those of the module.
        ffn: channels of the FFN, both halves together, divided by those of the module.
    """

    narrowing: int
    ffn: int


SIZES = {"lite": Layout(2, 2), "full": Layout(1, 4)}


class ChannelAttention(nn.Module):
    """Transposed attention by windows: of the features themselves, or of them to others.

    Args:
        width: in and out.
        kernel: side of the depth-wise convolution on what is attended to.
    """

    def __init__(self, width: int, kernel: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.q = operations.Conv2d(width, width, 1, **factory)
        self.kv = operations.Conv2d(width, 2 * width, 1, **factory)
        self.depthwise = operations.Conv2d(2 * width, 2 * width, kernel, padding=kernel // 2, groups=2 * width, **factory)
        self.temperature = nn.Parameter(torch.empty(HEADS, 1, 1, **factory))
        self.out = operations.Conv2d(width, width, 1, **factory)

    def forward(self, x: Tensor, other: Tensor, windows: Windows) -> Tensor:
        """(B, width, h, w) twice, normalised -> the same."""
        k, v = self.depthwise(self.kv(other)).chunk(2, 1)
        matrices = windows.attention(self.q(x), k, HEADS, cast_like(self.temperature, x))
        return self.out(windows.mix(matrices, v))


class GatedFFN(nn.Module):
    """Half of the channels let the other half through."""

    def __init__(self, width: int, ratio: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.open = operations.Conv2d(width, ratio * width, 1, **factory)
        self.depthwise = operations.Conv2d(ratio * width, ratio * width, 3, padding=1, groups=ratio * width, **factory)
        self.close = operations.Conv2d(ratio * width // 2, width, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        a, b = self.depthwise(self.open(x)).chunk(2, 1)
        return self.close(F.gelu(a) * b)


class DAEM(nn.Module):
    """One module.

    Args:
        site: where it sits.
        layout: how wide it is.
        window: side in pixels of the windows whose statistics it looks at; 0 for the whole picture.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, site: VaeSite, layout: Layout, window: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        width = site.channels // layout.narrowing
        self.window = window // site.scale
        self.enter = operations.Conv2d(site.channels, width, 1, bias=False, **factory)
        self.skip = operations.Conv2d(site.skip, width, 1, bias=False, **factory)
        self.shared = ChannelAttention(width, 3, operations, **factory)
        self.router = Router(width, len(KERNELS), operations, **factory)
        self.experts = nn.ModuleList(Expert(width, max(site.channels // RANK, min(LEAST_RANK, width)), kernel, operations, **factory) for kernel in KERNELS)
        self.cross = ChannelAttention(width, 7, operations, **factory)
        self.ffn = GatedFFN(width, layout.ffn, operations, **factory)
        self.leave = operations.Conv2d(width, site.channels, 1, **factory)
        self.outer = nn.Parameter(torch.empty((), **factory))

    def forward(self, x: Tensor, skip: Tensor, strength: float = 1.0, noise: Tensor | None = None) -> tuple[Tensor, Routed]:
        """Return x with detail added, and who did it.

        Args:
            x: (B, channels, h, w) of the decoder.
            skip: (B, skip channels, h, w) of the encoder, of the degraded picture.
            strength: of what is added.
            noise: for the router, in training.
        """
        windows = Windows(self.window, (x.shape[2], x.shape[3]))
        (decoded, size), (degraded, _) = _contrast(self.enter, x, windows), _contrast(self.skip, skip, windows)
        h = decoded + degraded
        own = normalised(h)
        s = h + self.shared(own, own, windows)
        routed = self.router(own, windows, noise)
        y = self._detailed(h, s, routed, windows)
        y = y + self.cross(normalised(y), normalised(s), windows)
        y = y + self.ffn(normalised(y))
        return x + self.leave(y) * size * (strength * cast_like(self.outer, x)), routed

    def _detailed(self, h: Tensor, s: Tensor, routed: Routed, windows: Windows) -> Tensor:
        y, weights = h, windows.spread(routed.weights)
        for index in routed.chosen.sum((0, 2, 3)).nonzero().flatten().tolist():
            y = y + weights[:, index:index + 1] * self.experts[index](h, s, windows)
        return y


def _contrast(layer: nn.Module, x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """layer((x - mean) / deviation), (B, width, h, w), and the deviation. The layer is linear: means need not be spread before it."""
    mean, deviation = window_statistics(x, windows)
    deviation = windows.spread(deviation)
    return (layer(x) - windows.spread(layer(mean))) / deviation, deviation


class DetailExperts(nn.Module):
    """All modules of a decoder.

    Args:
        sites: where they sit.
        size: one of SIZES.
        window: see DAEM.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, sites: tuple[VaeSite, ...], size: str, window: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.window = window
        self.sites = nn.ModuleDict({site.name: DAEM(site, SIZES[size], window, operations, **factory) for site in sites})


def initialise(network: DetailExperts, generator: torch.Generator) -> None:
    """Fill the weights, which the host's layers leave empty: as torch would, but zero where a branch ends."""
    fill(network, generator, zero=("leave", "zero", "zero2"), one=("outer", "temperature"))
