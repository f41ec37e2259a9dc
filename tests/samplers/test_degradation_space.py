"""Sampling in the degradation space: pictures in and out, the input itself where nothing is found, and company of other samplers."""

from types import SimpleNamespace

import pytest
import torch

import comfy.samplers
from mend.model_patches.degraded_picture import Degradation, DegradedPicture, Residuals, Space, reframed
from mend.samplers.alignment import Alignment
from mend.samplers.degradation_space import DegradationSpaceSampler, check_inner, degradation_of, samples_degradation
from mend.samplers.degraded_latent import DegradedLatent
from mend.samplers.guided_model import GuidedModel
from mend.samplers.posterior_guidance import Posterior
from mend.samplers.recurrence import RecurrentSampler
from mend.samplers.restoration_guidance import Restoration, RestorationGuidance
from mend.tests import tiny_models
from mend.tests.model_patches import adapters
from mend.tests.model_patches.degradation_models import (
    SIDE,
    applied,
    base,
    fresh,
    instruction,
    pictures,
    plain,
    removed,
    sampled,
    schedule,
    trained,
    vae,
    without_lora,
)  # fmt: skip


class Finds:
    """A sampler function that finds a constant damage, and keeps what it was given."""

    def __init__(self, value=0.0):
        self.value, self.starts, self.seeds = value, [], []

    def __call__(self, denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        self.starts.append(x.clone())
        self.seeds.append(extra_args["seed"])
        found = torch.full_like(x, self.value) if not isinstance(self.value, torch.Tensor) else self.value.to(x)
        callback({"i": 0, "denoised": found, "x": x})
        return found

    @property
    def sampler(self):
        return comfy.samplers.KSAMPLER(self)


def finding(value=0.0, samples=1):
    finds = Finds(value)
    return finds, DegradationSpaceSampler(finds.sampler, samples)


def c_lq(patcher, family, **shape):
    noise = torch.zeros(tiny_models.latent_shape(family, **shape))
    return patcher.get_attachment("mend_degradation").space(patcher.model, noise).c_lq


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 67), (72, 59)])
def test_no_damage_gives_the_input_itself_in_the_pixel_form(family, height, width):
    shown = pictures(1, height, width)
    patcher = applied(family, fresh(family, "pixel"), shown)
    for rows, columns in {(height // 8, width // 8), (-(-height // 8), -(-width // 8))}:
        out = sampled(patcher, family, finding()[1], height=rows, width=columns)
        assert torch.equal(removed(patcher, out), shown)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_no_damage_gives_the_encoded_input_in_the_latent_form(family):
    patcher = applied(family, fresh(family, "latent"))
    out = sampled(patcher, family, finding()[1])
    seen = c_lq(patcher, family)
    torch.testing.assert_close(out, patcher.model.process_latent_out(seen))
    torch.testing.assert_close(removed(patcher, out), vae(family).decode(vae(family).encode(pictures())), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("form", ["latent", "pixel"])
def test_the_true_residual_gives_what_the_oracle_gives(family, form):
    clean, shown = pictures(seed=8), pictures()
    patcher, model, own = applied(family, fresh(family, form), shown), base(family).model, vae(family)
    truth = Residuals(form, own, model)(shown, clean) / 0.5
    result = removed(patcher, sampled(patcher, family, finding(truth)[1]))
    if form == "latent":
        oracle = own.decode(own.encode(clean))
    else:
        grey = own.encode(torch.full_like(clean, 0.5))
        oracle = shown - 2 * (own.decode(own.encode((shown - clean + 1) / 2)) - own.decode(grey))
    torch.testing.assert_close(result, oracle.clamp(0, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(61, 67), (67, 61), (72, 59)])
def test_beyond_whole_cells_the_picture_stays_where_nothing_is_found(height, width):
    """VAE Encode and empty latents leave the rest of a cell out."""
    shown, (place, cells) = pictures(2, height, width), whole_cells(height, width)
    whole = reframed(shown, (8 * cells["height"], 8 * cells["width"]))
    patcher = applied("sd15", fresh("sd15"), shown)
    restored = removed(patcher, sampled(patcher, "sd15", finding()[1], batch=2, **cells))
    assert torch.equal(restored[:, ~place], shown[:, ~place])
    torch.testing.assert_close(restored[:, place].reshape(whole.shape), vae("sd15").decode(vae("sd15").encode(whole)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(61, 67), (67, 61)])
def test_beyond_whole_cells_the_light_changes_as_beside_them_and_the_grain_stays(height, width):
    clean, (place, cells) = 0.55 + 0.2 * pictures(1, height, width), whole_cells(height, width)
    degradation = Degradation(DegradedPicture(clean - 0.3, Averages(), "Apply"), "latent", 0.5)
    restored = degradation.removed(base("sd15"), Averages().encode(reframed(clean, (8 * cells["height"], 8 * cells["width"]))))
    torch.testing.assert_close(restored[:, ~place], clean[:, ~place], atol=1e-3, rtol=0)


class Averages:
    """Encodes and decodes as a VAE does, but only the light of each cell."""

    latent_dim = 2

    def spacial_compression_encode(self):
        return 8

    def encode(self, rows):
        light = torch.nn.functional.avg_pool2d(rows.movedim(-1, 1), 8)
        return torch.cat([light, light[:, :1]], 1)

    def decode(self, latent):
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1)


def whole_cells(height, width):
    """Where in a picture its whole cells are, (height, width), and how many."""
    place, rows, columns = torch.zeros(height, width, dtype=torch.bool), height // 8, width // 8
    top, left = (height - 8 * rows) // 2, (width - 8 * columns) // 2
    place[top:top + 8 * rows, left:left + 8 * columns] = True
    return place, {"height": rows, "width": columns}


@pytest.mark.parametrize("form", ["latent", "pixel"])
def test_strength_is_how_much_of_it_is_removed(form):
    found = {}
    for strength in (0.0, 0.5, 1.0):
        patcher = applied("sd15", fresh("sd15", form), strength=strength)
        found[strength] = patcher.model.process_latent_in(sampled(patcher, "sd15", finding(1.0)[1])) - c_lq(patcher, "sd15")
    assert not found[0.0].any()
    torch.testing.assert_close(found[0.5] * 2, found[1.0], atol=1e-4, rtol=1e-4)
    expected = -0.5 * {"latent": 1, "pixel": 2}[form]
    torch.testing.assert_close(found[1.0], torch.full_like(found[1.0], expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["latent", "pixel"])
def test_black_parts_of_the_mask_keep_the_input_bit_for_bit(form):
    mask = torch.zeros(1, 50, 50)
    mask[:, 10:30, 25:] = 1
    patcher = applied("sd15", fresh("sd15", form), mask=mask)
    restored = removed(patcher, sampled(patcher, "sd15", finding(1.0)[1]))
    at = torch.nn.functional.interpolate(mask[None], (SIDE, SIDE), mode="bicubic")[0, 0]
    kept = torch.nn.functional.max_pool2d((at != 0).float()[None], 9, 1, 4)[0] == 0
    assert kept.any() and torch.equal(restored[0][kept], pictures()[0][kept])
    assert (restored - pictures())[0, 20:30, 45:60].abs().mean() > 1e-3


def test_masks_of_a_batch_belong_to_their_pictures():
    mask = torch.stack([torch.zeros(SIDE, SIDE), torch.ones(SIDE, SIDE)])
    patcher = applied("sd15", fresh("sd15", "pixel"), pictures(2), mask=mask)
    restored = removed(patcher, sampled(patcher, "sd15", finding(1.0)[1], batch=2))
    assert torch.equal(restored[0], pictures(2)[0]) and not torch.equal(restored[1], pictures(2)[1])


def test_a_noise_mask_of_the_host_keeps_the_picture_where_it_is_black():
    patcher = applied("sd15", without_lora(trained("sd15")))
    held = torch.ones(1, 1, 8, 8)
    held[..., :4] = 0
    out = sampled(patcher, "sd15", noise_mask=held)
    change = patcher.model.process_latent_in(out) - c_lq(patcher, "sd15")
    assert change[..., :4].abs().max() < 1e-5 < change[..., 4:].abs().max()


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_from_full_noise_the_latent_does_not_matter(family):
    patcher = applied(family, without_lora(trained(family)))
    given = torch.randn(tiny_models.latent_shape(family), generator=torch.Generator().manual_seed(4))
    assert torch.equal(sampled(patcher, family), sampled(patcher, family, latent=given))


@pytest.mark.parametrize("form", ["latent", "pixel"])
def test_from_less_noise_what_the_latent_has_lost_counts_as_found(form):
    patcher = applied("sd15", fresh("sd15", form))
    done = sampled(patcher, "sd15", finding(0.7)[1])
    finds, sampler = finding()
    sampled(patcher, "sd15", sampler, denoise=0.25, latent=done)
    plain_start, start = torch.randn(done.shape, generator=torch.Generator().manual_seed(1)), finds.starts[0]
    sigma = schedule(patcher, 8)[-3]
    torch.testing.assert_close(start - sigma * plain_start, torch.full_like(start, 0.7), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "part"), [("ddim_uniform", slice(None)), ("simple", slice(-3, None))])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_an_empty_latent_has_lost_nothing_wherever_sampling_begins(family, name, part):
    patcher = applied(family, fresh(family))
    sigmas, most = schedule(patcher, 6, name)[part], float(patcher.model.model_sampling.sigma_max)
    assert sigmas[0] < 0.9999 * most, "this is no full noise"
    finds, sampler = finding()
    for latent in (None, patcher.model.process_latent_out(c_lq(patcher, family))):
        sampled(patcher, family, sampler, latent=latent, sigmas=sigmas)
    torch.testing.assert_close(*finds.starts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_previews_show_the_restored_picture(family):
    shown, patcher = [], applied(family, fresh(family, "pixel"))
    sampled(patcher, family, finding(1.0)[1], callback=lambda step, x0, x, total: shown.append((step, x0.clone(), total)))
    assert [entry[::2] for entry in shown] == [(0, 2)]
    torch.testing.assert_close(shown[0][1], c_lq(patcher, family) - 1.0)


def test_samples_are_averaged_and_counted_as_one_run():
    patcher, steps = applied("sd15", without_lora(trained("sd15"))), []
    one = sampled(patcher, "sd15")
    four = DegradationSpaceSampler(comfy.samplers.sampler_object("euler"), 4)
    mean = sampled(patcher, "sd15", four, callback=lambda step, x0, x, total: steps.append((step, total)))
    assert steps == [(index, 8) for index in range(8)]
    assert not torch.equal(one, mean) and torch.equal(mean, sampled(patcher, "sd15", four))
    finds, sampler = finding(samples=3)
    sampled(patcher, "sd15", sampler)
    assert len(set(finds.seeds)) == 3 and len({tuple(start.flatten()[:4].tolist()) for start in finds.starts}) == 3


def test_previews_show_the_mean_of_the_samples_so_far():
    patcher, shown = applied("sd15", without_lora(trained("sd15"))), []
    sampler = DegradationSpaceSampler(comfy.samplers.sampler_object("euler"), 3)
    mean = sampled(patcher, "sd15", sampler, callback=lambda step, x0, x, total: shown.append(patcher.model.process_latent_out(x0)))
    # The last of two Euler steps arrives at the prediction that is shown of it.
    torch.testing.assert_close(shown[1], sampled(patcher, "sd15"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shown[5], mean, atol=1e-4, rtol=1e-4)
    assert (shown[1] - mean).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_of_a_schedule_that_ends_with_noise_there_is_one_sample(family):
    """The high half of SplitSigmas: the mean of noisy states would lack noise where the low half goes on."""
    patcher, steps = applied(family, without_lora(trained(family))), []
    sigmas, four = schedule(patcher, 4), DegradationSpaceSampler(comfy.samplers.sampler_object("euler"), 4)
    high = sampled(patcher, family, four, sigmas=sigmas[:3], callback=lambda step, x0, x, total: steps.append((step, total)))
    assert torch.equal(high, sampled(patcher, family, sigmas=sigmas[:3])) and steps == [(0, 2), (1, 2)]
    low = sampled(patcher, family, four, sigmas=sigmas[2:], latent=high, noisy=False)
    torch.testing.assert_close(low, sampled(patcher, family, sigmas=sigmas), atol=1e-3, rtol=1e-3)


def test_without_added_noise_every_sample_starts_where_the_first_does():
    patcher = applied("sd15", without_lora(trained("sd15")))
    finds, sampler = finding(samples=3)
    sampled(patcher, "sd15", sampler, denoise=0.5, noisy=False)
    assert len(finds.starts) == 3 and all(torch.equal(start, finds.starts[0]) for start in finds.starts)


@pytest.mark.parametrize("inner", ["euler_ancestral", "uni_pc"])
def test_any_sampler_may_run_inside(inner):
    patcher = applied("sd15", without_lora(trained("sd15")))
    sampler = DegradationSpaceSampler(comfy.samplers.sampler_object(inner))
    one = sampled(patcher, "sd15", sampler, steps=4)
    assert one.isfinite().all() and torch.equal(one, sampled(patcher, "sd15", sampler, steps=4))
    assert not torch.equal(one, sampled(patcher, "sd15", sampler, steps=4, seed=2))


@pytest.mark.parametrize("form", ["latent", "pixel"])
def test_rounds_of_renoising_outside_go_on_from_what_was_found(form):
    finds, sampler = finding(0.6)
    patcher = applied("sd15", fresh("sd15", form))
    again = sampled(patcher, "sd15", RecurrentSampler(sampler, 1, 0.5), steps=4)
    assert len(finds.starts) == 2 and torch.allclose(again, sampled(patcher, "sd15", finding(0.6)[1]), atol=1e-4)
    fresh_noise = finds.starts[1] - 0.6
    assert fresh_noise.mean().abs() < 0.5 * fresh_noise.std(), "what was found is the middle of the second round's start"
    inside = DegradationSpaceSampler(RecurrentSampler(comfy.samplers.sampler_object("euler"), 1, 0.5))
    assert sampled(patcher, "sd15", inside, steps=4).isfinite().all()


def test_no_sample_repeats_the_noise_of_a_round():
    finds, sampler = finding(0.0, samples=3)
    sampled(applied("sd15", fresh("sd15")), "sd15", RecurrentSampler(sampler, 2, 0.5), steps=4)
    noises = [(start - start.mean()) / start.std() for start in finds.starts]
    assert len(noises) == 9 and len(set(finds.seeds)) == 9
    assert not any(torch.allclose(a, b, atol=1e-3) for index, a in enumerate(noises) for b in noises[:index])


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("inner", ["euler", "uni_pc"])
def test_restoration_guidance_pulls_towards_no_damage(family, inner):
    patcher = applied(family, without_lora(trained(family)))
    free = sampled(patcher, family, DegradationSpaceSampler(comfy.samplers.sampler_object(inner)), steps=4)
    guided = RestorationGuidance(Restoration(weight=0.2, onset=0.0), DegradedLatent(pictures(), vae(family))).attach(patcher)
    held = sampled(guided, family, DegradationSpaceSampler(comfy.samplers.sampler_object(inner)), steps=4)
    seen = patcher.model.process_latent_out(c_lq(patcher, family))
    assert (held - seen).norm() < 0.9 * (free - seen).norm()


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("outside", [True, False])
def test_guidance_reaches_it_through_rounds_of_renoising(family, outside):
    def sampler():
        inner = comfy.samplers.sampler_object("euler")
        if outside:
            return RecurrentSampler(DegradationSpaceSampler(inner), 1, 0.5)
        return DegradationSpaceSampler(RecurrentSampler(inner, 1, 0.5))

    patcher, steps = applied(family, without_lora(trained(family))), []
    guided = RestorationGuidance(Restoration(weight=0.2, onset=0.0), DegradedLatent(pictures(), vae(family))).attach(patcher)
    free = sampled(patcher, family, sampler(), steps=4)
    held = sampled(guided, family, sampler(), steps=4, callback=lambda step, x0, x, total: steps.append((step, total)))
    seen = patcher.model.process_latent_out(c_lq(patcher, family))
    assert (held - seen).norm() < 0.9 * (free - seen).norm()
    assert steps == [(index, len(steps)) for index in range(len(steps))] and len(steps) > 4
    assert torch.equal(held, sampled(guided, family, sampler(), steps=4))


def test_a_sampler_that_takes_damage_for_a_picture_is_refused():
    patcher = applied("sd15", fresh("sd15"))
    with pytest.raises(ValueError, match="Put Degradation Space Sampler"):
        sampled(patcher, "sd15", comfy.samplers.sampler_object("euler"))
    nested = RecurrentSampler(DegradationSpaceSampler(comfy.samplers.sampler_object("euler")), 0, 0.5)
    assert samples_degradation(nested) and not samples_degradation(comfy.samplers.sampler_object("euler"))


def test_guidance_that_would_decode_damage_is_refused():
    """Whichever of the two nodes comes first."""
    guidance = GuidedModel(Posterior(), Alignment(), None, vae("sd15"), pictures())
    for patcher in (guidance.attach(applied("sd15", fresh("sd15"))), applied("sd15", fresh("sd15"), to=guidance.attach(base("sd15")))):
        with pytest.raises(ValueError, match="Apply Degradation Diffusion: Apply Posterior Guidance is on this model too"):
            sampled(patcher, "sd15")


def test_a_model_without_a_degraded_picture_is_refused():
    with pytest.raises(ValueError, match="Connect the model from Apply Degradation Diffusion"):
        sampled(base("sd15"), "sd15")
    with pytest.raises(ValueError, match="Remove Degradation: 'model'"):
        degradation_of(base("sd15"), "Remove Degradation")


def test_latents_of_another_picture_or_vae_are_refused():
    patcher = applied("sd15", fresh("sd15"), pictures(1, 64, 96))
    with pytest.raises(ValueError, match="'degraded' is 96 x 64 but the latent belongs to a picture of 64 x 64"):
        sampled(patcher, "sd15")
    with pytest.raises(ValueError, match="2 pictures for a batch of 3"):
        sampled(applied("sd15", fresh("sd15"), pictures(2)), "sd15", batch=3)
    with pytest.raises(ValueError, match="Use the VAE of this model"):
        DegradedPicture(pictures(), vae("sd3"), "Apply").latent(base("sd15").model, torch.Size((1, 4, 8, 8)))


@pytest.mark.parametrize("form", ["latent", "pixel"])
def test_what_was_sampled_for_another_picture_or_model_is_refused(form):
    patcher = applied("sd15", fresh("sd15", form), pictures(1, 64, 96))
    with pytest.raises(ValueError, match="'degraded' is 96 x 64 but the latent belongs to a picture of 64 x 64"):
        removed(patcher, torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="Use the VAE of this model"):
        removed(patcher, torch.zeros(1, 16, 8, 12))


def test_masks_that_do_not_go_with_the_batch_are_named():
    patcher = applied("sd15", fresh("sd15"), pictures(2), mask=torch.ones(3, SIDE, SIDE))
    with pytest.raises(ValueError, match="'mask' holds 3 masks for a batch of 2"):
        sampled(patcher, "sd15", finding()[1], batch=2)


def test_a_vae_that_fails_is_named():
    broken = SimpleNamespace(latent_dim=2, encode=lambda rows: torch.full((1, 4, 8, 8), torch.nan), spacial_compression_encode=lambda: 8)
    with pytest.raises(ValueError, match="Apply: 'vae' gives NaN or infinite values"):
        DegradedPicture(pictures(), broken, "Apply").latent(base("sd15").model, torch.Size((1, 4, 8, 8)))


def test_latents_of_others_are_taken_where_the_run_is():
    """Restoration Guidance encodes its picture where the VAE puts it, which is not where a GPU samples."""
    space = Space(*(torch.empty(1, channels, 8, 8, device="meta") for channels in (4, 1)))
    assert space.residual(torch.zeros(1, 4, 8, 8)).device.type == "meta"


def test_rounds_within_a_sample_count_as_its_steps():
    patcher, steps = applied("sd15", fresh("sd15")), []
    inner = RecurrentSampler(comfy.samplers.sampler_object("euler"), 1, 0.5)
    sampled(patcher, "sd15", DegradationSpaceSampler(inner, 2), callback=lambda step, x0, x, total: steps.append((step, total)))
    assert [step for step, _ in steps] == list(range(len(steps))) and {total for _, total in steps} == {len(steps)} and len(steps) > 4


def test_pictures_are_cut_from_the_middle_and_padded_around():
    picture = torch.arange(10.0).reshape(1, 10, 1, 1).expand(1, 10, 10, 3)
    assert reframed(picture, (8, 10))[0, :, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert reframed(picture, (12, 10))[0, :, 0, 0].tolist() == [1, *range(10), 8]
    for size in ((8, 12), (16, 16), (7, 7)):
        assert torch.equal(reframed(reframed(picture, (16, 16)), (10, 10)), picture) and reframed(picture, size).shape[1:3] == size


def test_deviation_scales_what_is_sampled():
    picture = DegradedPicture(pictures(), vae("sd15"), "Apply")
    noise = torch.zeros(1, 4, 8, 8)
    one, two = (Degradation(picture, "latent", deviation).space(base("sd15").model, noise) for deviation in (1.0, 2.0))
    y0 = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two.residual(two.picture(y0)), y0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.picture(2 * y0), two.picture(y0))


def test_the_plain_picture_for_comparison():
    patcher = applied("sd15", without_lora(fresh("sd15", "picture")), told=instruction(spread=0.0))
    torch.testing.assert_close(sampled(patcher, "sd15"), plain("sd15"))


def test_samplers_that_take_damage_for_pictures_are_refused():
    euler = comfy.samplers.sampler_object("euler")
    check_inner(RecurrentSampler(euler, 1, 0.3))
    with pytest.raises(ValueError, match="'sampler' already comes from Degradation Space Sampler"):
        check_inner(RecurrentSampler(DegradationSpaceSampler(euler), 1, 0.3))
    with pytest.raises(ValueError, match="'sampler' is Recurrent Re-noising with a VAE"):
        check_inner(RecurrentSampler(euler, 1, 0.3, vae("sd15")))


def test_what_has_learned_on_pictures_is_refused():
    """On a model that predicts damage it would make the result worse than the input."""
    with_adapter = adapters.applied(adapters.base("sd15"), adapters.trained("sd15"), adapters.lq("sd15"))
    with pytest.raises(ValueError, match="Apply Restoration Adapter is on this model too"):
        sampled(applied("sd15", fresh("sd15"), to=with_adapter), "sd15")
