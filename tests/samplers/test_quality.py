"""The quality prior's losses on pictures whose values are known, and the ranges in which they act."""

import pytest
import torch

from mend.samplers.quality import Quality, chroma_loss, clarity_loss, dark_channel, exposure_loss, quality_loss


def plain(*colour, size=(64, 48)):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, *size).clone()


def picture(*size, batch=1, seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("patch", [1, 32, 1000])
def test_exposure_of_plain_grey(value, patch):
    assert exposure_loss(plain(value, value, value), 0.45, patch).item() == pytest.approx((value - 0.45) ** 2, abs=1e-6)


def test_exposure_counts_neighbourhoods_and_not_pixels():
    halves = torch.zeros(1, 3, 64, 64)
    halves[..., 32:] = 1
    assert exposure_loss(halves, 0.5, 32).item() == pytest.approx(0.25)
    assert exposure_loss(halves, 0.5, 64).item() == pytest.approx(0)


def test_exposure_counts_what_is_left_over_at_the_edges():
    picture = plain(0.5, 0.5, 0.5)[..., :48, :48].clone()
    picture[..., 32:, :] = 1
    picture[..., :, 32:] = 1
    # One neighbourhood is right, and three that do not fill theirs are 0.5 too bright.
    assert exposure_loss(picture, 0.5, 32).item() == pytest.approx(0.75 * 0.25)


def test_exposure_takes_the_mean_of_the_channels():
    assert exposure_loss(plain(0.9, 0.3, 0.0), 0.4, 16).item() == pytest.approx(0, abs=1e-7)


def test_chroma_of_greys_is_nothing():
    assert chroma_loss(plain(0.3, 0.3, 0.3)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("colour", "expected"), [((1.0, 0.0, 0.0), 2**0.5), ((0.5, 0.1, 0.3), (0.16**2 + 0.04**2 + 0.04**2) ** 0.5)])
def test_chroma_of_plain_colours(colour, expected):
    assert chroma_loss(plain(*colour)).item() == pytest.approx(expected, abs=1e-5)


def test_chroma_has_a_gradient_on_grey():
    x = plain(0.3, 0.3, 0.3).requires_grad_(True)
    chroma_loss(x).backward()
    assert torch.isfinite(x.grad).all()


def test_dark_channel_is_the_darkest_value_around():
    x = torch.full((1, 3, 40, 40), 0.6)
    x[0, 1, 20, 10] = 0.1
    dark = dark_channel(x, 7)
    assert dark.shape == (1, 1, 40, 40)
    assert (dark[0, 0, 13:28, 3:18] == 0.1).all()
    assert (dark == 0.1).sum() == 15 * 15 and (dark == 0.6).sum() == 40 * 40 - 15 * 15


def test_clarity_is_the_mean_dark_channel():
    assert clarity_loss(plain(0.9, 0.2, 0.5)).item() == pytest.approx(0.2)
    assert clarity_loss(plain(1.0, 0.0, 0.0)).item() == 0
    assert clarity_loss(plain(-0.5, 0.4, 0.4)).item() == 0


ALL = Quality(exposure=2.0, exposure_target=0.5, exposure_patch=16, exposure_below=0.1, chroma=3.0, chroma_below=0.2, clarity=5.0, clarity_below=0.3)


@pytest.mark.parametrize(("time", "active"), [(0.05, "ecd"), (0.1, "cd"), (0.15, "cd"), (0.2, "d"), (0.25, "d"), (0.3, ""), (1.0, "")])
def test_each_constraint_acts_below_its_time(time, active):
    x = plain(0.6, 0.2, 0.4)
    parts = {"e": 2 * exposure_loss(x, 0.5, 16), "c": 3 * chroma_loss(x), "d": 5 * clarity_loss(x)}
    assert quality_loss(x, ALL, time).item() == pytest.approx(sum(float(parts[name]) for name in active))


def test_a_weight_of_nothing_switches_off():
    assert quality_loss(picture(16, 16), Quality(exposure=0, chroma=0, clarity=0), 0.0) == 0


@pytest.mark.parametrize("size", [(1, 1), (7, 513), (1, 90)])
def test_odd_sizes(size):
    x = picture(*size).requires_grad_(True)
    quality_loss(x, ALL, 0.0).backward()
    assert torch.isfinite(x.grad).all()
