"""The environment is keyed by its pins, built once, and repaired when it was left half done."""

import shutil
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from mend.dev import cache, environment, pins
from mend.dev.console import DevError, run_step


def test_key_changes_with_every_pin():
    wanted = pins.environment_pins()
    keys = {pins.environment_key(wanted)} | {pins.environment_key({**wanted, name: "other"}) for name in wanted}
    assert len(keys) == 1 + len(wanted)
    assert pins.environment_key(pins.environment_pins()) == pins.environment_key(wanted)


def test_folder_is_built_once(tmp_path):
    builds = []
    for _ in range(2):
        cache.build_once(tmp_path / "env", "key", builds.append)
    assert len(builds) == 1


def test_interrupted_build_is_redone(tmp_path):
    folder = tmp_path / "env"

    def interrupted(target):
        (target / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(folder, "key", interrupted)
    assert not cache.is_complete(folder, "key")
    cache.build_once(folder, "key", lambda target: (target / "whole.txt").write_text("whole"))
    assert cache.is_complete(folder, "key")
    assert not (folder / "half.txt").exists()


@pytest.mark.parametrize("marker", ['{"key": "another"}', "", "{"])
def test_other_or_broken_marker_means_unfinished(tmp_path, marker):
    folder = tmp_path / "env"
    folder.mkdir()
    (folder / cache.MARKER).write_text(marker)
    assert not cache.is_complete(folder, "key")


def test_two_runs_at_once_build_once(tmp_path):
    builds = []

    def build(target):
        builds.append(target)
        time.sleep(0.3)

    threads = [threading.Thread(target=cache.build_once, args=(tmp_path / "env", "key", build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(builds) == 1


def test_home_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("MEND_HOME", str(tmp_path / "chosen"))
    assert cache.home() == tmp_path / "chosen"
    monkeypatch.delenv("MEND_HOME")
    assert cache.home() == cache.user_cache_folder() / "mend"


def test_users_host_needs_a_main_program(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(DevError, match="COMFYUI_PATH .* holds no main.py"):
        environment.ensure_environment()


def test_users_host_is_used_with_its_python(monkeypatch, tmp_path):
    (tmp_path / "main.py").touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.31.2"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    found = environment.ensure_environment()
    assert (found.host, found.version) == (tmp_path, "0.31.2")
    assert found.python.samefile(sys.executable)


def test_failed_step_says_what_failed():
    with pytest.raises(DevError, match="brewing failed with exit code 3"):
        run_step("brewing", [sys.executable, "-c", "import sys; sys.exit(3)"])


def test_venv_failure_names_the_package(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ensurepip is not available")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(DevError, match="python3-venv"):
        environment.create_venv(tmp_path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own, in which a virtual environment without anything in it stands for an installation."""
    monkeypatch.setenv("MEND_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(environment, "create_venv", lambda folder: venv.create(folder, symlinks=sys.platform != "win32"))
    monkeypatch.setattr(environment.host_source, "ensure_host", lambda version, python: tmp_path)
    monkeypatch.setattr(environment, "run_step", lambda title, command: None)
    return tmp_path / "home"


@pytest.mark.skipif(sys.platform == "win32", reason="there the environment's interpreter is no link")
def test_an_environment_whose_python_has_gone_is_built_again(home, capsys):
    python = environment.managed_python()
    kept = python.parent.parent / "kept"
    kept.touch()
    assert environment.managed_python() == python and kept.exists()
    python.unlink()
    python.symlink_to(home / "gone")
    assert environment.managed_python() == python and environment.starts(python.parent.parent)
    assert not kept.exists() and "no longer works; building it again" in capsys.readouterr().err


def test_an_interpreter_that_fails_does_not_work(tmp_path):
    assert not environment.starts(tmp_path)
    python = environment.python_in(tmp_path)
    python.parent.mkdir()
    if sys.platform != "win32":
        python.write_text("#!/bin/sh\nexit 103\n")
        python.chmod(0o755)
        assert not environment.starts(tmp_path)


def test_what_no_longer_works_is_built_again_and_an_interrupted_removal_is_not_taken_for_whole(tmp_path, monkeypatch):
    folder = tmp_path / "env"
    cache.build_once(folder, "key", lambda target: (target / "first").touch())

    def interrupted(target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "remove_tree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.build_once(folder, "key", lambda target: None, works=lambda target: False)
    cache.build_once(folder, "key", lambda target: (target / "second").touch())
    assert [file.name for file in folder.iterdir() if file.name != cache.MARKER] == ["second"]


def test_what_a_killed_run_left_goes_before_space_is_asked_for(home, monkeypatch):
    left = home / "environments" / pins.environment_key(pins.environment_pins()) / "half"
    left.parent.mkdir(parents=True)
    left.touch()
    room = {True: 2**30, False: 2**40}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=room[left.exists()]))
    assert environment.managed_python().exists()


def test_a_small_disk_is_an_error_that_says_how_much_is_needed(home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    with pytest.raises(DevError, match=r"has 1.0 GiB free; the environment needs about 12"):
        environment.managed_python()


def test_hosts_of_the_cache_folder_are_not_the_users(home, tmp_path):
    assert not environment.Environment(Path(sys.executable), home / "hosts" / "1" / "ComfyUI", "1").is_users
    assert environment.Environment(Path(sys.executable), tmp_path / "ComfyUI", "1").is_users


@pytest.mark.skipif(sys.platform == "win32", reason="locks are not inherited there")
def test_orphaned_installer_keeps_the_lock(tmp_path):
    lock = tmp_path / "env.lock"
    with cache.locked(lock):
        installer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with lock.open("a+b") as file:
        assert not cache._try_lock(file.fileno())
        installer.communicate(b"\n")
        assert cache._try_lock(file.fileno())
