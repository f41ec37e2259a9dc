"""The copy of a VAE's encoder that learns to look through damage: what belongs to it, how it is used, and that the VAE stays."""

import pytest
import torch

import comfy.sd
import comfy.utils
from comfy.ldm.wan.vae import WanVAE
from mend.lab.prior import WEIGHTS as LAB
from mend.model_patches.host_gradients import gradients
from mend.model_patches.host_vae import encode_pictures, float_copy
from mend.model_patches.robust_encoder import ENCODER, RobustEncoder, encoder_tensors, with_encoder
from mend.model_patches.weights_file import Weights, load_weights, save_weights
from mend.tests.model_patches.adapters import base
from mend.tests.tiny_models import CHANNELS, initialise, vae


def lab_vae():
    """The lab's own, in the host's TAESD layout."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(LAB / "vae.safetensors"), safe_load=True))


def wan_vae():
    """The host's causal video VAE, at eight channels."""
    weights = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
    initialise(weights, 3, spread=0.2)
    return comfy.sd.VAE(sd=weights.state_dict())


# A VAE, a family whose latents it makes, and what the names of its encoder begin with.
VAES = {
    "kl": (lambda: vae(4), "sd15", ("encoder.", "quant_conv.")), "kl 16": (lambda: vae(16), "sd3", ("encoder.", "quant_conv.")),
    "taesd": (lab_vae, "sd3", ("taesd_encoder.",)), "wan": (wan_vae, "wan", ("encoder.", "conv1.")),
}  # fmt: skip
every_vae = pytest.mark.parametrize("kind", VAES)


def made(kind):
    """As the host makes one while it executes a prompt: with inference tensors for weights."""
    make, family, _ = VAES[kind]
    with torch.inference_mode():
        return make(), base(family).model


def pictures(batch=1, side=64, seed=3):
    return torch.rand(batch, side, side, 3, generator=torch.Generator().manual_seed(seed))


def shifted(tensors):
    """The same encoder after it has learned something."""
    generator = torch.Generator().manual_seed(0)
    return {name: t + torch.randn(t.shape, generator=generator) * 0.1 * t.std().clamp_min(0.01) for name, t in tensors.items()}


def state(given):
    return {name: tensor.clone() for name, tensor in given.first_stage_model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_vae
def test_the_encoder_is_found_and_nothing_else(kind):
    given, _ = made(kind)
    tensors = encoder_tensors(given)
    names = {name.removeprefix(ENCODER) for name in tensors}
    beginnings = VAES[kind][2]
    # Convolutions over time are not at work on single pictures, which is all that it learns from.
    parameters = {name: p for name, p in given.first_stage_model.named_parameters() if name.startswith(beginnings) and p.ndim}
    assert names == {name for name in parameters if "time_conv" not in name}
    assert all(torch.equal(t, given.first_stage_model.state_dict()[name.removeprefix(ENCODER)].float()) for name, t in tensors.items())
    assert not any(t.requires_grad or t.is_inference() for t in tensors.values())


@every_vae
def test_it_changes_encoding_and_leaves_the_vae(kind):
    with torch.inference_mode():
        given, _ = made(kind)
        before, plain = state(given), given.encode(pictures())
        decoded = given.decode(plain)
        untouched = with_encoder(given, encoder_tensors(given))
        torch.testing.assert_close(untouched.encode(pictures()), plain, atol=0, rtol=0)
        robust = with_encoder(given, shifted(encoder_tensors(given)))
        seen = robust.encode(pictures())
        assert seen.shape == plain.shape and (seen - plain).abs().max() > 1e-3
        assert torch.equal(given.encode(pictures()), plain) and torch.equal(given.decode(plain), decoded)
        assert same(state(given), before)
        assert torch.equal(robust.encode(pictures()), seen)
        assert torch.equal(given.decode(plain), decoded) and same(state(given), before)


def test_files_without_an_encoder_leave_the_vae_alone():
    given, _ = made("kl")
    assert with_encoder(given, {"adapter.stem.bias": torch.zeros(3)}) is given


def test_half_precision_is_near():
    with torch.inference_mode():
        given, _ = made("kl")
        tensors = shifted(encoder_tensors(given))
        full, half = (with_encoder(given, each).encode(pictures()) for each in (tensors, {name: t.half() for name, t in tensors.items()}))
    # Eleven bits of each weight, through some ten layers.
    assert 0 < (full - half).abs().max() < 2e-2 * full.std()


@every_vae
def test_copies_are_of_the_vaes_own_weights(kind):
    (given, model), (untouched, _) = made(kind), made(kind)
    own = encoder_tensors(untouched)
    with torch.inference_mode():
        with_encoder(given, shifted(own)).encode(pictures())
    assert not same(state(given), state(untouched)), "the host leaves another encoder in the VAE's place until the VAE is used again"
    assert same(encoder_tensors(given), own)
    assert same(RobustEncoder(given, model, {}).module.state_dict(), float_copy(untouched).state_dict())


def test_copies_are_as_the_vae_is_patched():
    given, _ = made("kl")
    learned = shifted(encoder_tensors(given))
    copied, own = ({ENCODER + name: p for name, p in float_copy(vae).named_parameters()} for vae in (with_encoder(given, learned), given))
    assert same({name: copied[name] for name in learned}, learned) and same({name: p for name, p in own.items() if name in learned}, encoder_tensors(given))


def test_copies_are_not_loaded():
    given, _ = made("kl")
    module, learned = given.first_stage_model, shifted(encoder_tensors(given))
    patched = with_encoder(given, learned).patcher
    # As on a device that holds less than all of it: the host patches weights when they are used.
    patched.patch_model(patched.load_device, lowvram_model_memory=1)
    assert module.encoder.conv_in.weight_function and module.encoder.conv_in.comfy_cast_weights
    handle = module.encoder.conv_in._v = module.dynamic_vbars = Handle()
    copied = float_copy(given)
    assert not copied.encoder.conv_in.weight_function and not hasattr(copied.encoder.conv_in, "_v") and not hasattr(copied, "dynamic_vbars")
    assert module.encoder.conv_in._v is handle and module.encoder.conv_in.weight_function


class Handle:
    """Memory that has one owner."""

    def __deepcopy__(self, memo):
        raise AssertionError("two would free it")


@every_vae
def test_the_vae_is_as_it_was_after_an_error(monkeypatch, kind):
    with torch.inference_mode():
        given, _ = made(kind)
        before, plain = state(given), given.encode(pictures())
        robust = with_encoder(given, shifted(encoder_tensors(given)))
        with monkeypatch.context() as patch:
            patch.setattr(type(given.first_stage_model), "encode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                robust.encode(pictures())
        assert torch.equal(given.encode(pictures()), plain) and same(state(given), before)


@pytest.mark.parametrize(("kind", "other"), [("kl", "taesd"), ("taesd", "kl 16"), ("kl", "kl 16"), ("wan", "kl 16")])
def test_another_kind_of_vae_is_refused(kind, other):
    (given, model), tensors = made(other), encoder_tensors(made(kind)[0])
    with pytest.raises(ValueError, match="brings an encoder for another kind of VAE: .* does not fit this one. Connect the VAE"):
        with_encoder(given, tensors)
    with pytest.raises(ValueError, match="brings an encoder for another kind of VAE"):
        RobustEncoder(given, model, tensors)


@every_vae
def test_before_training_it_encodes_as_the_vae(kind):
    given, model = made(kind)
    with torch.inference_mode():
        expected = encode_pictures(given, model, pictures())
    encoder = RobustEncoder(given, model, encoder_tensors(given))
    found = encoder.encode(pictures().movedim(-1, 1)).detach()
    # The lab's is kept in half precision by the host where it can be; here it is trained in full.
    torch.testing.assert_close(found, expected.float(), atol=2e-2 if given.vae_dtype != torch.float32 else 1e-5, rtol=1e-3)


@every_vae
def test_it_learns_to_look_through_noise(kind):
    given, model = made(kind)
    with torch.inference_mode():
        before = state(given)
    clean = pictures(1, 32)
    noisy = (clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)) * 0.3).clamp(0, 1).movedim(-1, 1)
    tensors = encoder_tensors(given)
    with gradients():
        encoder = RobustEncoder(given, model, tensors)
        target = encoder.encode(clean.movedim(-1, 1)).detach()
        optimizer, errors = torch.optim.Adam(list(encoder.parameters()), 3e-4), []
        for _ in range(6):
            error = (encoder.encode(noisy) - target).square().mean()
            errors.append(float(error.detach()))
            optimizer.zero_grad()
            error.backward()
            assert all(p.grad is not None for p in encoder.parameters())
            optimizer.step()
    assert errors[-1] < 0.9 * errors[0]
    assert encoder.state_dict().keys() == tensors.keys() and not same(encoder.state_dict(), tensors)
    with torch.inference_mode():
        assert same(state(given), before)


def test_through_a_file_into_the_host(tmp_path):
    given, model = made("kl")
    learned = shifted(encoder_tensors(given))
    save_weights(Weights("restoration_adapter", "SD1.5", {}, learned), tmp_path / "a.safetensors")
    loaded = load_weights(tmp_path / "a.safetensors").tensors
    assert same(loaded, learned)
    encoder = RobustEncoder(given, model, encoder_tensors(given))
    encoder.load(loaded)
    with torch.inference_mode():
        found = model.process_latent_in(with_encoder(given, loaded).encode(pictures()))
    torch.testing.assert_close(found, encoder.encode(pictures().movedim(-1, 1)).detach(), atol=1e-5, rtol=1e-4)


def test_channels_of_the_tiny_vaes():
    assert [made(kind)[1].latent_format.latent_channels for kind in VAES] == [4, 16, 16, CHANNELS["wan"]]
