"""The budget of degradation-aware feature fusion: the published layout as it was counted, and a lite one that is little work beside the model."""

import pytest

from mend.tests.dev.counting import counted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    """What `python dev bench fusion_cost --quick` counts."""
    return {row["part"]: row for row in counted("fusion_cost")}


def test_the_published_layout_is_what_was_counted(rows):
    # 528 and 794 billion multiplications, and about 118 million parameters in the fusion without its condition embedding.
    assert rows["base"]["gmac"] == pytest.approx(794, rel=0.01) and rows["fusion, published"]["gmac"] == pytest.approx(528, rel=0.01)
    alone = rows["fusion, published"]["parameters"] - rows["condition embedding, once a picture"]["parameters"]
    assert alone == pytest.approx(118e6, rel=0.01)


def test_lite_is_at_most_a_tenth_of_the_model(rows):
    assert rows["fusion, lite"]["of_base"] <= 0.1


def test_the_encoder_is_that_of_the_vae(rows):
    assert rows["LQ encoder, once a picture"]["parameters"] == pytest.approx(34.1e6, rel=0.01)
