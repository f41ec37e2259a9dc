"""The budget of the Restoration Adapter: the paper's parameters within 3 %, and little work beside the model and a ControlNet."""

import pytest

from mend.tests.dev.counting import counted


@pytest.fixture(scope="module")
def rows():
    """What `python dev bench adapter_cost --quick` counts."""
    return {(row["model"], row["method"]): row for row in counted("adapter_cost")}


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "paper"), [("SDXL", 157e6), ("SD3 medium", 80e6)])
def test_parameters_are_the_papers(rows, model, paper):
    assert rows[model, "adapter + LoRA 32"]["parameters"] == pytest.approx(paper, rel=0.03)


@pytest.mark.parametrize("model", ["SDXL", "SD3 medium"])
def test_the_work_is_a_small_part_of_the_models(rows, model):
    assert 0.01 < rows[model, "adapter + LoRA 32"]["of_base"] <= 0.12


def test_the_work_is_at_most_a_third_of_a_controlnets(rows):
    adapter, control = rows["SDXL", "adapter + LoRA 32"], rows["SDXL", "ControlNet"]
    assert adapter["gmac"] <= control["gmac"] / 3 and adapter["parameters"] <= control["parameters"] / 4
    # The host's class, not the 839 M that the paper compares with.
    assert control["parameters"] == pytest.approx(1251e6, rel=0.01)


def test_the_base_is_what_it_is_known_as(rows):
    assert rows["SDXL", "base"]["parameters"] == pytest.approx(2.567e9, rel=0.001)
    assert rows["SD3 medium", "base"]["parameters"] == pytest.approx(2.028e9, rel=0.001)


def test_the_small_size_is_half(rows):
    small, full = rows["SDXL", "small adapter + LoRA 32"], rows["SDXL", "adapter + LoRA 32"]
    assert small["parameters"] < 0.55 * full["parameters"] and small["gmac"] < 0.55 * full["gmac"]
