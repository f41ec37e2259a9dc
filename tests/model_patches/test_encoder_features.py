"""The features of VAE encoders: what goes into the head, of every layout, through the host's own encoding."""

import pytest
import torch
from torch import nn

import comfy.sd
import comfy.utils
from mend.lab.prior import WEIGHTS
from mend.model_patches.encoder_features import feature_channels, feature_vae, features
from mend.model_patches.host_gradients import gradients
from mend.model_patches.lq_encoder import LQEncoder, check_feature_width, frozen_features, lq_encoder_tensors, lq_vae
from mend.model_patches.robust_encoder import ENCODER
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import base
from mend.tests.training.tiny_training import video_vae


def lab_vae():
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(WEIGHTS / "vae.safetensors"), safe_load=True))


VAES = {"usual": tiny_models.vae, "16 channels": lambda: tiny_models.vae(16), "lab": lab_vae, "video": video_vae}
WIDTHS = {"usual": 32, "16 channels": 32, "lab": 64, "video": 32}
every_vae = pytest.mark.parametrize("kind", VAES)


def lq_features(vae, pictures, tensors):
    return lq_vae(vae, tensors).encode(pictures).float()


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@every_vae
def test_the_head_makes_the_latent_of_them(kind):
    vae = VAES[kind]()
    seen = lq_features(vae, picture(1, 64, 48, 3), {})
    latent = vae.encode(picture(1, 64, 48, 3))
    assert feature_channels(vae) == WIDTHS[kind] == seen.shape[1] and seen.shape[2:] == latent.shape[2:]
    with torch.no_grad():
        model = vae.first_stage_model
        if kind == "lab":
            made = model.taesd_encoder[-1](seen) / model.vae_scale + model.vae_shift
        elif kind == "video":
            made = model.conv1(nn.Sequential(*model.encoder.head)(seen)).chunk(2, 1)[0]
        else:
            made = model.quant_conv(model.encoder.conv_out(nn.functional.silu(model.encoder.norm_out(seen)))).chunk(2, 1)[0]
    torch.testing.assert_close(made, latent.float(), rtol=1e-3, atol=1e-3 if kind == "lab" else 1e-5)  # the lab's VAE may run in half precision


@pytest.mark.parametrize("kind", ["usual", "lab"])
@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 64, 72, 3), (1, 71, 67, 3)], ids=str)
def test_sizes_are_those_of_latents(kind, shape):
    vae = VAES[kind]()
    assert lq_features(vae, picture(*shape), {}).shape[2:] == vae.encode(picture(*shape)).shape[2:]
    assert len(lq_features(vae, picture(*shape), {})) == shape[0]


def test_each_picture_of_a_batch_is_seen_alone():
    vae, pictures = tiny_models.vae(), picture(3, 64, 64, 3)
    together = lq_features(vae, pictures, {})
    # A batch may be added up in another order.
    torch.testing.assert_close(together, torch.cat([lq_features(vae, one, {}) for one in pictures.split(1)]), rtol=1e-4, atol=1e-5)


def test_videos_in_pieces_of_time():
    vae = video_vae()
    frames = lq_features(vae, picture(9, 32, 32, 3), {})
    assert frames.shape == (1, 32, 3, 4, 4) and vae.encode(picture(9, 32, 32, 3)).shape[2:] == frames.shape[2:]
    alone = frozen_features(vae, picture(9, 32, 32, 3))
    assert alone.shape == (9, 32, 1, 4, 4) and torch.equal(alone[:1], frames[:, :, :1])


def test_tiles_when_memory_is_short(monkeypatch):
    vae, pictures = tiny_models.vae(), picture(1, 576, 576, 3)
    whole = lq_features(vae, pictures, {})
    seeing, encode = feature_vae(vae), type(feature_vae(vae).first_stage_model).encode

    def short(self, pixels):
        if pixels.shape[-1] * pixels.shape[-2] > 512 * 512:
            raise torch.OutOfMemoryError
        return encode(self, pixels)

    monkeypatch.setattr(type(seeing.first_stage_model), "encode", short)
    with torch.inference_mode():  # as the host runs nodes
        tiled = lq_features(vae, pictures, {})
    assert tiled.shape == whole.shape and tiled.isfinite().all()


def test_the_vae_stays_as_it_is():
    vae = tiny_models.vae()
    before = vae.encode(picture(1, 64, 64, 3))
    lq_features(vae, picture(1, 64, 64, 3), lq_encoder_tensors(vae))
    assert torch.equal(vae.encode(picture(1, 64, 64, 3)), before)
    assert not any(part._forward_pre_hooks for part in vae.first_stage_model.modules())


def test_an_error_leaves_no_hook():
    vae = tiny_models.vae()
    with pytest.raises(RuntimeError):
        features(vae.first_stage_model, torch.zeros(1, 5, 16, 16))
    assert not any(part._forward_pre_hooks for part in vae.first_stage_model.modules())


# The encoder that learns


@every_vae
def test_a_copy_sees_the_same_and_holds_nothing_of_the_head(kind):
    vae = VAES[kind]()
    tensors = lq_encoder_tensors(vae)
    head = ("decoder", "taesd_decoder", "encoder.norm_out", "encoder.conv_out", "quant", "encoder.head", "taesd_encoder.14", "conv1", "conv2")
    names = [name.removeprefix(ENCODER) for name in tensors]
    assert names and not any(name.startswith(head) for name in names)
    plain = lq_features(vae, picture(1, 64, 64, 3), {})
    assert torch.equal(lq_features(vae, picture(1, 64, 64, 3), tensors), plain)
    changed = {name: tensor * 1.1 for name, tensor in tensors.items()}
    assert not torch.equal(lq_features(vae, picture(1, 64, 64, 3), changed), plain)


@pytest.mark.parametrize("kind", ["usual", "video"])
def test_it_learns_as_it_looks(kind):
    vae = VAES[kind]()
    tensors = lq_encoder_tensors(vae)
    encoder = LQEncoder(vae, base("wan" if kind == "video" else "sd15").model, tensors)
    with gradients():
        found = encoder.features(picture(2, 64, 64, 3))
        found.square().mean().backward()
    torch.testing.assert_close(found.detach(), frozen_features(vae, picture(2, 64, 64, 3)), rtol=1e-3, atol=1e-4)
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    assert encoder.state_dict().keys() == tensors.keys() and all(name.startswith(ENCODER) for name in tensors)


# What is refused


def test_other_vaes_are_refused():
    vae = tiny_models.vae()
    with pytest.raises(ValueError, match="was made for a VAE with 64 encoder features, and this one has 32. Connect the VAE it was trained with."):
        check_feature_width(vae, 64)
    vae.first_stage_model = nn.Identity()
    with pytest.raises(ValueError, match="was made for another VAE: VAEs of the kind Identity are not supported. Use that of SD1.5"):
        check_feature_width(vae, 32)
    vae.first_stage_model = None
    with pytest.raises(RuntimeError, match="your checkpoint does not contain a valid VAE"):
        check_feature_width(vae, 32)
