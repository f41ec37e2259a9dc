"""How programs are started in the environment: which interpreter, and what they can import."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import workspace
from .console import DevError
from .environment import Environment

MODULE_RUNNER = Path(__file__).with_name("run_module.py")


def child_environment(environment: Environment) -> dict[str, str]:
    """Environment variables under which `mend`, `comfy` and the host's own `nodes` can be imported, and the checkout root cannot."""
    variables = dict(os.environ)
    imports = [environment.host, workspace.base_folder() / "custom_nodes"]
    variables.update(
        COMFYUI_PATH=str(environment.host),
        COMFYUI_PYTHON=str(environment.python),
        PYTHONPATH=os.pathsep.join(str(path) for path in imports),
        PYTHONSAFEPATH="1",
        PYTHONUTF8="1",
        PATH=str(environment.scripts) + os.pathsep + os.environ.get("PATH", ""),
        DO_NOT_TRACK="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    variables.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow each other down on a busy machine
    return variables


def module_command(environment: Environment, module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command that runs a module of the environment or of the pack without the working folder on the import path."""
    return [str(environment.python), str(MODULE_RUNNER), module, *arguments]


def resolve_command(environment: Environment, command: Sequence[str]) -> list[str]:
    """Turns `python` into the environment's interpreter and other names into its programs, where it has them."""
    name, *arguments = command
    if name in ("python", "python3"):
        if len(arguments) >= 2 and arguments[0] == "-m":
            return module_command(environment, arguments[1], arguments[2:])
        return [str(environment.python), *arguments]
    found = shutil.which(name, path=str(environment.scripts)) or shutil.which(name)
    if found is None:
        raise DevError(f"there is no program {name}, neither in the environment nor on this machine.")
    return [found, *arguments]


def run_in_environment(environment: Environment, command: Sequence[str], cwd: Path | None = None) -> int:
    """Runs a command to its end with its output passed through and returns its exit code."""
    with subprocess.Popen(command, env=child_environment(environment), cwd=cwd) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()  # the terminal sends Ctrl-C to the child as well: let it end in its own way
        except SystemExit:
            process.terminate()
            raise
    return code if code >= 0 else 128 - code


def run_module(environment: Environment, module: str, arguments: Sequence[str] = ()) -> int:
    """Runs a module in the environment and returns its exit code."""
    return run_in_environment(environment, module_command(environment, module, arguments))
