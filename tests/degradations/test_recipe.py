"""A recipe does what its steps do one after another, the same for the same seed, and survives the way through a file."""

import json

import pytest
import torch

from mend.degradations import limits, operators, real_esrgan, resizing
from mend.degradations.recipe import KINDS, REAL_ESRGAN, Recipe, Step, defaults

SIZES = [(1, 1), (7, 513), (32, 20)]


def pictures(batch=1, height=32, width=20, seed=0):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def recipe(*steps):
    return Recipe.from_json([{"kind": kind, **settings} for kind, settings in steps])


NOISE_TWICE = recipe(("gaussian noise", {}), ("gaussian noise", {}))
LONG = recipe(
    ("haze", {}), ("blur", {"width": 1.0}), ("resize", {"factor": 3, "keep_size": False}), (REAL_ESRGAN, {"scale": 2}),
    ("jpeg", {"quality": 20}),
)  # fmt: skip


def test_no_steps_leave_the_picture():
    out, words = Recipe().apply(pictures(2), 3)
    assert torch.equal(out, pictures(2)) and words == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_kind_keeps_the_size_and_the_input(kind, size):
    image = pictures(2, *size)
    kept = image.clone()
    out, words = Recipe().then(Step.of(kind, {})).apply(image, 1)
    assert out.shape == image.shape and out.dtype == image.dtype and torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    assert torch.equal(image, kept) and isinstance(words, tuple)


@pytest.mark.parametrize("value", [NOISE_TWICE, LONG], ids=["noise", "long"])
def test_the_seed_fixes_everything(value):
    state = torch.get_rng_state()
    first, again, other = (value.apply(pictures(), seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_picture_b_of_a_batch_is_what_it_is_alone():
    batch = pictures(3)
    together = LONG.apply(batch, 7)[0]
    for index in range(3):
        assert torch.equal(together[index:index + 1], LONG.apply(batch[index:index + 1], 7 + index)[0])


def test_steps_draw_apart():
    # Twice the same noise would have a deviation of 2 * 25; of its own each it is sqrt(2) * 25. 30 000 values know it to 0.4 %.
    noise = NOISE_TWICE.apply(torch.full((1, 100, 100, 3), 0.5), 1)[0] - 0.5
    assert noise.std().item() == pytest.approx(2**0.5 * 25 / 255, rel=0.02)


def test_steps_happen_in_their_order():
    image = pictures()
    out, words = recipe(("grey", {}), ("jpeg", {"quality": 20})).apply(image, 0)
    grey = operators.degrade(image, "grey")[0]
    assert torch.equal(out, operators.degrade(grey, "jpeg", quality=20.0)[0])
    assert words == ("black and white", "compressed")


def test_what_shrinks_is_enlarged_at_the_end():
    image = pictures(1, 33, 20)
    small = operators.degrade(image, "resize", factor=4.0, keep_size=False)[0]
    small = operators.degrade(small, "jpeg", quality=50.0)[0]
    out, _ = recipe(("resize", {"factor": 4, "keep_size": False}), ("jpeg", {"quality": 50})).apply(image, 0)
    assert torch.equal(out, resizing.resize(small, (33, 20), "bicubic").clamp(0, 1))


def test_words_come_once_each_and_only_if_it_shows():
    assert LONG.apply(pictures(2), 0)[1] == ("hazy", "blurry", "low resolution", "noisy", "compressed")
    assert recipe(("gaussian noise", {"sigma": 0}), ("grey", {})).apply(pictures(), 0)[1] == ("black and white",)


def test_json_round_trip():
    for value in (Recipe(), NOISE_TWICE, LONG):
        plain = json.loads(json.dumps(value.to_json()))
        assert Recipe.from_json(plain) == value == Recipe.from_json(json.dumps(plain)) and hash(Recipe.from_json(plain)) == hash(value)
    assert recipe(("jpeg", {"quality": 30})) == recipe(("jpeg", {"quality": 30.0})) == recipe(("jpeg", {}))
    assert recipe((REAL_ESRGAN, {})).to_json() == [{"kind": REAL_ESRGAN, "keep_size": True, "preset": "standard", "scale": 4}]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_limits(kind):
    for name, default in defaults(kind).items():
        if isinstance(default, str):
            assert default in limits.OPTIONS[name]
        elif not isinstance(default, bool):
            low, high = limits.RANGES[name]
            assert low <= default <= high


def test_presets_are_those_of_the_pipeline():
    assert limits.OPTIONS["preset"] == tuple(real_esrgan.PRESETS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{", "not JSON"),
        ("{}", "has to be a list of steps"),
        (None, "has to be a list of steps"),
        ([3], "step 1 of a recipe has to be an object"),
        ([{"quality": 3}], "step 1 of a recipe has to be an object"),
        ([{"kind": "jpeg"}, {"kind": "fog"}], "step 2 of a recipe: unknown degradation 'fog'; choose one of gaussian noise"),
        ([{"kind": "jpeg", "strength": 3}], "'jpeg' has no setting 'strength'; it has quality"),
        ([{"kind": "haze", "depth": 3}], "'haze' has no setting 'depth'"),
        ([{"kind": "jpeg", "quality": 0}], "quality of the degradation 'jpeg' is 0; it has to be a number from 1 to 100"),
        ([{"kind": "jpeg", "quality": float("nan")}], "quality of the degradation 'jpeg' is nan"),
        ([{"kind": "jpeg", "quality": True}], "quality of the degradation 'jpeg' is True"),
        ([{"kind": "jpeg", "quality": "30"}], "quality of the degradation 'jpeg' is '30'"),
        ([{"kind": "jpeg", "quality": None}], "quality of the degradation 'jpeg' is None"),
        ([{"kind": "resize", "method": "lanczos"}], "method of the degradation 'resize' is 'lanczos'; choose one of area"),
        ([{"kind": "resize", "method": 3}], "method of the degradation 'resize' is 3"),
        ([{"kind": "resize", "keep_size": 1}], "keep_size of the degradation 'resize' is 1; it has to be true or false"),
        ([{"kind": REAL_ESRGAN, "scale": 2.5}], "scale of the degradation 'real-esrgan' is 2.5; it has to be a whole number from 1 to 8"),
        ([{"kind": REAL_ESRGAN, "preset": ["mild"]}], "preset of the degradation 'real-esrgan' is"),
    ],
)
def test_what_is_wrong_is_named(value, message):
    with pytest.raises(ValueError) as error:
        Recipe.from_json(value)
    assert message in str(error.value)
