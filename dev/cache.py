"""The cache folder outside the checkout: where it is, and how something in it is built exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .console import DevError, say

MARKER = "mend-complete.json"


def home() -> Path:
    """The cache folder: MEND_HOME, else `mend` in the platform's user cache folder."""
    chosen = os.environ.get("MEND_HOME")
    return Path(chosen).expanduser().resolve() if chosen else user_cache_folder() / "mend"


def user_cache_folder() -> Path:
    """Where this platform keeps a user's caches."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def is_complete(folder: Path, key: str) -> bool:
    """Whether `folder` was built to its end for this key."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")) == {"key": key}
    except (OSError, ValueError):
        return False


def build_once(folder: Path, key: str, build: Callable[[Path], None], works: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Has `build` fill `folder` unless an earlier run finished it and it still works. What is there otherwise is removed first."""
    if is_complete(folder, key) and works(folder):
        return folder
    with locked(folder.with_name(folder.name + ".lock")):
        if is_complete(folder, key):
            if works(folder):
                return folder
            say(f"{folder} no longer works; building it again")
            (folder / MARKER).unlink()  # first, so that what an interrupted removal leaves is not taken for whole
        elif folder.exists():
            say(f"removing what an interrupted run left in {folder}")
        if folder.exists():
            remove_tree(folder)
        folder.mkdir(parents=True)
        build(folder)
        unfinished = folder / (MARKER + ".part")
        unfinished.write_text(json.dumps({"key": key}), encoding="utf-8")
        os.replace(unfinished, folder / MARKER)
    return folder


def remove_tree(folder: Path) -> None:
    """Removes a folder of ours, or says which one could not be removed."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise DevError(f"cannot remove {folder}: {error}. Close programs that use it, or remove it by hand, and run again.") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file between processes; the system frees it when its holder ends, however it ends.

    Where the system allows it, programs started meanwhile hold it too: an installer that outlives us is waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        waiting = False
        while not _try_lock(file.fileno()):
            if not waiting:
                say(f"another run is setting up; waiting for {path}")
                waiting = True
            time.sleep(1)
        os.set_inheritable(file.fileno(), True)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
