"""Commands run in the environment, with the host's modules in reach and the checkout root out of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mend.dev import cache, launching, workspace
from mend.dev.commands import split_at_dashes
from mend.dev.console import DevError
from mend.dev.environment import ensure_environment

HOST = Path(os.environ["COMFYUI_PATH"])
WHERE_IS_NODES = "import importlib.util, sys; print(importlib.util.find_spec('nodes').origin, importlib.util.find_spec('mend').origin)"


def dev(*arguments, **options):
    """Runs `python dev ARGUMENTS` in the checkout."""
    return subprocess.run(
        [sys.executable, str(workspace.PACK / "dev"), *arguments], cwd=workspace.PACK, capture_output=True, text=True, **options
    )


def test_exec_passes_on_exit_code_arguments_and_folder(tmp_path):
    code = "import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(7)"
    done = subprocess.run(
        [sys.executable, str(workspace.PACK / "dev"), "exec", "--", "python", "-c", code, "--host", "x", "--"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7
    assert done.stdout.strip() == f"{tmp_path} ['--host', 'x', '--']"


@pytest.mark.skipif(not HOST.is_relative_to(cache.home()), reason="the host is the user's own: nothing is set up")
def test_a_second_start_adds_under_five_seconds():
    variables = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "COMFYUI_PYTHON")}
    begun = time.monotonic()
    done = dev("exec", "--", "python", "-c", "import sys; print(sys.prefix)", env=variables)
    assert time.monotonic() - begun < 5
    assert Path(done.stdout.strip()).is_relative_to(cache.home())


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="there python -c always looks in the working folder first; modules are started another way"
)
def test_nodes_is_the_hosts_and_mend_is_the_pack():
    origins = dev("exec", "--", "python", "-c", WHERE_IS_NODES).stdout.split()
    assert Path(origins[0]) == HOST / "nodes.py"
    assert Path(origins[1]).samefile(workspace.PACK / "__init__.py")


def test_module_runner_hides_the_checkout_without_safe_path():
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(launching.MODULE_RUNNER), "site"],
        cwd=workspace.PACK,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [line.strip(" ',") for line in done.stdout.splitlines() if line.startswith("    ")]
    assert paths and not {str(workspace.PACK), str(workspace.PACK / "dev"), ""} & set(paths)


def test_missing_program_and_missing_command_are_explained():
    assert "no program surely-not-there" in dev("exec", "--", "surely-not-there").stderr
    assert "nothing to run" in dev("exec").stderr
    assert "no measurement nonesuch" in dev("bench", "nonesuch").stderr
    assert "no measurement report; there are adapter, " in dev("bench", "report").stderr


def test_tools_of_the_environment_come_first():
    environment = ensure_environment()
    assert Path(launching.resolve_command(environment, ["ruff", "check"])[0]).parent == environment.scripts
    assert launching.resolve_command(environment, ["python", "-m", "pytest", "-q"])[1:] == [str(launching.MODULE_RUNNER), "pytest", "-q"]


def test_dashes_part_the_arguments():
    assert split_at_dashes(["exec", "--host", "1", "--", "a", "--", "b"]) == (["exec", "--host", "1"], ["a", "--", "b"])
    assert split_at_dashes(["test"]) == (["test"], [])


def test_link_follows_the_checkout_and_spares_folders(tmp_path):
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.mkdir()
    new.mkdir()
    workspace.link_folder(old, link)
    workspace.link_folder(new, link)
    assert link.samefile(new)
    (old / "file").touch()
    with pytest.raises(DevError, match="in the way"):
        workspace.link_folder(new, old)
