"""A few steps of `python dev train-lab` write weights that can be loaded, on pictures of their own."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mend.lab import train
from mend.lab.resume import OtherRun, save_run

STEPS, PICTURES = 2, 8


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Where weights go, in place of the pack's own."""
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    return tmp_path


def tensors(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def save_and_die(*state):
    save_run(*state)
    raise KeyboardInterrupt


def test_the_model_of_pixels_learns_without_a_vae_and_goes_on_where_it_was_stopped(written, monkeypatch):
    pixel(written / "whole")
    whole, _ = tensors(train.weights_file("pixel"))
    with monkeypatch.context() as patched:
        patched.setattr(train, "SAVE_EVERY", 0)
        patched.setattr(train, "save_run", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            pixel(written / "parts")
    assert tensors(train.weights_file("pixel"))[1]["mend.lab.steps"] == "1"
    pixel(written / "parts")
    found, metadata = tensors(train.weights_file("pixel"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in found.items())
    shipped, _ = tensors(train.Path(train.__file__).parent / "weights" / "pixel.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in shipped.items()}
    assert metadata["mend.kind"] == "lab_pixel" and metadata["mend.lab.steps"] == str(STEPS)
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in found.values())
    assert not list((written / "whole").glob("latents-*")), "pixels need no latents"


def pixel(folder, *more):
    train.train_denoiser("pixel", folder, torch.device("cpu"), STEPS, PICTURES, *more)


def test_a_run_that_is_killed_when_it_is_saved_has_its_weights(written, monkeypatch):
    def killed(*state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_run", killed)
        with pytest.raises(KeyboardInterrupt):
            pixel(written)
    first, metadata = tensors(train.weights_file("pixel"))
    assert metadata["mend.lab.steps"] == str(STEPS)
    pixel(written)
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors(train.weights_file("pixel"))[0].items())


def test_a_run_of_other_steps_or_pictures_is_refused_and_stays(written):
    pixel(written)
    before, first = (written / "pixel.run.safetensors").read_bytes(), tensors(train.weights_file("pixel"))[0]
    for steps, pictures in ((STEPS + 1, PICTURES), (STEPS, PICTURES + 1)):
        with pytest.raises(OtherRun, match=f"pictures {PICTURES}, steps {STEPS}; now pictures {pictures}, steps {steps}"):
            train.train_denoiser("pixel", written, torch.device("cpu"), steps, pictures)
    assert (written / "pixel.run.safetensors").read_bytes() == before
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors(train.weights_file("pixel"))[0].items())


def test_a_decoder_of_another_vae_does_not_write_over_it(written):
    def write_vae(scale):
        model = train.build_autoencoder()
        model.taesd_encoder[-1].weight.data.mul_(scale)
        train.save_weights(train.weights_file("vae"), model.state_dict(), {})
        return tensors(train.weights_file("vae"))[0]

    def decoder():
        train.train_autoencoder(written, torch.device("cpu"), 1, PICTURES, decoder_only=True)

    first = write_vae(1)
    decoder()
    trained, _ = tensors(train.weights_file("vae"))
    assert {name.partition(".")[0] for name, tensor in trained.items() if not torch.equal(first[name], tensor)} >= {"taesd_decoder"}
    assert all(torch.equal(first[name], tensor) for name, tensor in trained.items() if name.startswith("taesd_encoder."))
    other = write_vae(2)
    with pytest.raises(OtherRun, match="latents"):
        decoder()
    assert all(torch.equal(other[name], tensor) for name, tensor in tensors(train.weights_file("vae"))[0].items())


def test_weights_that_have_gone_are_written_again_without_training(written, monkeypatch, capsys):
    pixel(written)
    first, metadata = tensors(train.weights_file("pixel"))
    train.weights_file("pixel").unlink()
    capsys.readouterr()
    arguments = ["train-lab", "pixel", "--cache", str(written), "--steps", str(STEPS), "--pictures", str(PICTURES)]
    monkeypatch.setattr("sys.argv", arguments)
    train.main()
    again, same = tensors(train.weights_file("pixel"))
    assert same == metadata and all(torch.equal(first[name], again[name]) for name in first)
    train.weights_file("pixel").write_bytes(b"the user's own")
    train.main()
    assert train.weights_file("pixel").read_bytes() == b"the user's own"
    assert "step" not in capsys.readouterr().out


def test_the_vae_and_its_decoder_share_weights():
    assert train.weights_file("decoder") == train.weights_file("vae") == train.WEIGHTS / "vae.safetensors"
    assert train.weights_file("dit") == train.WEIGHTS / "dit.safetensors"


def test_an_array_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "array-8.npy"

    def killed(stream, array):
        stream.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train.save_array(file, np.arange(4))
    assert not file.exists()
    train.save_array(file, np.arange(4))
    assert (np.load(file, mmap_mode="r") == np.arange(4)).all() and list(tmp_path.iterdir()) == [file]


def test_latents_are_whole_or_not_there(written, monkeypatch):
    monkeypatch.setattr(train, "WEIGHTS", train.Path(train.__file__).parent / "weights")
    monkeypatch.setattr(train, "save_array", lambda file, array: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.encode_pictures(written / "cache", torch.device("cpu"), PICTURES)
    assert not list((written / "cache").glob("latents-*"))


def test_captions_are_read_once(written, monkeypatch):
    first = train.captions(written / "cache", PICTURES)
    monkeypatch.setattr(train, "describe", None)
    assert (train.captions(written / "cache", PICTURES) == first).all() and first.shape[0] == PICTURES
