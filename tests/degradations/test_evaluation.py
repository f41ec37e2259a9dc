"""The four degradations of the evaluation are exactly the ones that were fixed."""

import pytest
import torch

from mend.degradations import evaluation
from mend.degradations.evaluation import NAMES, degrade


def pictures(batch=2, height=64, width=48, seed=0):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def constant(value, side=256):
    return torch.full((1, side, side, 3), value)


def test_there_are_four():
    assert NAMES == ("noise", "lowlight", "haze", "grey")


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_picture(name):
    assert torch.equal(degrade(pictures(), name, 5), degrade(pictures(), name, 5))
    assert torch.equal(degrade(pictures(), name, 5), degrade(pictures(), name, 6)) == (name == "grey")


@pytest.mark.parametrize("name", NAMES)
def test_picture_b_of_a_batch_uses_seed_plus_b(name):
    batch = pictures(3)
    both = degrade(batch, name, 7)
    for index in range(3):
        assert torch.equal(both[index:index + 1], degrade(batch[index:index + 1], name, 7 + index))


@pytest.mark.parametrize("name", NAMES)
def test_result_is_a_picture_and_the_input_is_kept(name):
    image = pictures()
    kept = image.clone()
    out = degrade(image, name)
    assert out.shape == image.shape and out.dtype == image.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(image, kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (7, 513)])
def test_odd_sizes(name, size):
    assert torch.isfinite(degrade(pictures(1, *size), name)).all()


def test_noise_is_white_with_deviation_50_and_clipped():
    # 196 608 values of middle grey, which 2.5 deviations separate from either end: 1.2 % are clipped, so the quartiles tell the deviation.
    noise = (degrade(constant(0.5), "noise", 1) - 0.5).flatten()
    quartiles = torch.quantile(noise, torch.tensor([0.25, 0.5, 0.75]))
    deviation = 50 / 255
    # Quartiles of so many values are known to 0.5 % of the deviation.
    torch.testing.assert_close(quartiles, deviation * torch.tensor([-0.6745, 0, 0.6745]), atol=0.01 * deviation, rtol=0)
    generator = torch.Generator().manual_seed(1)
    expected = (0.5 + deviation * torch.randn(256, 256, 3, generator=generator)).clamp(0, 1)
    torch.testing.assert_close(degrade(constant(0.5), "noise", 1)[0], expected)


def test_noise_before_clipping_has_the_variance(monkeypatch):
    raw = evaluation._noise(constant(0.5)[0], torch.Generator().manual_seed(0)) - 0.5
    # The variance of 196 608 values is known to 0.3 %.
    assert raw.var().item() == pytest.approx((50 / 255) ** 2, rel=0.015)
    assert raw.mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("value", [0.5, 0.8, 1.0])
def test_low_light_is_a_quarter_of_the_power_with_grain(value):
    dark = degrade(constant(value), "lowlight", 2)
    # A mean over 196 608 values with a grain of 5/255; at these brightnesses under 2 % of the grain is clipped at 0.
    assert dark.mean().item() == pytest.approx(0.25 * value**2.2, abs=5e-4)
    assert dark.std().item() == pytest.approx(5 / 255, rel=0.02)


def test_haze_is_atmospheric_scattering():
    black, white, grey = (degrade(constant(value, 128), "haze", 3) for value in (0.0, 1.0, 0.5))
    t = white - black
    torch.testing.assert_close(black, 0.85 * (1 - t), atol=1e-6, rtol=0)
    torch.testing.assert_close(grey, 0.5 * t + 0.85 * (1 - t), atol=1e-6, rtol=0)
    depth = -t.log() / 1.2
    assert (t[..., :1] == t).all() and depth.min() >= -1e-6 and depth.max() <= 1.5 + 1e-5


def test_haze_thins_from_top_to_bottom_and_wavers_by_seed():
    depths = [-(degrade(constant(1.0, 64), "haze", seed) - degrade(constant(0.0, 64), "haze", seed)).log()[0, ..., 0] / 1.2 for seed in range(8)]
    rows = torch.stack(depths).mean((0, 2))
    # The waver of 0.15 averages out over eight seeds and a row to about 0.03; the ramp falls by 0.25 in 16 rows.
    assert (rows[16:] - rows[:-16] < -0.1).all()
    assert (depths[0] - depths[1]).abs().max() > 0.05
    assert max((depth[1:] - depth[:-1]).abs().max() for depth in depths) < 0.1


def test_grey_is_rec709_luma():
    image = pictures()
    luma = 0.2126 * image[..., 0] + 0.7152 * image[..., 1] + 0.0722 * image[..., 2]
    torch.testing.assert_close(degrade(image, "grey"), luma[..., None].expand_as(image), atol=1e-6, rtol=0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown degradation 'blur'; choose one of noise, lowlight, haze, grey"):
        degrade(pictures(), "blur")
