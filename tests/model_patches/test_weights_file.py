"""Files of weights: whole or not there, never replaced, and refused by name when they are something else."""

import errno
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mend.model_patches.weights_file import Weights, load_weights, save_weights

TENSORS = {"a": torch.arange(15.0).reshape(3, 5) / 7, "b.alpha": torch.tensor(4.0)}
WEIGHTS = Weights("restoration_adapter", "SD1.5", {"size": "full", "rank": 4}, TENSORS, "mine")
METADATA = {"mend.kind": "k", "mend.version": "1", "mend.family": "f", "mend.config": "{}"}


def saved(folder, name="a_00001_.safetensors"):
    save_weights(WEIGHTS, folder / name)
    return folder / name


def test_round_trip(tmp_path):
    file = saved(tmp_path / "new" / "folder")
    found = load_weights(file)
    assert (found.kind, found.family, found.config, found.name) == (WEIGHTS.kind, WEIGHTS.family, WEIGHTS.config, file.name)
    assert found.tensors.keys() == TENSORS.keys() and all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["mend.kind"] == "restoration_adapter" and metadata["mend.version"] == "1" and metadata["mend.family"] == "SD1.5"
    assert metadata["mend.config"] == '{"rank": 4, "size": "full"}' and len(metadata) == 4


def test_views_and_parameters_are_written_as_they_look(tmp_path):
    def table():
        return torch.arange(12.0).reshape(3, 4)

    tensors = {"turned": table().T, "row": table()[1], "learned": torch.nn.Parameter(table())}
    save_weights(Weights("k", "f", {}, tensors), tmp_path / "views.safetensors")
    found = load_weights(tmp_path / "views.safetensors").tensors
    assert all(torch.equal(found[name], tensors[name].detach()) for name in tensors)


def test_a_file_is_never_replaced(tmp_path):
    file = saved(tmp_path)
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        save_weights(Weights("other", "f", {}, {}), file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_without_hard_links_it_is_renamed(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    file = saved(tmp_path)
    assert load_weights(file).family == "SD1.5" and os.listdir(tmp_path) == [file.name]
    with pytest.raises(FileExistsError):
        save_weights(WEIGHTS, file)
    assert os.listdir(tmp_path) == [file.name]


def test_a_full_disk_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource", reason="only where a process can limit the size of its files")
    large = Weights("k", "f", {}, {"a": torch.zeros(1 << 20)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="(?i)file too large|os error 27"):
            save_weights(large, tmp_path / "large.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def truncated(file):
    file.write_bytes(saved(file.parent, "whole.safetensors").read_bytes()[:-7])


def pickled(file):
    file.write_bytes(pickle.dumps({"a": 1}, protocol=2) * 10)


def with_metadata(metadata):
    return lambda file: save_file({"a": torch.zeros(2)}, file, metadata)


def unreadable(file):
    file.symlink_to(file)


UNUSABLE = {
    "truncated": (truncated, "is not a safetensors file, or only a part of one"),
    "header cut": (lambda file: file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{"), "is not a safetensors file, or only a part of one"),
    "empty": (lambda file: file.write_bytes(b""), "is not a safetensors file, or only a part of one"),
    "pickle": (pickled, "is not a safetensors file, or only a part of one"),
    "foreign": (with_metadata({"format": "pt"}), "was not made by this pack: its metadata lacks mend.kind, mend.version, mend.family, mend"),
    "no metadata": (with_metadata(None), "was not made by this pack: its metadata lacks mend.kind"),
    "config": (with_metadata({**METADATA, "mend.config": "{size"}), "was not made by this pack: its description is no JSON"),
    "no set of values": (with_metadata({**METADATA, "mend.config": "[]"}), "was not made by this pack: its description is '[]', and not a set"),
    "newer": (with_metadata({**METADATA, "mend.version": "2"}), "has version 2 of the file format, and this pack reads 1. Update the pack"),
    "folder": (lambda file: file.mkdir(), "there is no file x.safetensors. Put it into models/mend"),
    "missing": (lambda file: None, "there is no file x.safetensors. Put it into models/mend"),
    "broken link": (unreadable, "there is no file x.safetensors"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_files_are_refused_by_name(tmp_path, kind):
    make, message = UNUSABLE[kind]
    file = tmp_path / "x.safetensors"
    make(file)
    with pytest.raises(ValueError) as caught:
        load_weights(file)
    assert "x.safetensors" in str(caught.value) and message in str(caught.value)


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    file = tmp_path / "x.safetensors"
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError):
        load_weights(file)
    assert not (tmp_path / "sprung").exists()


def test_what_is_made_of_weights_is_made_once():
    weights, made = Weights("k", "f", {}, {}), []
    assert weights.once("a", lambda: made.append(1) or "A") == weights.once("a", lambda: made.append(2)) == "A"
    assert weights.once("b", lambda: "B") == "B" and made == [1]
    assert replace(weights, tensors={}).once("a", lambda: "of others") == "of others", "trained weights are not those they were trained from"
    assert json.dumps(weights.config) == "{}"
