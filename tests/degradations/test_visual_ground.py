"""The charts of visual instructions: always the same for a seed, in range, of every family, at any size; and the scales of damage done to them."""

import math

import pytest
import torch

from mend.degradations import limits
from mend.degradations import visual_ground as own
from mend.degradations.operators import OPERATORS
from mend.degradations.scales import SCALES, WEAKEST, from_json, recipe_of, to_json
from mend.degradations.visual_ground import DENSITIES, FAMILIES, LARGEST_RADIUS, LEAST_RADIUS, SMALLEST, _greys, layout, visual_ground


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [SMALLEST, 33, 100, 128, 257])
def test_charts_of_any_size_are_in_range(size):
    chart = visual_ground(size, size)
    assert chart.shape == (1, size, size, 3) and chart.dtype == torch.float32
    assert chart.isfinite().all() and chart.min() >= 0 and chart.max() <= 1 and chart.std() > 0.05


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_a_seed_always_draws_the_same(seed):
    first = visual_ground(seed, 64)
    torch.rand(3)
    assert torch.equal(first, visual_ground(seed, 64)) and not torch.equal(first, visual_ground((seed + 1) % 2**64, 64))


def test_every_layout_has_every_family_and_layouts_differ():
    found = [layout(seeded(seed)) for seed in range(200)]
    assert all(set(families) == set(FAMILIES) and len(families) == rows * columns for rows, columns, families in found)
    assert {(rows, columns) for rows, columns, _ in found} == {(rows, columns) for rows in (2, 3, 4) for columns in (2, 3, 4)}


def test_small_charts_are_refused():
    with pytest.raises(ValueError, match="sides of 32 pixels or more, not 31"):
        visual_ground(0, 31)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(8, 9), (40, 64), (150, 70)], ids=str)
def test_tiles_fill_their_place(family, size):
    tile = FAMILIES[family](*size, seeded(3))
    assert tile.shape == (*size, 3) and tile.isfinite().all() and tile.min() >= 0 and tile.max() <= 1


def test_greys_have_the_listed_densities():
    encoded = _greys()[:, 0].double()
    light = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    torch.testing.assert_close(-light.log10(), torch.tensor(DENSITIES, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_natural_texture_has_the_slope_of_photographs():
    power = torch.zeros(128, 65)
    for seed in range(40):
        tile = FAMILIES["natural"](128, 128, seeded(seed)).mean(-1)
        power += torch.fft.rfft2(tile - tile.mean()).abs() ** 2
    radius = (torch.fft.fftfreq(128)[:, None] ** 2 + torch.fft.rfftfreq(128)[None] ** 2).sqrt()

    def ring(low, high):
        inside = (radius >= low) & (radius < high)
        return power[inside].mean().log(), radius[inside].log().mean()

    (a, near), (b, far) = ring(0.08, 0.12), ring(0.3, 0.4)
    # 40 tiles leave an error of a few per cent in each ring; clipping and the grain in a direction bend the line a little.
    assert float((b - a) / (far - near)) == pytest.approx(-1.8, abs=0.25)


def test_leaves_cover_the_tile():
    tile = FAMILIES["random"](128, 128, seeded(1))
    flat = (tile[:, 1:] == tile[:, :-1]).all(-1).float().mean()
    assert flat > 0.6, "discs are of one colour"
    assert (tile == 0.5).all(-1).float().mean() < 0.005, "hardly anything is left bare"


def test_leaves_have_radii_of_the_published_density(monkeypatch):
    drawn, paint = [], own._leaves
    monkeypatch.setattr(own, "_leaves", lambda centre, radius, *leaves: drawn.append(radius) or paint(centre, radius, *leaves))
    FAMILIES["random"](128, 128, seeded(1))
    radius = drawn[0]
    assert len(radius) > 1000 and radius.min() >= LEAST_RADIUS and radius.max() <= LARGEST_RADIUS
    # The density r^-3 leaves (least^-2 - r^-2) / (least^-2 - largest^-2) below r; of 1500 draws, 0.04 is three times the error.
    for r in (2.2, 3.0, 6.0):
        expected = (LEAST_RADIUS**-2 - r**-2) / (LEAST_RADIUS**-2 - LARGEST_RADIUS**-2)
        assert float((radius < r).float().mean()) == pytest.approx(expected, abs=0.04)
    covered = math.pi * radius.double().square().sum() / (128 * 128)
    assert covered > own.LAYERS / 2, "every place is covered several times"


# Scales


def test_scales_are_within_the_limits_of_their_settings():
    for scale in SCALES:
        assert scale.kind in OPERATORS
        low, high = limits.RANGES[scale.setting]
        assert all(low <= level <= high for level in scale.levels)
        assert all(low <= dict(scale.step(place).settings)[scale.setting] <= high for place in (WEAKEST, len(scale.levels)))


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.kind)
def test_levels_are_places_and_damage_grows(scale):
    assert [dict(scale.step(place).settings)[scale.setting] for place in (1, 2, 3)] == pytest.approx(scale.levels)
    between = dict(scale.step(1.5).settings)[scale.setting]
    assert between == pytest.approx(math.sqrt(scale.levels[0] * scale.levels[1]))
    chart = visual_ground(5, 64)
    errors = [float((recipe_of({scale.kind: place}).apply(chart, 1)[0] - chart).square().mean()) for place in (WEAKEST, 1, 2, 3)]
    assert errors == sorted(errors) and errors[0] > 0


def test_recipes_are_in_the_order_of_what_happens():
    recipe = recipe_of({"jpeg": 1, "gaussian noise": 2, "haze": 3})
    assert [step.kind for step in recipe.steps] == ["haze", "gaussian noise", "jpeg"]
    assert from_json(to_json(SCALES)) == SCALES
