"""Inputs that several nodes have, and what all of them check in these."""

from typing import Any

from torch import Tensor

from comfy_api.latest import io

from ..model_patches.framing import check_finite

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF  # as in the host's own nodes


def seed_input(tooltip: str, name: str = "seed") -> io.Input:
    """A seed that stays as it is after each run: with another one, training would begin anew and damage could not be compared."""
    control = io.ControlAfterGenerate.fixed
    return io.Int.Input(name, default=0, min=0, max=LARGEST_SEED, control_after_generate=control, tooltip=tooltip)


def percent_inputs(more: str = "") -> list[io.Input]:
    """The part of sampling in which a patch acts; `more` is said of both ends."""
    return [
        _percent("start_percent", 0.0, f"When in sampling it begins to act. {more}".rstrip()),
        _percent("end_percent", 1.0, f"When in sampling it stops acting. {more}".rstrip()),
    ]


def _percent(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tooltip)


def samples_of(latent: dict[str, Any], node: str, name: str) -> Tensor:
    """Return the samples of a LATENT.

    Raises:
        ValueError: naming the node and the input, when it holds latents of several kinds.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise ValueError(f"{node}: '{name}' holds several things at once (such as picture and sound). "
                         "Connect a latent of a picture or a plain video.")
    return samples


def usable_mask(mask: Tensor | None, node: str) -> Tensor | None:
    """Return a MASK as (N, H, W) in 0..1, None for none.

    Raises:
        ValueError: naming the node, when it holds no pixels, or numbers that are not finite.
    """
    if mask is None:
        return None
    if not mask.numel():
        raise ValueError(f"{node}: 'mask' holds no pixels (its shape is {tuple(mask.shape)}). Connect a node that gives at least one mask.")
    mask = mask.reshape(-1, *mask.shape[-2:])
    check_finite(mask, node, "mask")
    return mask.clamp(0, 1)
