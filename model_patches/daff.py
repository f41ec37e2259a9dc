"""Degradation-aware feature fusion, DAFF (UniLDiff, arXiv 2507.23685, read with methods that are public): what the denoiser sees right
after its first layer is fused with the encoder's features of the degraded picture.

    e = out(SiLU(conv(GroupNorm(f_LQ))))                            the condition embedding, once a run
    latent, lq = DoubleStream(linear(x), linear(e))                 one attention over the tokens of both
    f = SingleStream([lq, latent])                                  joined channel by channel; both streams as updated
    x' = x + zero(Last(f))

The last layer starts at zero, so a fresh one leaves the model as it is. Modulations follow the timestep. The public code feeds the single
stream the latent stream as it came in; the paper says both updated streams, and so it is here. What the paper does not say is how other
layers start: here so that the degraded picture is seen clearly from the first step (`initialise`). The public code has a second zero, at
the end of the condition embedding; with it, and with layers that start at random, the picture is hardly seen at first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import PATCH, Anatomy
from .daff_blocks import HEAD, DoubleStreamBlock, LastLayer, SingleStreamBlock, TimeEmbedding, time_code
from .first_weights import fill
from .frames import frames_of
from .token_windows import in_windows

# What "published" and "lite" mean for a model whose features have so many channels after its first layer: SDXL has 320 there.
PRESETS = ("published", "lite")
WIDTHS = {"published": (3.2, 1024), "lite": (2.4, 768)}
TRANSFORMER_WIDTHS = {"published": (1.0, 1024), "lite": (0.5, 768)}
EMBEDDING = 320
GROUPS = 32
# How far from zero tokens stand at first, beside their deviation of about 1.
PEDESTAL = 2.0
# Scale of what the zero layer is given at first; its gradient, and so its speed, grow with it.
LOUDNESS = 2.0
# Tokens to a side of a window: 512 pixels of published, 1024 of lite or of a transformer, for eight pixels to a cell.
WINDOW = 64
# Tokens that are fused at once outside of training, so that batches and videos need no more memory than two large pictures.
AT_ONCE = 2 * WINDOW**2


@dataclass(frozen=True)
class Layout:
    """The sizes of a DAFF.

    Attributes:
        channels: of the denoiser's feature.
        features: channels of the encoder's features.
        embedding: channels of the condition embedding.
        width: of the tokens; the single stream has twice that.
        patch: latent cells to a side of a token.
        tokens: the denoiser's feature comes as such tokens (B, N, C) already.
        single: whether there is a single-stream block.
    """

    channels: int
    features: int
    embedding: int
    width: int
    patch: int
    tokens: bool
    single: bool = True


def layout_of(anatomy: Anatomy, preset: str, features: int, single: bool = True) -> Layout:
    """Return the layout for a denoiser.

    "published" has a token for every latent cell and width 1024 on SDXL, "lite" tokens of 2x2 cells and width 768; narrower models get
    narrower ones. Transformers have tokens of their own, 2x2 cells in both.

    Args:
        anatomy: of the model.
        preset: one of PRESETS.
        features: channels of the VAE encoder's features.
        single: False leaves the single-stream block out, to see what it is worth.
    """
    unet = anatomy.kind == "unet"
    channels = anatomy.emb // 4 if unet else anatomy.emb
    factor, most = (WIDTHS if unet else TRANSFORMER_WIDTHS)[preset]
    width = max(HEAD, int(min(factor * channels, most)) // HEAD * HEAD)
    return Layout(channels, features, min(EMBEDDING, channels), width, 1 if unet and preset == "published" else PATCH, not unet, single)


class ConditionEmbedding(nn.Module):
    """What the encoder knows of the degraded picture, brought to the denoiser's terms."""

    def __init__(self, features: int, embedding: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(next(groups for groups in (GROUPS, 16, 8, 4, 2, 1) if features % groups == 0), features, **factory)
        self.conv = operations.Conv2d(features, features, 3, padding=1, **factory)
        self.out = operations.Conv2d(features, embedding, 3, padding=1, **factory)

    def forward(self, features: Tensor) -> Tensor:
        """(B, features, h, w) -> (B, embedding, h, w)."""
        return self.out(F.silu(self.conv(self.norm(features))))


class DAFF(nn.Module):
    """The fusion of one denoiser.

    Args:
        layout: sizes.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, layout: Layout, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.layout, width = layout, layout.width
        self.embedding = ConditionEmbedding(layout.features, layout.embedding, operations, **factory)
        cut = {"kernel_size": layout.patch, "stride": layout.patch, **factory}
        if layout.tokens:
            self.latent_in = operations.Linear(layout.channels, width, **factory)
        else:
            self.latent_in = operations.Conv2d(layout.channels, width, **cut)
        self.lq_in = operations.Conv2d(layout.embedding, width, **cut)
        self.time1 = TimeEmbedding(width, operations, **factory)
        self.time2 = TimeEmbedding(2 * width, operations, **factory)
        self.double_stream = DoubleStreamBlock(width, operations, **factory)
        self.single_stream = SingleStreamBlock(2 * width, operations, **factory) if layout.single else None
        self.last = LastLayer(2 * width, width, operations, **factory)
        cells = 1 if layout.tokens else layout.patch ** 2
        self.zero = operations.Linear(width, layout.channels * cells, **factory)

    def embed(self, features: Tensor) -> Tensor:
        """Return the condition embedding of features (B, C, h, w), or of a video's (B, C, T, h, w)."""
        if features.ndim == 4:
            return self.embedding(features)
        return self.embedding(frames_of(features)).unflatten(0, (features.shape[0], -1)).movedim(2, 1).contiguous()

    def forward(self, x: Tensor, e: Tensor, time: Tensor, options: dict) -> Tensor:
        """Return what is added to the denoiser's feature.

        Args:
            x: (B, channels, h, w), or tokens (B, N, channels).
            e: the condition embedding at the latent's resolution, (B, embedding, h, w) or (B, embedding, T, h, w).
            time: (B,) in 0..1000.
            options: the host's transformer_options.
        """
        lq = self.lq_in(_padded(frames_of(e), self.layout.patch))
        if self.layout.tokens:
            latent = self.latent_in(x).reshape(len(lq), -1, self.layout.width).transpose(1, 2).reshape(lq.shape)
        else:
            latent = self.latent_in(_padded(x, self.layout.patch))
        code = time_code(time).to(x).repeat_interleave(len(lq) // len(time), 0)
        times = self.time1(code), self.time2(code)
        fused = self._fuse_rows(latent, lq, times, options)
        change = self.zero(fused.flatten(2).transpose(1, 2))
        if self.layout.tokens:
            return change.reshape(x.shape)
        cells = change.transpose(1, 2).unflatten(2, fused.shape[-2:])
        return F.pixel_shuffle(cells, self.layout.patch)[..., :x.shape[-2], :x.shape[-1]]

    def _fuse_rows(self, latent: Tensor, lq: Tensor, times: tuple[Tensor, Tensor], options: dict) -> Tensor:
        """Fuse (B, width, h, w), in windows, as many rows at once as there is room for."""
        together = len(lq) if torch.is_grad_enabled() else max(1, AT_ONCE // min(lq.shape[-2] * lq.shape[-1], WINDOW**2))
        parts = zip(latent.split(together), lq.split(together), *(time.split(together) for time in times))
        return torch.cat([in_windows(lambda a, b, own=own: self._fuse(a, b, own, options), x, e, WINDOW) for x, e, *own in parts])

    def _fuse(self, latent: Tensor, lq: Tensor, times: tuple[Tensor, Tensor], options: dict) -> Tensor:
        """(B, width, h, w) of both streams -> the same of the fused one."""
        sides = latent.shape[-2:]
        latent, lq = self.double_stream(latent.flatten(2).transpose(1, 2), lq.flatten(2).transpose(1, 2), times[0], options)
        joined = torch.cat([lq, latent], -1)
        if self.single_stream is not None:
            joined = self.single_stream(joined, times[1], options)
        return self.last(joined, times[1]).transpose(1, 2).unflatten(2, sides)

    def weigh(self, mask: Tensor) -> Tensor:
        """Return the mask (B, 1, ...) of the latent at the resolution of its place, shaped to multiply it."""
        if not self.layout.tokens:
            return mask
        return F.avg_pool2d(_padded(frames_of(mask), self.layout.patch), self.layout.patch).reshape(len(mask), -1, 1)


def initialise(daff: DAFF, generator: torch.Generator) -> None:
    """Fill the weights, which the host's layers leave empty.

    What the last layer sees of a fresh one is, token by token, a linear view of the encoder's features in the token's own cells; streams,
    modulations and the latent's part in it open as they learn, as in adaLN-Zero (arXiv 2212.09748).
    """
    fill(daff, generator, one=("norm", "query_norm", "key_norm"))
    with torch.no_grad():
        for name, p in daff.named_parameters():
            if p.ndim > 1 and not name.startswith("zero."):
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
            if "modulation." in name:
                p.zero_()
        _see_linearly(daff.embedding, generator)
        _stand_on_pedestals(daff)


def _see_linearly(embedding: ConditionEmbedding, generator: torch.Generator) -> None:
    """Lead u and -u through the activation and subtract them again: SiLU(u) - SiLU(-u) = u. Only the middle of each kernel sees at first."""
    conv, out = embedding.conv.weight, embedding.out.weight
    pairs = conv.shape[0] // 2
    directions = torch.linalg.qr(torch.randn(conv.shape[1], pairs, generator=generator))[0].T
    mixed = torch.randn(out.shape[0], pairs, generator=generator) / pairs ** 0.5
    for weight, both in ((conv, torch.cat([directions, -directions])), (out, torch.cat([mixed, -mixed], 1))):
        weight.zero_()
        weight[:both.shape[0], :both.shape[1], 1, 1] = both


def _stand_on_pedestals(daff: DAFF) -> None:
    """Lift tokens far from zero, so that normalisation, which would take the strength of detail away, is nearly linear; and take the LQ stream down again."""
    width = daff.layout.width
    pedestal = PEDESTAL * (1 - 2 * (torch.arange(width) % 2).float())
    daff.lq_in.bias.copy_(pedestal)
    daff.latent_in.bias.copy_(pedestal)
    # Of a joined token the norm's divisor is about the pedestal itself.
    daff.last.linear.weight.copy_(LOUDNESS * PEDESTAL * torch.eye(width, 2 * width))
    daff.last.linear.bias.copy_(-LOUDNESS * pedestal)


def _padded(x: Tensor, patch: int) -> Tensor:
    """Repeat the last row and column until whole patches are there."""
    down, right = (-x.shape[axis] % patch for axis in (-2, -1))
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
