"""What the measurement of diffusion in the degradation space says in words about its own rows."""

from types import SimpleNamespace

import pytest

from mend.dev.bench import degradation_space
from mend.dev.bench.degradation_findings import (
    BLIND,
    COMPOSITE,
    DENOISER,
    IMAGE,
    LATENT,
    MAIN,
    METHODS_OF,
    PIXEL,
    TASKS,
    TOLD_NOTHING,
    asked,
    averages,
    evidence,
)


def rows(method, psnr, **more):
    """A method's rows for every task, all alike."""
    return [{"method": method, "degradation": name, "psnr": psnr, "ssim": 0.5, "haarpsi": 0.5, "seeds": 3, **more} for name in TASKS]


def composite(label, psnr):
    return {"method": f"{LATENT}, told of {label}", "degradation": COMPOSITE, "psnr": psnr, "to_encoded_input": 9.0}


# One of seven in the pixel form: 1.5 - 1 / 7.
BETTER = {name: "pixel" if name == "haze" else "latent" for name in TASKS}
DAMAGED = [*rows("degraded", 15.0), {"method": "degraded", "degradation": COMPOSITE, "psnr": 12.0}]
WHOLE = [
    *DAMAGED, *rows(LATENT, 20.0), *rows(IMAGE, 18.5), *rows(PIXEL, 19.0),
    *rows(f"{LATENT}, {TOLD_NOTHING}", 16.0, to_input=21.0, to_encoded_input=31.0),
    *rows(f"{PIXEL}, {TOLD_NOTHING}", 15.0, to_input=33.0, to_encoded_input=22.0),
    *rows(f"{LATENT}, told of haze", 14.0, to_input=17.0, to_encoded_input=19.0),
    *rows(f"{LATENT}, {BLIND}", 19.4), composite(COMPOSITE, 18.0), composite("haze", 17.0), composite("noise 25", 13.0),
]  # fmt: skip


@pytest.mark.parametrize("said", [
    "3 dB expected: noise 50 +5.0, haze +5.0, low light +5.0.",
    "Latent form over image space, 1.5 dB expected in the mean: +1.50 (",
    "the form whose ceiling is higher, over image space, 1.5 dB expected in the mean: +1.36 (",
    f"told of nothing, to_encoded_input, 30 dB expected: {TASKS[0]} 31.0",
    f"told of nothing, to_input, 30 dB expected: {TASKS[0]} 33.0",
    f"told of the wrong damage, to_encoded_input, 30 dB expected: {TASKS[0]} 19.0",
    f"at most 1 dB less expected: {TASKS[0]} -0.6",
    f"at 12.0 dB: 18.0 told of {COMPOSITE}, 17.0 told of haze, 13.0 told of noise 25.",
])  # fmt: skip
def test_every_expectation_stands_beside_what_was_found(said):
    assert said in "\n".join(asked(WHOLE, BETTER))


def test_nothing_is_said_of_what_was_not_measured():
    assert asked(DAMAGED, BETTER) == [] == asked([*DAMAGED, *rows(LATENT, 20.0)[:3]], BETTER)
    alone = "\n".join(asked([*DAMAGED, *rows(LATENT, 20.0)], BETTER))
    assert "image space" not in alone and "lind" not in alone and COMPOSITE not in alone


def test_a_prior_that_samples_pixels_has_the_method_in_another_form():
    told = [{"method": f"{DENOISER}, told of {COMPOSITE}", "degradation": COMPOSITE, "psnr": 19.0}]
    nothing = rows(f"{DENOISER}, {TOLD_NOTHING}", 15.0, to_input=40.0, to_encoded_input=40.0)
    said = "\n".join(asked([*DAMAGED, *rows(DENOISER, 22.0), *told, *nothing, *rows(f"{DENOISER}, {BLIND}", 21.0)], BETTER))
    assert "3 dB expected: noise 50 +7.0" in said and f"to_input, 30 dB expected: {TASKS[0]} 40.0" in said
    assert f"less expected: {TASKS[0]} -1.0" in said and f"19.0 told of {COMPOSITE}" in said and "image space" not in said


def test_every_method_can_be_asked_for():
    assert set(degradation_space.NAMES.values()) == set(degradation_space.METHODS) == {method for methods in METHODS_OF.values() for method in methods}
    assert set(degradation_space.PUBLISHED.values()) <= set(degradation_space.METHODS)
    assert METHODS_OF.keys() == degradation_space.BATCHES.keys() and all(len(set(methods) & set(MAIN)) == 1 for methods in METHODS_OF.values())


def test_a_section_says_what_was_not_measured():
    settings = {"batch": 4, "crop": 128, "rate": 1e-3, "change": "with all weights", "sampling": 10}
    text = evidence([{**row, "n": 4, "prior": "dit"} for row in (*DAMAGED, *rows(LATENT, 20.0))], "dit", SimpleNamespace(steps=7), BETTER, settings)
    assert "7 steps of 4 crops" in text and f"Not measured yet: {PIXEL}; {IMAGE};" in text and LATENT not in text.split("Not measured yet:")[1].split("\n")[0]


def test_weights_are_published_for_priors_that_they_are_for(tmp_path, monkeypatch):
    trained, stored = [], []
    monkeypatch.setattr(degradation_space, "store", lambda weights, file: stored.append(file.name))
    monkeypatch.setattr(degradation_space, "weights_of", lambda trainee: SimpleNamespace(tensors={degradation_space.DEVIATION: 1.0}))
    for prior in METHODS_OF:
        lab = SimpleNamespace(prior=prior, trained=lambda run: trained.append((run.prior, run.method)))
        degradation_space.publish(lab, 5, ["latent", "denoiser"])
    assert trained == [("unet", LATENT), ("dit", LATENT), ("pixel", DENOISER)]
    assert stored == ["degradation_latent_unet.safetensors", "degradation_latent_dit.safetensors", "degradation_denoiser_pixel.safetensors"]


def test_means_are_of_methods_that_have_every_task():
    means = {row["method"]: row for row in averages([*WHOLE, rows("half", 30.0)[0]])}
    assert means[LATENT]["psnr"] == pytest.approx(20.0) and means[LATENT]["gain"] == pytest.approx(5.0)
    assert "half" not in means and f"{LATENT}, told of {COMPOSITE}" not in means
