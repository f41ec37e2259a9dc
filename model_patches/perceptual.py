"""The perceptual distance: VGG16 up to relu2_2 when its weights are in models/mend/perceptual, else the VAE encoder's own features."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

import comfy.utils
import folder_paths

from .host_gradients import plain
from .host_vae import LatentEncoder

# torchvision's VGG16 up to relu2_2: convolutions at these places, a pooling after the second.
VGG_LAYERS = (0, 2, 5, 7)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Perceptual:
    """Mean squared distance of features.

    Args:
        encoder: the run's VAE encoder, used when there is no VGG.
        vgg: "features.<n>.weight/bias" tensors of torchvision's VGG16, or None.
    """

    def __init__(self, encoder: LatentEncoder, vgg: dict[str, Tensor] | None) -> None:
        self.encoder, self.vgg = encoder, plain(vgg)

    @property
    def name(self) -> str:
        """Which features are compared."""
        return "VAE encoder" if self.vgg is None else "VGG16"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of two batches (B, 3, H, W) in 0..1; only `a` carries a gradient."""
        with torch.no_grad():
            target = self.features(b)
        return self.to_features(a, target)

    def to_features(self, a: Tensor, target: Tensor) -> Tensor:
        """The distance to what `features` returned for another batch."""
        return F.mse_loss(self.features(a), target)

    def features(self, x: Tensor) -> Tensor:
        """Return what is compared of (B, 3, H, W) in 0..1."""
        if self.vgg is None:
            return self.encoder(_whole_cells(x, self.encoder.cell))
        x = (x - x.new_tensor(MEAN).view(1, 3, 1, 1)) / x.new_tensor(DEVIATION).view(1, 3, 1, 1)
        for layer in VGG_LAYERS:
            weight, bias = (self.vgg[f"features.{layer}.{part}"].to(x) for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            x = F.max_pool2d(x, 2) if layer == 2 else x
        return x


def _whole_cells(x: Tensor, cell: int) -> Tensor:
    height, width = (max(side // cell, 1) * cell for side in x.shape[-2:])
    return F.pad(x, (0, max(0, width - x.shape[-1]), 0, max(0, height - x.shape[-2])), mode="replicate")[..., :height, :width]


def vgg16_weights() -> dict[str, Tensor] | None:
    """Load torchvision's VGG16 from models/mend/perceptual/vgg16.safetensors; None when the user has not put it there."""
    for folder in folder_paths.get_folder_paths("mend"):
        file = os.path.join(folder, "perceptual", "vgg16.safetensors")
        if os.path.isfile(file):
            tensors = comfy.utils.load_torch_file(file, safe_load=True)
            wanted = {f"features.{layer}.{part}" for layer in VGG_LAYERS for part in ("weight", "bias")}
            missing = sorted(wanted - tensors.keys())
            if missing:
                raise ValueError(f"{file} lacks {', '.join(missing)}, which torchvision's VGG16 has. Put the whole of its weights there, as a safetensors file, "
                                 "or take the file away: then the VAE's own features are compared.")
            return {name: tensors[name] for name in wanted}
    return None
