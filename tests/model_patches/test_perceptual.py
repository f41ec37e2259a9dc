"""The perceptual distance: torchvision's VGG16 where the user has it, else the VAE encoder's features."""

import pytest
import torch
from safetensors.torch import save_file

import comfy.sd
import comfy.utils
import folder_paths
from mend.lab.prior import WEIGHTS
from mend.model_patches.host_vae import LatentEncoder
from mend.model_patches.perceptual import VGG_LAYERS, Perceptual, vgg16_weights


def picture(*size, seed=0):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder(tiny):
    return LatentEncoder(tiny.vae(4), tiny.model("sd15").model)


@pytest.fixture
def vgg():
    from torchvision.models.vgg import make_layers

    torch.manual_seed(0)
    return make_layers([64, 64, "M", 128, 128], batch_norm=False).requires_grad_(False)


@pytest.fixture
def vgg_tensors(vgg):
    return {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "mend", ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "perceptual").mkdir()
    return tmp_path / "perceptual" / "vgg16.safetensors"


def test_names_tell_which_features_are_used(encoder, vgg_tensors):
    assert Perceptual(encoder, None).name == "VAE encoder"
    assert Perceptual(encoder, vgg_tensors).name == "VGG16"


def test_vgg_features_are_torchvisions(encoder, vgg, vgg_tensors):
    a, b = picture(16, 24, seed=1), picture(16, 24, seed=2)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = (vgg((a - mean) / deviation) - vgg((b - mean) / deviation)).square().mean()
    torch.testing.assert_close(Perceptual(encoder, vgg_tensors)(a, b), expected)


@pytest.fixture
def lab_encoder(tiny):
    return LatentEncoder(comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(WEIGHTS / "vae.safetensors"))), tiny.model("sd3").model)


@pytest.mark.parametrize("size", [(32, 40), (1, 1), (7, 513), (9, 5)])
def test_distance_is_zero_only_between_equals(lab_encoder, size):
    distance = Perceptual(lab_encoder, None)
    with torch.no_grad():
        assert distance(picture(*size), picture(*size)) == 0
        assert distance(picture(*size), 1 - picture(*size)) > 0


def test_only_the_first_picture_carries_a_gradient(encoder):
    a, b = picture(16, 16, seed=1).requires_grad_(True), picture(16, 16, seed=2).requires_grad_(True)
    Perceptual(encoder, None)(a, b).backward()
    assert a.grad.any() and b.grad is None


def test_vgg_read_while_a_prompt_runs_lets_gradients_through(encoder, model_folder, vgg_tensors):
    save_file(vgg_tensors, model_folder)
    a = picture(16, 16, seed=1).requires_grad_(True)
    with torch.inference_mode():
        kept = {name: tensor.clone() for name, tensor in vgg16_weights().items()}
    assert all(tensor.is_inference() for tensor in kept.values())
    Perceptual(encoder, kept)(a, picture(16, 16, seed=2)).backward()
    assert a.grad.any()


def test_without_the_file_there_is_no_vgg(model_folder):
    assert vgg16_weights() is None


def test_the_file_is_found_and_read(model_folder, vgg_tensors):
    save_file({**vgg_tensors, "classifier.0.weight": torch.zeros(2)}, model_folder)
    found = vgg16_weights()
    assert sorted(found) == sorted(vgg_tensors) and len(found) == 2 * len(VGG_LAYERS)
    assert all(torch.equal(found[name], vgg_tensors[name]) for name in found)


def test_an_incomplete_file_is_refused(model_folder, vgg_tensors):
    del vgg_tensors["features.5.bias"]
    save_file(vgg_tensors, model_folder)
    with pytest.raises(ValueError, match=r"vgg16.safetensors lacks features.5.bias"):
        vgg16_weights()
