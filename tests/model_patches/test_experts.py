"""Experts and their router: who is chosen, by what chance, and how far each one sees."""

import pytest
import torch
from torch import nn

from mend.model_patches.daem import DAEM, SIZES, DetailExperts, initialise
from mend.model_patches.experts import KERNELS, NAFBlock, Routed, Router, _load, balance, laplacian, normalised
from mend.model_patches.first_weights import fill
from mend.model_patches.vae_sites import VaeSite
from mend.model_patches.window_grid import Windows

SITE = VaeSite("at_2", 32, 16, 2)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(module, seed=1, spread=0.3):
    """Give every parameter a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
    return module


def router():
    return opened(Router(16, len(KERNELS), nn))


def test_large_numbers_in_half_precision():
    # Decoders of VAEs hold such numbers; their squares are beyond 65504.
    x = (3000 * noise(1, 8, 4, 4)).half()
    torch.testing.assert_close(normalised(x).float(), normalised(x.float()), atol=2e-3, rtol=0)


def test_one_expert_works_in_each_window():
    windows = Windows(4, (8, 12))
    routed = router()(noise(3, 16, 8, 12), windows)
    assert routed.weights.shape == (3, 4, 2, 3) and routed.load is None
    assert ((routed.weights > 0).sum(1) == 1).all() and (routed.chosen.sum(1) == 1).all()
    torch.testing.assert_close(routed.weights.sum(1), routed.probabilities.amax(1))
    assert torch.equal(routed.weights > 0, routed.chosen > 0)


def test_routing_is_as_random_as_its_noise():
    windows, x = Windows(4, (32, 32)), noise(1, 16, 32, 32)
    # Routers of their own: what is routed with noise is learned from.
    drawn = [router()(x, windows, noise(1, 4, 8, 8, seed=seed)).chosen for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    chooses = router()
    plain = [chooses(x, windows).chosen for _ in range(2)]
    assert torch.equal(*plain)


def test_load_is_the_chance_of_being_chosen():
    logits, deviation = torch.tensor([0.3, 0.1, -0.2, 0.0]).reshape(1, 4, 1, 1), 0.25
    xi = noise(1, 4, 1, 1, seed=4) * deviation
    found = _load(logits, logits + xi, deviation)
    draws = noise(200_000, seed=5) * deviation
    for index in range(4):
        others = torch.cat([(logits + xi)[:, :index], (logits + xi)[:, index + 1:]], 1).max()
        chance = ((logits[0, index, 0, 0] + draws) > others).float().mean()
        assert float(found[0, index]) == pytest.approx(float(chance), abs=0.005)  # 200000 draws: 0.0011


def test_balance_is_zero_for_equal_work_and_high_for_one_worker():
    def routed(shares):
        return Routed(shares, shares, shares, shares)

    even = torch.full((2, 4, 3, 3), 0.25)
    alone = torch.zeros(2, 4, 3, 3)
    alone[:, 1] = 1
    assert float(balance(routed(even))) == pytest.approx(0, abs=1e-6)
    # One of four: mean 1/4, variance 3/16, CV^2 3; half of it twice.
    assert float(balance(routed(alone))) == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_experts_share_the_work_without_noise_though_windows_have_most_in_common(seed):
    windows, chooses = Windows(4, (32, 32)), Router(16, len(KERNELS), nn)
    fill(chooses, torch.Generator().manual_seed(seed))
    # So much that one or two experts do everything without standardising.
    common = 30 * noise(1, 16, 1, 1, seed=9)
    optimizer = torch.optim.Adam(chooses.parameters(), 1e-3)
    for step in range(100):
        optimizer.zero_grad()
        balance(chooses(noise(2, 16, 32, 32, seed=100 + step) + common, windows, noise(2, 4, 8, 8, seed=step))).backward()
        optimizer.step()
    with torch.no_grad():
        shares = chooses(noise(8, 16, 32, 32) + common, windows).chosen.mean((0, 2, 3))
    assert shares.min() > 0.1 and shares.max() < 0.5, shares


def test_only_training_moves_what_a_router_takes_for_usual():
    chooses, windows = router(), Windows(4, (8, 8))
    mean, deviation = chooses.mean.clone(), chooses.deviation.clone()
    chooses(noise(1, 16, 8, 8), windows)
    assert torch.equal(chooses.mean, mean) and torch.equal(chooses.deviation, deviation)
    chooses(noise(1, 16, 8, 8), windows, noise(1, 4, 2, 2))
    assert not torch.equal(chooses.mean, mean) and not torch.equal(chooses.deviation, deviation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "a square that overflows"])
def test_what_is_not_finite_is_not_followed(value):
    chooses, x, windows = router(), noise(2, 16, 8, 8), Windows(4, (8, 8))
    broken = x.clone()
    broken[1, 3, 5, 5] = value
    mean, deviation = chooses.mean.clone(), chooses.deviation.clone()
    chooses(broken, windows, noise(2, 4, 2, 2))
    assert torch.equal(chooses.mean, mean) and torch.equal(chooses.deviation, deviation)
    chooses(x, windows, noise(2, 4, 2, 2))
    assert not torch.equal(chooses.mean, mean) and chooses.deviation.isfinite().all()


def test_high_frequencies():
    x = noise(1, 2, 6, 6)
    kernel = -torch.ones(2, 1, 3, 3)
    kernel[..., 1, 1] = 8
    expected = nn.functional.conv2d(x, kernel, groups=2)
    torch.testing.assert_close(laplacian(x)[..., 1:-1, 1:-1], expected, atol=1e-5, rtol=1e-5)
    assert laplacian(torch.full((1, 2, 4, 4), 7.0)).abs().max() < 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_sees_as_far_as_its_kernel(kernel):
    block = opened(NAFBlock(4, kernel, nn))
    with torch.no_grad():
        block.attend.weight.zero_()  # a mean sees everything
    x = noise(1, 4, 21, 21).requires_grad_(True)
    block(x, Windows(0, (21, 21)))[..., 10, 10].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amin(0) == 10 - kernel // 2).all() and (seen.amax(0) == 10 + kernel // 2).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_fresh_module_changes_nothing(size):
    network = DetailExperts((SITE,), size, 16, nn)
    initialise(network, torch.Generator().manual_seed(0))
    x = noise(2, 32, 12, 20)
    out, routed = network.sites["at_2"](x, noise(2, 16, 12, 20, seed=1))
    assert torch.equal(out, x) and routed.chosen.shape == (2, 4, 2, 3)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_learns(size):
    daem = opened(DAEM(SITE, SIZES[size], 8, nn), spread=0.2)
    x, skip = noise(4, 32, 16, 16), noise(4, 16, 16, 16, seed=1)
    # Noise that has every expert chosen somewhere.
    xi = 100 * nn.functional.one_hot(torch.arange(64).reshape(4, 4, 4) % 4, 4).movedim(-1, 1).float()
    out, routed = daem(x, skip, noise=xi)
    assert set(routed.chosen.argmax(1).flatten().tolist()) == {0, 1, 2, 3}
    ((out - x).square().mean() + balance(routed)).backward()
    silent = [name for name, p in daem.named_parameters() if p.grad is None or not p.grad.any()]
    # What is normalised over channels afterwards does not feel an offset of all of them, nor a softmax one of all experts; others have a slope.
    assert not silent


def test_what_is_added_is_in_proportion_to_what_it_lies_on():
    daem = opened(DAEM(SITE, SIZES["full"], 8, nn), spread=0.1)
    x, skip = noise(1, 32, 8, 8), noise(1, 16, 8, 8, seed=1)
    with torch.no_grad():
        added, louder = daem(x, skip)[0] - x, daem(10 * x, skip)[0] - 10 * x
    # EPSILON under the roots is what keeps these from being equal.
    torch.testing.assert_close(louder, 10 * added, atol=1e-4, rtol=1e-3)


def test_places_without_anything_have_slopes():
    daem = opened(DAEM(SITE, SIZES["full"], 8, nn), spread=0.1)
    x = torch.zeros(1, 32, 8, 8, requires_grad=True)
    out, _ = daem(x, noise(1, 16, 8, 8))
    out.square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_strength_scales_what_is_added():
    daem = opened(DAEM(SITE, SIZES["full"], 8, nn), spread=0.1)
    x, skip = noise(1, 32, 8, 8), noise(1, 16, 8, 8, seed=1)
    with torch.no_grad():
        whole, half, none = (daem(x, skip, strength)[0] - x for strength in (1.0, 0.5, 0.0))
    torch.testing.assert_close(2 * half, whole, atol=1e-5, rtol=1e-4)
    assert whole.abs().max() > 1e-2 and not none.any()
