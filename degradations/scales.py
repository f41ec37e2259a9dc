"""How strong each kind of damage can be: what a bank of visual instructions is made of, and what an estimator tells apart.

Each kind has levels, weakest first. Places between them are numbers: 1 is the first level, 2.5 halfway from the second to the third, and
below 1 it fades away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .recipe import Recipe, Step

WEAKEST = 0.5


@dataclass(frozen=True)
class Scale:
    """One kind of damage from weak to strong.

    Attributes:
        kind: of degradations/operators.py.
        setting: which of its settings says how strong it is.
        levels: values of that setting, the weakest damage first.
    """

    kind: str
    setting: str
    levels: tuple[float, ...]

    def step(self, place: float) -> Step:
        """Return the degradation at a place from WEAKEST to the last level; between levels the setting runs geometrically."""
        place = min(max(place, WEAKEST), len(self.levels))
        below = min(max(int(place), 1), len(self.levels) - 1)
        low, high = self.levels[below - 1], self.levels[below]
        return Step.of(self.kind, {self.setting: low * (high / low) ** (place - below)})


# In the order in which damage happens to a picture.
SCALES = (
    Scale("haze", "density", (0.6, 1.2, 2.0)),
    Scale("rain", "rain", (0.25, 0.5, 1.0)),
    Scale("low light", "exposure", (0.5, 0.25, 0.125)),
    Scale("blur", "width", (1.0, 2.0, 4.0)),
    Scale("gaussian noise", "sigma", (12.5, 25.0, 50.0)),
    Scale("jpeg", "quality", (40.0, 20.0, 8.0)),
)


def recipe_of(places: Mapping[str, float], scales: Sequence[Scale] = SCALES) -> Recipe:
    """Return the degradations at these places by kind, in the order of `scales`."""
    return Recipe(tuple(scale.step(places[scale.kind]) for scale in scales if scale.kind in places))


def to_json(scales: Sequence[Scale]) -> list[list]:
    """Return plain JSON: [[kind, setting, [levels]], ...]."""
    return [[scale.kind, scale.setting, list(scale.levels)] for scale in scales]


def from_json(value: list) -> tuple[Scale, ...]:
    """Read what `to_json` returned.

    Raises:
        ValueError: for an unknown kind or setting, or a level that it cannot have.
    """
    scales = tuple(Scale(kind, setting, tuple(levels)) for kind, setting, levels in value)
    for scale in scales:
        for level in scale.levels:
            Step.of(scale.kind, {scale.setting: level})
    return scales
