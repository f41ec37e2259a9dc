"""Checks of single values in the configs of files and of training, which may hold anything that JSON and TOML can."""

import math
from collections.abc import Collection
from typing import Any


def one_of(value: Any, options: Collection[str]) -> bool:
    """Tell whether a value is one of these texts; lists and tables, which have no hash, are not."""
    return isinstance(value, str) and value in options


def number(value: Any, least: float = 0) -> bool:
    """Tell whether a value is a finite number from `least` on; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < math.inf


def whole_number(value: Any, least: int = 0) -> bool:
    """Tell whether a value is a whole number from `least` on; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
