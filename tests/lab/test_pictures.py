"""Training pictures depend on their index alone, and the held-out photographs stay out."""

import numpy as np
import pytest
import torch

from mend.lab.photographs import EVALUATION, TRAINING, evaluation_photograph
from mend.lab.pictures import Pictures
from mend.lab.procedural import SIDE, picture, pink_noise

PALETTES = [np.random.default_rng(0).random((6, 3)).astype(np.float32)]


def test_training_and_evaluation_share_nothing():
    trained = {name.rsplit(".", 1)[0] for name in TRAINING}
    assert len(trained) == len(TRAINING) and not trained & set(EVALUATION)
    assert {"coffee", "china", "flower", "motorcycle_left", "motorcycle_right"} == set(EVALUATION)


def original(name):
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    import skimage.data
    import skimage.io

    return skimage.io.imread(f"{skimage.data.data_dir}/{name}.png")[..., :3]


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_photographs_are_centre_crops(name):
    crop = evaluation_photograph(name)
    assert crop.shape == (3, 256, 256) and crop.min() >= 0 and crop.max() <= 1 and crop.std() > 0.05
    image = original(name)
    top, left = (image.shape[0] - 256) // 2, (image.shape[1] - 256) // 2
    assert np.array_equal((crop * 255).round().byte().permute(1, 2, 0).numpy(), image[top:top + 256, left:left + 256])
    assert torch.equal(evaluation_photograph(name, 64), crop[:, 96:160, 96:160])


@pytest.mark.parametrize("seed", range(12))
def test_procedural_pictures_follow_their_seed(seed):
    one, other = (picture(np.random.default_rng(seed), PALETTES, 64) for _ in range(2))
    assert one.shape == (64, 64, 3) and one.dtype == np.float32
    assert np.isfinite(one).all() and one.min() >= 0 and one.max() <= 1
    assert np.array_equal(one, other)
    assert not np.array_equal(one, picture(np.random.default_rng(seed + 100), PALETTES, 64))


def test_pink_noise_has_its_slope():
    field = pink_noise(np.random.default_rng(0), 256, 1.5)
    assert field.mean() == pytest.approx(0, abs=1e-4) and field.std() == pytest.approx(1, abs=1e-3)
    amplitude = np.abs(np.fft.fft2(field))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    used = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[used]), np.log(amplitude[used]), 1)[0]
    # Thirty thousand amplitudes of Rayleigh spread know the slope to a hundredth.
    assert slope == pytest.approx(-1.5, abs=0.05)


def test_items_depend_on_seed_and_index_alone():
    a, b = Pictures(10), Pictures(5000)
    # In another order, and from another set: no item may draw on what another left.
    wanted = [7, 0, 3, 9]
    first = {index: a[index] for index in wanted}
    second = {index: b[index] for index in reversed(wanted)}
    for index in wanted:
        assert first[index].shape == (SIDE, SIDE, 3) and first[index].dtype == np.uint8
        assert np.array_equal(first[index], second[index])
    assert not np.array_equal(first[7], first[0]) and not np.array_equal(first[7], Pictures(10, seed=1)[7])
    assert len(a) == 10
