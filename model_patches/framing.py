"""Brings pictures to sizes that VAEs and models accept, and back."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import comfy.utils

MAX_SIDE = 16384
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Frame:
    """What framing did to a batch of pictures. All sizes are (height, width) in pixels.

    Attributes:
        scaled: size after the change of scale, before padding.
        offset: (top, left) corner of the scaled picture in the framed one.
        framed: size after padding.
        alpha: (B, H, W, 1) in 0..1 at the size before framing, or None if nothing in the pictures is transparent.
    """

    scaled: Size
    offset: Size
    framed: Size
    alpha: Tensor | None = None


def frame_pictures(image: Tensor, scale: float = 1.0, multiple: int = 16, node: str = "Frame Image", name: str = "image") -> tuple[Tensor, Frame]:
    """Scale pictures and pad their sides up to a multiple.

    Args:
        image: (B, H, W, C) with C of 1, 3 or 4.
        scale: factor on both sides.
        multiple: what both sides of the result are a multiple of, in pixels.
        node, name: whose input the pictures are and which, for messages.

    Returns:
        (B, H', W', 3) and what `unframe_pictures` needs to undo it. At scale 1 the pixels inside are the given ones, bit for bit.

    Raises:
        ValueError: the pictures are empty, not finite, of another layout, or too large once scaled.
    """
    pictures = rgb_pictures(image, node, name)
    scaled = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale)))
    framed = (-(-scaled[0] // multiple) * multiple, -(-scaled[1] // multiple) * multiple)
    if max(framed) > MAX_SIDE:
        at, advice = ("", "Make it smaller first.") if scale == 1 else (f" at scale {scale:g}", "Lower 'scale'.")
        raise ValueError(f"{node}: '{name}' would be {size_text(framed)} pixels{at}, and sides beyond {MAX_SIDE} are not supported. {advice}")
    padded = pad_to(resize(pictures, scaled), framed)
    seen_through = image.shape[-1] == 4 and bool((image[..., 3] < 1).any())
    alpha = image[..., 3:].clone() if seen_through else None
    return padded, Frame(scaled, _offset(scaled, framed), framed, alpha)


def unframe_pictures(image: Tensor, frame: Frame, node: str = "Unframe Image") -> Tensor:
    """Cut the padding away and put the alpha channel back.

    Args:
        image: (N, H', W', C), the framed size or a whole multiple of it. If N is not the number of framed pictures, their
            alpha channels are repeated or cut off in order.
        frame: what `frame_pictures` returned.
        node: whose input the pictures are, for messages.

    Returns:
        (N, h, w, 3), or 4 channels if the framed pictures were transparent anywhere.

    Raises:
        ValueError: the pictures are empty, of another layout, or of a size that does not fit the frame.
    """
    check_pictures(image, node)
    factor = _enlargement((image.shape[1], image.shape[2]), frame.framed)
    top, left = (start * factor for start in frame.offset)
    size = (frame.scaled[0] * factor, frame.scaled[1] * factor)
    inner = to_rgb(image[:, top:top + size[0], left:left + size[1]]).contiguous()
    if frame.alpha is None:
        return inner
    alpha = comfy.utils.repeat_to_batch_size(frame.alpha.to(inner), len(inner))
    return torch.cat([inner, resize(alpha, size)], -1)


def rgb_pictures(image: Tensor, node: str, name: str = "image") -> Tensor:
    """Return (B, H, W, 3) of an IMAGE that passes `check_pictures` and `check_finite`."""
    check_pictures(image, node, name)
    check_finite(image, node, name)
    return to_rgb(image)


def check_pictures(image: Tensor, node: str, name: str = "image") -> None:
    """Raise a ValueError that names the node and its input unless `image` is (B, H, W, C) with pixels and C of 1, 3 or 4."""
    if image.ndim != 4:
        raise ValueError(f"{node}: '{name}' has the shape {tuple(image.shape)}, not batch x height x width x channels. Connect an IMAGE output.")
    if not image.numel():
        raise ValueError(f"{node}: '{name}' holds no pixels (its shape is {tuple(image.shape)}). Connect a node that gives at least one picture.")
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{node}: '{name}' has {image.shape[-1]} channels, and only 1 (grey), 3 (RGB) and 4 (RGBA) are understood. "
                         f"Convert it to one of these first.")  # fmt: skip


def check_finite(image: Tensor, node: str, name: str = "image") -> None:
    """Raise a ValueError that names the node, its input and the first picture of the batch that has NaN or infinite pixels."""
    bad = (~image.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{node}: '{name}' has NaN or infinite pixels in picture {bad[0] + 1} of {len(image)}. They come from the node that "
                         f"made the picture; if that is a VAE decode, run it in a higher precision.")  # fmt: skip


def check_covers(size: Size, latent_size: Size, cell: int, node: str,
                 advice: str = "Encode the same picture that you connect here (Frame Image pads both alike).") -> Size:
    """Return the size of the picture that a latent belongs to.

    Args:
        size: of the picture that is given, less than a cell off.
        latent_size: (rows, columns) of the latent.
        cell: pixels per latent pixel.
        node, advice: for the message.

    Raises:
        ValueError: for a picture of another size; the message names the input, both sizes and what to do.
    """
    own = (latent_size[0] * cell, latent_size[1] * cell)
    if any(abs(covered - side) >= cell for covered, side in zip(own, size)):
        raise ValueError(f"{node}: 'degraded' is {size_text(size)} but the latent belongs to a picture of {size_text(own)}. {advice}")
    return own


def to_rgb(image: Tensor) -> Tensor:
    """Return (B, H, W, 3): grey repeated, alpha left out."""
    return image.expand(-1, -1, -1, 3) if image.shape[-1] == 1 else image[..., :3]


def resize(image: Tensor, size: Size) -> Tensor:
    """Resize (B, H, W, C): bicubic where it grows, averaging where it shrinks, within each picture's own range of values."""
    if (image.shape[1], image.shape[2]) == size:
        return image
    # Not the host's lanczos: it rounds pixels to 8 bits.
    method = "bicubic" if size[0] * size[1] >= image.shape[1] * image.shape[2] else "area"
    resized = comfy.utils.common_upscale(image.movedim(-1, 1), size[1], size[0], method, "disabled")
    low, high = (limit(dim=(1, 2, 3), keepdim=True) for limit in (image.amin, image.amax))
    return resized.clamp(low, high).movedim(1, -1)


def pad_to(image: Tensor, size: Size) -> Tensor:
    """Pad (B, H, W, C) to a size by reflection, repeating the last pixels along a side that is too short to reflect."""
    padded = image.movedim(-1, 1)
    top, left = _offset((image.shape[1], image.shape[2]), size)
    bottom, right = size[0] - image.shape[1] - top, size[1] - image.shape[2] - left
    for sides, length in (((0, 0, top, bottom), image.shape[1]), ((left, right, 0, 0), image.shape[2])):
        padded = F.pad(padded, sides, mode="reflect" if max(sides) < length else "replicate")
    return padded.movedim(1, -1).contiguous()


def _offset(size: Size, framed: Size) -> Size:
    # Centred: each edge gets a margin against the network's own border effects, and no mirrored strip grows wide enough to
    # be taken for part of the scene, which is what would show as a seam after cropping.
    return (framed[0] - size[0]) // 2, (framed[1] - size[1]) // 2


def _enlargement(size: Size, framed: Size) -> int:
    factor = size[0] // framed[0]
    if factor < 1 or size != (framed[0] * factor, framed[1] * factor):
        raise ValueError(f"Unframe Image: 'image' is {size_text(size)} pixels, but this frame belongs to pictures of {size_text(framed)} or a "
                         f"whole multiple of that. Connect the frame output of the Frame Image node that this picture went through, and "
                         f"resize or crop only after Unframe Image.")  # fmt: skip
    return factor


def size_text(size: Size) -> str:
    """Return (height, width) as messages give it."""
    return f"{size[1]} x {size[0]}"
