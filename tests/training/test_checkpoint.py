"""Checkpoints survive whatever happens while they are written, and training goes on from them bit for bit."""

import errno
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from mend.tests.training.dummies import DummyPairs, Watcher, same, trainee
from mend.training import checkpoint as checkpoints
from mend.training.checkpoint import LOCK, Checkpoint, RunFolder, TrainingError, open_run
from mend.training.loop import describe_run, train
from mend.training.settings import Settings
from mend.training.trainee import Models

SETTINGS = Settings(steps=8, batch=2, rate=1e-2, validate_every=0)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(folder, watcher=None):
    learner, pairs = trainee(), DummyPairs()
    opened = open_run(folder, "run", describe_run(learner, pairs, Models(), SETTINGS), SETTINGS.steps)
    return train(learner, pairs, Models(), SETTINGS, opened, watcher or Watcher())


def some(step, size=3):
    losses = torch.tensor([0.1, float("nan")], dtype=torch.float64)
    return Checkpoint(step, {"a": torch.full((size,), float(step)), "losses": losses}, {"b": [1, None, 0.1]})


def experiment(command, folder):
    """Run tests/training/forks.py in a fresh process and return what it found."""
    arguments = [sys.executable, "-m", "mend.tests.training.forks", command, folder]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@forks
@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    found = experiment("kill", tmp_path)
    assert found["kills"] >= 3 and found["status"] == [0, 0], found
    assert found["alike"] and found["folders"] == ["run"], found
    kept = [name for name in found["files"] if name != LOCK]  # some systems keep the lock's empty file
    assert kept == ["checkpoint_000000149.safetensors", "checkpoint_000000150.safetensors", "run.json", "validation"]


def test_what_is_saved_comes_back(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(some(3))
    loaded = folder.load()
    assert loaded.step == 3 and loaded.facts == some(3).facts
    assert torch.equal(loaded.tensors["a"], some(3).tensors["a"]) and loaded.tensors["losses"].dtype == torch.float64
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_000000003.safetensors"]


@pytest.mark.parametrize("keep", [2, 3])
def test_only_the_last_ones_stay(tmp_path, keep):
    for step in range(1, 7):
        RunFolder(tmp_path, keep).save(some(step))
    assert RunFolder(tmp_path).steps() == [6, 5, 4][:keep]


def test_one_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch, caplog):
    delete = type(tmp_path).unlink

    def unlink(path, missing_ok=False):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "another program uses it", str(path))
        delete(path, missing_ok)

    folder = RunFolder(tmp_path, 1)
    with monkeypatch.context() as held:
        held.setattr(type(tmp_path), "unlink", unlink)
        for step in (1, 2):
            folder.save(some(step))
    assert folder.steps() == [2, 1] and "checkpoint_000000001.safetensors cannot be deleted" in caplog.text
    folder.save(some(3))
    assert folder.steps() == [3]


@pytest.mark.parametrize("damage", ["cut", "emptied", "other", "gone"])
def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    whole = run(tmp_path / "whole")
    run(tmp_path, Watcher(stop_after=3))
    run(tmp_path, Watcher(stop_after=2))
    file = tmp_path / "run" / "checkpoint_000000005.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "other": b"\0" * len(content)}[damage])
    watcher = Watcher()
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path, watcher)
    assert watcher.progress[0].step == 4 and same(again.tensors, whole.tensors)
    assert damage == "gone" or "checkpoint_000000005.safetensors is broken" in caplog.text


def test_without_any_whole_checkpoint_it_begins_again(tmp_path):
    first = run(tmp_path)
    for file in (tmp_path / "run").glob("checkpoint*"):
        file.write_bytes(b"")
    assert same(run(tmp_path).tensors, first.tensors)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True) if sys.platform == "linux" else None
    if mounted is None or mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_earlier_checkpoints_stay(small_disk):
    run(small_disk, Watcher(stop_after=3))
    before = (small_disk / "run" / "checkpoint_000000003.safetensors").read_bytes()
    (small_disk / "ballast").write_bytes(b"\0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(TrainingError, match="run cannot be written: the disk is full. Earlier checkpoints in it are whole: make room and"):
        run(small_disk)
    assert (small_disk / "run" / "checkpoint_000000003.safetensors").read_bytes() == before
    assert not list((small_disk / "run").glob(".*")), "nothing half written stays"
    (small_disk / "ballast").unlink()
    assert same(run(small_disk).tensors, run(small_disk / "whole").tensors)


def test_a_full_disk_is_named_before_training_begins(small_disk):
    (small_disk / "ballast").write_bytes(b"\0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(TrainingError, match="the disk is full"):
        run(small_disk)


@pytest.mark.parametrize("code, text", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EACCES, "Permission denied")])
def test_faults_while_writing_are_named(tmp_path, monkeypatch, code, text):
    folder = RunFolder(tmp_path)
    folder.save(some(1))

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoints.os, "replace", fail)
    with pytest.raises(TrainingError, match=text):
        folder.save(some(2))
    monkeypatch.undo()
    assert folder.load().step == 1 and len(list(tmp_path.iterdir())) == 1


def test_the_text_of_a_full_disk_is_understood_on_windows(tmp_path, monkeypatch):
    def fail(*arguments):
        raise checkpoints.SafetensorError("Error while serializing: I/O error: There is not enough space on the disk. (os error 112)")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(TrainingError, match="the disk is full"):
        RunFolder(tmp_path).save(some(1))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    (tmp_path / "run_2").write_text("a file")
    (tmp_path / "run_3").mkdir()
    assert open_run(tmp_path, "run", {"a": 1}, 5).path.name == "run_3", "an empty folder is as good as none"
    assert open_run(tmp_path, "run", {"a": 2}, 5).path.name == "run_4"
    assert open_run(tmp_path, "run", {"a": 1}, 5).path.name == "run_3"
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"] and (tmp_path / "run_2").read_text() == "a file"


def test_a_run_that_went_further_is_not_turned_back(tmp_path):
    open_run(tmp_path, "run", {"a": 1}, 5).save(some(4))
    assert open_run(tmp_path, "run", {"a": 1}, 4).path.name == "run"
    assert open_run(tmp_path, "run", {"a": 1}, 3).path.name == "run_2"


@pytest.mark.parametrize("name", ["", "  ", "..", "a/b", "a\\b", "/tmp", ".hidden", "C:", "a:b", "ends.", "-"])
def test_names_that_are_no_folders_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        open_run(tmp_path, name, {}, 1)


def test_names_of_people_are_taken(tmp_path):
    assert open_run(tmp_path, " Fotos von Oma 2, 1960".replace(",", ""), {}, 1).path.name == "Fotos von Oma 2 1960"
    assert open_run(tmp_path, "\u6559\u5e08-1.5", {}, 1).path.exists()


def test_what_a_killed_process_left_is_cleared(tmp_path):
    run = open_run(tmp_path, "run", {}, 5)
    folder = run.path
    (folder / ".checkpoint_000000004.safetensors.123.tmp").write_bytes(b"half")
    (folder / ".tmpAb12yZ").write_bytes(b"half")
    with run.alone():
        assert {file.name for file in folder.iterdir()} == {"run.json", LOCK}


def test_a_folder_with_nothing_but_leftovers_is_as_good_as_none(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.123.tmp").write_bytes(b"half")
    assert open_run(tmp_path, "run", {}, 5).path.name == "run"


def test_a_drive_without_locks_keeps_nobody_out_and_is_named(tmp_path, monkeypatch, caplog):
    for error in (NotImplementedError("use SoftFileLock"), OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))):
        def fail(self, error=error):
            raise error

        monkeypatch.setattr(checkpoints.FileLock, "acquire", fail)
        with caplog.at_level(logging.WARNING), RunFolder(tmp_path).alone():
            pass
        assert "has no locks" in caplog.text
        caplog.clear()


def test_a_folder_that_cannot_be_cleared_is_let_go(tmp_path, monkeypatch):
    def fail(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_leftovers", fail)
        with pytest.raises(TrainingError, match="Permission denied") as kept, RunFolder(tmp_path).alone():
            pass
    with RunFolder(tmp_path).alone():
        assert kept.value is not None, "though somebody holds on to the error"


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    run = open_run(tmp_path, "run", {}, 5)
    with run.alone(), pytest.raises(TrainingError, match="somebody trains in"), RunFolder(run.path).alone():
        pass
    with run.alone():
        pass
    code = "import sys; from pathlib import Path; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(run.path / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(TrainingError, match="somebody trains in"), run.alone():
            pass
        other.kill()
    with run.alone():
        pass
