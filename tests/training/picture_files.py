"""Picture files for the tests of paired data."""

import struct
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from mend.degradations.recipe import Recipe

JPEG = Recipe.from_json([{"kind": "jpeg", "quality": 20}])
NOISE = Recipe.from_json([{"kind": "gaussian noise", "sigma": 40}])


def levels(height, width, channels=3, seed=0, kind=np.uint8):
    """(H, W, C) of any values."""
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max + 1, (height, width, channels), kind)


def encoded(pixels, kind="PNG", **options):
    """The bytes of a picture file; of 16 bits as PNG."""
    if pixels.dtype == np.uint16:
        return deep_png(pixels)
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, kind, **options)
    return file.getvalue()


def deep_png(pixels):
    """The bytes of a PNG file of 16 bits: (H, W, 1 to 4) uint16. Pillow can write none in colour."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def exif(orientation):
    """EXIF that says how the camera was held."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def fill(folder: Path, count, height=40, width=48, first=0, ending="png"):
    """Pictures 00.png, 01.png, ... that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        (folder / f"{index:02d}.{ending}").write_bytes(encoded(levels(height, width, seed=index), {"jpg": "JPEG"}.get(ending, ending)))
    return folder


def write_shard(file: Path, members):
    """A tar file of (name, bytes)."""
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return file


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
