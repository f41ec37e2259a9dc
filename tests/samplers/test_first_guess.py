"""The first guess undoes what the quality prior names, and never fails on a picture."""

import pytest
import torch
import torch.nn.functional as F

from mend.model_patches.fpam import FPAM
from mend.model_patches.host import run_operations
from mend.samplers.first_guess import KnownDegradation, first_guess, known_degradation
from mend.samplers.quality import Quality

OFF = dict(exposure=0.0, chroma=0.0, clarity=0.0)
BRIGHT, CLEAR = Quality(**{**OFF, "exposure": 0.01}), Quality(**{**OFF, "clarity": 0.01})
BOTH = Quality(**{**OFF, "exposure": 0.01, "clarity": 0.01})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(height=128, width=128, seed=0, mean=0.45):
    """A picture of soft shapes over all of 0..1 whose mean is known."""
    x = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator(seed)), (height, width), mode="bicubic").clamp(0, 1)
    for _ in range(40):
        x = x.pow(1.05 if x.mean() > mean else 0.95)
    return (x - x.min()) / (x.max() - x.min())


def estimated(y, quality, grid=1, grey=False):
    known = known_degradation(y, quality, grid, grey)
    return known, first_guess(y, known)


def test_without_a_quality_prior_the_picture_stays():
    y = smooth()
    known, guess = estimated(y, None)
    torch.testing.assert_close(guess, y, atol=1e-5, rtol=0)
    assert torch.equal(known.mix, torch.eye(3)) and (known.transmission == 1).all() and not known.airlight.any()


@pytest.mark.parametrize(("low", "high", "power"), [(0.0, 0.25, 2.2), (0.1, 0.6, 1.5), (0.2, 0.9, 1.0), (0.0, 1.0, 0.6)])
def test_a_tone_curve_is_inverted(low, high, power):
    x = smooth()
    known, guess = estimated(low + (high - low) * x**power, Quality(**{**OFF, "exposure": 0.01, "exposure_target": float(x.mean())}))
    # Black and white are taken half a per cent inside the picture's range, which moves the rest by a few hundredths.
    assert (guess - x).abs().mean() < 0.02 and (guess - x).abs().max() < 0.1
    assert guess.mean().item() == pytest.approx(x.mean().item(), abs=0.01)


@pytest.mark.parametrize("target", [0.3, 0.45, 0.6])
def test_the_guess_has_the_brightness_that_is_asked_for(target):
    guess = estimated(0.3 * smooth() ** 2, Quality(**{**OFF, "exposure": 0.01, "exposure_target": target}))[1]
    assert guess.mean().item() == pytest.approx(target, abs=0.02)


def hazy(t, light=0.85, side=128, sky=32):
    """Homogeneous haze over a picture with something black everywhere, under a strip of sky that is all haze."""
    x = smooth(side, side)
    x[:, 0] = 0
    y = x * t + light * (1 - t)
    y[..., :sky, :] = light
    return x, y


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_a_homogeneous_haze_is_found_and_lifted(t):
    x, y = hazy(t)
    known, guess = estimated(y, CLEAR, grid=8)
    assert known.airlight.tolist() == pytest.approx([0.85] * 3, abs=0.01)
    # A twentieth of the haze is left on purpose; the sky's cells end at row 2, and the dark channel looks 7 pixels further.
    torch.testing.assert_close(known.transmission[..., 3:, :], torch.full((1, 1, 5, 8), t + 0.05 * (1 - t)), atol=0.01, rtol=0)
    below = (guess - x)[..., 64:, :].abs()
    # What that twentieth does to a black pixel, divided by t.
    assert below.max() < 0.85 * 0.05 * (1 - t) / t + 0.03


def test_clear_air_is_left_alone():
    x = smooth()
    x[:, 0] = 0
    assert (estimated(x, CLEAR, grid=4)[1] - x).abs().max() < 0.01


def test_the_guess_is_what_the_degradation_maps_to_the_picture():
    y = 0.2 + 0.4 * smooth() ** 2
    for quality, grid in ((BRIGHT, 1), (BOTH, 6)):
        known, guess = estimated(y, quality, grid)
        psi = FPAM(run_operations, grid).requires_grad_(False)
        psi.start_aligned(known.curve, known.mix, known.airlight, known.transmission, generator())
        # The tone curve's 21 straight pieces, and half a per cent of values at each end that the guess clips.
        assert (psi(guess) - y).abs().quantile(0.98) < 0.01


def test_grey_pictures_are_mixed_by_luma():
    known = known_degradation(smooth(), None, 1, True)
    torch.testing.assert_close(known.mix, torch.tensor([0.2126, 0.7152, 0.0722]).expand(3, 3))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 513), (513, 1)])
@pytest.mark.parametrize("quality", [None, BRIGHT, CLEAR, BOTH], ids=["none", "bright", "clear", "both"])
@pytest.mark.parametrize("grid", [1, 12])
def test_any_size_gives_a_picture(size, quality, grid):
    y = torch.rand(1, 3, *size, generator=generator())
    known, guess = estimated(y, quality, grid, grey=True)
    assert guess.shape == y.shape and torch.isfinite(guess).all() and guess.min() >= 0 and guess.max() <= 1
    assert known.transmission.shape == (1, 1, grid, grid) and known.grain.deviation >= 0


@pytest.mark.parametrize("value", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("quality", [BRIGHT, CLEAR, BOTH], ids=["bright", "clear", "both"])
def test_plain_pictures_give_a_picture(value, quality):
    guess = estimated(torch.full((1, 3, 32, 32), value), quality, 4)[1]
    assert torch.isfinite(guess).all() and guess.min() >= 0 and guess.max() <= 1


@pytest.mark.parametrize("value", [0.1, 0.3, 0.6])
def test_plain_pictures_are_not_made_black(value):
    y = torch.full((1, 3, 32, 32), value)
    guess = estimated(y, BRIGHT)[1]
    # Towards the target, or left where it was.
    assert min(value, 0.45) - 0.01 <= guess.mean().item() <= max(value, 0.45) + 0.01


def test_huge_pictures_are_sampled():
    assert isinstance(known_degradation(torch.rand(1, 3, 1500, 1500, generator=generator()), BOTH, 12, False), KnownDegradation)
