"""Loss of resolution. Pictures are (B, H, W, C)."""

from torch import Tensor

METHODS = ("area", "bilinear", "bicubic")
Size = tuple[int, int]


def resize(pictures: Tensor, size: Size, method: str) -> Tensor:
    """Resize to (height, width) without any smoothing beforehand, as training pipelines do; bicubic can leave 0..1.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown resize method {method!r}; choose one of {', '.join(METHODS)}")
    if tuple(pictures.shape[1:3]) == size:
        return pictures
    from kornia.geometry.transform import resize as kornia_resize

    return kornia_resize(pictures.movedim(-1, 1), size, method, antialias=False).movedim(1, -1)


def lower_resolution(
    pictures: Tensor, factor: float = 4.0, method: str = "area", up_method: str = "bicubic", keep_size: bool = True
) -> Tensor:  # fmt: skip
    """Make both sides `factor` times smaller, at least one pixel, and back to the old size if that is to be kept."""
    size = (pictures.shape[1], pictures.shape[2])
    small = resize(pictures, (max(1, round(size[0] / factor)), max(1, round(size[1] / factor))), method).clamp(0, 1)
    return resize(small, size, up_method) if keep_size else small
