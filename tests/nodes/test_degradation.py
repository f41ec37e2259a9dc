"""MendDegradeImage and MendRealESRGANDegradation: through the host, for every kind and every picture an artist may bring."""

import json
from pathlib import Path

import pytest
import torch

from mend.degradations import limits, operators, real_esrgan
from mend.degradations.recipe import REAL_ESRGAN, Recipe, Step
from mend.nodes.degradation import DegradeImage, RealESRGANDegradation

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "degrade_image.json"
KINDS = list(operators.OPERATORS)
SHAPES = [(1, 1, 1, 3), (2, 7, 513, 3), (1, 20, 31, 1), (2, 20, 31, 4)]


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def options():
    combo = next(entry for entry in DegradeImage.GET_SCHEMA().inputs if entry.id == "kind")
    return {option.key: option.inputs for option in combo.options}


def defaults(kind):
    """The widgets of one kind at the values a new node has."""
    return {
        entry.id: entry.default if entry.default is not None else entry.options[0]
        for entry in options()[kind]
        if hasattr(entry, "default")
    }


def operator_settings(kind):
    """Defaults as the operators take them."""
    settings = defaults(kind)
    settings.pop("white_is", None)
    return settings


def degrade_inputs(kind, **settings):
    """The inputs of a node in a prompt."""
    values = {f"kind.{name}": value for name, value in {**defaults(kind), **settings}.items()}
    return {"image": ["1", 0], "kind": kind, "seed": 3, **values}


def prompt(inputs, node="MendDegradeImage", **given):
    """A given picture, one node, and both of its outputs; each further given value feeds the input of its name."""
    more = {name: {"class_type": "TestGiven", "inputs": {"name": name}} for name in given}
    links = {name.replace("__", "."): [name, 0] for name in given}
    return {
        "1": {"class_type": "TestGiven", "inputs": {"name": "image"}},
        "2": {"class_type": node, "inputs": {**inputs, **links}},
        "3": {"class_type": "TestCapture", "inputs": {"value": ["2", 0]}},
        "4": {"class_type": "TestCapture", "inputs": {"value": ["2", 1]}},
        **more,
    }


@pytest.fixture
def run(run_prompt):
    """Image and words of one node that ran in the host."""

    def call(image, inputs, node="MendDegradeImage", **given):
        values = run_prompt(prompt(inputs, node, **given), given={"image": image, **given}).values
        return values["3"], values["4"]

    return call


@pytest.fixture
def refused(run_prompt):
    """What the host says where a node fails."""

    def call(image, inputs, node="MendDegradeImage", **given):
        result = run_prompt(prompt(inputs, node, **given), given={"image": image, **given}, check=False)
        assert not result.success
        return result.error_text()

    return call


def real_esrgan_inputs(**changes):
    return {"image": ["1", 0], "preset": "mild", "scale": 4, "keep_size": True, "seed": 3, **changes}


def test_every_operator_has_its_kind():
    assert list(options()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_in_the_host(run, kind):
    image = picture(2, 20, 31, 3)
    out, words = run(image, degrade_inputs(kind))
    expected, new = operators.degrade(image, kind, 3, **operator_settings(kind))
    assert torch.equal(out, expected) and words == ", ".join(new) != ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_takes_every_picture(kind, shape):
    image = picture(*shape)
    kept = image.clone()
    out, words, _ = DegradeImage.execute(image, {"kind": kind, **defaults(kind)}, 1).result
    assert out.shape == (*shape[:3], max(3, shape[3])) and torch.isfinite(out).all() and isinstance(words, str)
    assert torch.equal(image, kept)
    if shape[3] == 4:
        assert torch.equal(out[..., 3], image[..., 3])


def after(node):
    """The inputs that continue a chain."""
    return {"image": [node, 0], "words": [node, 1], "degradation": [node, 2]}


def test_chains_append_their_words_and_their_recipe(run_prompt):
    steps = {
        "1": {"class_type": "TestGiven", "inputs": {"name": "image"}},
        "2": {"class_type": "MendDegradeImage", "inputs": degrade_inputs("haze", density=0.7)},
        "3": {"class_type": "MendDegradeImage", "inputs": {**degrade_inputs("gaussian noise"), **after("2")}},
        "4": {"class_type": "MendRealESRGANDegradation", "inputs": {**real_esrgan_inputs(scale=2), **after("3")}},
        "5": {"class_type": "TestCapture", "inputs": {"value": ["4", 1]}},
        "6": {"class_type": "TestCapture", "inputs": {"value": ["4", 0]}},
        "7": {"class_type": "TestCapture", "inputs": {"value": ["4", 2]}},
    }
    values = run_prompt(steps, given={"image": picture(1, 32, 32, 3)}).values
    assert values["5"] == "hazy, noisy, blurry, compressed, low resolution"
    assert values["6"].shape == (1, 32, 32, 3)
    assert values["7"].to_json() == [
        {"kind": "haze", "airlight": 0.85, "density": 0.7},
        {"kind": "gaussian noise", "grey_noise": False, "sigma": 25.0},
        {"kind": REAL_ESRGAN, "keep_size": True, "preset": "mild", "scale": 2},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_says_what_the_node_does(kind):
    recipe = DegradeImage.execute(picture(1, 8, 8, 3), {"kind": kind, **defaults(kind)}, 1).result[2]
    assert recipe == Recipe().then(Step.of(kind, operator_settings(kind)))
    assert recipe.apply(picture(1, 8, 8, 3), 1)[1] == operators.OPERATORS[kind].words


def test_mask_and_depth_are_not_part_of_the_recipe():
    image = picture(1, 8, 8, 3)
    settings = {"kind": "haze", **defaults("haze"), "depth": torch.zeros(1, 8, 8, 3)}
    recipe = DegradeImage.execute(image, settings, 1, mask=torch.zeros(1, 8, 8)).result[2]
    assert recipe == Recipe().then(Step.of("haze", {}))
    assert recipe.apply(image, 1)[1] == ("hazy",)


def test_a_linked_value_out_of_range_is_refused(refused):
    message = refused(picture(1, 8, 8, 3), degrade_inputs("jpeg"), kind__quality=0)
    assert "Degrade Image: quality of the degradation 'jpeg' is 0; it has to be a number from 1 to 100" in message


def test_nodes_and_recipes_share_their_limits():
    entries = [entry for inputs in options().values() for entry in inputs] + RealESRGANDegradation.GET_SCHEMA().inputs
    found = {entry.id: (entry.min, entry.max) for entry in entries if getattr(entry, "min", None) is not None and entry.id != "seed"}
    assert found == limits.RANGES
    choices = {entry.id: tuple(entry.options) for entry in entries if hasattr(entry, "options") and entry.id not in ("white_is",)}
    assert choices == limits.OPTIONS


def test_mask_is_fitted_and_selects(run):
    image = picture(2, 20, 30, 3)
    mask = torch.zeros(1, 10, 15)
    mask[:, :5] = 1
    out, words = run(image, degrade_inputs("jpeg"), mask=mask)
    assert torch.equal(out[:, 12:], image[:, 12:]) and words == "compressed"
    assert (out[:, :8] - image[:, :8]).abs().mean() > 0.01
    out, words = run(image, degrade_inputs("jpeg"), mask=torch.zeros(2, 20, 30))
    assert torch.equal(out, image) and words == ""


@pytest.mark.parametrize("white_is", ["near", "far"])
def test_depth_says_where_the_haze_is(run, white_is):
    image = torch.zeros(2, 16, 16, 3)
    depth = torch.zeros(1, 8, 8, 3)
    depth[:, :, :4] = 1
    out, _ = run(image, degrade_inputs("haze", white_is=white_is, density=10.0, airlight=1.0), kind__depth=depth)
    near, far = (out[..., :4, :], out[..., 12:, :]) if white_is == "near" else (out[..., 12:, :], out[..., :4, :])
    assert near.max() < 1e-4 and far.min() > 0.999


def test_resize_can_leave_the_picture_small(run):
    out, words = run(picture(1, 7, 513, 4), degrade_inputs("resize", keep_size=False))
    assert out.shape == (1, 2, 128, 4) and words == "low resolution"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(0, 8, 8, 3), "'image' holds no pixels"),
        (torch.zeros(1, 0, 8, 3), "'image' holds no pixels"),
        (torch.zeros(1, 8, 8, 2), "'image' has 2 channels"),
        (torch.zeros(8, 8, 3), "'image' has the shape"),
        (torch.full((1, 8, 8, 3), float("nan")), "'image' has NaN or infinite"),
    ],
)
def test_unusable_pictures_are_refused(refused, image, message):
    assert f"Degrade Image: {message}" in refused(image, degrade_inputs("blur"))
    assert f"Real-ESRGAN Degradation: {message}" in refused(image, real_esrgan_inputs(), "MendRealESRGANDegradation")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(0, 8, 8), "'mask' holds no pixels"),
        (torch.zeros(3, 8, 8), "'mask' holds 3 pictures for 2 in 'image'"),
        (torch.zeros(1, 1, 8, 8), "'mask' has the shape"),
        (torch.full((1, 8, 8), float("nan")), "'mask' has NaN or infinite"),
    ],
)
def test_unusable_masks_are_refused(refused, mask, message):
    assert f"Degrade Image: {message}" in refused(picture(2, 8, 8, 3), degrade_inputs("blur"), mask=mask)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (torch.zeros(0, 8, 8, 3), "'depth' holds no pixels"),
        (torch.zeros(3, 8, 8, 3), "'depth' holds 3 pictures for 2 in 'image'"),
        (torch.full((1, 8, 8, 1), float("inf")), "'depth' has NaN or infinite"),
    ],
)
def test_unusable_depths_are_refused(refused, depth, message):
    assert f"Degrade Image: {message}" in refused(picture(2, 8, 8, 3), degrade_inputs("haze"), kind__depth=depth)


def test_mask_and_a_smaller_picture_exclude_each_other(refused):
    message = refused(picture(1, 8, 8, 3), degrade_inputs("resize", keep_size=False), mask=torch.ones(1, 8, 8))
    assert "Degrade Image: 'mask' cannot be used where the picture becomes smaller. Turn 'keep_size' on" in message


@pytest.mark.parametrize(("kind", "setting"), [("jpeg", {"quality": 0}), ("resize", {"method": "lanczos"}), ("rain", {"rain": 2.0})])
def test_host_checks_the_ranges_of_nested_inputs(refused, kind, setting):
    assert f"kind.{next(iter(setting))}" in refused(picture(1, 8, 8, 3), degrade_inputs(kind, **setting))


@pytest.mark.parametrize("preset", real_esrgan.PRESETS)
def test_real_esrgan_runs_in_the_host(run, preset):
    image = picture(2, 21, 30, 3)
    out, words = run(image, real_esrgan_inputs(preset=preset, keep_size=False), "MendRealESRGANDegradation")
    assert torch.equal(out, real_esrgan.degrade(image, preset, 4, 3)[0]) and out.shape == (2, 5, 7, 3)
    assert words == "blurry, noisy, compressed, low resolution"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1, 8])
def test_real_esrgan_takes_every_picture(shape, scale):
    image = picture(*shape)
    out, _, _ = RealESRGANDegradation.execute(image, "standard", scale, True, 2**64 - 1).result
    assert out.shape == (*shape[:3], max(3, shape[3])) and torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    if shape[3] == 4:
        assert torch.equal(out[..., 3], image[..., 3])


def test_the_shared_workflow_has_the_widgets_of_its_kinds():
    nodes = [node for node in json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"] if node["type"] == "MendDegradeImage"]
    for node in nodes:
        kind, *values, seed, control = node["widgets_values"]
        assert [type(value) for value in values] == [type(value) for value in defaults(kind).values()]
        assert isinstance(seed, int) and control == "fixed"
