"""Sampling begins where the noise of the picture belongs, and pictures get what they lack."""

import pytest
import torch

from comfy.nested_tensor import NestedTensor
from mend.lab.prior import load_lab_prior
from mend.model_patches.host import noise_to_signal
from mend.samplers.matched_start import MatchedStart, latent_noise
from mend.tests import tiny_models
from mend.tests.training.tiny_training import video_vae

FAMILIES = ("sd15", "sd3", "flux")


@pytest.fixture(scope="module")
def lab():
    model, _, vae = load_lab_prior("unet")
    return model, vae


def smooth(side=128):
    across = torch.linspace(0.2, 0.8, side)
    return torch.stack([across.expand(side, side), across[:, None].expand(side, side), torch.full((side, side), 0.5)], -1)[None]


def grainy(picture, deviation, seed=0):
    return picture + deviation * torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_the_noise_of_a_latent_is_found_from_the_picture_alone(lab, deviation):
    model, vae = lab
    clean, into = smooth(), model.get_model_object("process_latent_in")
    noisy = grainy(clean, deviation)
    truth = (into(vae.encode(noisy)) - into(vae.encode(clean))).std().item()
    # The encoder is not linear, so noise on noise differs a little from noise alone.
    assert latent_noise(model, vae, noisy) == pytest.approx(truth, rel=0.15)


def test_a_picture_without_grain_has_no_noise(lab):
    assert latent_noise(*lab, torch.full((1, 64, 64, 3), 0.5)) == 0
    assert latent_noise(*lab, smooth()) < 0.02


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 47)])
def test_pictures_of_any_size(lab, size):
    found = latent_noise(*lab, torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(0)))
    assert 0 <= found < 10


def test_video_vaes_take_a_picture_for_a_video_of_one_frame():
    noisy = grainy(smooth(64), 0.1)
    model, vae = tiny_models.model("wan"), video_vae()
    into = model.get_model_object("process_latent_in")
    truth = (into(vae.encode(noisy)) - into(vae.encode(smooth(64)))).std().item()
    # As above; the tiny VAE is not even trained.
    assert latent_noise(model, vae, noisy) == pytest.approx(truth, rel=0.25)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_schedule_falls_evenly_from_the_start_to_nothing(family):
    sampling = tiny_models.model(family).get_model_object("model_sampling")
    start = MatchedStart.of([0.25], 0.1, 0)
    sigmas = start.sigmas(sampling, 5)
    assert sigmas.shape == (6,) and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    ratios = torch.tensor([noise_to_signal(sampling, float(sigma)) for sigma in sigmas])
    assert ratios[0].item() == pytest.approx(0.25, rel=1e-4)
    # Steps of the share of noise in the mixture: 0.25 / 1.25 in five.
    torch.testing.assert_close((ratios / (1 + ratios)).diff(), torch.full((5,), -0.04), atol=1e-5, rtol=0)
    assert start.share == pytest.approx(0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_found_and_noise_added_make_the_start(family):
    sampling = tiny_models.model(family).get_model_object("model_sampling")
    found = [0.0, 0.2, 0.5]
    start = MatchedStart.of(found, 0.1, 3)
    added = start.generate_noise({"samples": torch.zeros(3, 4, 64, 64)})
    assert start.start == 0.5 and not added[2].any()
    sigma = start.sigmas(sampling, 2)[0]
    clean = torch.zeros(3, 4, 64, 64)
    carried = torch.tensor(found).view(3, 1, 1, 1) * torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    x = sampling.noise_scaling(sigma, added, clean + carried, False)
    signal = sampling.noise_scaling(sigma, torch.zeros(1), torch.ones(1), False)
    # 16,384 values know their deviation to half a per cent.
    torch.testing.assert_close(x.flatten(1).std(1) / signal, torch.full((3,), 0.5), rtol=0.03, atol=0)


def test_the_seed_decides_and_batches_equal_single_pictures():
    start = MatchedStart.of([0.1, 0.3], 0.6, 5)
    samples = torch.zeros(4, 4, 8, 8)
    noise = start.generate_noise({"samples": samples})
    assert torch.equal(noise, start.generate_noise({"samples": samples}))
    assert not torch.equal(noise, MatchedStart.of([0.1, 0.3], 0.6, 6).generate_noise({"samples": samples}))
    # Latents beyond the pictures take them in turn: 1.5 is the ratio at a share of 0.6.
    expected = torch.tensor([(1 - (found / 1.5) ** 2) ** 0.5 for found in (0.1, 0.3, 0.1, 0.3)])
    plain = MatchedStart.of([0.0], 0.6, 5).generate_noise({"samples": samples})
    torch.testing.assert_close(noise, plain * expected.view(4, 1, 1, 1))
    second = MatchedStart.of([0.3], 0.6, 5).generate_noise({"samples": samples[:1], "batch_index": [1]})
    torch.testing.assert_close(second[0], noise[1])


def test_a_picture_taken_from_a_batch_keeps_its_own_noise():
    start = MatchedStart.of([0.1, 0.3, 0.2], 0.6, 5)
    samples = torch.zeros(3, 4, 8, 8)
    noise = start.generate_noise({"samples": samples})
    (last,) = start.generate_noise({"samples": samples[2:], "batch_index": [2]})
    assert torch.equal(last, noise[2])
    # As many pictures as latents: those pictures were taken from the batch as well.
    (own,) = MatchedStart.of([0.2], 0.6, 5).generate_noise({"samples": samples[2:], "batch_index": [2]})
    assert torch.equal(own, last)


def test_a_video_gets_what_its_frames_lack_on_average():
    samples = torch.zeros(1, 16, 3, 8, 8)
    noise = MatchedStart.of([0.0, 0.2, 0.1, 0.1, 0.1], 0.3, 1).generate_noise({"samples": samples})
    assert torch.equal(noise, MatchedStart.of([0.1], 0.3, 1).generate_noise({"samples": samples}))


def test_sound_beside_a_picture_gets_all_of_its_noise():
    samples = NestedTensor([torch.zeros(1, 16, 1, 8, 8), torch.zeros(1, 8, 50, 16)])
    quiet, noisy = (MatchedStart.of([found], 0.3, 1).generate_noise({"samples": samples}).unbind() for found in (0.0, 5.0))
    assert quiet[0].std().item() == pytest.approx(1, abs=0.1) and not noisy[0].any()
    assert torch.equal(quiet[1], noisy[1]) and noisy[1].std().item() == pytest.approx(1, abs=0.1)


def test_video_latents_are_noised_alike():
    noise = MatchedStart.of([0.0], 0.3, 1).generate_noise({"samples": torch.zeros(1, 16, 3, 8, 8)})
    assert noise.shape == (1, 16, 3, 8, 8) and noise.std().item() == pytest.approx(1, abs=0.05)
