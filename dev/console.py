"""What the commands say, and how they run other programs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HEARTBEAT_SECONDS = 30


class DevError(Exception):
    """Something the person at the keyboard can act on; shown without a traceback."""


def say(message: str) -> None:
    """One line on standard error, so that standard output stays free for results."""
    sys.stderr.write(f"[mend] {message}\n")
    sys.stderr.flush()


def elapsed(since: float) -> str:
    """Time since a time.monotonic() value, as '7 s' or '2 min 05 s'."""
    seconds = int(time.monotonic() - since)
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"


def run_step(title: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
    """Runs a long command with its output passed through, says how long it takes, and raises DevError when it fails."""
    say(f"{title} ...")
    start = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], env=env, stdout=sys.stderr, close_fds=False)
    try:
        while True:
            try:
                code = process.wait(timeout=HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                say(f"{title}: still at it after {elapsed(start)}")
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code != 0:
        raise DevError(
            f"{title} failed with exit code {code} after {elapsed(start)}; its own message is above. Running again repairs what is left."
        )
    say(f"{title}: done in {elapsed(start)}")
