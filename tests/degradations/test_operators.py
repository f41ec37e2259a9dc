"""Each degradation does what its name says, the same for the same seed, and nothing at strength 0."""

import io

import numpy
import pytest
import torch
from PIL import Image

from mend.degradations import evaluation, jpeg, resizing, weather
from mend.degradations.operators import OPERATORS, degrade, joined
from mend.degradations.seeding import generators

KINDS = list(OPERATORS)
RANDOM = {kind for kind, operator in OPERATORS.items() if operator.seeded}
OFF = {
    "gaussian noise": {"sigma": 0},
    "poisson noise": {"shot": 0},
    "blur": {"width": 0},
    "motion blur": {"length": 1},
    "defocus": {"radius": 0},
    "resize": {"factor": 1},
    "haze": {"density": 0},
    "low light": {"exposure": 1, "gamma": 1, "shot": 0, "grain": 0},
    "rain": {"rain": 0},
    "snow": {"snow": 0},
    "fading": {"fading": 0},
    "grey": {"greyness": 0},
}


def pictures(batch=2, height=64, width=48, seed=0):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_lie_beyond_black_and_white_are_taken_for_those(kind):
    """As an enlarged picture overshoots at its edges."""
    beyond = pictures() * 1.4 - 0.2
    found, words = degrade(beyond, kind, 0)
    expected, same_words = degrade(beyond.clamp(0, 1), kind, 0)
    assert torch.equal(found, expected) and words == same_words


def photograph(side=96):
    """Smooth enough for a codec: waves of three lengths in three colours."""
    line = torch.linspace(0, 6.28, side)
    waves = [0.5 + 0.25 * torch.sin(count * line)[:, None] + 0.2 * torch.cos((count + 1) * line) for count in (1, 2, 3)]
    return torch.stack(waves, -1)[None].clamp(0, 1)


def constant(value, side=256):
    return torch.full((1, side, side, 3), value)


def dot(side=41):
    image = torch.zeros(1, side, side, 3)
    image[:, side // 2, side // 2] = 1
    return image


def changed_rows_and_columns(image):
    marked = image[0, ..., 0] > 1e-4
    return marked.any(1).sum().item(), marked.any(0).sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_picture(kind):
    state = torch.get_rng_state()
    first, again, other = (degrade(pictures(), kind, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind not in RANDOM)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_picture_b_of_a_batch_uses_seed_plus_b(kind):
    batch = pictures(3)
    together = degrade(batch, kind, 7)[0]
    for index in range(3):
        torch.testing.assert_close(together[index:index + 1], degrade(batch[index:index + 1], kind, 7 + index)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 513), (2, 3)])
def test_result_is_a_picture_of_the_same_size_and_the_input_is_kept(kind, size):
    image = pictures(2, *size)
    kept = image.clone()
    out = degrade(image, kind)[0]
    assert out.shape == image.shape and out.dtype == image.dtype and torch.isfinite(out).all()
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(image, kept)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_gives_the_same_picture(kind):
    device = torch.accelerator.current_accelerator()
    out = degrade(pictures().to(device), kind, 3)[0]
    assert out.device.type == device.type
    # On average: where a coefficient of JPEG lies between two levels, either may be taken.
    assert (out.cpu() - degrade(pictures(), kind, 3)[0]).abs().mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays(kind):
    assert degrade(pictures().half(), kind)[0].dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_words_describe_it(kind):
    words = degrade(pictures(), kind)[1]
    assert words == OPERATORS[kind].words and words


@pytest.mark.parametrize("kind", OFF)
def test_strength_0_changes_nothing_and_says_nothing(kind):
    out, words = degrade(pictures(), kind, **OFF[kind])
    assert torch.equal(out, pictures()) and words == ()


@pytest.mark.parametrize("kind", KINDS)
def test_mask_selects_where(kind):
    mask = torch.zeros(1, 64, 48, 1)
    mask[:, :32] = 1
    everywhere, masked = degrade(pictures(), kind, 3)[0], degrade(pictures(), kind, 3, mask)[0]
    assert torch.equal(masked[:, :32], everywhere[:, :32])
    assert torch.equal(masked[:, 32:], pictures()[:, 32:])
    assert degrade(pictures(), kind, 3, torch.zeros(1, 64, 48, 1))[1] == ()


def test_mask_needs_the_size_to_stay():
    with pytest.raises(ValueError, match="a mask cannot select where resize acts"):
        degrade(pictures(), "resize", mask=torch.ones(1, 64, 48, 1), keep_size=False)


@pytest.mark.parametrize("seed", [2**64 - 1, -1])
def test_every_seed_of_the_host_works(seed):
    assert torch.isfinite(degrade(pictures(), "gaussian noise", seed)[0]).all()


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("gaussian noise", "noise", {"sigma": 50}),
        ("low light", "lowlight", {"shot": 0}),
        ("haze", "haze", {}),
        ("grey", "grey", {}),
    ],
)
def test_the_evaluation_is_a_special_case(kind, name, settings):
    torch.testing.assert_close(degrade(pictures(), kind, 4, **settings)[0], evaluation.degrade(pictures(), name, 4), atol=1e-6, rtol=0)


def test_gaussian_noise_has_the_deviation():
    # 196 608 values know their deviation to 0.16 %; at 25 of 255 around middle grey nothing is clipped.
    assert (degrade(constant(0.5), "gaussian noise", sigma=25)[0] - 0.5).std().item() == pytest.approx(25 / 255, rel=0.01)


@pytest.mark.parametrize("value", [0.2, 0.5])
def test_poisson_noise_grows_with_the_light(value):
    out = degrade(constant(value), "poisson noise", 1, shot=1.5)[0]
    assert out.mean().item() == pytest.approx(value, abs=1e-3)
    # The variance of 196 608 values is known to 0.32 %.
    assert out.var().item() == pytest.approx(1.5**2 * value / 256, rel=0.015)


@pytest.mark.parametrize("kind", ["gaussian noise", "poisson noise"])
def test_grey_noise_has_no_colour(kind):
    coloured, grey = (degrade(constant(0.5), kind, grey_noise=on)[0] - 0.5 for on in (False, True))
    assert (grey.amax(-1) - grey.amin(-1)).max() < 1e-6
    assert (coloured.amax(-1) - coloured.amin(-1)).mean() > 0.03


def test_blurs_keep_the_light_and_have_their_size():
    for kind, settings in (("blur", {"width": 2}), ("motion blur", {"length": 15}), ("defocus", {"radius": 4}), ("blur", {"profile": "plateau"})):
        assert degrade(dot(), kind, **settings)[0].sum().item() == pytest.approx(3, rel=1e-3)
    assert changed_rows_and_columns(degrade(dot(), "motion blur", length=15)[0]) == (1, 15)
    assert changed_rows_and_columns(degrade(dot(), "motion blur", length=15, motion_angle=90)[0]) == (15, 1)
    assert changed_rows_and_columns(degrade(dot(), "defocus", radius=4)[0]) == (9, 9)


def test_blur_of_two_widths_is_longer_along_its_angle():
    spread = degrade(dot(), "blur", width=4, width_across=1, blur_angle=90)[0][0, ..., 0]
    weights = torch.arange(41.0) - 20
    down, right = ((spread.sum(axis) * weights**2).sum() / spread.sum() for axis in (1, 0))
    # The kernel ends at 3 deviations, which takes 2.7 % off the variance.
    assert down.sqrt().item() == pytest.approx(4, rel=0.02) and right.sqrt().item() == pytest.approx(1, rel=0.02)


def test_ringing_overshoots_an_edge():
    edge = constant(0.25, 64)
    edge[:, :, 32:] = 0.75
    out = degrade(edge, "ringing", cutoff=0.4)[0]
    assert out.max() > 0.77 and out.min() < 0.23


@pytest.mark.parametrize("method", resizing.METHODS)
def test_resize_without_the_way_back(method):
    out, words = degrade(pictures(1, 7, 513), "resize", factor=4, method=method, keep_size=False)
    assert out.shape == (1, 2, 128, 3) and words == ("low resolution",)


def test_area_averages_and_enlarging_repeats():
    image = pictures(1, 8, 8)
    blocks = image.reshape(1, 4, 2, 4, 2, 3).mean((2, 4))
    torch.testing.assert_close(degrade(image, "resize", factor=2, keep_size=False)[0], blocks)
    whole = degrade(image, "resize", factor=2, up_method="area")[0]
    torch.testing.assert_close(whole, blocks.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="unknown resize method 'lanczos'; choose one of area, bilinear, bicubic"):
        degrade(pictures(), "resize", method="lanczos")


@pytest.mark.parametrize("quality", [10, 30, 50])
def test_jpeg_comes_close_to_a_real_one(quality):
    detail = torch.randn(1, 96, 96, 3, generator=torch.Generator().manual_seed(0))
    image = (photograph() + 0.08 * detail).clamp(0, 1)
    file = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(file, "JPEG", quality=quality)
    real = torch.from_numpy(numpy.array(Image.open(file))).float()[None] / 255
    ours = jpeg.compress(image, quality)
    # What is left, about a seventh, is the codec's soft rounding.
    assert (ours - real).abs().mean() < 0.25 * (real - image).abs().mean()


def test_jpeg_loses_more_at_lower_quality_and_lets_gradients_through():
    losses = [(jpeg.compress(pictures(), quality) - pictures()).square().mean() for quality in (5, 20, 60, 95)]
    assert losses == sorted(losses, reverse=True)
    image = photograph().requires_grad_()
    jpeg.compress(image, 40).square().mean().backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().mean() > 0


def test_haze_follows_a_depth():
    depth = torch.linspace(0, 1, 48).view(1, 1, 48, 1).expand(1, 64, 48, 1)
    out = degrade(pictures(), "haze", density=1.5, airlight=0.9, depth=depth)[0]
    t = torch.exp(-1.5 * depth)
    torch.testing.assert_close(out, pictures() * t + 0.9 * (1 - t))


def test_generated_depth_falls_towards_the_viewer():
    depth = torch.stack([weather.generated_depth(64, 48, generator) for generator in generators(0, 8)])
    assert depth.min() >= 0 and depth.max() <= 1.5
    assert depth[:, :16].mean() > depth[:, -16:].mean() + 0.5


@pytest.mark.parametrize(("kind", "strength"), [("rain", "rain"), ("snow", "snow")])
def test_more_weather_is_brighter(kind, strength):
    light = [degrade(constant(0.2), kind, 1, **{strength: amount})[0].mean().item() for amount in (0.0, 0.3, 0.6, 1.0)]
    assert light == sorted(light) and light[0] == pytest.approx(0.2) and 0.25 < light[-1] < 0.6
    assert degrade(constant(0.2), kind)[0].min() >= 0.2 - 1e-6


def test_rain_runs_along_its_angle():
    out = degrade(constant(0.2), "rain", 1, rain=0.2, streak_angle=90)[0][0, ..., 0]
    assert (out[1:] - out[:-1]).abs().mean() < 0.5 * (out[:, 1:] - out[:, :-1]).abs().mean()


def test_fading_pales_and_yellows():
    white, black = (degrade(constant(value, 8), "fading", fading=1.0, tint=0.5)[0][0, 0, 0] for value in (1.0, 0.0))
    assert white[0] > white[1] > white[2] and white.max() < 0.9 and black.min() > 0.15
    colour = degrade(pictures(), "fading", fading=1.0, tint=0.0)[0]
    assert (colour.amax(-1) - colour.amin(-1)).max() < 1e-6


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown degradation 'fog'; choose one of gaussian noise, "):
        degrade(pictures(), "fog")


def test_words_are_joined_once_each():
    assert joined("", ("noisy",)) == "noisy"
    assert joined("noisy, dark", ("noisy", "compressed")) == "noisy, dark, compressed"
    assert joined(" noisy ,, ", ()) == "noisy"
