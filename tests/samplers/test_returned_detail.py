"""What coding drops comes back, grain does not, and what the model changed stays."""

import pytest
import torch

from mend.samplers.returned_detail import TRUST, coded, returned_detail
from mend.tests.training.tiny_training import video_vae


def noise(*size, deviation=1.0, seed=0):
    return deviation * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def grey(side=64):
    return torch.full((1, side, side, 3), 0.5)


def stripes(side=64, height=0.2):
    """Detail of a pixel's width in the left half."""
    x = torch.zeros(1, side, side, 3)
    x[:, :, : side // 2 : 2] = height
    x[:, :, 1 : side // 2 : 2] = -height
    return x


def test_without_grain_all_that_was_dropped_comes_back():
    start = grey() + stripes()
    torch.testing.assert_close(returned_detail(grey(), start, grey(), grain=1e-6), start, atol=1e-5, rtol=0)


def test_what_the_model_changed_stays_changed():
    start, coded, restored = grey() + stripes(), grey(), grey() + 0.1
    torch.testing.assert_close(returned_detail(restored, start, coded, grain=1e-6), restored + stripes(), atol=1e-5, rtol=0)


def test_grain_stays_behind():
    start = grey() + noise(1, 64, 64, 3, deviation=0.1)
    found = returned_detail(grey(), start, grey())
    # A window of 81 pixels knows the energy of grain to a tenth; TRUST asks for more than twice as much.
    assert TRUST**2 > 2 and torch.equal(found, grey())


def test_detail_comes_back_through_grain():
    start = grey() + stripes(height=0.4) + noise(1, 64, 64, 3, deviation=0.03)
    found = returned_detail(grey(), start, grey(), grain=0.03)
    left, right = (found[:, :, :24] - grey()[:, :, :24]), (found[:, :, 40:] - grey()[:, :, 40:])
    assert (left - stripes(height=0.4)[:, :, :24]).abs().mean() < 0.05
    assert not right.any()


def test_strength_scales_it_and_zero_is_nothing():
    start = grey() + stripes()
    full, half, none = (returned_detail(grey(), start, grey(), strength, grain=1e-6) - grey() for strength in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, full / 2)
    assert not none.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (33, 50)])
def test_pictures_of_any_size(size):
    restored, start, coded = (torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found = returned_detail(restored, start, coded)
    assert found.shape == restored.shape and found.isfinite().all() and found.min() >= 0 and found.max() <= 1


def test_a_video_vae_codes_a_picture_for_a_video_of_one_frame():
    picture = torch.rand(1, 33, 50, 3, generator=torch.Generator().manual_seed(0))
    found = coded(video_vae(), picture)
    assert found.shape == picture.shape and found.isfinite().all() and found.min() >= 0 and found.max() <= 1
