"""c_lq: the degraded picture as latents that a model sees, of the size that is sampled."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_patches.framing import check_covers, pad_to
from ..model_patches.host_vae import encode_video, latent_frames, video_pictures

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

NODE = "Restoration Guidance"


@dataclass(frozen=True)
class DegradedLatent:
    """A degraded picture, or its latent.

    Attributes:
        pictures: (N, H, W, 3) in 0..1: one for all latents, one each, or the frames of a video.
        vae: encodes them.
        latent: (N, C, h, w) or (N, C, T, h, w) as VAEs give them, in place of the pictures.
    """

    pictures: Tensor | None = None
    vae: "VAE | None" = None
    latent: Tensor | None = None

    @property
    def name(self) -> str:
        """The input that is used, for messages."""
        return "degraded" if self.latent is None else "latent"

    def fitted(self, patcher: "ModelPatcher", shape: torch.Size) -> Tensor:
        """Return (1 or B, C, ...) in the model's space for latents of a shape.

        Args:
            patcher: of the model that is sampled.
            shape: (B, C, h, w) or (B, C, T, h, w) of its latents.

        Raises:
            ValueError: picture and latent do not fit; the message names the input, what was found and what to do.
        """
        if len(shape) not in (4, 5):
            raise ValueError(f"{NODE}: the latent has the shape {tuple(shape)}; only pictures and plain video can be guided. Leave this node out "
                             "for sound and for models that sample several things at once.")
        raw = self._encoded(shape) if self.latent is None else self._given(shape)
        source = "vae" if self.latent is None else "latent"
        if not raw.isfinite().all():
            raise ValueError(f"{NODE}: '{source}' gives NaN or infinite values; if a VAE made them, run it in a higher precision.")
        if raw.shape[1] != shape[1]:
            raise ValueError(f"{NODE}: '{source}' gives latents of {raw.shape[1]} channels but the model works on {shape[1]}; use the VAE that belongs "
                             "to the model.")
        return patcher.get_model_object("process_latent_in")(raw)

    def _given(self, shape: torch.Size) -> Tensor:
        raw = self.latent.float()
        if len(shape) == 5 and raw.ndim == 4:
            raw = raw.unsqueeze(2)
        if raw.ndim != len(shape):
            raise ValueError(f"{NODE}: 'latent' has the shape {tuple(raw.shape)} but {tuple(shape)} is sampled; connect a latent of the same model.")
        if raw.shape[-2:] != shape[-2:]:
            raise ValueError(f"{NODE}: 'latent' is {_size(raw.shape)} cells but {_size(shape)} are sampled; encode the degraded picture at the size that "
                             "is sampled.")
        if raw.ndim == 5 and raw.shape[2] not in (1, shape[2]):
            raise ValueError(f"{NODE}: 'latent' has {raw.shape[2]} frames but {shape[2]} are sampled; give as many, or one for all.")
        return raw

    def _encoded(self, shape: torch.Size) -> Tensor:
        pictures = self._padded(shape)
        if len(shape) == 4:
            return torch.cat([encode_video(self.vae, picture)[:, :, 0] for picture in pictures.split(1)])
        return torch.cat([encode_video(self.vae, video) for video in self._videos(pictures, shape[0], shape[2])])

    def _padded(self, shape: torch.Size) -> Tensor:
        """Pad what is short by less than a cell. An excess of less than a cell is cropped by the VAE, as in VAE Encode."""
        height, width = self.pictures.shape[1:3]
        tall, wide = check_covers((height, width), tuple(shape[-2:]), self.vae.spacial_compression_encode(), NODE)
        return pad_to(self.pictures, (max(tall, height), max(wide, width)))

    def _videos(self, pictures: Tensor, batch: int, frames: int) -> list[Tensor]:
        """Sort pictures into one video for all latents, or one each."""
        count = len(pictures)
        if frames == 1:
            return list(pictures.split(1))
        if count == 1:
            return [pictures.expand(video_pictures(self.vae, frames), -1, -1, -1)]
        if latent_frames(self.vae, count) == frames:
            return [pictures]
        if count % batch == 0 and latent_frames(self.vae, count // batch) == frames:
            return list(pictures.split(count // batch))
        raise ValueError(f"{NODE}: 'degraded' holds {count} pictures but the latent is a video of {video_pictures(self.vae, frames)}; give every frame "
                         "of it, or one picture for all.")


def cell_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return (M, 1, h, w), or with one frame, for latents of a shape: each value is the mean of what lies under its cell.

    Args:
        mask: (M, H, W) or (H, W) in 0..1, of any size.
        shape: of the latents.
    """
    mask = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]).float(), tuple(shape[-2:]), mode="area")
    return mask.unsqueeze(2) if len(shape) == 5 else mask


def _size(shape: torch.Size) -> str:
    return f"{shape[-1]} x {shape[-2]}"
