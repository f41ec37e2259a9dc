"""The picture whose degradation is sampled: fitted to the latents, and the way between what a model samples and the restored picture.

Defusion (arXiv 2506.16960) samples y0 = x_LQ - x_HQ. There are two places to take that difference, and one to leave it out:

    latent:  y0 = (E(x_LQ) - E(x_HQ)) / d                the restored picture is Dec(E(x_LQ) - d y0)
    pixel:   y0 = (E((x_LQ - x_HQ) / 2) - E(0)) / d      it is x_LQ - 2 (Dec(E(0) + d y0) - Dec(E(0))), the input itself where y0 = 0
    picture: y0 = E(x_HQ)                                plain diffusion, for comparison

d is the deviation measured when training began, pixels are in -1..1. A LATENT always holds c_lq - g d y0 with g = 1 in the latent form. In
the pixel form g = 2: as far as a VAE is linear that is the restored picture too, so that previews, masks and samplers that go on from a
latent see a picture, while `removed` finds d y0 in it again and takes it from the pixels.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .framing import check_covers, pad_to, resize
from .host_vae import encode_pictures

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

FORMS = ("latent", "pixel", "picture")
GAIN = {"latent": 1.0, "pixel": 2.0}
# Under which a MODEL carries its Degradation.
ATTACHMENT = "mend_degradation"
# What the host's scaling of latents may leave of zero, relative to their largest value.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class DegradedPicture:
    """A degraded picture of any size.

    Attributes:
        pictures: (N, H, W, 3) in 0..1, one for all latents or one each.
        vae: encodes them.
        node: for messages.
    """

    pictures: Tensor
    vae: "VAE"
    node: str
    _known: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def cell(self) -> int:
        """Pixels to a side of one latent cell."""
        return self.vae.spacial_compression_encode()

    def pixels(self, sides: tuple[int, int]) -> Tensor:
        """Return the part that latents of these sides (in cells) stand for, reflected at the edges where they reach beyond the picture.

        Raises:
            ValueError: when they belong to a picture of another size.
        """
        advice = "Encode the same picture that you connect here, or connect an empty latent of its size."
        size = check_covers(tuple(self.pictures.shape[1:3]), sides, self.cell, self.node, advice)
        return reframed(self.pictures, size)

    @torch.no_grad()
    def latent(self, model: Any, shape: torch.Size) -> Tensor:
        """Return c_lq as the model sees latents, (N, C, ...) float32, for latents of a shape.

        Raises:
            ValueError: when picture, VAE and latents do not go together, or the VAE fails.
        """
        key = tuple(shape[-2:])
        if key not in self._known:
            self._known.clear()
            self._known[key] = self._finite(encode_pictures(self.vae, model, self.pixels(key)))
        c_lq = self._known[key]
        c_lq = c_lq.unsqueeze(2) if c_lq.ndim == 4 and len(shape) == 5 else c_lq
        if c_lq.shape[1:] != shape[1:]:
            found, wanted = ("x".join(str(side) for side in sizes) for sizes in (c_lq.shape[1:], shape[1:]))
            raise ValueError(f"{self.node}: the degraded latent is {found} and the one that is sampled {wanted}. Use the VAE of this "
                             "model; videos are restored picture by picture.")
        return self.each(c_lq, shape[0])

    def each(self, rows: Tensor, batch: int, what: str = "'degraded' holds {count} pictures") -> Tensor:
        """Repeat what belongs to the pictures for a batch.

        Args:
            rows: one for all, or one each.
            batch: how many there are to be.
            what: says in messages what the rows are.

        Raises:
            ValueError: when that does not work out.
        """
        if batch % len(rows):
            raise ValueError(f"{self.node}: {what.format(count=len(rows))} for a batch of {batch}. Give one for all, or one each.")
        return rows.repeat(batch // len(rows), *[1] * (rows.ndim - 1))

    def _finite(self, c_lq: Tensor) -> Tensor:
        if not c_lq.isfinite().all():
            raise ValueError(f"{self.node}: 'vae' gives NaN or infinite values for 'degraded'. Run the VAE in a higher precision (start "
                             "ComfyUI with --fp32-vae).")
        return c_lq

    def _covered(self, sides: tuple[int, int]) -> tuple[int, int]:
        return sides[0] * self.cell, sides[1] * self.cell


@dataclass(frozen=True, eq=False)
class Degradation:
    """What a MODEL knows of the degradation that it is to sample; the sampler and Remove Degradation find it there.

    Attributes:
        picture: the degraded one.
        form: one of FORMS.
        deviation: d.
        strength: how much of what was found is removed.
        mask: (M, h, w) in 0..1, where it is removed; None for everywhere.
    """

    picture: DegradedPicture
    form: str
    deviation: float
    strength: float = 1.0
    mask: Tensor | None = None

    def space(self, model: Any, noise: Tensor) -> "Space":
        """Return the way between what is sampled and the restored picture, for a run."""
        c_lq = self.picture.latent(model, noise.shape).to(noise)
        if self.form == "picture":
            return Space(c_lq, None)
        scale = torch.full_like(c_lq[:, :1], GAIN[self.form] * self.deviation * self.strength)
        return Space(c_lq, scale if self.mask is None else scale * self._touched(noise.shape).to(scale))

    @torch.no_grad()
    def removed(self, patcher: "ModelPatcher", latent: Tensor) -> Tensor:
        """Return the restored pictures (B, H, W, 3) in 0..1 of what was sampled.

        Args:
            patcher: the model it was sampled with.
            latent: (B, C, ...) as LATENTs are.

        Raises:
            ValueError: when the latent belongs to another picture or another model.
        """
        seen = self.picture.latent(patcher.model, latent.shape)
        pictures = self.picture.each(self.picture.pictures, len(latent))
        if self.form == "pixel":
            restored = pictures - 2 * self._residual(patcher, latent, seen).to(pictures.device)
        else:
            restored = self._restored(patcher, latent, seen, pictures)
        weight = 1.0 if self.mask is None else self._masks(self._mask(pictures.shape[1:3]), len(latent)).to(pictures.device)
        return (pictures + weight * (restored.to(pictures) - pictures)).clamp(0, 1)

    def _residual(self, patcher: "ModelPatcher", latent: Tensor, seen: Tensor) -> Tensor:
        """Return half the residual in -1..1, the size of the pictures, and exactly 0 where nothing was sampled; seen is c_lq."""
        vae, own = self.picture.vae, self.picture.pictures.shape[1:3]
        reference = _as_sampled(patcher, seen, latent)
        change = (reference - latent) / GAIN[self.form]
        least = max(ROUNDING, torch.finfo(latent.dtype).eps) * reference.abs().max()
        change = torch.where(change.abs() <= least, torch.zeros_like(change), change)
        rows = []
        grey = torch.full((1, *(side * self.picture.cell for side in latent.shape[-2:]), 3), 0.5)
        zero = vae.encode(grey).to(latent).reshape(1, *latent.shape[1:])
        nothing = self._decoded(zero)
        for row in change.split(1):
            rows.append(reframed(self._decoded(zero + row) - nothing, own) if row.any() else torch.zeros(1, *own, 3))
        # Decoders answer in 0..1, which is half of -1..1.
        return torch.cat([row.to(latent.device) for row in rows])

    def _restored(self, patcher: "ModelPatcher", latent: Tensor, seen: Tensor, pictures: Tensor) -> Tensor:
        """Return what was sampled, as large as the pictures; seen is c_lq.

        Beyond whole cells there is nothing that was sampled. The pictures stand there as they are, but for the smooth part of what changed
        beside them: without it haze would end in a seam, and with all of it noise would come in twice.
        """
        decoded, own, cell = self._decoded(latent).to(pictures.device), pictures.shape[1:3], self.picture.cell
        inside = reframed(decoded, tuple(map(min, own, decoded.shape[1:3])))
        if inside.shape[1:3] == own:
            return inside
        change = (decoded - self._decoded(_as_sampled(patcher, seen, latent)).to(decoded)).movedim(-1, 1)
        smooth = F.avg_pool2d(change, 2 * cell + 1, stride=1, padding=cell, count_include_pad=False).movedim(1, -1)
        restored = pictures + reframed(smooth, own).to(pictures)
        top, left = ((side - part) // 2 for side, part in zip(own, inside.shape[1:3]))
        restored[:, top:top + inside.shape[1], left:left + inside.shape[2]] = inside
        return restored

    def _decoded(self, latent: Tensor) -> Tensor:
        flat = latent[:, :, 0] if latent.ndim == 5 and self.picture.vae.latent_dim == 2 else latent
        decoded = torch.cat([self.picture.vae.decode(row).reshape(-1, *self._pixels_of(row), 3) for row in flat.split(1)])
        return decoded.float()

    def _pixels_of(self, latent: Tensor) -> tuple[int, int]:
        return latent.shape[-2] * self.picture.cell, latent.shape[-1] * self.picture.cell

    def _mask(self, size: tuple[int, int]) -> Tensor:
        return resize(self.mask.reshape(-1, *self.mask.shape[-2:], 1).float().clamp(0, 1), tuple(size))

    def _masks(self, rows: Tensor, batch: int) -> Tensor:
        return self.picture.each(rows, batch, "'mask' holds {count} masks")

    def _touched(self, shape: torch.Size) -> Tensor:
        """Return (B, 1, ...): 1 in cells where any pixel may change; how much it does is decided pixel by pixel."""
        cell = self.picture.cell
        mask = reframed(self._mask(self.picture.pictures.shape[1:3]), (shape[-2] * cell, shape[-1] * cell))
        touched = (F.max_pool2d(mask.movedim(-1, 1), cell) > 0).float()
        touched = self._masks(touched, shape[0])
        return touched.unsqueeze(2) if len(shape) == 5 else touched


@dataclass(frozen=True, eq=False)
class Space:
    """The way between latents of pictures and what is sampled, for one run.

    Attributes:
        c_lq: (B, C, ...).
        scale: (B, 1, ...) how far the picture moves when y0 moves by 1; None where the picture itself is sampled.
    """

    c_lq: Tensor
    scale: Tensor | None

    def picture(self, y0: Tensor) -> Tensor:
        """Return c_lq - scale y0."""
        return y0 if self.scale is None else self.c_lq - self.scale * y0

    def residual(self, latent: Tensor) -> Tensor:
        """Return y0 of a picture; 0 where nothing may change."""
        if self.scale is None:
            return latent
        change, held = self.c_lq - latent.to(self.c_lq), self.scale == 0
        return torch.where(held, torch.zeros_like(change), change / torch.where(held, torch.ones_like(self.scale), self.scale))


class Residuals:
    """d y0 of pairs, for training.

    Args:
        form: one of FORMS.
        vae: encodes.
        model: the host's, whose latents they become.
    """

    def __init__(self, form: str, vae: "VAE", model: Any) -> None:
        self.form, self.vae, self.model = form, vae, model
        self.nothing: dict[torch.Size, Tensor] = {}

    def __call__(self, degraded: Tensor, clean: Tensor, c_lq: Tensor | None = None) -> Tensor:
        """Return (B, C, ...), float32, of pictures (B, H, W, 3) in 0..1 whose sides are whole cells; c_lq if it is known already."""
        if self.form == "picture":
            return self.encoded(clean)
        if self.form == "latent":
            known = self.encoded(degraded) if c_lq is None else c_lq
            return known - self.encoded(clean).to(known)
        found = self.encoded((degraded - clean + 1) / 2)
        if clean.shape[1:] not in self.nothing:
            self.nothing[clean.shape[1:]] = self.encoded(torch.full_like(clean[:1], 0.5))
        return found - self.nothing[clean.shape[1:]]

    def encoded(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures, without gradients."""
        with torch.no_grad():
            return encode_pictures(self.vae, self.model, pictures)


def _as_sampled(patcher: "ModelPatcher", seen: Tensor, latent: Tensor) -> Tensor:
    """Return c_lq as a run in which nothing is found gives it, as a latent (device, precision)."""
    # On the device that sampled, so that equal latents are equal bit for bit.
    return patcher.model.process_latent_out(seen.to(patcher.load_device)).to(latent)


def reframed(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (B, H, W, C) to a size from its middle, as VAE Encode does, or pad it by reflection."""
    for axis, side in enumerate(size, 1):
        pictures = pictures.narrow(axis, max(0, pictures.shape[axis] - side) // 2, min(side, pictures.shape[axis]))
    return pictures if tuple(pictures.shape[1:3]) == tuple(size) else pad_to(pictures, tuple(size))
