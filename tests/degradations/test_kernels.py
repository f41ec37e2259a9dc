"""Blur kernels sum to 1, have the shape of their formula, and turn the way they say."""

import math

import pytest
import torch
from kornia.filters import get_gaussian_kernel2d

from mend.degradations import kernels

EVERY = {
    "gaussian": kernels.bell(21, 2.0, 1.0, 30.0),
    "generalised": kernels.bell(21, 2.0, 1.0, 30.0, "generalised", 0.5),
    "plateau": kernels.bell(21, 2.0, 1.0, 30.0, "plateau", 2.0),
    "sinc": kernels.sinc(21, 2.0),
    "disc": kernels.disc(4.3),
    "line": kernels.line(9, 20.0),
}


@pytest.mark.parametrize("name", EVERY)
def test_sums_to_1_and_is_symmetric(name):
    kernel = EVERY[name]
    assert kernel.shape[0] == 1 and kernel.shape[1] == kernel.shape[2] and kernel.shape[1] % 2 == 1 and kernel.dtype == torch.float32
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(kernel, kernel.flip(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [(1.5, 1.5), (0.2, 0.2), (1.0, 3.0)])
def test_gaussian_is_that_of_kornia(sigma):
    torch.testing.assert_close(kernels.bell(21, sigma[1], sigma[0]), get_gaussian_kernel2d(21, (sigma[0], sigma[1])), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [kernels.bell(9, 3.0, 1.0, 45.0), kernels.line(9, 45.0)], ids=["bell", "line"])
def test_angles_turn_counter_clockwise(kernel):
    assert kernel[0, 2, 6] > 10 * kernel[0, 2, 2] and kernel[0, 6, 2] > 10 * kernel[0, 6, 6]


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_formulas_at_a_distance(beta):
    # At 3 pixels with a deviation of 2, q is 2.25 and the centre is 1.
    for shape, value in (("generalised", math.exp(-(2.25**beta) / 2)), ("plateau", 1 / (1 + 2.25**beta))):
        kernel = kernels.bell(21, 2.0, shape=shape, beta=beta)[0]
        assert (kernel[10, 13] / kernel[10, 10]).item() == pytest.approx(value, rel=1e-4)
    torch.testing.assert_close(kernels.bell(21, 2.0, shape="generalised", beta=1.0), kernels.bell(21, 2.0))


def test_sinc_passes_what_is_below_its_cutoff():
    kernel = kernels.sinc(21, math.pi / 2)[0]
    response = torch.fft.fft2(kernel, s=(256, 256))[0, :129].abs()
    # The window of 21 pixels lets the response waver by about a tenth around the ideal step at bin 64.
    assert (response[:44] - 1).abs().max() < 0.2 and response[84:].max() < 0.2


def test_disc_is_even_inside():
    kernel = kernels.disc(4.0)[0]
    middle = kernel.shape[0] // 2
    assert kernel[middle, middle + 3] == kernel[middle, middle] and kernel[middle, middle + 4] == kernel[middle, middle] / 2


@pytest.mark.parametrize(("length", "expected"), [(0, 1), (1, 1), (1.9, 1), (2, 3), (2.9, 3), (4, 5), (6, 7), (25, 25)])
def test_odd(length, expected):
    assert kernels.odd(length) == expected


def test_impossible_kernels_are_refused():
    with pytest.raises(ValueError, match="cannot have 8 pixels a side"):
        kernels.bell(8, 1.0)
    with pytest.raises(ValueError, match="deviations 0 and 0; both must be above 0"):
        kernels.bell(7, 0.0)
    with pytest.raises(ValueError, match="unknown kernel shape 'box'"):
        kernels.bell(7, 1.0, shape="box")
