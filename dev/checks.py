"""`python dev test`: everything a change must pass."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import pins, workspace
from .console import DevError, elapsed, say
from .environment import Environment, ensure_environment
from .launching import module_command, run_in_environment, run_module
from .server import running_server

ENDPOINT = Path(__file__).with_name("validate_endpoint")
MOST_WORKERS = 4  # each starts a host of its own
SLOWEST = "--durations=25"


class Checks:
    """Runs checks one after another, whether or not earlier ones passed, and keeps how they ended."""

    def __init__(self) -> None:
        self.results: list[tuple[str, bool]] = []
        self.start = time.monotonic()

    def run(self, name: str, check: Callable[..., int], *arguments: object) -> None:
        """Runs one check, which returns an exit code."""
        say(f"== {name}")
        start = time.monotonic()
        try:
            good = check(*arguments) == 0
        except DevError as error:
            say(f"error: {error}")
            good = False
        self.results.append((f"{name} {'passed' if good else 'FAILED'} ({elapsed(start)})", good))

    def summary(self) -> int:
        """Says how everything ended and returns the exit code."""
        good = all(passed for _, passed in self.results)
        say(f"{'PASSED' if good else 'FAILED'} in {elapsed(self.start)}: {', '.join(text for text, _ in self.results)}")
        return 0 if good else 1


def run_checks(host_version: str | None, pytest_arguments: Sequence[str]) -> int:
    """All checks on the default host and a subset on the oldest; with pytest arguments, only the tests they choose."""
    environment = ensure_environment(host_version)
    if pytest_arguments:
        return pytest(environment, pytest_arguments)
    checks = Checks()
    if environment.version in pins.HOSTS and environment.version != pins.DEFAULT_HOST:
        subset(checks, environment)
        return checks.summary()
    checks.run("ruff", lint, environment)
    checks.run("comfy-test static", run_module, environment, "mend.dev.pack_checks")
    checks.run("pytest", pytest, environment, [*parallel(environment), SLOWEST])
    checks.run("registration and workflows", on_running_host, environment, True)
    if host_version is None and not os.environ.get("COMFYUI_PATH"):
        subset(checks, ensure_environment(pins.FLOOR_HOST))
    return checks.summary()


def subset(checks: Checks, environment: Environment) -> None:
    """What older hosts are held to."""
    checks.run(f"registration on {environment.version}", on_running_host, environment, False)
    checks.run(f"pytest on {environment.version}", pytest, environment, ["-m", "zero_shot_e2e"])


def lint(environment: Environment) -> int:
    """The linter, with the rules in pyproject.toml."""
    return run_in_environment(environment, module_command(environment, "ruff", ["check", str(workspace.PACK)]))


def pytest(environment: Environment, arguments: Sequence[str]) -> int:
    """The tests, run from the checkout."""
    command = module_command(environment, "pytest", ["--rootdir", str(workspace.PACK), *arguments])
    return run_in_environment(environment, command, cwd=workspace.PACK)


def parallel(environment: Environment) -> list[str]:
    """Arguments that spread all tests, file by file, over the processors; none where the user's own interpreter cannot."""
    known = subprocess.run([str(environment.python), "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    return ["-n", str(workers), "--dist", "loadfile"] if known and workers > 1 else []


def on_running_host(environment: Environment, workflows: bool) -> int:
    """What is checked on a running host that has the pack and the validation endpoint."""
    with tempfile.TemporaryDirectory(prefix="mend-test-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        workspace.link_folder(ENDPOINT, workspace.prepare_base(base) / "mend_validate")
        log = base / "server.log"
        with running_server(environment, base=base, log=log) as server:
            arguments = ["--server", server.url, "--log", str(log), *(["--workflows"] if workflows else [])]
            return run_module(environment, "mend.dev.pack_checks", arguments)
