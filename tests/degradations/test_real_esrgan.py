"""The Real-ESRGAN pipeline draws what its table says, as often as it says, and does it in that order."""

import functools
import math
from collections import Counter

import pytest
import torch

from mend.degradations import real_esrgan
from mend.degradations.seeding import generators

DRAWS = 4000
# Of all the frequencies and means below, none is off by this many deviations except once in some thousand runs.
DEVIATIONS = 4.5

KERNELS = {
    ("gaussian", True): 0.45, ("gaussian", False): 0.25, ("generalised", True): 0.12, ("generalised", False): 0.03,
    ("plateau", True): 0.12, ("plateau", False): 0.03,
}  # fmt: skip
# (preset, stage): blur, sigma, up / down / keep, resize, noise, poisson, jpeg
TABLE = {
    ("standard", "first"): (1.0, (0.2, 3), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3), (30, 95)),
    ("standard", "second"): (0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ("mild", "first"): (1.0, (0.2, 3), (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2), (60, 95)),
    ("mild", "second"): (0.5, (0.2, 1.5), (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100)),
}
every_stage = pytest.mark.parametrize(("preset", "stage"), TABLE)
both = pytest.mark.parametrize("preset", real_esrgan.PRESETS)


@functools.cache
def recipes(preset):
    return [real_esrgan.draw(preset, generator) for generator in generators(0, DRAWS)]


def stages(preset, stage):
    return [getattr(recipe, stage) for recipe in recipes(preset)]


def blurs(preset, stage):
    return [drawn.blur for drawn in stages(preset, stage) if drawn.blur]


def check_frequencies(found, chances):
    """The counts of what was found fit these chances within the binomial deviation."""
    found = list(found)
    counts = Counter(found)
    assert counts.keys() <= chances.keys()
    for value, chance in chances.items():
        share = counts[value] / len(found)
        assert abs(share - chance) <= DEVIATIONS * math.sqrt(chance * (1 - chance) / len(found)), f"{value}: {share:.3f} for {chance}"


def check_uniform(values, limits):
    """The values fill the range evenly: mean within its own deviation, and both ends reached."""
    values = list(values)
    (low, high), count = limits, len(values)
    width = high - low
    assert low <= min(values) and max(values) <= high
    assert abs(sum(values) / count - (low + high) / 2) <= DEVIATIONS * width / math.sqrt(12 * count)
    # An end of width 10 / count of the range stays empty once in 20 000 times.
    assert min(values) < low + 10 * width / count and max(values) > high - 10 * width / count


@every_stage
def test_blur(preset, stage):
    chance, sigma, *_ = TABLE[preset, stage]
    check_frequencies([drawn.blur is not None for drawn in stages(preset, stage)], {True: chance, False: 1 - chance})
    found = blurs(preset, stage)
    check_frequencies([blur.size for blur in found], dict.fromkeys(range(7, 22, 2), 1 / 8))
    check_frequencies([blur.shape == "sinc" for blur in found], {True: 0.1, False: 0.9})
    bells = [blur for blur in found if blur.shape != "sinc"]
    check_frequencies([(blur.shape, blur.isotropic) for blur in bells], KERNELS)
    check_uniform([blur.sigma for blur in bells], sigma)
    check_uniform([blur.across for blur in bells if not blur.isotropic], sigma)
    check_uniform([blur.angle for blur in bells if not blur.isotropic], (-180, 180))
    assert all(blur.across == blur.sigma for blur in bells if blur.isotropic)
    check_uniform([blur.beta for blur in bells if blur.shape == "generalised"], (0.5, 4))
    check_uniform([blur.beta for blur in bells if blur.shape == "plateau"], (1, 2))


@every_stage
def test_sinc_cutoffs(preset, stage):
    sincs = [blur for blur in blurs(preset, stage) if blur.shape == "sinc"]
    check_uniform([blur.cutoff for blur in sincs if blur.size < 13], (math.pi / 3, math.pi))
    check_uniform([blur.cutoff for blur in sincs if blur.size >= 13], (math.pi / 5, math.pi))


@every_stage
def test_resize(preset, stage):
    _, _, chances, (low, high), *_ = TABLE[preset, stage]
    drawn = stages(preset, stage)
    check_frequencies([each.direction for each in drawn], dict(zip(("up", "down", "keep"), chances, strict=True)))
    check_frequencies([each.method for each in drawn], dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3))
    check_uniform([each.factor for each in drawn if each.direction == "up"], (1, high))
    check_uniform([each.factor for each in drawn if each.direction == "down"], (low, 1))
    assert {each.factor for each in drawn if each.direction == "keep"} == {1}


@every_stage
def test_noise_and_jpeg(preset, stage):
    *_, noise, poisson, quality = TABLE[preset, stage]
    drawn = stages(preset, stage)
    check_frequencies([each.noise for each in drawn], {"gaussian": 0.5, "poisson": 0.5})
    check_frequencies([each.grey for each in drawn], {True: 0.4, False: 0.6})
    check_uniform([each.level for each in drawn if each.noise == "gaussian"], noise)
    check_uniform([each.level for each in drawn if each.noise == "poisson"], poisson)
    check_uniform([each.quality for each in drawn], quality)


@both
def test_end(preset):
    drawn = recipes(preset)
    check_frequencies([recipe.final_blur is not None for recipe in drawn], {True: 0.8, False: 0.2})
    check_frequencies([recipe.resize_first for recipe in drawn], {True: 0.5, False: 0.5})
    check_frequencies([recipe.final_method for recipe in drawn], dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3))
    sincs = [recipe.final_blur for recipe in drawn if recipe.final_blur]
    assert {blur.shape for blur in sincs} == {"sinc"}
    check_frequencies([blur.size for blur in sincs], dict.fromkeys(range(7, 22, 2), 1 / 8))
    check_uniform([blur.cutoff for blur in sincs], (math.pi / 3, math.pi))


@pytest.mark.parametrize("resize_first", [True, False])
def test_order(monkeypatch, resize_first):
    recipe = next(
        recipe
        for recipe in recipes("standard")
        if recipe.resize_first == resize_first and recipe.second.blur and recipe.final_blur and recipe.first.noise != recipe.second.noise
    )
    done = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(picture, *rest):
            done.append((name, *rest))
            return original(picture, *rest)

        monkeypatch.setattr(module, name, watched)

    watch(real_esrgan, "convolve")
    watch(real_esrgan.resizing, "resize")
    watch(real_esrgan.jpeg, "compress")
    watch(real_esrgan.noise, "gaussian_noise")
    watch(real_esrgan.noise, "poisson_noise")
    real_esrgan.follow(recipe, torch.rand(1, 64, 48, 3), 4, torch.Generator().manual_seed(0))
    noises = [f"{stage.noise}_noise" for stage in (recipe.first, recipe.second)]
    end = ["resize", "convolve", "compress"] if resize_first else ["compress", "resize", "convolve"]
    assert [step[0] for step in done] == ["convolve", "resize", noises[0], "compress", "convolve", "resize", noises[1], *end]
    sizes = [step[1] for step in done if step[0] == "resize"]
    assert sizes[0] == (max(1, int(64 * recipe.first.factor)), max(1, int(48 * recipe.first.factor)))
    assert sizes[1] == (max(1, int(16 * recipe.second.factor)), max(1, int(12 * recipe.second.factor)))
    assert sizes[2] == (16, 12)
    qualities = [step[1] for step in done if step[0] == "compress"]
    assert qualities == [recipe.first.quality, recipe.second.quality]


@both
@pytest.mark.parametrize(("size", "scale", "expected"), [((64, 48), 4, (16, 12)), ((7, 513), 4, (1, 128)), ((1, 1), 4, (1, 1)), ((9, 9), 3, (3, 3))])
def test_result_is_8_bit_and_of_the_size(preset, size, scale, expected):
    image = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(0))
    kept = image.clone()
    for seed in range(3):
        out, words = real_esrgan.degrade(image, preset, scale, seed)
        assert out.shape == (2, *expected, 3) and out.min() >= 0 and out.max() <= 1
        torch.testing.assert_close(out * 255, (out * 255).round(), atol=1e-4, rtol=0)
        assert words == ("blurry", "noisy", "compressed", "low resolution")
    assert torch.equal(image, kept)


@both
def test_seeds(preset):
    image = torch.rand(3, 40, 30, 3, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    together = real_esrgan.degrade(image, preset, 2, 5)[0]
    for index in range(3):
        assert torch.equal(together[index:index + 1], real_esrgan.degrade(image[index:index + 1], preset, 2, 5 + index)[0])
    assert not torch.equal(together, real_esrgan.degrade(image, preset, 2, 6)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_standard_is_worse_than_mild():
    line = torch.linspace(0, 6.28, 64)
    image = (0.5 + 0.4 * torch.sin(3 * line)[:, None] * torch.cos(2 * line))[None, ..., None].expand(8, -1, -1, 3)
    errors = {preset: (real_esrgan.degrade(image, preset, 1)[0] - image).square().mean() for preset in real_esrgan.PRESETS}
    assert errors["standard"] > 1.5 * errors["mild"] > 0


def test_scale_1_is_not_called_low_resolution():
    assert real_esrgan.degrade(torch.rand(1, 16, 16, 3), "mild", 1)[1] == ("blurry", "noisy", "compressed")


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'severe'; choose one of standard, mild"):
        real_esrgan.degrade(torch.rand(1, 8, 8, 3), "severe")
