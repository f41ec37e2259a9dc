"""What the commands that count parameters and operations say."""

import json
import os
import subprocess
import sys
from pathlib import Path


def counted(bench):
    """The rows of `python dev bench BENCH --quick`, in a process of its own, since it chooses the host's attention first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", f"mend.dev.bench.{bench}", "--quick", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]
