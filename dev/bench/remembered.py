"""Training data whose latents are made once: on a processor the lab's VAE takes three quarters of a training step."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...training.pairs import Pairs
from ...training.trainee import Pair


class FewPairs(Pairs):
    """Pairs of which every picture has a few variants, with crops and damage of their own; all are made once, and so can be what is made of them."""

    variants = 3

    def __init__(self, *source: Any, **settings: Any) -> None:
        super().__init__(*source, **settings)
        self.made: dict[tuple[int, int], Pair] = {}

    def with_charts(self, side: int) -> "FewPairs":
        """Return the same pairs with charts; they remember their own."""
        charted = super().with_charts(side)
        charted.made = {}
        return charted

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """Return one of the variants; the generator decides which."""
        key = index % len(self), int(torch.randint(self.variants, (), generator=generator))
        if key not in self.made:
            self.made[key] = super().pair(key[0], torch.Generator().manual_seed(key[0] * self.variants + key[1]))
        return self.made[key]

    def fingerprint(self) -> str:
        """Return the digest of the pairs, unlike that of pairs that vary."""
        return hashlib.sha256(f"{self.variants} of {super().fingerprint()}".encode()).hexdigest()


class SamePairs(FewPairs):
    """Pairs whose pictures are cut out and degraded in one way each, in every epoch."""

    variants = 1

    def fingerprint(self) -> str:
        """Return the digest of the pairs, unlike that of pairs that vary."""
        return hashlib.sha256(f"same {Pairs.fingerprint(self)}".encode()).hexdigest()


class Remembered:
    """What a function makes of pictures, each made once.

    Args:
        function: (B, ...) pictures -> (B, ...), each for itself.
        file: where results are kept between runs; it is written by `save`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], file: Path) -> None:
        self.function, self.file = function, file
        self.known: dict[str, Tensor] = load_file(file) if file.exists() else {}
        self.saved = len(self.known)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return what the function makes of them."""
        keys = [hashlib.sha256(picture.contiguous().numpy().tobytes() + bytes(str(tuple(picture.shape)), "ascii")).hexdigest() for picture in pictures]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if new:
            for index, made in zip(new, self.function(pictures[new]).cpu()):
                self.known[keys[index]] = made.clone()
        return torch.stack([self.known[key] for key in keys])

    def save(self) -> None:
        """Write what was added, atomically."""
        if len(self.known) > self.saved:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
            save_file(self.known, temporary)
            os.replace(temporary, self.file)
            self.saved = len(self.known)


class RememberingVAE:
    """A VAE that encodes every picture once, and is the given one in all else.

    Args:
        vae: the host's.
        file: where latents are kept between runs; it is written by `save`.
    """

    def __init__(self, vae: Any, file: Path) -> None:
        self.vae, self.encoded = vae, Remembered(vae.encode, file)
        self.save = self.encoded.save

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, pictures: Tensor) -> Tensor:
        """Return raw latents of (B, H, W, 3) in 0..1."""
        return self.encoded(pictures)


class RememberingEncoder:
    """A tokenizer's encoder that encodes every chart once."""

    def __init__(self, encoder: Any, file: Path) -> None:
        self.encoder, self.encoded = encoder, Remembered(encoder, file)
        self.save = self.encoded.save

    def to(self, device: torch.device) -> "RememberingEncoder":
        """Move the encoder."""
        self.encoder.to(device)
        return self

    def __call__(self, charts: Tensor) -> Tensor:
        """Return tokens (B, N, width) of charts (B, 3, H, W)."""
        return self.encoded(charts.cpu())
