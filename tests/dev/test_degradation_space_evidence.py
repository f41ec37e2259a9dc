"""What the measurement of diffusion in the degradation space says in words about its own rows."""

import pytest

from mend.dev.bench.degradation_findings import BLIND, COMPOSITE, DENOISER, IMAGE, LATENT, PIXEL, TASKS, TOLD_NOTHING, asked, averages


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


def test_means_are_of_methods_that_have_every_task():
    means = {row["method"]: row for row in averages([*WHOLE, rows("half", 30.0)[0]])}
    assert means[LATENT]["psnr"] == pytest.approx(20.0) and means[LATENT]["gain"] == pytest.approx(5.0)
    assert "half" not in means and f"{LATENT}, told of {COMPOSITE}" not in means
