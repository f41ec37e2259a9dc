"""Inputs that several nodes have."""

from comfy_api.latest import io

from ..training.settings import LARGEST_SEED


def seed_input(tooltip: str, fixed: bool = False, name: str = "seed") -> io.Input:
    """A seed; `fixed` keeps it from changing after each run, where that would make something new each time."""
    control = io.ControlAfterGenerate.fixed if fixed else True
    return io.Int.Input(name, default=0, min=0, max=LARGEST_SEED, control_after_generate=control, tooltip=tooltip)


def percent_inputs() -> list[io.Input]:
    """The part of sampling in which a patch acts."""
    return [
        _percent("start_percent", 0.0, "When in sampling it begins to act."),
        _percent("end_percent", 1.0, "When in sampling it stops acting."),
    ]


def _percent(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tooltip)
