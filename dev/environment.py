"""The Python environment and the host to run in it: ours from the cache folder, or the user's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import cache, host_source, pins
from .console import DevError, run_step, say

INSTALLED_GIB = 7
NEEDED_GIB = 12  # with what pip keeps in its own cache


@dataclass(frozen=True)
class Environment:
    """A Python interpreter that can run a ComfyUI folder."""

    python: Path
    host: Path
    version: str

    @property
    def scripts(self) -> Path:
        """The folder of the interpreter's own programs, such as ruff and comfy-test."""
        return self.python.parent

    @property
    def is_users(self) -> bool:
        """Whether the host is the user's, and not one that was fetched into the cache folder."""
        return not self.host.resolve().is_relative_to((cache.home() / "hosts").resolve())


def ensure_environment(host_version: str | None = None) -> Environment:
    """The environment, set up first if need be. COMFYUI_PATH and COMFYUI_PYTHON count unless a host version is asked for."""
    own_host = os.environ.get("COMFYUI_PATH")
    if own_host and host_version is None:
        return user_environment(Path(own_host), os.environ.get("COMFYUI_PYTHON"))
    python = managed_python()
    version = host_version or pins.DEFAULT_HOST
    return Environment(python, host_source.ensure_host(version, python), version)


def user_environment(host: Path, python: str | None) -> Environment:
    """A ComfyUI of the user's, with the interpreter that runs it or, where none is named, with ours."""
    host = host.expanduser().resolve()
    if not (host / "main.py").is_file():
        raise DevError(f"COMFYUI_PATH is {host}, which holds no main.py. Set it to a ComfyUI folder, or unset it.")
    if python is None:
        say("COMFYUI_PYTHON is not set: running your ComfyUI with the environment made for the pinned one")
        return Environment(managed_python(), host, host_version_in(host))
    found = shutil.which(python)
    if found is None:
        raise DevError(f"COMFYUI_PYTHON is {python}, which is not a program. Set it to the Python that runs your ComfyUI.")
    warn_about_missing_tools(found)
    return Environment(Path(found).absolute(), host, host_version_in(host))


def warn_about_missing_tools(python: str) -> None:
    """Says what the user's own interpreter lacks; serving the host needs none of it."""
    lookup = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
    modules = ["pytest", "ruff", "comfy_cli", "comfy_test", "skimage", "sklearn", "piq", "diffusers", "accelerate", "xdist"]
    done = subprocess.run([python, "-c", lookup, *modules], capture_output=True, text=True, check=False)
    if done.stdout.strip():
        say(
            f"COMFYUI_PYTHON has no {done.stdout.strip()}; commands that need them will fail. Add all with: {python} -m pip install {' '.join(pins.TOOLS)}"
        )


def host_version_in(host: Path) -> str:
    """The version a ComfyUI folder states of itself."""
    try:
        text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return text.partition("__version__ =")[2].strip().strip("\"'") or "unknown"


def managed_python() -> Path:
    """The interpreter of the environment in the cache folder, which is installed unless it is there."""
    check_python()
    wanted = pins.environment_pins()
    key = pins.environment_key(wanted)
    return python_in(cache.build_once(cache.home() / "environments" / key, key, install, works=starts))


def starts(folder: Path) -> bool:
    """Whether the interpreter of a virtual environment starts: it does not when the Python that it was made with has gone."""
    try:
        return subprocess.run([str(python_in(folder)), "-I", "-S", "-c", ""], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def check_python() -> None:
    """Refuses interpreters that the pinned torch has no wheels for."""
    if not pins.OLDEST_PYTHON <= sys.version_info[:2] <= pins.NEWEST_PYTHON:
        raise DevError(
            "Python %d.%d cannot hold the pinned torch; start `python dev` with a Python from %d.%d to %d.%d."
            % (*sys.version_info[:2], *pins.OLDEST_PYTHON, *pins.NEWEST_PYTHON)
        )


def check_space() -> None:
    """Says before a long download that the disk is too small for it."""
    folder = cache.home()
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GIB:
        raise DevError(
            f"{folder} has {free:.1f} GiB free; the environment needs about {NEEDED_GIB}. Free some, or set MEND_HOME to another folder."
        )


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def install(folder: Path) -> None:
    """Fills an empty folder: a virtual environment with torch, all that the host names, and the tools."""
    check_space()
    say(f"setting up in {cache.home()} (about {INSTALLED_GIB} GiB; once, until the pins change)")
    create_venv(folder)
    python = python_in(folder)
    host = host_source.ensure_host(pins.DEFAULT_HOST, python)
    options = ["--prefer-binary", "--disable-pip-version-check"]
    requirements = [*pins.TORCH, *pins.TOOLS, "-r", host / "requirements.txt"]
    run_step("installing torch, the host's requirements and the tools", [python, "-m", "pip", "install", *options, *requirements])


def create_venv(folder: Path) -> None:
    """Makes a virtual environment with pip in it."""
    done = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevError(
            f"{sys.executable} cannot make a virtual environment:\n{(done.stdout + done.stderr).strip()}\n"
            "Install the venv package of your system's Python (on Debian and Ubuntu: python3-venv), or use another Python."
        )
