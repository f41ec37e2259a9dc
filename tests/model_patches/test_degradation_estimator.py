"""The degradation estimator: windows of any picture, tokens mixed out of the bank."""

import math

import pytest
import torch

from mend.model_patches import degradation_estimator as own
from mend.model_patches.degradation_estimator import bank_shares, check_fit, findings, mixed_tokens, windows
from mend.model_patches.weights_file import Weights

CONFIG = {"scales": [["blur", "width", [1.0, 2.0]], ["jpeg", "quality", [40.0, 20.0, 8.0]]], "codebook": "abc", "chart": {"seed": 0, "size": 32}}


def weights():
    return own.new_weights(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)), CONFIG)


def test_neighbours_share_a_place():
    shares = bank_shares(torch.tensor([0.0, 0.5, 1.0, 1.25, 2.0, 3.0, 9.0]), 3)
    expected = [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert shares.tolist() == expected


def test_tokens_are_mixed_from_the_bank():
    bank = weights().tensors["bank"].float()
    assert torch.equal(mixed_tokens(weights(), {}), torch.zeros(1, 4, 3))
    assert torch.equal(mixed_tokens(weights(), {1: 2.0})[0], bank[3])
    torch.testing.assert_close(mixed_tokens(weights(), {0: 1.5, 1: 0.5})[0], 0.5 * bank[0] + 0.5 * bank[1] + 0.5 * bank[2])


@pytest.mark.parametrize("size", [(1, 1), (100, 500), (128, 128), (1000, 129)], ids=str)
def test_windows_lie_on_whole_blocks_in_the_picture(size):
    place = torch.arange(size[0] * size[1]).reshape(1, 1, *size)
    found = windows(place)
    assert {window.shape[2:] for window in found} == {(min(size[0], 128), min(size[1], 128))}
    corners = [divmod(int(window[0, 0, 0, 0]), size[1]) for window in found]
    assert all(top % 8 == left % 8 == 0 for top, left in corners) and corners[0] == (0, 0) and len(corners) == len(set(corners))
    assert size[0] - max(top for top, _ in corners) - min(size[0], 128) < 8


@pytest.mark.parametrize("size", [(1, 1), (37, 300)], ids=str)
def test_pictures_of_any_size_are_looked_at_alone(size):
    pictures = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(1))
    made = weights()
    both, second = findings(made, pictures, "Test"), findings(made, pictures[1:], "Test")[0]
    assert len(both) == 2 and torch.equal(both[1].chances, second.chances) and torch.equal(both[1].places, second.places)
    assert ((second.places > 0) & (second.places < torch.tensor([2, 3]))).all() and ((second.chances > 0) & (second.chances < 1)).all()


def test_only_what_is_likely_enough_is_present():
    finding = own.Finding(torch.tensor([0.4, 0.6]), torch.tensor([1.0, 2.5]))
    assert finding.present(0.5) == {1: 2.5} and finding.present(0.0) == {0: 1.0, 1: 2.5} and finding.present(0.7) == {}


def test_incomplete_files_are_refused():
    made = weights()
    with pytest.raises(ValueError, match="Test: .* is incomplete: bank does not have the expected shape"):
        check_fit(Weights(own.KIND, "any", CONFIG, {**made.tensors, "bank": made.tensors["bank"][1:]}), "Test")
    with pytest.raises(ValueError, match="Test: .* is incomplete: network.out.bias does not have the expected shape"):
        check_fit(Weights(own.KIND, "any", CONFIG, {name: t for name, t in made.tensors.items() if name != "network.out.bias"}), "Test")
    with pytest.raises(ValueError, match="Test: .* does not say its chart, codebook"):
        check_fit(Weights(own.KIND, "any", {"scales": [["blur", "width", [1.0, 2.0]]]}, {}), "Test")


@pytest.mark.parametrize(("name", "value"), [
    ("scales", []), ("scales", 3), ("scales", [["blur", "width"]]), ("scales", [["blur", "width", 3]]), ("scales", [["blur", "width", ["a", 1]]]),
    ("scales", [["blur", "width", [0.0, 1.0]]]), ("scales", [["blur", "width", [1.0, -2.0]]]),
    ("scales", [["blur", "width", [1.0, math.inf]]]), ("scales", [["blur", "width", [True, 2.0]]]),
    ("codebook", None), ("chart", [0, 32]), ("chart", {"seed": 0}), ("chart", {"seed": "0", "size": 32}),
])  # fmt: skip
def test_files_that_are_not_understood_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Test: .* does not say its {name}, or not in a way"):
        check_fit(Weights(own.KIND, "any", {**CONFIG, name: value}, weights().tensors), "Test")
