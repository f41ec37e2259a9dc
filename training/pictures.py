"""Pictures that are read when they are asked for: files, members of shards, and tensors that are in memory already."""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from torch import Tensor

from .decoding import Size, UnreadableError, read_pixels, read_size

HEADER = 1 << 16
STAMP_STEP = 8


class Picture(Protocol):
    """A picture that can be read any number of times."""

    def size(self) -> Size:
        """Return the two sides, the shorter first, without decoding.

        Raises:
            UnreadableError: when that cannot be done.
        """

    def pixels(self) -> np.ndarray:
        """Return (H, W, 3): uint8, uint16, or float32 with white at 1.

        Raises:
            UnreadableError: when that cannot be done.
        """

    def stamp(self) -> str:
        """Return a text that hardly stays the same if the picture changes."""


@dataclass(frozen=True)
class StoredPicture:
    """A file, or a part of one.

    Attributes:
        file: where it is.
        length: of the file or the part, in bytes.
        start: where the part begins; 0 for a whole file, since no archive begins with a picture.
    """

    file: Path
    length: int
    start: int = 0

    def size(self) -> Size:
        """Return the two sides, the shorter first, from the header."""
        if self.start and self.length > HEADER:
            try:
                return read_size(BytesIO(self._part(HEADER)))
            except UnreadableError:
                pass  # the header may be at the end, as TIFF allows
        with self._opened() as opened:
            return read_size(opened)

    def pixels(self) -> np.ndarray:
        """Return (H, W, 3) as the file holds it."""
        with self._opened() as opened:
            return read_pixels(opened)

    def stamp(self) -> str:
        """Return the length: times change when files are copied to another machine."""
        return str(self.length)

    def _opened(self) -> BinaryIO:
        try:
            return BytesIO(self._part(self.length)) if self.start else self.file.open("rb")
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error

    def _part(self, length: int) -> bytes:
        try:
            with self.file.open("rb") as opened:
                opened.seek(self.start)
                return opened.read(length)
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error


@dataclass(frozen=True, eq=False)
class GivenPicture:
    """A picture in memory: (H, W, 3) in 0..1."""

    tensor: Tensor

    def size(self) -> Size:
        """Return the two sides, the shorter first."""
        shorter, longer = sorted(self.tensor.shape[:2])
        return shorter, longer

    def pixels(self) -> np.ndarray:
        """Return (H, W, 3) float32."""
        return self.tensor.float().cpu().numpy()

    def stamp(self) -> str:
        """Return a digest of the size and of every eighth pixel of every eighth row."""
        some = self.tensor[::STAMP_STEP, ::STAMP_STEP].float().cpu().contiguous().numpy()
        return hashlib.sha256(repr(tuple(self.tensor.shape)).encode() + some.tobytes()).hexdigest()
