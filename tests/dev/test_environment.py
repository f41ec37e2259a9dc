"""The environment is keyed by its pins, built once, and repaired when it was left half done."""

import subprocess
import sys
import threading
import time

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


@pytest.mark.skipif(sys.platform == "win32", reason="locks are not inherited there")
def test_orphaned_installer_keeps_the_lock(tmp_path):
    lock = tmp_path / "env.lock"
    with cache.locked(lock):
        installer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with lock.open("a+b") as file:
        assert not cache._try_lock(file.fileno())
        installer.communicate(b"\n")
        assert cache._try_lock(file.fileno())
