"""The solver of posterior guidance against closed forms, on tiles, under reuse, without memory and when it is cancelled."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import comfy.model_management
from mend.model_patches.host import OUT_OF_MEMORY, model_time
from mend.model_patches.host_vae import PixelDecoder
from mend.samplers.posterior_guidance import MISFIT, Posterior, row_seed
from mend.samplers.quality import Quality, quality_loss
from mend.tests.samplers.tiny_guidance import ALIGNMENT, CELL, QUALITY, SIDE, STILL, model, pictures, posterior_run, vae_of

PIXELS = replace(STILL, distance_features=0.0)
SIGMAS = {"sd15": (0.05, 0.7, 14.0), "sd3": (0.05, 0.6, 0.99)}
ANY_TIME = dict(guide_below=1.1)


def latent(kind="sd15", side=SIDE, seed=5, batch=1):
    return torch.randn(batch, model(kind).model.latent_format.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))


class Linear:
    """A decoder that is one matrix a cell: four channels to 2x2 pixels."""

    cell = 2

    def __init__(self, dtype=torch.float32):
        self.weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)).to(dtype)

    def prepare(self):
        pass

    def fits(self, z):
        return True

    def __call__(self, z):
        return F.conv_transpose2d(z.to(self.weight), self.weight, stride=2).float()


class Local(Linear):
    """A decoder that looks 3 cells around and is not linear."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.kernels = [torch.randn(4, 4, 3, 3, generator=generator) / 6 for _ in range(3)]

    def __call__(self, z):
        for kernel in self.kernels:
            z = torch.tanh(F.conv2d(z, kernel, padding=1))
        return super().__call__(z)


class Hazy(Local):
    """The same with no dark pixel."""

    def __call__(self, z):
        return super().__call__(z) + 3


class Cramped(Linear):
    """A decoder that has no memory for more than so many cells, from a call on."""

    def __init__(self, cells, first=0):
        super().__init__()
        self.cells, self.first, self.calls = cells, first, 0

    def __call__(self, z):
        self.calls += 1
        if self.calls > self.first and z.shape[-1] * z.shape[-2] > self.cells:
            raise OUT_OF_MEMORY[0]("no memory left")
        return super().__call__(z)


def solver(decoder=None, side=SIDE, y=None, psi=None, alignment=PIXELS, **settings):
    """A run on an oracle decoder and, unless another is given, the identity for psi."""
    decoder = decoder or Linear()
    y = torch.rand(1, 3, side * decoder.cell, side * decoder.cell, generator=torch.Generator().manual_seed(6)) if y is None else y
    run = posterior_run(alignment=alignment, decoder=decoder, y=y, side=side, batch=len(y), **{**ANY_TIME, **settings})
    for row in run.rows:
        row.alignment.psi = psi or (lambda x, window: x)
    return run


def objective(run, z, z0, sigma, quality=None):
    """What the module's docstring says is minimised."""
    row, variance = run.rows[0], run._variance(sigma)
    with torch.no_grad():
        x = run.decoder(z)
        loss = row.alignment.distance(x, (0, 0, *x.shape[-2:]), None, row.mask)[0]
        if quality is not None:
            loss = loss + quality_loss(x, quality, model_time(run.model_sampling, sigma))
    return float(run.settings.strength * x.numel() / (2 * row.noise**2) * loss + (z - z0).square().sum() / (2 * variance))


@pytest.mark.parametrize(("kind", "sigma"), [(kind, sigma) for kind, sigmas in SIGMAS.items() for sigma in sigmas])
@pytest.mark.parametrize("settings", [{"steps": 3}, {"steps": 1, "strength": 50.0}], ids=["three steps", "strong"])
def test_the_objective_falls_at_every_sigma(kind, sigma, settings):
    run = posterior_run(kind, quality=QUALITY, **{**ANY_TIME, **settings})
    z0 = latent(kind)
    assert objective(run, run.guide(z0, sigma), z0, sigma, QUALITY) < objective(run, z0, z0, sigma, QUALITY)


def ridge(run, z0, sigma):
    """The minimiser in closed form: every cell is a ridge regression of its own."""
    weight, variance = run.settings.strength / run.rows[0].noise**2, run._variance(sigma)
    matrix = run.decoder.weight.flatten(1).T.double()
    y = F.unfold(run.rows[0].y, 2, stride=2)[0].double()
    left = weight * matrix.T @ matrix + torch.eye(4, dtype=torch.float64) / variance
    return torch.linalg.solve(left, weight * matrix.T @ y + z0[0].flatten(1).double() / variance).float().reshape(z0.shape)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 5.0])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_steps_converge_to_the_ridge_solution(sigma, strength):
    errors = []
    for steps in (1, 2, 4, 8):
        run, z0 = solver(steps=steps, strength=strength), latent()
        exact = ridge(run, z0, sigma)
        errors.append(float((run.guide(z0, sigma) - exact).norm() / (z0 - exact).norm()))
    assert errors[0] < 1 and errors[1] < errors[0]
    # Every cell has the same four eigenvalues, so four conjugate steps end there but for float32 and the finite difference of the line search.
    assert errors[2] < 0.02 and errors[3] < 1e-3


def test_the_noise_of_the_picture_and_the_misfit_weigh_the_likelihood():
    assert solver(noise=0.1).rows[0].noise == pytest.approx(0.1 + MISFIT)
    flat = torch.full((1, 3, 12, 12), 0.4)
    assert solver(y=flat).rows[0].noise == pytest.approx(MISFIT)


def test_the_step_does_not_depend_on_the_size_of_the_latent():
    y = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(6))
    small = solver(y=y, noise=0.1).guide(latent(), 0.5)
    large = solver(y=y.repeat(1, 1, 3, 3), side=3 * SIDE, noise=0.1).guide(latent().repeat(1, 1, 3, 3), 0.5)
    # Sums over nine times as many equal values, in float32.
    torch.testing.assert_close(large, small.repeat(1, 1, 3, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.15)])
def test_the_step_does_not_depend_on_the_decoders_precision(dtype, tolerance):
    z0 = latent()
    moved, like = (solver(Linear(kind), noise=0.1).guide(z0, 0.5) - z0 for kind in (dtype, torch.float32))
    # A line search divides by a squared difference of two pictures, so it feels the last bit (2^-11, 2^-8) some ten times over.
    assert (moved - like).norm() < tolerance * like.norm()


class Deep(Linear):
    """A decoder of many layers, as real ones have, each of which rounds."""

    def __init__(self, dtype):
        super().__init__(dtype)
        generator = torch.Generator().manual_seed(2)
        widths = [4, *[16] * 12, 4]
        self.kernels = [(torch.randn(b, a, 3, 3, generator=generator) / (4.5 * a) ** 0.5).to(dtype) for a, b in zip(widths, widths[1:])]

    def __call__(self, z):
        z = z.to(self.weight) * 5  # latents as they come out of the model's own scale
        for kernel in self.kernels:
            z = F.silu(F.conv2d(z, kernel, padding=1))
        return super().__call__(z)


@pytest.mark.parametrize("sigma", [0.5, 0.1, 0.03])
def test_a_deep_decoder_in_half_precision_moves_about_as_far(sigma):
    z0 = latent()
    moved, like = (solver(Deep(kind), noise=0.1).guide(z0, sigma) - z0 for kind in (torch.bfloat16, torch.float32))
    # Its pictures are known to about a hundredth, and the line search compares two that are 0.1 sigma apart in the latent.
    assert (moved - like).norm() < 0.2 * like.norm()


@pytest.mark.parametrize("settings", [{"strength": 100.0, "noise": 1e-3}, {"strength": 1.0, "noise": 1e-3}])
def test_strong_guidance_fits_into_half_precision(settings):
    z0 = latent()
    moved, like = (solver(Linear(kind), **settings).guide(z0, 0.5) - z0 for kind in (torch.float16, torch.float32))
    assert (moved - like).norm() < 5e-2 * like.norm()


class Spoilt(Linear):
    """A decoder whose gradient is not finite in some calls."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.bad = 0, calls

    def __call__(self, z):
        if z.requires_grad:
            self.calls += 1
            if self.calls in self.bad:
                z = z * float("inf")
        return super().__call__(z)


@pytest.mark.parametrize("settings", [{"steps": 3}, {"published": True}], ids=["solve", "published"])
def test_a_gradient_that_is_not_finite_moves_nothing(settings, caplog):
    z0 = latent()
    run = solver(Spoilt(1), **settings)
    assert torch.equal(run.guide(z0, 0.5), z0)
    assert "not finite" in caplog.text and "--fp32-vae" in caplog.text
    assert torch.isfinite(run.guide(z0, 0.4)).all() and not torch.equal(run.guide(z0, 0.4), z0)


def test_a_gradient_that_ends_within_the_solver_leaves_what_was_found():
    z0 = latent()
    assert torch.equal(solver(Spoilt(2), steps=3).guide(z0, 0.5), solver(steps=1).guide(z0, 0.5))


def test_without_memory_to_learn_it_says_what_to_turn(monkeypatch):
    run = solver(alignment=ALIGNMENT)

    def crowded(*_):
        raise OUT_OF_MEMORY[0]("no memory left")

    monkeypatch.setattr(run.rows[0].alignment, "update", crowded)
    with pytest.raises(MemoryError, match="Apply Posterior Guidance.*'crop' in F-PAM Alignment"):
        run.guide(latent(), 0.5)


def test_the_step_does_not_depend_on_the_batch():
    ys = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(6))
    zs = latent(batch=2)
    both = solver(y=ys).guide(zs, 0.5)
    for index in range(2):
        assert torch.equal(both[index:index + 1], solver(y=ys[index:index + 1]).guide(zs[index:index + 1], 0.5))


def test_above_t1_nothing_moves():
    run, z = solver(guide_below=0.5), latent()
    assert torch.equal(run.guide(z, 10.0), z) and run.counters.decoder_backwards == 0
    assert not torch.equal(run.guide(z, 0.1), z)


@pytest.mark.parametrize("alignment", [PIXELS, replace(PIXELS, residual=1e-3)], ids=["pixels", "with D2"])
def test_a_mask_keeps_every_term_off_what_it_hides(alignment):
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., :6] = 1
    run, z0 = solver(alignment=alignment, mask=mask, quality=QUALITY, steps=1), latent()
    moved = run.guide(z0, 0.2) - z0
    # The oracle decoder has no overlap: six pixels are three cells.
    assert moved[..., :3].any() and not moved[..., 3:].any()


# Tiles


def learned_psi(run):
    """psi as ten steps of Adam may leave it: its 3x3 layers see their neighbours."""
    generator = torch.Generator().manual_seed(9)
    psi = run.rows[0].alignment.known
    with torch.no_grad():
        for p in (psi.h1_in.weight, psi.h2_out.weight):
            p.add_(torch.randn(p.shape, generator=generator) * 0.005)
    return psi


@pytest.mark.parametrize("side", [40, 33])
def test_tiles_are_the_whole_picture(side):
    z0 = latent(side=side)
    whole, tiled = (solver(Local(), side=side, tile=tile, steps=3).guide(z0, 0.5) for tile in (96, 16))
    # The halo covers all that the decoder sees: only sums in another order are left, which conjugate directions carry on.
    assert (whole - tiled).norm() < 1e-3 * (whole - z0).norm()


def test_tiles_leave_no_seam():
    side = 40
    z0 = latent(side=side)
    moved = []
    for tile in (96, 16):
        run = solver(Local(), side=side, tile=tile, steps=2)
        run.rows[0].alignment.psi = learned_psi(run)
        moved.append(run.guide(z0, 0.5) - z0)
    whole, tiled = moved
    off = (whole - tiled).abs().mean((0, 1, 2))
    # Three tiles a side, which end after columns 13 and 27. psi is padded with zeros there, which is all that is left of a seam.
    seams = off[[12, 13, 26, 27]].mean()
    assert seams < 0.1 * whole.abs().mean()


def half_busy(side):
    """A latent that is flat to the left: what each half is normalised by alone is not what the whole is."""
    z = latent(side=side)
    z[..., :side // 2] = 0.1
    return z


def on_real_decoder(y, tile, whole_fits=True, **settings):
    """A run behind a tiny AutoencoderKL, which normalises and attends over all it is shown."""
    run = solver(PixelDecoder(vae_of("sd15"), model("sd15").model), side=32, y=y, tile=tile, steps=2, **settings)
    run.whole_fits = whole_fits
    return run


def test_a_picture_that_is_right_stays_tile_by_tile():
    z0 = half_busy(32)
    with torch.no_grad():
        y = on_real_decoder(None, 96).decoder(z0)
    whole, tiled, apart = (on_real_decoder(y, *how).guide(z0, 0.5) - z0 for how in ((96,), (16,), (16, False)))
    # Tiles that are compared as they come out alone move what is right already.
    assert whole.abs().max() < 1e-5 and tiled.abs().max() < 1e-5 and apart.square().mean().sqrt() > 1e-3


@pytest.mark.parametrize("quality", [None, QUALITY], ids=["likelihood", "quality"])
def test_tiles_of_a_real_decoder_move_as_the_whole_does(quality):
    z0 = half_busy(32)
    with torch.no_grad():
        y = on_real_decoder(None, 96).decoder(latent(side=32, seed=9))
    runs = [on_real_decoder(y, *how, noise=0.1, quality=quality) for how in ((96,), (16,), (16, False))]
    before = objective(runs[0], z0, z0, 0.5, quality)
    whole, tiled, apart = (before - objective(run, run.guide(z0, 0.5), z0, 0.5, quality) for run in runs)
    # The way back is each tile's own and so not quite the gradient, but most of what the whole gains it gains, and more than tiles apart.
    assert tiled > 0.6 * whole and tiled > apart


def test_f_pam_learns_on_parts_of_the_whole(monkeypatch):
    z0 = half_busy(32)
    run = on_real_decoder(None, 16, alignment=replace(ALIGNMENT, updates=2), guide_below=0.0)
    seen = []
    monkeypatch.setattr(run.rows[0].alignment, "update", lambda crop, window, late: seen.append((crop, window)))
    run.guide(z0, 0.5)
    with torch.no_grad():
        whole = run.decoder(z0)
    assert len(seen) == 2 and run.counters.decodes == 1
    for crop, (top, left, *size) in seen:
        assert torch.equal(crop, whole[..., top:top + 32, left:left + 32]) and tuple(size) == (256, 256)


@pytest.mark.parametrize("constraint", ["exposure", "chroma", "clarity"])
def test_quality_is_that_of_the_whole_picture(constraint):
    """A tile may be all sky: what is asked of the mean colour and light is asked of the picture. A neighbourhood may lie in two tiles."""
    quality = Quality(exposure=0.0, exposure_patch=16, exposure_below=1.1, chroma_below=1.1, clarity_below=1.1)
    quality = replace(quality, **{constraint: 5.0})
    z0 = latent(side=40)
    z0[..., :20] += 1
    moved = [solver(Hazy(), side=40, tile=tile, steps=1, quality=quality).guide(z0, 0.5) - z0 for tile in (96, 16)]
    free = solver(Hazy(), side=40, steps=1).guide(z0, 0.5) - z0
    whole, tiled = moved
    # Only sums in another order are left; the constraint itself moves far more.
    assert (whole - tiled).norm() < 1e-3 * whole.norm() and (whole - free).norm() > 1e-2 * whole.norm()


@pytest.mark.parametrize(("side", "cells", "tile"), [(40, 1200, 24), (64, 1400, 16)])
@pytest.mark.parametrize("fits", [True, False])
def test_without_memory_tiles_are_halved(monkeypatch, side, cells, tile, fits):
    z0 = latent(side=side)
    decoder = Cramped(cells)
    monkeypatch.setattr(decoder, "fits", lambda z: fits)
    run = solver(decoder, side=side)
    cramped = run.guide(z0, 0.5)
    assert run.tile == tile and run.whole_fits == (not fits)
    whole = solver(side=side).guide(z0, 0.5)
    assert (whole - cramped).norm() < 1e-3 * (whole - z0).norm()


def test_memory_that_ends_within_the_line_search_changes_nothing():
    z0 = latent(side=40)
    cramped = solver(Cramped(1200, first=1), side=40, steps=1).guide(z0, 0.5)
    whole = solver(side=40, steps=1).guide(z0, 0.5)
    assert (whole - cramped).norm() < 1e-3 * (whole - z0).norm()


def test_without_memory_for_the_smallest_tile_it_says_so():
    with pytest.raises(MemoryError, match="Apply Posterior Guidance.*'degraded'.*'vae'"):
        solver(Cramped(10), side=40).guide(latent(side=40), 0.5)
    assert not comfy.model_management.in_training


# Steps in between


def test_every_second_step_repeats_the_correction():
    run, z = solver(every=2), latent()
    run.sigmas = [2.0, 1.0, 0.5, 0.25, 0.0]
    first = run.guide(z, 1.0) - z
    work = run.counters.decoder_backwards
    other = latent(seed=8)
    solved = run.guide(other, 0.5) - other
    assert run.counters.decoder_backwards == 2 * work and not torch.allclose(solved, first)
    repeated = run.guide(z, 0.25) - z
    assert run.counters.decoder_backwards == 2 * work
    # What is still uncertain shrinks with sigma^2 / (1 + sigma^2), and the correction with it.
    torch.testing.assert_close(repeated, solved * (0.25**2 / (1 + 0.25**2)) / (0.5**2 / (1 + 0.5**2)), atol=1e-5, rtol=1e-4)


def test_a_new_pass_repeats_nothing_of_the_last():
    run, z = solver(every=2), latent()
    run.follow([1.0, 0.5, 0.0])
    run.guide(z, 1.0)
    work = run.counters.decoder_backwards
    run.follow([1.0, 0.5, 0.0])
    run.guide(z, 0.5)
    assert run.counters.decoder_backwards == work
    run.follow([0.7, 0.3, 0.0])
    run.guide(z, 0.3)
    assert run.counters.decoder_backwards == 2 * work


def test_a_repeated_correction_never_grows():
    run, z = solver(every=2), latent()
    run.sigmas = [0.5, 1.0, 0.0]
    first = run.guide(z, 0.5) - z
    torch.testing.assert_close(run.guide(z, 1.0) - z, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sigma", "following"), [(5.0, 3.0), (0.5, 0.2), (0.2, 0.0)])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_published_step_is_the_papers_after_euler(sigma, following, strength):
    run, z, x = solver(published=True, published_scale=2000.0, strength=strength), latent(), latent(seed=7) * 3
    run.sigmas = [9.0, sigma, following, 0.0]
    leaf = z.clone().requires_grad_(True)
    mean_gradient = torch.autograd.grad(F.mse_loss(run.decoder(leaf), run.rows[0].y), leaf)[0]

    def euler(x0):
        """The next state, as the papers keep it: of unit variance."""
        return (x + (x - x0) / sigma * (following - sigma)) / (1 + following**2) ** 0.5

    change = euler(run.guide(z, sigma)) - euler(z)
    torch.testing.assert_close(change, -strength * 2000.0 * SIDE * SIDE / 4096 * mean_gradient, atol=1e-5, rtol=1e-3)


# Seeds and interruption


def test_row_seed_names_a_picture_by_its_noise():
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert row_seed(3, noise[1]) == row_seed(3, noise[1:].clone()[0]) != row_seed(3, noise[0])
    assert row_seed(4, noise[1]) != row_seed(3, noise[1])
    assert 0 <= row_seed(2**64 - 1, noise[0]) < 2**63


def test_psi_learns_the_same_alone_and_in_a_batch():
    ys, zs = pictures(2).movedim(-1, 1), latent(batch=2)
    both = posterior_run(alignment=ALIGNMENT, y=ys, batch=2, **ANY_TIME)
    alone = posterior_run(alignment=ALIGNMENT, y=ys[:1], batch=1, **ANY_TIME)
    assert torch.equal(both.guide(zs, 1.0)[:1], alone.guide(zs[:1], 1.0))
    for name, tensor in alone.rows[0].alignment.psi.state_dict().items():
        assert torch.equal(both.rows[0].alignment.psi.state_dict()[name], tensor)
        assert name == "p" or not torch.equal(both.rows[1].alignment.psi.state_dict()[name], tensor) or not tensor.any()


@pytest.mark.parametrize("alignment", [ALIGNMENT, STILL], ids=["while F-PAM learns", "while x0 moves"])
def test_cancel_stops_inside(alignment):
    run = posterior_run(alignment=alignment, **ANY_TIME)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run.guide(latent(), 1.0)
    assert run.counters.decodes == 0 and not comfy.model_management.in_training


def test_settings_default_to_the_published_t1():
    assert Posterior().guide_below == 0.7 and PixelDecoder(vae_of("sd15"), model("sd15").model).cell == CELL


class Plain(Linear):
    """A decoder whose first three channels are the colours."""

    def __init__(self):
        super().__init__()
        self.weight = torch.eye(4, 3)[:, :, None, None].repeat(1, 1, 2, 2)


STRONG = {"exposure": {"exposure": 10.0, "exposure_patch": 8}, "chroma": {"exposure": 0.0, "chroma": 1.0}, "clarity": {"exposure": 0.0, "clarity": 1.0}}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("tile", [96, 4])
@pytest.mark.parametrize("name", STRONG)
def test_strong_quality_constraints_do_not_overshoot(name, tile, steps):
    """Their bend is not in the line search: without a look behind the step, means ended between -0.8 and 1.3."""
    quality = Quality(**STRONG[name], exposure_below=1.1, chroma_below=1.1, clarity_below=1.1)
    z0 = 0.3 + 0.02 * latent() + torch.tensor([0.0, 0.0, 0.2, 0.0])[:, None, None]
    run = solver(Plain(), y=Plain()(z0), quality=quality, noise=0.001, tile=tile, steps=steps)
    z = run.guide(z0, 0.3)
    assert objective(run, z, z0, 0.3, quality) < objective(run, z0, z0, 0.3, quality)
    assert 0 < float(Plain()(z).mean((0, 2, 3)).min()) and float(Plain()(z).mean((0, 2, 3)).max()) < 0.6


def test_a_constraint_below_all_steps_is_said(caplog):
    posterior_run("sd3", quality=Quality(exposure_below=0.001))
    assert "'exposure' of Quality Prior does nothing while sampling: it acts below timestep 1, and the last step is at" in caplog.text
    caplog.clear()
    posterior_run("sd3", quality=Quality(exposure_below=1.0))
    assert not caplog.text
