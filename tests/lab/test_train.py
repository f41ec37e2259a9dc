"""A few steps of `python dev train-lab` write weights that can be loaded, on pictures of their own."""

import pytest
import torch
from safetensors import safe_open

from mend.lab import train

STEPS, PICTURES = 2, 8


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Where weights go, in place of the pack's own."""
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    return tmp_path


def tensors(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def test_the_model_of_pixels_learns_without_a_vae_and_goes_on_where_it_was_stopped(written):
    for folder, stops in (("whole", (STEPS,)), ("parts", (1, STEPS))):
        for steps in stops:
            train.train_denoiser("pixel", written / folder, torch.device("cpu"), steps, PICTURES)
    found, metadata = tensors(written / "weights" / "pixel.safetensors")
    shipped, _ = tensors(train.Path(train.__file__).parent / "weights" / "pixel.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in shipped.items()}
    assert metadata["mend.kind"] == "lab_pixel" and metadata["mend.lab.steps"] == str(STEPS)
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in found.values())
    assert not list((written / "whole").glob("latents-*")), "pixels need no latents"


def test_captions_are_read_once(written, monkeypatch):
    first = train.captions(written / "cache", PICTURES)
    monkeypatch.setattr(train, "describe", None)
    assert (train.captions(written / "cache", PICTURES) == first).all() and first.shape[0] == PICTURES
