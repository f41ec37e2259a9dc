"""The part of sampling in which a patch acts."""

from typing import Any

from torch import Tensor


def acts(start_percent: float, end_percent: float, model_sampling: Any, sigma: Tensor) -> bool:
    """Tell whether sigma (B,) lies in a part of sampling. Compares as the host does for conditioning, under the schedule of the moment."""
    if (start_percent, end_percent) == (0.0, 1.0):
        return True
    first, last = (float(model_sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return last <= float(sigma.max()) <= first


def percent_of(model_sampling: Any, sigma: float) -> float:
    """Return where in a model's whole schedule a sigma comes, as percent_to_sigma counts: 0 at its beginning, 1 at its end."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return high
