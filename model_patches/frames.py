"""Videos as batches of their frames."""

from torch import Tensor


def frames_of(x: Tensor) -> Tensor:
    """Return (B, C, T, H, W) as (B * T, C, H, W); pictures (B, C, H, W) stay as they are."""
    return x.movedim(2, 1).flatten(0, 1) if x.ndim == 5 else x
