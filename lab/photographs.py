"""The photographs of the lab: which may be trained on, and which are only ever evaluated on."""

import numpy as np
import torch
from torch import Tensor

TRAINING = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)
EVALUATION = ("coffee", "china", "flower", "motorcycle_left", "motorcycle_right")


def training_photographs() -> dict[str, Tensor]:
    """Return scikit-image's bundled photographs that training may use, each (3, H, W) in 0..1."""
    import skimage.data
    import skimage.io

    folder = skimage.data.data_dir
    return {name: _to_tensor(skimage.io.imread(f"{folder}/{name}")) for name in TRAINING}


def evaluation_photograph(name: str, size: int = 256) -> Tensor:
    """Return the centre crop of a held-out photograph at native resolution.

    Args:
        name: one of EVALUATION.
        size: side of the square crop in pixels.

    Returns:
        (3, size, size) in 0..1.
    """
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        image = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data
        import skimage.io

        image = skimage.io.imread(f"{skimage.data.data_dir}/{name}.png")
    photograph = _to_tensor(image)
    top, left = ((side - size) // 2 for side in photograph.shape[1:])
    return photograph[:, top:top + size, left:left + size]


def _to_tensor(image: np.ndarray) -> Tensor:
    if image.ndim == 2:
        image = image[..., None].repeat(3, axis=2)
    return torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1).float() / 255
