"""The lab's training pictures: procedural scenes and crops of the training photographs, each a function of its index."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .photographs import training_photographs
from .procedural import SIDE, palettes_of, picture

PHOTOGRAPH_SHARE = 0.45
# Photographs with colour and depth teach more than plates of one texture.
_WEIGHT = {"astronaut.png": 5, "chelsea.png": 5, "rocket.jpg": 5, "hubble_deep_field.jpg": 1, "ihc.png": 1, "camera.png": 3, "coins.png": 2}


class Pictures(torch.utils.data.Dataset):
    """Pictures of 256 px by index; item i is a (256, 256, 3) uint8 array that depends on (seed, i) alone."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        photographs = training_photographs()
        self.photographs = [p.permute(1, 2, 0).numpy() for p in photographs.values()]
        weights = np.array([_WEIGHT.get(name, 1) for name in photographs], float)
        self.weights = weights / weights.sum()
        coloured = [p for p in self.photographs if (p[..., 0] != p[..., 2]).any()]
        self.palettes = palettes_of(coloured, np.random.default_rng(seed))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index))
        image = self._crop(rng) if rng.random() < PHOTOGRAPH_SHARE else picture(rng, self.palettes)
        return (image * 255 + 0.5).astype(np.uint8)

    def _crop(self, rng: np.random.Generator) -> np.ndarray:
        photograph = self.photographs[rng.choice(len(self.photographs), p=self.weights)]
        height, width = photograph.shape[:2]
        side = int(min(height, width, SIDE * rng.uniform(0.6, 1.8)))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = Image.fromarray((photograph[top:top + side, left:left + side] * 255).astype(np.uint8))
        image = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32) / 255
        image = image[:, ::-1] if rng.random() < 0.5 else image
        image = np.rot90(image) if rng.random() < 0.1 else image
        if (image[..., 0] == image[..., 2]).all() and rng.random() < 0.6:
            low, high = rng.uniform(0, 0.5, 3), rng.uniform(0.5, 1, 3)
            image = low + (high - low) * image
        elif rng.random() < 0.3:
            image = image[..., rng.permutation(3)]
        image = image ** rng.uniform(0.75, 1.35) * rng.uniform(0.9, 1.1, 3)
        return np.clip(image, 0, 1).astype(np.float32)


def cached_pictures(folder: Path, count: int, seed: int = 0) -> np.ndarray:
    """Return (count, 256, 256, 3) uint8 as a memory map, drawing what an earlier run has not drawn yet."""
    folder.mkdir(parents=True, exist_ok=True)
    file, progress = folder / f"pictures-{seed}-{count}.u8", folder / f"pictures-{seed}-{count}.done"
    shape = (count, SIDE, SIDE, 3)
    store = np.memmap(file, np.uint8, "r+" if file.exists() else "w+", shape=shape)
    start = int(progress.read_text()) if progress.exists() else 0
    if start < count:
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(Pictures(count, seed), range(start, count)), batch_size=None, num_workers=2)
        for index, image in enumerate(loader, start):
            store[index] = image
            if index % 100 == 99 or index == count - 1:
                store.flush()
                progress.write_text(str(index + 1))
    return store
