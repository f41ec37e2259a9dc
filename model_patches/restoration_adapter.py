"""Restoration Adapters (Diffusion Restoration Adapter, arXiv 2502.20679, section 3.2): small networks after a denoiser's blocks that read the degraded latent.

Each one takes the LQ feature (what the adapter before it made; at first the stem's view of the degraded latent), the denoiser's feature X_t and its
timestep embedding:

    h = lq(feature) + time(emb) + X_t;   h = h + block1(h);   h = h + block2(h);   X_t' = X_t + zero(h);   next feature = h

Only `zero` starts at zero, so a fresh adapter leaves the model as it is. The paper does not say what an adapter block holds. Here it is GroupNorm,
SiLU and a convolution for UNets, LayerNorm, a linear layer and GELU for transformers. With the paper's topology 3x3 convolutions everywhere would be
186 M parameters on SDXL (it reports 157 M), three quarters of them in the up blocks, so the fine up blocks make do with 1x1 (see KERNELS).

Nor does it say how the LQ feature finds its detail again after a UNet's coarse middle. Here an adapter going up adds fine(feature of the same
resolution on the way down, or the stem's), which on the lab's UNet is worth 2.7 dB after 400 steps (web/docs/MendApplyRestorationAdapter.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import Anatomy, Site
from .first_weights import fill
from .frames import frames_of
from .host import pad_to_patches

TRANSFORMER_SITES = 6
GROUPS = 32
# Sides of the three convolutions (lq, block1, block2) by where an adapter sits.
KERNELS = {
    "full": {"down": (3, 3, 3), "middle": (3, 3, 3), "up0": (1, 3, 3), "up": (1, 1, 1)},
    "small": {"down": (1, 3, 1), "middle": (1, 3, 1), "up0": (1, 1, 1), "up": (1, 1, 1)},
}


def adapter_sites(anatomy: Anatomy) -> list[Site]:
    """Return where adapters go: every block of a UNet but the last, six evenly spaced blocks of a transformer, all of them if it has no more."""
    sites = list(anatomy.sites)
    if anatomy.kind == "unet" or len(sites) <= TRANSFORMER_SITES:
        return sites
    return [sites[(index + 1) * len(sites) // TRANSFORMER_SITES - 1] for index in range(TRANSFORMER_SITES)]


class ConvAdapterBlock(nn.Module):
    """GroupNorm, SiLU and one convolution."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(min(GROUPS, channels), channels, **factory)
        self.conv = operations.Conv2d(channels, out_channels, kernel, stride=stride, padding=kernel // 2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, out_channels, h / stride, w / stride)."""
        return self.conv(F.silu(self.norm(x)))


class LinearAdapterBlock(nn.Module):
    """LayerNorm, one linear layer and GELU."""

    def __init__(self, channels: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(channels, **factory)
        self.linear = operations.Linear(channels, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, channels) -> the same."""
        return F.gelu(self.linear(self.norm(x)), approximate="tanh")


class Adapter(nn.Module):
    """One Restoration Adapter; how its parts are made is left to the two kinds below."""

    lq: nn.Module
    time: nn.Module
    block1: nn.Module
    block2: nn.Module
    zero: nn.Module
    fine: nn.Module | None

    def forward(self, feature: Tensor, x_t: Tensor, emb: Tensor, detail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (what is added to X_t, the LQ feature for the next adapter), both shaped like X_t; `detail` is what `fine` takes."""
        h = self.fitted(self.lq(self.aligned(feature, x_t)), x_t) + self.shaped(self.time(F.silu(emb)), x_t) + x_t
        if self.fine is not None:
            h = h + self.fitted(self.fine(detail), x_t)
        h = h + self.block1(h)
        h = h + self.block2(h)
        return self.zero(h), h

    def aligned(self, feature: Tensor, x_t: Tensor) -> Tensor:
        """Bring the LQ feature to the resolution that `lq` takes."""
        return feature

    def fitted(self, feature: Tensor, x_t: Tensor) -> Tensor:
        """Bring what is to be added to X_t to its size."""
        return feature

    def shaped(self, time: Tensor, x_t: Tensor) -> Tensor:
        """Shape (B, C) so that it can be added to X_t."""
        return time.unsqueeze(1)


class UNetAdapter(Adapter):
    """The variant for UNets: features are (B, C, h, w)."""

    def __init__(self, before: Site, site: Site, level: Site | None, emb: int, kernels: tuple[int, int, int], operations: Any, **factory: Any) -> None:
        super().__init__()
        self.stride = 2 if site.scale > before.scale else 1
        self.lq = ConvAdapterBlock(before.channels, site.channels, kernels[0], self.stride, operations, **factory)
        self.time = operations.Linear(emb, site.channels, **factory)
        self.block1 = ConvAdapterBlock(site.channels, site.channels, kernels[1], 1, operations, **factory)
        self.block2 = ConvAdapterBlock(site.channels, site.channels, kernels[2], 1, operations, **factory)
        self.zero = operations.Conv2d(site.channels, site.channels, 1, **factory)
        self.fine = None if level is None else operations.Conv2d(level.channels, site.channels, 1, **factory)

    def aligned(self, feature: Tensor, x_t: Tensor) -> Tensor:
        """Going down, `lq` halves by its stride; going up, the feature is repeated."""
        if self.stride > 1 or feature.shape[-2:] == x_t.shape[-2:]:
            return feature
        return F.interpolate(feature, x_t.shape[-2:], mode="nearest")

    def fitted(self, feature: Tensor, x_t: Tensor) -> Tensor:
        """Other patches, such as the host's PatchModelAddDownscale, make X_t smaller for a while."""
        return feature if feature.shape[-2:] == x_t.shape[-2:] else F.interpolate(feature, x_t.shape[-2:], mode="nearest")

    def shaped(self, time: Tensor, x_t: Tensor) -> Tensor:
        """(B, C) -> (B, C, 1, 1)."""
        return time[:, :, None, None]


class TransformerAdapter(Adapter):
    """The variant for transformers: features are the picture's tokens (B, N, C)."""

    def __init__(self, channels: int, emb: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.lq = LinearAdapterBlock(channels, operations, **factory)
        self.time = operations.Linear(emb, channels, **factory)
        self.block1 = LinearAdapterBlock(channels, operations, **factory)
        self.block2 = LinearAdapterBlock(channels, operations, **factory)
        self.zero = operations.Linear(channels, channels, **factory)
        self.fine = None


class RestorationAdapter(nn.Module):
    """All adapters of a model and the stem, which shows them the degraded latent.

    Args:
        anatomy: of the model.
        size: one of KERNELS; transformers have one size only.
        operations: the host's layers.
        factory: dtype and device of the weights.
    """

    def __init__(self, anatomy: Anatomy, size: str, operations: Any, **factory: Any) -> None:
        super().__init__()
        sites = adapter_sites(anatomy)
        first = sites[0]
        self.tokens = anatomy.kind != "unet"
        # Where adapters on the way up have their detail from.
        self.details: dict[str, str] = {}
        if self.tokens:
            self.stem = operations.Conv2d(anatomy.latent_channels, first.channels, first.scale, stride=first.scale, **factory)
            adapters = [TransformerAdapter(site.channels, anatomy.emb, operations, **factory) for site in sites]
        else:
            self.stem = operations.Conv2d(anatomy.latent_channels, first.channels, 3, padding=1, **factory)
            before = [Site("stem", "input", -1, first.channels, 1), *sites[:-1]]
            levels = [_level(site, before[:index + 1]) for index, site in enumerate(sites)]
            self.details = {site.name: level.name for site, level in zip(sites, levels) if level is not None}
            adapters = [UNetAdapter(b, site, level, anatomy.emb, _kernels(site, size), operations, **factory) for b, site, level in zip(before, sites, levels)]
        self.adapters = nn.ModuleDict({site.name: adapter for site, adapter in zip(sites, adapters)})

    def change(self, name: str, features: dict[str, Tensor], x_t: Tensor, emb: Tensor) -> Tensor:
        """Return what one adapter adds to X_t, and put its LQ feature behind those in `features`, which begin with {"stem": embed(c_lq)}.

        The feature it is given is the last one made: a block that guidance skips makes none. It stays only if it is somebody's detail.
        """
        last, detail = next(reversed(features)), features.get(self.details.get(name))
        feature = features[last] if last in self.details.values() else features.pop(last)
        change, features[name] = self.adapters[name](feature, x_t, emb, detail)
        return change

    def embed(self, c_lq: Tensor) -> Tensor:
        """Return the first LQ feature of latents (B, C, h, w) or (B, C, f, h, w)."""
        if not self.tokens:
            return self.stem(c_lq)
        tokens = self.stem(pad_to_patches(frames_of(c_lq), self.stem.stride)).flatten(2).transpose(1, 2)
        return tokens.reshape(len(c_lq), -1, tokens.shape[-1])

    def weigh(self, mask: Tensor, x_t: Tensor) -> Tensor:
        """Return the mask (B, 1, ...) of the latent at X_t's resolution, shaped to multiply it."""
        if not self.tokens:
            return F.interpolate(mask, x_t.shape[-2:], mode="area")
        return F.avg_pool2d(pad_to_patches(frames_of(mask), self.stem.stride), self.stem.stride).reshape(len(mask), -1, 1)


def initialise(adapter: RestorationAdapter, generator: torch.Generator) -> None:
    """Fill the weights, which the host's layers leave empty: everything as torch would, only the last layers zero."""
    fill(adapter, generator)


def _level(site: Site, earlier: list[Site]) -> Site | None:
    """The last place on the way down, the stem among them, with the resolution that `site` returns to; None on the way down itself."""
    if not site.name.startswith("up"):
        return None
    return next((place for place in reversed(earlier) if place.kind == "input" and place.scale == site.scale), None)


def _kernels(site: Site, size: str) -> tuple[int, int, int]:
    kernels = KERNELS[size]
    return kernels.get(site.name) or kernels[site.name.rstrip("0123456789")]
