"""The degraded picture's latent as part of the host's conditioning: batched, cropped to areas and cut to context windows with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import comfy.conds

from .lq_pictures import Encoding


class LatentCondition:
    """A degraded latent, and where it counts.

    Args:
        key: the name it has among the model's conds; free on the model.
        c_lq: (B, C, h, w) or (B, C, f, h, w), as the model sees latents.
        mask: (M, H, W) in 0..1, of any size; None for everywhere.
        node: whom messages name.
        again: gives what there is for another number of frames than c_lq has, or raises a ValueError; None where there is nothing else.
    """

    WHAT = "degraded latent"

    def __init__(self, key: str, c_lq: Tensor, mask: Tensor | None, node: str, again: Encoding | None = None) -> None:
        self.key, self.c_lq, self.mask, self.node, self.again = key, c_lq, mask, node, again

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """OUTER_SAMPLE wrapper: what has to be encoded again is, while the model is not yet loaded."""
        self.encoded(noise)
        return executor(noise, *args, **kwargs)

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *args: Any,
                       **kwargs: Any) -> Tensor:
        """SAMPLER_SAMPLE wrapper: every cond of this run carries the latent."""
        with conds_with(guider, {self.key: comfy.conds.CONDNoiseShape(self.fitted(noise))}):
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def encoded(self, noise: Tensor) -> Tensor:
        """Return what there is for the frames of a run."""
        if self.again is None or noise.ndim != 5 or noise.shape[2] == self.c_lq.shape[2]:
            return self.c_lq
        return self.again(noise.shape[2])

    def fitted(self, noise: Tensor) -> Tensor:
        """Return latent and mask for a run, (B, C + 1, ...) on the noise's device; up to a cell of height and width is padded or cropped.

        Raises:
            ValueError: when picture or mask do not fit the latent; the message names the input and both sizes.
        """
        if noise.ndim != self.c_lq.ndim or not self.goes_with(noise):
            raise ValueError(f"{self.node}: the {self.WHAT} is {_size(self.c_lq)} and the one that is sampled {_size(noise)}. "
                             "Use the VAE of this model.")
        c_lq, batch, sides = self.encoded(noise), noise.shape[0], noise.shape[2:]
        other_frames = sides[:-2] != c_lq.shape[2:-2]
        if other_frames or any(abs(side - own) > 1 for side, own in zip(sides[-2:], c_lq.shape[-2:])):
            raise ValueError(f"{self.node}: the {self.WHAT} is {_size(c_lq)} and the one that is sampled {_size(noise)}. "
                             "Encode the same picture that you connect here (Frame Image pads both alike).")
        c_lq = _rows(self.shown(_resized(c_lq, sides), noise), batch, "degraded", self.node)
        mask = torch.ones_like(c_lq[:, :1]) if self.mask is None else _rows(latent_mask(self.mask, sides), batch, "mask", self.node)
        return torch.cat([c_lq, mask.to(c_lq)], 1).to(noise.device)

    def goes_with(self, noise: Tensor) -> bool:
        """Tell whether this is the model's own kind of latent."""
        return noise.shape[1] == self.c_lq.shape[1]

    def shown(self, c_lq: Tensor, noise: Tensor) -> Tensor:
        """Return what the model is shown of it, once a run."""
        return c_lq

    def take(self, kwargs: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take latent and mask out of the arguments of one evaluation, as x (device, precision); None if this evaluation carries none.

        Raises:
            ValueError: when another pack samples in pieces of its own, which the latent was not cut to.
        """
        held = kwargs.pop(self.key, None)
        if held is None:
            return None
        if held.shape[2:] != x.shape[2:]:
            raise ValueError(f"{self.node}: the model is given {_size(x)} of a latent of {_size(held)}, by a tiled sampler that the "
                             "degraded latent cannot follow. Tile the picture instead, and restore tile by tile.")
        both = held.to(x)
        return both[:, :-1], both[:, -1:]


class FeatureCondition(LatentCondition):
    """Features of the degraded picture instead of its latent, one for each latent cell.

    Args:
        key, c_lq, mask, node, again: as there; c_lq has any number of channels.
        embed: makes what the model is shown of the features, (B, ...) -> (B, ...); runs once a run, on the device of the noise.
    """

    WHAT = "encoded degraded picture"

    def __init__(self, key: str, c_lq: Tensor, mask: Tensor | None, node: str, embed: Callable[[Tensor], Tensor],
                 again: Encoding | None = None) -> None:
        super().__init__(key, c_lq, mask, node, again)
        self.embed = embed

    def goes_with(self, noise: Tensor) -> bool:
        """Features have channels of their own."""
        return True

    def shown(self, c_lq: Tensor, noise: Tensor) -> Tensor:
        """Embed them."""
        with torch.no_grad():
            return self.embed(c_lq.to(noise.device))


@contextmanager
def conds_with(guider: Any, added: dict[str, Any]) -> Iterator[None]:
    """Have every cond of a guider carry these too for as long as the context is open."""
    before = guider.conds
    guider.conds = {name: [{**entry, "model_conds": {**entry.get("model_conds", {}), **added}} for entry in entries or ()]
                    for name, entries in before.items()}
    try:
        yield
    finally:
        guider.conds = before


def _size(latent: Tensor) -> str:
    return "x".join(str(side) for side in latent.shape)


def _resized(latent: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Crop at the end or repeat the last cell, to reach the sides."""
    for axis, side in enumerate(sides, 2):
        latent = latent.narrow(axis, 0, min(side, latent.shape[axis]))
        if latent.shape[axis] < side:
            latent = torch.cat([latent, latent.narrow(axis, latent.shape[axis] - 1, 1)], axis)
    return latent


def _rows(latent: Tensor, batch: int, name: str, node: str) -> Tensor:
    if not len(latent) or batch % len(latent):
        raise ValueError(f"{node}: '{name}' holds {len(latent)} for a batch of {batch}. Give one for all, or one each.")
    return latent.repeat(batch // len(latent), *[1] * (latent.ndim - 1))


def latent_mask(mask: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return (M, 1, *sides): averages over cells. On videos the masks are frames, spread over the latent's frames."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().clamp(0, 1)
    if len(sides) == 2 or sides[0] == 1:
        return F.interpolate(mask, sides[-2:], mode="area").reshape(-1, 1, *sides)
    span, left = divmod(len(mask) - 1, sides[0] - 1)
    if span and not left:
        # Video VAEs make the first latent frame of one picture, and each other one of as many as follow it.
        cells = F.interpolate(mask, sides[-2:], mode="area")
        return torch.cat([cells[:1], cells[1:].unflatten(0, (-1, span)).mean(1)]).movedim(0, 1).unsqueeze(0)
    return F.interpolate(mask.movedim(0, 1).unsqueeze(0), sides, mode="area")
