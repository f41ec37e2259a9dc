"""F-PAM learns on crops, its discriminators take one step a call, and the distance counts what it should."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mend.model_patches.host_gradients import plain_weights
from mend.model_patches.host_vae import LatentEncoder
from mend.model_patches.perceptual import Perceptual
from mend.samplers.alignment import Alignment, AlignmentRun, cut
from mend.samplers.first_guess import known_degradation
from mend.samplers.quality import Quality
from mend.tests.samplers.tiny_guidance import STILL, model, posterior_run, vae_of

SIDE = 32
WINDOW = (0, 0, SIDE, SIDE)
DARK = Quality(exposure=0.01)
WEIGHTS = dict(content=0.0, content_features=0.0, style=0.0, distance_features=0.0, residual=0.0)


def picture(height=SIDE, width=SIDE, seed=0, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run_of(y=None, seed=0, quality=None, grey=False, **changes):
    """An AlignmentRun with nothing but the named weights, on the tiny VAE's features."""
    given = vae_of("sd15")
    plain_weights(given.first_stage_model)
    alignment = Alignment(**{**WEIGHTS, **changes})
    y = picture() if y is None else y
    known = known_degradation(y, quality, alignment.grid, grey)
    perceptual = Perceptual(LatentEncoder(given, model("sd15").model), None)
    return AlignmentRun(alignment, y, known, perceptual, torch.Generator().manual_seed(seed))


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_taken(optimizer):
    return {int(state["step"]) for state in optimizer.state.values()}


# Learning


def loss_of(run, psi, x, late=True):
    """F-PAM's loss against the discriminator as it is now."""
    a = run.alignment
    with torch.no_grad():
        fake, content = psi(x, WINDOW), run._content(x, WINDOW)
        features = a.content_features * run.perceptual(fake, content)
        logits = run.d1(fake)
        style = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        return float(a.content * F.mse_loss(fake, content) + (features * 0.2 if late and features > 10 else features) + a.style * style)


@pytest.mark.parametrize("start", ["aligned", "random"])
@pytest.mark.parametrize("changes", [dict(style=0.5), dict(content=0.2, content_features=0.3, style=0.5)], ids=["style", "all"])
def test_an_update_lowers_its_loss(start, changes):
    run, x = run_of(start=start, quality=DARK, y=0.2 * picture(seed=5), **changes), picture(seed=1)
    before = copy.deepcopy(run.psi)
    run.update(x, WINDOW, True)
    assert loss_of(run, run.psi, x) < loss_of(run, before, x)


def test_a_random_start_learns_to_keep_the_picture_itself():
    run, x = run_of(start="random", content=1.0, rate=5e-3), picture(seed=1)
    before = F.mse_loss(run.psi(x), x).item()
    for _ in range(20):
        run.update(x, WINDOW, True)
    assert F.mse_loss(run.psi(x), x).item() < 0.2 * before


@pytest.mark.parametrize("grey", [False, True])
def test_an_aligned_start_keeps_the_content_through_the_known_degradation(grey):
    run = run_of(y=0.2 * picture(seed=5), quality=DARK, grey=grey, content=1.0, content_features=0.3)
    x, before = picture(seed=1), weights(run.psi)
    assert F.mse_loss(run.psi(x), x) > 0.01
    for _ in range(3):
        run.update(x, WINDOW, True)
    # It is there already: no gradient at all.
    assert same(weights(run.psi), before)
    with torch.no_grad():
        run.psi.h2_out.bias.add_(0.1)
    start = F.mse_loss(run.psi(x), run.known(x)).item()
    for _ in range(10):
        run.update(x, WINDOW, True)
    assert F.mse_loss(run.psi(x), run.known(x)).item() < start
    assert same(weights(run.known), before)


def gradient(run, x, late):
    run.update(x, WINDOW, late)
    return torch.cat([p.grad.flatten() for p in run.psi.parameters()])


@pytest.mark.parametrize(("weight", "late", "share"), [(1e9, True, 0.2), (1e9, False, 1.0), (1e-3, True, 1.0)])
def test_an_outsized_feature_term_is_damped_late(weight, late, share):
    x = picture(seed=1)
    plain = run_of(start="random", content_features=weight)
    size = weight * float(plain.perceptual(plain.psi(x), x).detach())
    assert (size > 10) == (weight > 1)
    damped = gradient(plain, x, late)
    torch.testing.assert_close(damped, share * gradient(run_of(start="random", content_features=weight), x, False), rtol=1e-4, atol=1e-6 * float(damped.abs().max()))


@pytest.mark.parametrize(("start", "decay"), [("random", 1e-5), ("aligned", 0.0)])
def test_only_a_random_start_decays_its_weights(start, decay):
    run = run_of(start=start, rate=0.1, style_rate=0.2, residual_rate=0.3)
    groups = [optimizer.param_groups[0] for optimizer in (run.psi_optimizer, run.d1_optimizer, run.d2_optimizer)]
    assert [group["weight_decay"] for group in groups] == [decay, 0, 0]
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("start", ["aligned", "random"])
def test_the_seed_decides_everything(start):
    def trained(seed):
        run = run_of(seed=seed, start=start, content=0.2, style=0.5, residual=1e-4)
        for index in range(3):
            run.update(picture(16, 16, seed=index), (8, 8, SIDE, SIDE), True)
            run.distance(picture(seed=index), WINDOW, None, None)
        return {f"{name}.{key}": value for name in ("psi", "d1", "d2") for key, value in weights(getattr(run, name)).items()}

    torch.manual_seed(1)
    one = trained(4)
    torch.manual_seed(2)
    assert same(one, trained(4)) and not same(one, trained(5))


# Discriminators


def discriminator_gradient(network, fake, real):
    """Of BCE alone, on a copy."""
    network = copy.deepcopy(network)
    fakes, reals = network(fake.detach()), network(real.detach())
    loss = F.binary_cross_entropy_with_logits(fakes, torch.zeros_like(fakes)) + F.binary_cross_entropy_with_logits(reals, torch.ones_like(reals))
    return torch.autograd.grad(loss, list(network.parameters()))


def test_d1_takes_one_step_of_its_own_an_update():
    run, x = run_of(style=0.5), picture(seed=1)
    expected = discriminator_gradient(run.d1, run.psi(x), run.y)
    still = weights(run.d2)
    for count in (1, 2, 3):
        run.update(x, WINDOW, True)
        assert steps_taken(run.d1_optimizer) == steps_taken(run.psi_optimizer) == {count} == {run.updates}
        if count == 1:
            # F-PAM's adversarial term goes through D1 and leaves no gradient on it.
            assert all(torch.equal(p.grad, g) for p, g in zip(run.d1.parameters(), expected))
    assert all(p.requires_grad for p in run.d1.parameters())
    assert same(weights(run.d2), still) and not run.d2_optimizer.state


@pytest.mark.parametrize("with_companion", [False, True])
def test_d2_takes_one_step_of_its_own_a_distance(with_companion):
    run, x = run_of(y=0.3 * picture(seed=5), quality=DARK, residual=1.0), picture(seed=1)
    companion = picture(seed=2) if with_companion else None
    real = x - run.psi(x)
    if with_companion:
        real = torch.cat([real, companion - run.psi(companion)])
    expected = discriminator_gradient(run.d2, x - run.y, real)
    still = weights(run.psi), weights(run.d1)
    leaf = x.clone().requires_grad_(True)
    for count in (1, 2):
        loss, _ = run.distance(leaf, WINDOW, companion, None)
        assert torch.autograd.grad(loss, leaf)[0].any()
        assert steps_taken(run.d2_optimizer) == {count}
        if count == 1:
            assert all(torch.allclose(p.grad, g, atol=1e-7) for p, g in zip(run.d2.parameters(), expected))
    assert all(p.requires_grad for p in run.d2.parameters())
    assert same(weights(run.psi), still[0]) and same(weights(run.d1), still[1])
    assert all(p.grad is None for p in run.psi.parameters())


def test_without_weight_discriminators_rest():
    run = run_of(content=1.0)
    before = weights(run.d1), weights(run.d2)
    run.update(picture(seed=1), WINDOW, True)
    run.distance(picture(seed=1), WINDOW, None, None)
    assert same(weights(run.d1), before[0]) and same(weights(run.d2), before[1])


# The distance


def test_the_distance_is_the_papers():
    run, x = run_of(y=0.3 * picture(seed=5), quality=DARK, distance_features=0.5), picture(seed=1)
    loss, seen = run.distance(x, WINDOW, None, None)
    expected = F.mse_loss(run.psi(x), run.y) + 0.5 * run.perceptual(run.psi(x), run.y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(seen, run.psi(x)) and torch.equal(seen, run.look(x, WINDOW, None))


def test_a_window_is_compared_with_its_part_of_the_picture():
    y = picture(40, 48, seed=5)
    run = run_of(y=y)
    window = (8, 16, 40, 48)
    part = y[..., 8:24, 16:40]
    assert torch.equal(cut(y, window, part), part)
    # psi begins as the identity, but for a curve fitted in float32 to 1e-4.
    assert run.distance(part, window, None, None)[0].item() < 1e-7
    assert run.distance(part, (0, 0, 40, 48), None, None)[0].item() > 0.01


def test_a_mask_hides_the_picture_and_the_prediction():
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., :SIDE // 2] = 1
    y, x = picture(seed=5), picture(seed=1)
    other = torch.where(mask > 0, y, 1 - y)
    run, changed = (run_of(y=one, distance_features=0.5) for one in (y, other))
    leaf = x.clone().requires_grad_(True)
    loss, seen = run.distance(leaf, WINDOW, None, mask)
    assert torch.equal(loss, changed.distance(x, WINDOW, None, mask)[0]) and not seen[..., SIDE // 2:].any()
    g = torch.autograd.grad(loss, leaf)[0]
    # The aligned start looks at one pixel at a time, so nothing leaks over the mask's edge.
    assert not g[..., SIDE // 2:].any() and g[..., :SIDE // 2].any()
    assert torch.equal(seen, run.look(leaf, WINDOW, mask))


def test_a_mask_is_cut_with_its_window():
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 8:, :] = 1
    run, x = run_of(), picture(16, 16, seed=1)
    assert not run.distance(x[..., :8, :], (0, 4, SIDE, SIDE), None, mask)[0].any()
    loss = run.distance(x, (16, 4, SIDE, SIDE), None, mask)[0]
    assert torch.equal(loss, run.distance(x, (16, 4, SIDE, SIDE), None, None)[0]) and loss > 0


def test_remembered_features_are_those_of_the_window():
    y, x = picture(SIDE, 2 * SIDE), picture(seed=1)
    run = run_of(y=y, distance_features=1.0)
    for left in (0, 0, SIDE, 0):
        window = (0, left, SIDE, 2 * SIDE)
        loss, seen = run.distance(x, window, None, None)
        target = cut(y, window, x)
        torch.testing.assert_close(loss, F.mse_loss(seen, target) + run.perceptual(seen, target))


# Crops


class Cells:
    """A decoder whose pixels are their cell's value."""

    cell = 8

    def prepare(self):
        pass

    def __call__(self, z):
        return z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.mark.parametrize("side", [1, 3, 6, 9])
@pytest.mark.parametrize("crop", [1, 20, 32, 2048])
def test_crops_stay_within_the_latent(side, crop):
    run = posterior_run(alignment=replace(STILL, crop=crop), side=side, decoder=Cells())
    z = torch.arange(float(side * side)).view(1, 1, side, side).expand(1, 4, side, side)
    cells = min(max(1, crop // 8), side)
    seen = set()
    for _ in range(200):
        x, (top, left, height, width) = run._decoded_crop(run.rows[0], z, None)
        assert x.shape == (1, 3, cells * 8, cells * 8) and (height, width) == (side * 8, side * 8)
        assert float(x[0, 0, 0, 0]) == top // 8 * side + left // 8
        seen |= {("top", top), ("left", left)}
    # Two hundred crops miss none of at most nine places, edges included.
    assert seen == {(way, place * 8) for way in ("top", "left") for place in range(side - cells + 1)}


def test_a_companion_is_cropped_alike():
    run = posterior_run(alignment=STILL, side=6)
    z = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    x, _ = run._decoded_crop(run.rows[0], z, None)
    assert x.shape == (2, 3, 32, 32) and not torch.equal(x[0], x[1])


@pytest.mark.parametrize(("size", "features"), [((1, 1), 0.0), ((8, 8), 0.0), ((9, 70), 0.3)])
@pytest.mark.parametrize("grid", [1, 4])
def test_pictures_of_any_size(size, features, grid):
    # The tiny encoder's group norms refuse a single cell, which wider ones do not.
    run = run_of(y=picture(*size), content=0.2, content_features=features, style=0.5, distance_features=features, residual=1e-4, grid=grid)
    x = picture(*size, seed=1)
    run.update(x, (0, 0, *size), True)
    loss, _ = run.distance(x, (0, 0, *size), None, None)
    assert torch.isfinite(loss) and all(torch.isfinite(p).all() for p in run.psi.parameters())


def test_the_look_of_the_picture_comes_from_all_over_it():
    y = torch.arange(40.0).view(1, 1, 1, 40).expand(1, 3, 24, 40)
    run, crop = run_of(y=y), picture(16, 16)
    starts = [float(run._elsewhere(crop)[0, 0, 0, 0]) for _ in range(200)]
    assert run._elsewhere(crop).shape == crop.shape and min(starts) == 0 and max(starts) == 24
