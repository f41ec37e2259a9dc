"""A ComfyUI server as a child process: started on a free port, waited for, stopped."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import workspace
from .console import DevError, elapsed, say
from .environment import Environment
from .host_folders import own_folders, users_folders
from .launching import child_environment

START_SECONDS = 300
STOP_SECONDS = 20
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Server:
    """A running ComfyUI server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path | None

    def log_text(self) -> str:
        """What the server has logged so far; empty when its output goes to the terminal."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log else ""


@contextlib.contextmanager
def running_server(
    environment: Environment,
    *,
    base: Path | None = None,
    port: int | None = None,
    extra: Sequence[str] = (),
    log: Path | None = None,
    keep_files: bool = False,
) -> Iterator[Server]:
    """A server for as long as the `with` block lasts.

    `base` defaults to this checkout's base folder, and then a ComfyUI of the user's keeps its models and custom nodes. Unless
    `keep_files` is set, uploads, outputs and previews live in a folder that goes with the server. `log` takes the server's
    output; without it, the output goes to standard error.
    """
    with_users_own = base is None and environment.is_users
    base = base or workspace.base_folder()
    if port:
        check_port(port)
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="mend-server-", ignore_cleanup_errors=True) as scratch:
        files = base if keep_files else Path(scratch)
        folders = users_folders(environment.host, base, files, Path(scratch)) if with_users_own else own_folders(base, files)
        command = [*server_command(environment, port, Path(scratch)), *folders, *extra]
        with open(log, "wb") if log else contextlib.nullcontext(sys.stderr) as output:
            process = subprocess.Popen(command, env=child_environment(environment), stdout=output, stderr=subprocess.STDOUT, cwd=base)
            server = Server(f"http://127.0.0.1:{port}", process, log)
            try:
                wait_until_ready(server)
                yield server
            finally:
                stop(process)


def server_command(environment: Environment, port: int, scratch: Path) -> list[str]:
    """The command line of the host, less its folders."""
    command = [str(environment.python), str(environment.host / "main.py"), "--port", str(port)]
    command += ["--temp-directory", str(scratch), "--database-url", "sqlite:///:memory:"]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--dont-print-server"]
    if not has_gpu(environment):
        command.append("--cpu")
    return command


def has_gpu(environment: Environment) -> bool:
    """Whether torch sees an accelerator. Our own torch is only asked where the system shows a trace of one that it could use."""
    if environment.is_users:
        pass
    elif sys.platform == "linux":
        if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri/renderD128")):
            return False
    elif sys.platform == "win32" and shutil.which("nvidia-smi") is None:
        return False
    probe = "import sys, torch; sys.exit(0 if getattr(torch, 'accelerator', torch.cuda).is_available() else 3)"  # before 2.6, CUDA alone
    return subprocess.run([str(environment.python), "-c", probe], check=False, capture_output=True).returncode == 0


def free_port() -> int:
    """A port nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Says before a start that another program has the port: its answers would be taken for those of our server."""
    with socket.socket() as probe:
        # As the host's own listening socket has it: no other program at the port, though closed connections may linger there.
        option = socket.SO_EXCLUSIVEADDRUSE if sys.platform == "win32" else socket.SO_REUSEADDR
        probe.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise DevError(f"cannot serve on port {port}: {error}. Stop what uses it, or choose another with --port.") from error


def wait_until_ready(server: Server) -> None:
    """Returns when the server answers; raises DevError with the end of its log when it ends first or takes too long."""
    start = time.monotonic()
    while time.monotonic() - start < START_SECONDS:
        if server.process.poll() is not None:
            raise DevError(f"the host ended with exit code {server.process.returncode} before it was ready.\n{log_end(server)}")
        if answers(server.url):
            say(f"the host answers at {server.url} after {elapsed(start)}")
            return
        time.sleep(0.25)
    raise DevError(f"the host did not answer within {START_SECONDS} s.\n{log_end(server)}")


def answers(url: str) -> bool:
    """Whether a ComfyUI server answers at this address."""
    try:
        with LOCAL.open(url + "/system_stats", timeout=5) as response:
            return "system" in json.load(response)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def log_end(server: Server, lines: int = 30) -> str:
    """The last lines of the server's log."""
    return "\n".join(server.log_text().splitlines()[-lines:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server, by force if it does not end by itself."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
