"""Grain is measured on pictures as they come from a camera, on enlarged ones, and not where there is none."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mend.degradations.scales import recipe_of
from mend.lab.photographs import EVALUATION, evaluation_photograph
from mend.lab.prior import load_lab_prior
from mend.model_patches.framing import resize
from mend.samplers.first_guess import first_guess, known_degradation
from mend.samplers.grain import Grain, grain_like, grain_of, noise_level
from mend.samplers.matched_start import latent_noise
from mend.samplers.quality import Quality
from mend.samplers.returned_detail import returned_detail


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(height=128, width=128):
    return F.interpolate(torch.rand(1, 3, 6, 6, generator=generator()), (height, width), mode="bicubic").clamp(0, 1)


def enlarged(scale, deviation, side=128, around=None):
    """A grainy picture as Frame Image enlarges it, (1, H, W, 3)."""
    picture = torch.full((1, side, side, 3), 0.5) if around is None else around
    noisy = picture + deviation * torch.randn(picture.shape, generator=generator(4))
    return resize(noisy, (round(side * scale), round(side * scale)))


@pytest.mark.parametrize("deviation", [0.02, 5 / 255, 50 / 255])
def test_noise_on_a_flat_picture_is_measured(deviation):
    y = 0.5 + deviation * torch.randn(1, 3, 200, 200, generator=generator(4))
    # A median of 30 000 details is known to 1 %.
    assert noise_level(y) == pytest.approx(deviation, rel=0.04)


@pytest.mark.parametrize("deviation", [0.05, 50 / 255])
def test_noise_on_a_textured_picture_is_measured(deviation):
    texture = smooth(200, 200)
    texture[..., ::20, :] = 0
    y = texture + deviation * torch.randn(1, 3, 200, 200, generator=generator(4))
    # The texture's own edges add to few of the diagonal details, so the median hardly feels them.
    assert noise_level(y) == pytest.approx(deviation, rel=0.1)


def test_clean_pictures_have_no_noise():
    assert grain_of(torch.full((1, 3, 20, 20), 0.4)) == Grain(0.0)
    assert grain_of(torch.full((1, 3, 100, 100), 0.4)) == Grain(0.0)
    assert noise_level(smooth()) < 0.005


@pytest.mark.parametrize("scale, size", [(1, 1), (2, 2), (3, 4), (4, 4)])
@pytest.mark.parametrize("deviation", [0.05, 0.15])
def test_grain_of_an_enlarged_picture_is_measured(scale, size, deviation):
    y = enlarged(scale, deviation).movedim(-1, 1)
    found = grain_of(y)
    assert found.size == size
    # A place holds 16 to 64 grains, which deviate by a tenth to a fifth from place to place, and the smoothest tenth is looked at.
    assert found.deviation == pytest.approx(float(y.std()), rel=0.25 if scale > 1 else 0.04)


@pytest.mark.parametrize("name", EVALUATION)
@pytest.mark.parametrize("damage", [None, {"haze": 2}, {"low light": 2}, {"rain": 2}, {"blur": 2}, {"jpeg": 2}, {"gaussian noise": 3}], ids=str)
def test_photographs_of_their_own_size_have_white_noise_at_most(name, damage):
    picture = evaluation_photograph(name).movedim(0, -1)[None]
    y = (recipe_of(damage).apply(picture, 0)[0] if damage else picture).movedim(-1, 1)
    assert grain_of(y) == Grain(noise_level(y))


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (47, 47), (48, 2000)])
def test_pictures_of_any_size(size):
    found = grain_of(torch.rand(1, 3, *size, generator=generator()))
    assert 0 <= found.deviation < 1 and found.size == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_grain_is_drawn_as_coarse_as_it_was_found(size):
    drawn = grain_like(Grain(0.1, size), torch.Size((1, 200, 181, 3)), generator())
    assert drawn.shape == (1, 200, 181, 3) and float(drawn.std()) == pytest.approx(1, rel=0.02)
    assert grain_of((0.5 + 0.1 * drawn).movedim(-1, 1)).size == size


def test_a_first_guess_does_not_brighten_coarse_grain():
    dark = 0.2 * smooth().movedim(1, -1)
    y = enlarged(4, 0.02, around=dark).movedim(-1, 1)
    clean = resize(dark, (512, 512)).movedim(-1, 1)
    known = known_degradation(y, Quality(), 1, False)
    assert known.grain.size == 4
    rough, white = (first_guess(y, replace(known, grain=grain)) for grain in (known.grain, Grain(noise_level(y))))
    target = first_guess(clean, replace(known, grain=Grain(0.0)))
    # The grains' own middles stay, as they do of white noise.
    assert (rough - target).std() < 0.75 * (white - target).std()


def test_coarse_grain_stays_behind_when_detail_comes_back():
    start = enlarged(4, 0.1)
    found = returned_detail(torch.full_like(start, 0.5), start, torch.full_like(start, 0.5))
    # A window of 9 pixels holds two grains a side, and its energy may be twice the mean now and then.
    assert (found - 0.5).abs().mean() < 0.1 * (start - 0.5).abs().mean()


@pytest.mark.parametrize("scale", [2, 4])
def test_the_noise_of_an_enlarged_pictures_latent_is_found(scale):
    model, _, vae = load_lab_prior("unet")
    into = model.get_model_object("process_latent_in")
    noisy, clean = enlarged(scale, 0.15, side=64), torch.full((1, 64 * scale, 64 * scale, 3), 0.5)
    truth = (into(vae.encode(noisy)) - into(vae.encode(clean))).std().item()
    # As with white noise the encoder is not linear, and so small a picture's grain is known to a fifth.
    assert latent_noise(model, vae, noisy) == pytest.approx(truth, rel=0.35)
