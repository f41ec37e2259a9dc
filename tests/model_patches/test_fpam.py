"""F-PAM has the published layout, and its aligned start is the degradation it was given."""

import pytest
import torch
import torch.nn.functional as F

from mend.model_patches.fpam import FPAM, KNOTS, PatchDiscriminator, upsample_grid
from mend.model_patches.host import run_operations

IDENTITY = torch.linspace(0, 1, 257)
LUMA = torch.tensor([0.2126, 0.7152, 0.0722])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(*size, seed=0):
    return torch.rand(1, 3, *size, generator=seeded(seed))


def psi(grid=1):
    return FPAM(run_operations, grid).requires_grad_(False)


def aligned(curve=IDENTITY, mix=None, airlight=None, transmission=None, grid=1):
    module = psi(grid)
    mix = torch.eye(3) if mix is None else mix
    airlight = torch.zeros(3) if airlight is None else airlight
    transmission = torch.ones(1, 1, grid, grid) if transmission is None else transmission
    module.start_aligned(curve, mix, airlight, transmission, seeded())
    return module


def random(grid=1, seed=0):
    module = psi(grid)
    module.start_random(seeded(seed))
    return module


def along(curve, x):
    """The curve's values, read between its points by straight lines."""
    position = x.clamp(0, 1) * (len(curve) - 1)
    below = position.long().clamp(max=len(curve) - 2)
    return torch.lerp(curve[below], curve[below + 1], position - below)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones():
    assert parameters(psi()) == 373_577
    assert parameters(PatchDiscriminator(run_operations)) == 371_073


def test_forward_is_h2_of_h1_plus_p_times_h1():
    module, x = random(), picture(9, 11)
    module.p.copy_(torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1))
    h1 = F.conv2d(F.leaky_relu(F.conv2d(x, module.h1_in.weight, module.h1_in.bias, padding=1), 0.01), module.h1_out.weight, module.h1_out.bias)
    h2 = h1
    for layer in module.h2:
        h2 = F.leaky_relu(F.conv2d(h2, layer.weight, layer.bias, padding=1), 0.01)
    h2 = F.conv2d(h2, module.h2_out.weight, module.h2_out.bias)
    torch.testing.assert_close(module(x), h2 + module.p * h1)


@pytest.mark.parametrize("size", [(2, 1), (3, 50), (32, 32), (33, 31)])
def test_a_coarse_h2_changes_the_offset_alone(size):
    fine, x = random(), picture(*size)
    coarse = FPAM(run_operations, 1, coarse=4).requires_grad_(False)
    coarse.load_state_dict(fine.state_dict())
    assert coarse(x).shape == x.shape and not torch.equal(coarse(x), fine(x))
    for module in (fine, coarse):
        module.h2_out.weight.zero_()
    torch.testing.assert_close(coarse(x), fine(x))


def test_a_coarse_h2_sees_means_and_varies_smoothly():
    coarse = FPAM(run_operations, 1, coarse=4).requires_grad_(False)
    coarse.load_state_dict(random().state_dict())
    for layer in (coarse.h1_in, *coarse.h2):
        # Without their neighbours all layers see single cells.
        layer.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    coarse.p.zero_()
    flat = torch.full((1, 3, 16, 16), 0.5)
    here = coarse(flat)
    assert here.std((-2, -1)).max() < 1e-5
    there = coarse(flat + torch.eye(4).repeat(4, 4) * 0.1)
    # Every cell of this pattern has the same mean.
    assert there.std((-2, -1)).max() < 1e-5


def test_random_start_is_kaiming_and_the_generators_alone():
    torch.manual_seed(1)
    one = random(seed=4)
    torch.manual_seed(2)
    other = random(seed=4)
    for a, b in zip(one.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
    assert not torch.equal(one.h1_in.weight, random(seed=5).h1_in.weight)
    assert torch.equal(one.p, torch.ones(1, 3, 1, 1)) and not one.h2_out.bias.any()
    deep = one.h2[2].weight
    # 295 k values: their deviation is known to a few tenths of a per cent.
    assert deep.std().item() == pytest.approx((2 / (1 + 0.01**2) / deep[0].numel()) ** 0.5, rel=0.01)


def test_aligned_start_is_the_generators_alone():
    a, b = aligned(), aligned()
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def test_identity_start_changes_nothing():
    x = picture(16, 24)
    # The tone curve is a least squares fit with a ridge of 1e-8, evaluated in float32.
    torch.testing.assert_close(aligned()(x), x, atol=1e-4, rtol=0)


def test_identity_start_leaves_any_airlight_out_where_the_air_is_clear():
    x = picture(16, 24)
    torch.testing.assert_close(aligned(airlight=torch.tensor([0.9, 0.8, 0.7]))(x), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_aligned_start_is_curve_mix_haze(seed):
    x = picture(20, 20, seed=seed + 10)
    # With a point at every knot there is one exact fit; what is left is the ridge and float32 through slopes as steep as 20.
    curve = torch.rand(KNOTS + 1, generator=seeded(seed)).sort().values
    mix = torch.eye(3) * 0.5 + 0.5 * LUMA.expand(3, 3)
    airlight = torch.rand(3, generator=seeded(seed + 1))
    transmission = 0.2 + 0.8 * torch.rand(1, 1, 6, 6, generator=seeded(seed + 2))
    mixed = torch.einsum("oc,bchw->bohw", mix, along(curve, x))
    t, light = upsample_grid(transmission, 20, 20), airlight.view(1, 3, 1, 1)
    expected = light + t * (mixed - light)
    torch.testing.assert_close(aligned(curve, mix, airlight, transmission, 6)(x), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("power", "tolerance"), [(2.2, 1e-3), (4.0, 3e-3), (1.0, 1e-4), (0.5, 3e-2)])
def test_smooth_tone_curves_fit_their_knots(power, tolerance):
    # Straight pieces 1/21 wide miss a curve by at most its second derivative / (8 * 21^2); a root's first piece by a quarter of its height, 0.5 * 21^-0.5 / 4.
    ramp = torch.linspace(0, 1, 300).view(1, 1, 1, -1).expand(1, 3, 4, -1)
    torch.testing.assert_close(aligned(0.1 + 0.5 * IDENTITY.pow(power))(ramp), 0.1 + 0.5 * ramp.pow(power), atol=tolerance, rtol=0)


def test_luma_mix_makes_grey():
    out = aligned(mix=LUMA.expand(3, 3))(picture(8, 8))
    torch.testing.assert_close(out, (picture(8, 8) * LUMA.view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(out), atol=1e-4, rtol=0)


def test_windows_agree_with_the_whole_picture():
    module, x = random(5), picture(40, 56)
    module.p.copy_(torch.rand(module.p.shape, generator=seeded(3)))
    whole = module(x)
    top, left, height, width = 8, 16, 24, 32
    part = module(x[..., top:top + height, left:left + width], (top, left, 40, 56))
    # Four 3x3 convolutions in a row see four pixels beyond the window, which the window pads with zeros.
    inner = (slice(4, -4), slice(4, -4))
    torch.testing.assert_close(part[(..., *inner)], whole[..., top:top + height, left:left + width][(..., *inner)], atol=1e-5, rtol=1e-5)


def test_windows_of_an_aligned_start_agree_to_the_edge():
    module, x = aligned(airlight=torch.full((3,), 0.8), transmission=0.3 + 0.6 * torch.rand(1, 1, 5, 5, generator=seeded()), grid=5), picture(40, 56)
    part = module(x[..., 10:30, 5:50], (10, 5, 40, 56))
    torch.testing.assert_close(part, module(x)[..., 10:30, 5:50], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (7, 513), (8, 9)])
def test_odd_sizes(size):
    for grid in (1, 4):
        assert random(grid)(picture(*size)).shape == (1, 3, *size)
    network = PatchDiscriminator(run_operations).requires_grad_(False)
    network.start_random(seeded())
    assert network(picture(*size)).shape == (1, 1, -(-size[0] // 8), -(-size[1] // 8))


def test_batches_are_independent():
    module = random(3)
    both = torch.cat([picture(9, 9, seed=1), picture(9, 9, seed=2)])
    # Convolutions may sum in another order for another batch size.
    torch.testing.assert_close(module(both)[1:], module(both[1:]), atol=1e-5, rtol=1e-5)
