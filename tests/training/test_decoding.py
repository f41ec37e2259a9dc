"""Picture files come out as the host would load them, in their full depth and the right way up."""

from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from mend.tests.training.picture_files import encoded, exif, levels
from mend.training.decoding import UnreadableError, read_pixels, read_size, suffixes


def three(pixels):
    return pixels[..., :3] if pixels.shape[-1] > 2 else np.repeat(pixels[..., :1], 3, -1)


def loaded_by_host(host_nodes, folder, content, ending):
    file = folder / "input" / f"decoding.{ending}"
    file.write_bytes(content)
    return host_nodes.LoadImage().load_image(file.name)[0][0]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 7, 31, 64, 517])
def test_png_of_every_layout_is_exact(kind, channels, width):
    pixels = levels(9, width, channels, kind=kind)
    file = BytesIO(encoded(pixels))
    found = read_pixels(file)
    assert found.dtype == kind and np.array_equal(found, three(pixels))
    assert read_size(BytesIO(encoded(pixels))) == tuple(sorted((9, width)))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_host_loads_the_same(host_nodes, base_folder, kind, channels):
    content = encoded(levels(40, 48, channels, kind=kind))
    found = read_pixels(BytesIO(content))
    ours = torch.from_numpy(found.astype(np.float32)) / np.iinfo(kind).max
    # The host takes 16 bits in colour through another colour space and loses 1/2048, and puts the white of 8-bit grey at 255/256.
    tolerance = 1e-3 if kind == np.uint16 and channels > 1 else 1 / 255 if kind == np.uint8 and channels == 1 else 1e-6
    torch.testing.assert_close(ours, loaded_by_host(host_nodes, base_folder, content, "png").float(), atol=tolerance, rtol=0)


def test_the_host_turns_the_same(host_nodes, base_folder):
    content = encoded(levels(16, 40), "JPEG", quality=95, exif=exif(6))
    found = read_pixels(BytesIO(content))
    theirs = loaded_by_host(host_nodes, base_folder, content, "jpg")
    assert found.shape == (40, 16, 3) == tuple(theirs.shape)
    # Two JPEG decoders, one of which smooths the colours of noise. Turned wrongly the difference would be 60 and more.
    assert np.abs(found / 255 - theirs.numpy()).mean() < 30 / 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation_of_every_format(orientation, kind):
    content = encoded(levels(5, 7), kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    wanted = ImageOps.exif_transpose(Image.open(BytesIO(content)).convert("RGB") if kind != "TIFF" else Image.open(BytesIO(content)))
    assert np.array_equal(read_pixels(BytesIO(content)), np.asarray(wanted)) and read_size(BytesIO(content)) == (5, 7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_16_bit_colour(orientation):
    pixels, file = levels(5, 7, kind=np.uint16), BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    high = BytesIO(encoded((pixels // 256).astype(np.uint8), exif=exif(orientation)))
    assert np.array_equal(read_pixels(file) // 256, read_pixels(high))


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "LAB", "YCbCr", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    file = BytesIO()
    image = Image.fromarray(levels(9, 7))
    (image.quantize(9) if mode == "P" else image.convert("L").convert(mode) if mode in "IF" else image.convert(mode)).save(file, "TIFF")
    assert read_pixels(file).shape == (9, 7, 3)


def test_transparent_palette():
    file = BytesIO()
    Image.fromarray(levels(9, 7)).quantize(9).save(file, "PNG", transparency=bytes([0, 128]))
    assert read_pixels(file).shape == (9, 7, 3)


def test_float_tiff_counts_from_0_to_1():
    file = BytesIO()
    tifffile.imwrite(file, np.array([[0.25, 2.0, -1.0, np.nan]], np.float32))
    assert read_pixels(file)[0, :, 0].tolist() == [0.25, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("content", [encoded(levels(64, 64)), encoded(levels(64, 64), "JPEG"), encoded(levels(64, 64, kind=np.uint16))])
def test_a_file_that_is_cut_off_is_unreadable(content):
    with pytest.raises(UnreadableError, match="truncated"):
        read_pixels(BytesIO(content[:len(content) // 2]))
    assert read_size(BytesIO(content[:len(content) // 2])) == (64, 64)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(99), b"II*\0" + bytes(99)])
def test_what_is_no_picture_is_unreadable(content):
    for read in (read_size, read_pixels):
        with pytest.raises(UnreadableError):
            read(BytesIO(content))


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damage_anywhere_is_an_unreadable_picture_or_other_pixels():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        content = np.frombuffer(encoded(levels(24, 24), kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[generator.integers(0, min(len(content), 200), 4)] = generator.integers(0, 256, 4)
            try:
                assert read_pixels(BytesIO(damaged.tobytes())).shape[-1] == 3
            except UnreadableError:
                pass


def test_endings():
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"} <= suffixes()
    assert not {".txt", ".mpg", ".pdf", ".ps", ".h5"} & suffixes()
