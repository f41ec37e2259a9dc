"""Reads picture files of any format that Pillow knows, with their full depth and the right way up."""

import functools
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

ORIENTATION = 0x0112
# Pillow registers these, but they are documents, films or formats that need another program.
NOT_PICTURES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# What Pillow raises for files that are damaged, cut off or something else.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error, zlib.error,
           Image.DecompressionBombError)  # fmt: skip
Size = tuple[int, int]


class UnreadableError(Exception):
    """A picture that cannot be read; the text says why."""


@functools.cache
def suffixes() -> frozenset[str]:
    """Return what the names of picture files end in, such as ".png"."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NOT_PICTURES)


def read_size(file: BinaryIO) -> Size:
    """Return the two sides of a picture, the shorter first, from its header alone.

    Which of them is the height may be known only when the picture is decoded.

    Raises:
        UnreadableError: when it is no picture, or damaged.
    """
    try:
        with Image.open(file) as image:
            shorter, longer = sorted(image.size)
    except DAMAGED as error:
        raise UnreadableError(_reason(error)) from error
    return shorter, longer


def read_pixels(file: BinaryIO) -> np.ndarray:
    """Return (H, W, 3): uint8, uint16, or float32 in 0..1, as the file holds them; grey repeated, alpha left out, turned as EXIF says.

    Raises:
        UnreadableError: when it is no picture, or damaged.
    """
    try:
        with Image.open(file) as image:
            deep, turn = _is_deep_colour(image), image.getexif().get(ORIENTATION, 1)
            image.load()
            pixels = _deep_colour(file) if deep else None
            if pixels is None:
                # Once loaded, TIFF is turned already and says so.
                pixels, turn = _levels(image), image.getexif().get(ORIENTATION, 1)
            return _turned(pixels, turn)
    except DAMAGED as error:
        raise UnreadableError(_reason(error)) from error


def _is_deep_colour(image: Image.Image) -> bool:
    """Tell colour of 16 bits, of which Pillow keeps 8."""
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in image.tile)


def _deep_colour(file: BinaryIO) -> np.ndarray | None:
    """Return (H, W, 3) uint16 by the host's other decoder, or None where that does not know the format."""
    import av

    file.seek(0)
    try:
        with av.open(file) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb48le")
    except (av.FFmpegError, StopIteration):
        return None


def _levels(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        return _three(np.nan_to_num(np.asarray(image, np.float32)).clip(0, 1))
    if image.mode.startswith("I"):
        return _three(np.asarray(image).clip(0, 0xFFFF).astype(np.uint16))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the way a camera was held: the eight orientations of EXIF."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a format that can be read"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
