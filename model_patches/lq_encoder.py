"""The LQ encoder of UniLDiff (arXiv 2507.23685): a copy of the VAE's encoder up to its middle block, which may learn to see through damage.

Untrained it is the VAE's own encoder and is not stored; a trained one travels in the file, as the robust encoder does.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .encoder_features import feature_channels, feature_vae, features
from .robust_encoder import RobustEncoder, encoder_tensors, with_encoder

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.sd import VAE


def lq_encoder_tensors(vae: "VAE") -> dict[str, Tensor]:
    """Return copies of the weights that the features depend on, named as in the VAE, behind robust_encoder.ENCODER."""
    return encoder_tensors(vae, features)


def check_feature_width(vae: "VAE", channels: int) -> None:
    """Check that a VAE is known and its features have the width that a file was made for.

    Raises:
        ValueError: saying what was found; the name of the file goes before it.
    """
    try:
        found = feature_channels(vae)
    except ValueError as error:
        raise ValueError(f"was made for another VAE: {error}") from error
    if found != channels:
        raise ValueError(f"was made for a VAE with {channels} encoder features, and this one has {found}. "
                         "Connect the VAE it was trained with.")


def lq_vae(vae: "VAE", tensors: dict[str, Tensor]) -> "VAE":
    """Return a VAE whose `encode` gives the features of pictures.

    It takes (B, H, W, 3) in 0..1, cut to whole latent cells as the host cuts, and returns (B, C, h, w), or the features (1, C, T, h, w) of one
    video where the VAE knows videos.

    Args:
        vae: the user's.
        tensors: a file's; if a trained encoder is among them, it is the one that looks.

    Raises:
        ValueError: for a VAE that is not known, or an encoder of another kind of VAE's.
    """
    return feature_vae(with_encoder(vae, tensors))


class LQEncoder(RobustEncoder):
    """The encoder as it learns; see RobustEncoder."""

    def __init__(self, vae: "VAE", model: "BaseModel", tensors: dict[str, Tensor]) -> None:
        super().__init__(vae, model, tensors)
        self.vae = vae

    def features(self, pictures: Tensor) -> Tensor:
        """Return the features (B, C, h, w) of pictures (B, H, W, 3) in 0..1, each a video of one frame where the VAE knows videos."""
        pixels = self.vae.process_input(pictures.movedim(-1, 1)).to(next(self.module.parameters()).device, torch.float32)
        return features(self.module, pixels.unsqueeze(2) if self.vae.latent_dim == 3 else pixels)


def frozen_features(vae: "VAE", pictures: Tensor) -> Tensor:
    """Return the features (B, C, h, w) of pictures (B, H, W, 3) in 0..1, from an encoder that does not learn."""
    seeing = feature_vae(vae)
    with torch.no_grad():
        if vae.latent_dim == 3:
            return torch.cat([seeing.encode(picture) for picture in pictures.split(1)]).float()
        return seeing.encode(pictures).float()

