"""The degraded picture and the visual instruction as part of the host's conditioning, and guidance by what the instruction adds."""

from typing import TYPE_CHECKING, Any
from uuid import uuid5

import torch
import torch.nn.functional as F
from torch import Tensor

import comfy.conds

from .degraded_picture import DegradedPicture
from .host import WrappersMP
from .lq_condition import LatentCondition, conds_with

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class DegradationCondition(LatentCondition):
    """The picture is folded into latent cells: pixels in -1..1 and the latent, one upon the other, so that it is cropped with the latents.

    Args:
        key: the name it has among the model's conds; free on the model.
        picture: None in training, where pictures come with each evaluation.
        tokens: (1 or B, N, width) of the instruction.
        cfg: how far beyond what no instruction would give; 1 asks for the instruction alone.
        node: whom messages name.
    """

    def __init__(self, key: str, picture: DegradedPicture | None, tokens: Tensor, cfg: float, node: str) -> None:
        super().__init__(key, torch.empty(0), None, node)
        self.picture, self.tokens, self.cfg = picture, tokens, cfg

    @property
    def tokens_key(self) -> str:
        """Name of the instruction among the conds."""
        return f"{self.key}_tokens"

    @property
    def whole_key(self) -> str:
        """Name among the conds of whether all of them see the whole picture, so that one look at it serves all."""
        return f"{self.key}_whole"

    @property
    def count_key(self) -> str:
        """Name among the conds of how many there are without their twins; see _calc_cond_batch."""
        return f"{self.key}_count"

    def listen(self, patcher: "ModelPatcher") -> None:
        """Encode the picture while the model is not yet loaded, and guide where that is asked for."""
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self.key, self._outer_sample)
        if self.cfg != 1:
            patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self.key, self._calc_cond_batch)

    def _outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if noise.ndim in (4, 5):
            self.picture.latent(executor.class_obj.model_patcher.model, noise.shape)
        return executor(noise, *args, **kwargs)

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *args: Any,
                       **kwargs: Any) -> Tensor:
        """SAMPLER_SAMPLE wrapper: every cond of this run carries picture and instruction."""
        areas = any("area" in entry for entries in guider.conds.values() for entry in entries or ())
        conds = {self.key: comfy.conds.CONDNoiseShape(self.shown_to(guider.inner_model, noise)),
                 self.tokens_key: comfy.conds.CONDRegular(self._instruction(noise)),
                 self.whole_key: comfy.conds.CONDConstant(not areas)}
        with conds_with(guider, conds):
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def shown_to(self, model: Any, noise: Tensor) -> Tensor:
        """Return picture, latent and a mask of ones for a run.

        Raises:
            ValueError: when the picture does not fit the latents.
        """
        # The host lays what is sampled together with others into one row.
        if noise.ndim not in (4, 5) or (noise.ndim == 5 and noise.shape[2] > 1):
            raise ValueError(f"{self.node}: videos and things sampled together with others are not supported. Restore picture by picture.")
        c_lq = self.picture.latent(model, noise.shape)
        pixels = self.picture.each(self.picture.pixels(tuple(noise.shape[-2:])), len(noise))
        return folded(pixels, c_lq, self.picture.cell).to(noise.device)

    def _instruction(self, noise: Tensor) -> Tensor:
        if len(noise) % len(self.tokens):
            raise ValueError(f"{self.node}: 'instruction' is for {len(self.tokens)} pictures and the batch holds {len(noise)}. Give one "
                             "for all, or one each.")
        return self.tokens.to(noise)

    def _calc_cond_batch(self, executor: Any, model: Any, conds: list, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Evaluate every cond together with a twin that has no instruction."""
        conds = [self._counted(entries, len(conds)) for entries in conds]
        out = executor(model, [*conds, *(self._without(entries) for entries in conds)], *args, **kwargs)
        return [torch.lerp(none, asked, self.cfg) for asked, none in zip(out[:len(conds)], out[len(conds):])]

    def told(self, kwargs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return the transformer_options of one evaluation with what its conds say; it is taken out of the arguments.

        The host numbers twins on from the conds they are twins of. Patches that have one thing for the prompt and another for the negative
        prompt, such as IP-Adapter's, find them by these numbers: a twin gets the number of its cond.
        """
        options = options | {name: kwargs.pop(name) for name in (self.tokens_key, self.whole_key) if name in kwargs}
        count = kwargs.pop(self.count_key, None)
        return options if count is None else {**options, "cond_or_uncond": [number % count for number in options["cond_or_uncond"]]}

    def _counted(self, entries: list[dict] | None, count: int) -> list[dict] | None:
        if entries is None:
            return None
        known = {self.count_key: comfy.conds.CONDConstant(count)}
        return [{**entry, "model_conds": {**entry["model_conds"], **known}} for entry in entries]

    def _without(self, entries: list[dict] | None) -> list[dict] | None:
        return None if entries is None else [self._emptied(entry) for entry in entries]

    def _emptied(self, entry: dict) -> dict:
        tokens = entry["model_conds"].get(self.tokens_key)
        if tokens is None:
            return entry
        nothing = comfy.conds.CONDRegular(torch.zeros_like(tokens.cond))
        # Patches that remember what a cond gave, such as EasyCache, tell conds apart by it.
        twin = uuid5(entry["uuid"], self.tokens_key)
        return {**entry, "uuid": twin, "model_conds": {**entry["model_conds"], self.tokens_key: nothing}}


def folded(pixels: Tensor, c_lq: Tensor, cell: int) -> Tensor:
    """Return (B, 3 cell^2 + C + 1, ...) of pictures (B, H, W, 3) in 0..1 and their latents: what `take` parts into picture and mask."""
    cells = F.pixel_unshuffle(2 * pixels.movedim(-1, 1).float() - 1, cell).to(c_lq)
    cells = cells.unsqueeze(2) if c_lq.ndim == 5 else cells
    return torch.cat([cells, c_lq, torch.ones_like(c_lq[:, :1])], 1)
