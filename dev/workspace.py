"""Where the host works for one checkout: a base folder with the pack linked into custom_nodes as `mend`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from . import cache
from .console import DevError

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "mend"


def base_folder() -> Path:
    """This checkout's base folder, with the link to the pack in place."""
    name = hashlib.sha256(str(PACK).encode()).hexdigest()[:12]
    base = cache.home() / "checkouts" / name
    with cache.locked(base.with_name(name + ".lock")):
        prepare_base(base)
    return base


def prepare_base(base: Path) -> Path:
    """Makes `base` something to start the host with, and returns its custom_nodes folder."""
    custom_nodes = base / "custom_nodes"
    for folder in (custom_nodes, base / "models", base / "input", base / "output", base / "user"):
        folder.mkdir(parents=True, exist_ok=True)
    link_folder(PACK, custom_nodes / PACK_NAME)
    return custom_nodes


def link_folder(target: Path, link: Path) -> None:
    """Makes `link` lead to the folder `target`: a symbolic link, or on Windows without the right to make one a junction."""
    if link.exists() and os.path.samefile(link, target):
        return
    remove_link(link)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        if sys.platform != "win32":
            raise DevError(f"cannot link {target} to {link}: {error}") from error
        done = subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DevError(f"cannot link {target} to {link}: {done.stderr.strip()}") from error


def remove_link(link: Path) -> None:
    """Removes a link that leads elsewhere or nowhere, but no folder with something in it."""
    if link.is_symlink():
        link.unlink()
    elif os.path.lexists(link):
        try:
            link.rmdir()  # a junction, or an empty folder
        except OSError as error:
            raise DevError(f"{link} is in the way: it should be a link to the pack. Move it elsewhere and run again.") from error
