"""Decoding with detail experts: what is the VAE's own, what is added, and that tiles, batches and sizes make no difference."""

import functools

import pytest
import torch

import comfy.model_management
import comfy.sd
from mend.model_patches import detail_decoder
from mend.model_patches.daem import GatedFFN
from mend.model_patches.detail_decoder import decode_with_experts, fitted_pictures, window_tiling
from mend.model_patches.detail_experts import check_fit, new_weights
from mend.model_patches.vae_sites import skips, vae_anatomy
from mend.model_patches.weights_file import Weights
from mend.tests.model_patches.detail_experts import VAES, WINDOW, made, pictures, trained
from mend.tests.tiny_models import vae as tiny_vae
from mend.tests.training.tiny_training import video_vae

NODE = "Decode with Detail Experts"
every_vae = pytest.mark.parametrize("kind", VAES)


def decoded(vae, weights, latent, degraded, strength=1.0, tile=0, overlap=64):
    with torch.inference_mode():
        return decode_with_experts(vae, weights, latent, degraded, strength, tile, overlap, NODE)


def encoded(vae, degraded):
    with torch.inference_mode():
        return vae.encode(degraded)


def plain(vae, latent):
    with torch.inference_mode():
        return vae.decode(latent).clone()


def state(vae):
    return {name: tensor.clone() for name, tensor in vae.first_stage_model.state_dict().items()}


def untouched(vae, before):
    module = vae.first_stage_model
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) + ("forward" in vars(part)) for part in module.modules())
    return hooks == 0 and "decode" not in vars(module) and all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# What is the VAE's own


@every_vae
def test_fresh_experts_are_the_plain_decode(kind):
    vae, seen = made(kind), pictures(2, 40, 72)
    latent = encoded(vae, seen)
    picture, experts = decoded(vae, new_weights(vae, window=WINDOW), latent, seen)
    assert torch.equal(picture, plain(vae, latent)) and experts.shape == picture.shape


@every_vae
def test_strength_zero_is_the_plain_decode(kind):
    vae, seen = made(kind), pictures(1, 64, 64)
    latent = encoded(vae, seen)
    picture, experts = decoded(vae, trained(vae), latent, seen, strength=0.0)
    assert torch.equal(picture, plain(vae, latent)) and not experts.any()


def test_the_same_in_tiles():
    vae, seen = made("kl"), pictures(1, 64, 320)
    latent = encoded(vae, seen)
    with torch.inference_mode():
        host = vae.decode_tiled(latent, 32, 32, 8)
    for weights, strength in ((new_weights(vae, window=WINDOW), 1.0), (trained(vae), 0.0)):
        assert torch.equal(decoded(vae, weights, latent, seen, strength, tile=256, overlap=64)[0], host)


@pytest.mark.parametrize("tile", [0, 256], ids=["whole", "tiles"])
def test_pictures_hold_no_more_memory_than_they_need(tile):
    vae, seen = made("kl"), pictures(2, 64, 320)
    picture, experts = decoded(vae, trained(vae), encoded(vae, seen), seen, tile=tile)
    for held in (picture, experts):
        assert held.untyped_storage().nbytes() == held.numel() * held.element_size()


@every_vae
def test_the_vae_is_as_it_was(kind):
    vae, seen = made(kind), pictures()
    latent, before = encoded(vae, seen), state(vae)
    without = plain(vae, latent)
    assert not torch.equal(decoded(vae, trained(vae), latent, seen)[0], without)
    assert untouched(vae, before) and torch.equal(plain(vae, latent), without)


@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_the_vae_is_as_it_was_after_errors(monkeypatch, error):
    vae, seen = made("kl"), pictures()
    latent, before, calls = encoded(vae, seen), state(vae), []

    def fail(self, x):
        calls.append(x)
        if len(calls) == 2:
            raise error("stop")
        return x

    monkeypatch.setattr(GatedFFN, "forward", fail)
    with pytest.raises(error):
        decoded(vae, trained(vae), latent, seen)
    assert len(calls) == 2 and untouched(vae, before)


# What is added


@every_vae
def test_experts_act_on_what_they_see(kind):
    vae, seen = made(kind), pictures()
    latent, weights = encoded(vae, seen), trained(vae)
    picture, experts = decoded(vae, weights, latent, seen)
    assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1
    others = [decoded(vae, weights, latent, seen, strength=0.5)[0], decoded(vae, weights, latent, pictures(seed=9))[0],
              decoded(vae, trained(vae, size="lite"), latent, seen)[0], plain(vae, latent)]
    assert not any(torch.equal(picture, other) for other in others)
    again = decoded(vae, weights, latent, seen)
    assert torch.equal(picture, again[0]) and torch.equal(experts, again[1])


def test_experts_take_turns():
    vae, seen = made("taesd"), pictures(1, 64, 320)
    experts = decoded(vae, trained(vae), encoded(vae, seen), seen)[1]
    # One expert everywhere would have one colour.
    assert experts.flatten(0, 2).std(0).max() > 0.01


def test_the_map_has_a_colour_for_each_expert():
    vae, seen = made("kl"), pictures(1, 64, 96)
    weights = trained(vae)
    for index, colour in enumerate(detail_decoder.COLOURS):
        tensors = dict(weights.tensors)
        for name in tensors:
            if name.endswith(("router.content.bias",)):
                tensors[name] = 100.0 * torch.nn.functional.one_hot(torch.tensor(index), 4)
        always = Weights(weights.kind, weights.family, weights.config, tensors)
        experts = decoded(vae, always, encoded(vae, seen), seen)[1]
        torch.testing.assert_close(experts, torch.tensor(colour).expand(1, 64, 96, 3))


@every_vae
def test_skips_are_what_the_encoder_computes(kind):
    vae = made(kind)
    module, anatomy, caught = vae.first_stage_model, vae_anatomy(vae), {}
    layers = list(module.taesd_encoder) if kind == "taesd" else [down.block[-1] for down in module.encoder.down]
    places = {"at_1": 1, "at_2": 5, "at_4": 9} if kind == "taesd" else {"at_1": 0, "at_2": 1, "at_4": 2}
    handles = [layers[index].register_forward_hook(lambda _, args, out, name=name: caught.update({name: out})) for name, index in places.items()]
    with torch.inference_mode():
        module.encode(pictures().movedim(-1, 1) * 2 - 1)
        found = skips(module, pictures().movedim(-1, 1) * 2 - 1)
    for handle in handles:
        handle.remove()
    assert found.keys() == caught.keys() == {site.name for site in anatomy.sites}
    for site in anatomy.sites:
        assert torch.equal(found[site.name], caught[site.name]) and found[site.name].shape[1:] == (site.skip, 64 // site.scale, 64 // site.scale)


def test_half_precision():
    with torch.inference_mode():
        full = tiny_vae(4)
        shape = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1,
                     attn_resolutions=[], dropout=0.0)
        vae = comfy.sd.VAE(sd=full.get_sd(), config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.bfloat16)
    seen = pictures(1, 32, 32)
    latent = encoded(vae, seen)
    assert torch.equal(decoded(vae, new_weights(vae, window=WINDOW), latent, seen)[0], plain(vae, latent))
    fine, coarse = (decoded(each, trained(each), latent, seen)[0] for each in (full, vae))
    # bfloat16 knows numbers to 1/256; experts add about as much as there is.
    assert (fine - coarse.float()).abs().mean() < 0.02


# Sizes, batches, tiles


@every_vae
def test_a_batch_is_its_pictures(kind):
    vae, seen = made(kind), pictures(2, 40, 72)
    latent, weights = encoded(vae, seen), trained(vae)
    together = decoded(vae, weights, latent, seen)[0]
    for index in range(2):
        torch.testing.assert_close(together[index:index + 1], decoded(vae, weights, latent[index:index + 1], seen[index:index + 1])[0], atol=1e-4, rtol=0)
    shared = decoded(vae, weights, latent, seen[:1])[0]
    torch.testing.assert_close(shared[:1], together[:1], atol=1e-4, rtol=0)
    assert not torch.allclose(shared[1:], together[1:], atol=1e-3)


def test_five_dimensions_are_the_first_frame_as_in_the_host():
    vae, seen = made("kl 16"), pictures()
    latent = encoded(vae, seen)
    video = torch.stack([latent, latent + 1], 2)
    assert torch.equal(decoded(vae, trained(vae), video, seen)[0], decoded(vae, trained(vae), latent, seen)[0])
    assert torch.equal(decoded(vae, trained(vae), video, seen, strength=0.0)[0], plain(vae, video))


@functools.cache
def tile_error(kind, width=320, tile=256):
    """What tiles differ by from the whole picture: with experts, the host's own, and the map."""
    vae, seen = made(kind), pictures(1, 64, width)
    latent, weights = encoded(vae, seen), trained(vae, outer=0.05)
    whole, experts = decoded(vae, weights, latent, seen)
    tiled, experts_tiled = decoded(vae, weights, latent, seen, tile=tile, overlap=64)
    with torch.inference_mode():
        host = vae.decode_tiled(latent, tile // 8, tile // 8, 8)
    return tiled - whole, host - plain(vae, latent), experts_tiled - experts


@pytest.mark.parametrize("kind", ["kl", "taesd"])
def test_tiles_differ_no_more_than_the_vae_itself(kind):
    ours, host, experts = tile_error(kind)
    # Half as much again: experts see the VAE's own features, which differ between tiles.
    assert ours.abs().mean() < 1.5 * host.abs().mean() and ours.abs().max() < 1.5 * host.abs().max()
    # Near a tile's end a window sees less and may choose another expert: one choice of nine, at three places in three tilings.
    if kind == "taesd":
        assert experts.abs().max() < 1 / 9


def test_a_tiles_end_fades_within_three_windows():
    # The shortest of the host's three tilings has tiles of half the width, which end at 256: the fourth window from there is the first.
    ours, _, experts = tile_error("taesd", 704, 512)
    assert ours[:, :, :WINDOW].abs().max() < 1e-5 and experts[:, :, :WINDOW].abs().max() < 1e-5


def test_tiles_leave_no_seams():
    ours, host, _ = tile_error("taesd")
    # At a seam the error would jump from one column to the next: by no more than in the host's own tiles, and a fifth for what follows from that.
    jumps, own = (error.diff(dim=2).abs().mean((0, 1, 3)).max() for error in (ours, host))
    assert jumps < 1.2 * own


def test_one_expert_for_the_whole_picture():
    vae, seen = made("kl 16"), pictures(1, 64, 136)
    experts = decoded(vae, trained(vae, window=0), encoded(vae, seen), seen)[1]
    assert torch.equal(experts, experts[:, :1, :1].expand_as(experts))


def test_tiles_when_memory_runs_out(monkeypatch):
    vae, seen = made("kl"), pictures(1, 64, 320)
    latent, weights, before, forward = encoded(vae, seen), trained(vae), state(vae), GatedFFN.forward
    tiled = decoded(vae, weights, latent, seen, tile=256, overlap=64)

    tried = []

    def small(self, x):
        if x.shape[-1] == 320 and not tried:
            tried.append(x)
            raise comfy.model_management.OOM_EXCEPTION("too large")
        return forward(self, x)

    monkeypatch.setattr(GatedFFN, "forward", small)
    monkeypatch.setattr(detail_decoder, "TILE", 32)
    monkeypatch.setattr(detail_decoder, "OVERLAP", 8)
    found = decoded(vae, weights, latent, seen)
    assert torch.equal(found[0], tiled[0]) and torch.equal(found[1], tiled[1]) and tried and untouched(vae, before)


@pytest.mark.parametrize("window", [1, 8, 16, 32])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (8, 0), (60, 10), (512, 128)])
def test_tiles_begin_where_windows_do(window, tile, overlap):
    side, over = window_tiling(tile, overlap, window)
    assert side >= tile and over >= max(overlap, 1) and side >= 4 * over
    assert all((each - over) % window == 0 and each > over for each in (side // 2, side, side * 2))


# Pictures that fit, and those that do not


def test_less_than_a_cell_is_padded_or_cut():
    shape = torch.Size((2, 4, 8, 9))
    for height, width in ((64, 72), (71, 79), (57, 65), (60, 75)):
        assert fitted_pictures(pictures(1, height, width), shape, 8, NODE).shape == (2, 64, 72, 3)
    exact = pictures(2, 64, 72)
    assert torch.equal(fitted_pictures(exact, shape, 8, NODE), exact)
    large = pictures(1, 67, 75)
    assert torch.equal(fitted_pictures(large, torch.Size((1, 4, 8, 9)), 8, NODE), large[:, 1:65, 1:73]), "as VAE Encode cuts it"


@pytest.mark.parametrize(("height", "width"), [(56, 72), (64, 80), (72, 64)])
def test_pictures_of_another_size_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{NODE}: 'degraded' is {width} x {height} but the latent belongs to a picture of 72 x 64. Connect the picture"):
        fitted_pictures(pictures(1, height, width), torch.Size((1, 4, 8, 9)), 8, NODE)


def test_other_numbers_of_pictures_are_refused():
    with pytest.raises(ValueError, match=f"{NODE}: 'degraded' holds 2 for a batch of 3. Give one for all, or one each."):
        fitted_pictures(pictures(2, 64, 64), torch.Size((3, 4, 8, 8)), 8, NODE)


def test_latents_of_another_vae_are_refused():
    vae = made("kl")
    with pytest.raises(ValueError, match="'samples' is a latent of 1x16x8x8, and 'vae' takes 4 channels"):
        decoded(vae, trained(vae), torch.zeros(1, 16, 8, 8), pictures())


# Experts of another VAE


def test_experts_of_another_layout_are_refused():
    with pytest.raises(ValueError, match=f"{NODE}: .* was made for TAESD of 16 channels, 64-64-64, and 'vae' is AutoencoderKL of 16 channels, 32-32-32"):
        check_fit(new_weights(made("taesd")), made("kl 16"), NODE)


def test_experts_of_a_vae_of_the_same_layout_are_refused():
    weights, other = new_weights(made("kl")), tiny_vae(4, seed=4)
    with pytest.raises(ValueError, match="was made for another VAE of the same layout .*, such as that of SD1.5 instead of SDXL. Load the VAE"):
        check_fit(weights, other, NODE)


def test_a_fine_tune_of_the_vae_is_welcome():
    weights, tuned = new_weights(made("kl")), tiny_vae(4)
    with torch.no_grad():
        for p in tuned.first_stage_model.parameters():
            p.mul_(0.7).add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2 * p.std().nan_to_num(0))
    check_fit(weights, tuned, NODE)


def test_video_vaes_are_refused():
    with pytest.raises(ValueError, match="video VAEs are not supported. Use that of SD1.5, SD2, SDXL, SD3 or FLUX.1"):
        new_weights(video_vae())


def test_damaged_files_are_refused():
    vae = made("kl")
    weights = new_weights(vae, "full")
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.endswith("at_4.leave.weight")}
    with pytest.raises(ValueError, match="daem.sites.at_4.leave.weight is missing, expected 32x32x1x1. The file is incomplete"):
        check_fit(Weights(weights.kind, weights.family, weights.config, tensors), vae, NODE)
    for change in ({"size": "huge"}, {"window": 60}, {"window": None}, {"latents": "none"}, {"latents": None}, {"perceptual": "none"}):
        with pytest.raises(ValueError, match="describes itself as .*, and a size \\(lite, full\\), a window"):
            check_fit(Weights(weights.kind, weights.family, weights.config | change, weights.tensors), vae, NODE)
    broken = weights.tensors | {"daem.sites.at_4.leave.weight": torch.full((32, 32, 1, 1), torch.nan)}
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        check_fit(Weights(weights.kind, weights.family, weights.config, broken), vae, NODE)
    with pytest.raises(ValueError, match="is of the kind restoration adapter, and this node applies the kind detail experts"):
        check_fit(Weights("restoration_adapter", weights.family, {}, {}), vae, NODE)


def test_seeds():
    vae = made("kl")
    first, same, other = (new_weights(vae, seed=seed).tensors for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not torch.equal(first["daem.sites.at_1.enter.weight"], other["daem.sites.at_1.enter.weight"])
