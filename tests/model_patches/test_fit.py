"""What all kinds of weights are checked with; the kinds' own tests see to families and to what else each of them checks."""

import pytest
import torch

from mend.model_patches.errors import telling
from mend.model_patches.fit import VAE_INPUT, check_finite, check_shapes, misfit
from mend.model_patches.robust_encoder import ENCODER
from mend.model_patches.weights_file import Weights, part_of

EXPECTED = {"b": torch.zeros(2, 3), "c": torch.zeros(())}


def weights(**tensors):
    return Weights("fusion", "UNet 32", {}, tensors, "rain.safetensors")


@pytest.mark.parametrize(("found", "words"), [
    (EXPECTED, None),
    ({"b": torch.zeros(2, 3)}, ("c", "is missing, expected a number")),
    ({**EXPECTED, "b": torch.zeros(3, 2)}, ("b", "is 3x2, expected 2x3")),
    ({**EXPECTED, "a": torch.zeros(1)}, ("a", "is 1, expected missing")),
    ({"c": torch.zeros(1), "d": torch.zeros(1)}, ("b", "is missing, expected 2x3")),
])  # fmt: skip
def test_the_first_misfit_by_name(found, words):
    assert misfit(found, EXPECTED) == words


def test_an_encoder_in_the_file_has_to_fit_no_model():
    given = weights(**EXPECTED, **{f"{ENCODER}conv": torch.zeros(1)})
    check_shapes(given, EXPECTED, "Apply")
    with pytest.raises(ValueError, match=r"Apply: rain.safetensors does not fit 'vae' \(UNet 32\): lq_encoder.conv is 1, expected missing. .*another VAE"):
        check_shapes(given, EXPECTED, "Apply", VAE_INPUT)
    with pytest.raises(ValueError, match=r"Apply: rain.safetensors does not fit 'model' \(UNet 32\): c is missing, .* another model of that family"):
        check_shapes(weights(b=EXPECTED["b"]), EXPECTED, "Apply")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value):
    check_finite(weights(**EXPECTED), "Apply")
    with pytest.raises(ValueError, match="Apply: rain.safetensors holds numbers that are not finite"):
        check_finite(weights(**EXPECTED, a=torch.tensor([0.0, value])), "Apply")


def test_errors_say_what_they_are_about():
    with pytest.raises(ValueError, match="^Train: 'vae': too small$"), telling("Train: 'vae':"):
        raise ValueError("too small")
    with pytest.raises(KeyError, match="^'too small'$"), telling("Train: 'vae':"):
        raise KeyError("too small")


def test_a_part_of_a_file():
    assert part_of({"a.b": 1, "a.a.c": 2, "b.a.": 3}, "a.") == {"b": 1, "a.c": 2}
