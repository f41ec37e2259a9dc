"""The command line: `python dev COMMAND`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from . import cache, pins, workspace
from .checks import run_checks
from .console import DevError, say
from .environment import Environment, ensure_environment
from .launching import resolve_command, run_in_environment, run_module
from .server import log_end, running_server

Command = Callable[[argparse.Namespace, list[str]], int]
DEMO_FILES = ("before.png", "after.png", "compare.png")


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    own, passed_on = split_at_dashes(arguments)
    parser = build_parser()
    options, unknown = parser.parse_known_args(own)
    if unknown and not options.takes_more:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return options.run(options, [*unknown, *passed_on])
    except DevError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what stands behind it."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="python dev", description="Development commands of the Mend node pack.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, help_text: str, takes_more: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.add_argument(
            "--host", metavar="VERSION", help=f"ComfyUI version: {', '.join(pins.HOSTS)} (default: COMFYUI_PATH, else {pins.DEFAULT_HOST})"
        )
        command.set_defaults(run=run, takes_more=takes_more)
        return command

    serve = add("serve", command_serve, "Start the host with the pack in it. What follows -- goes to the host.", takes_more=True)
    serve.add_argument("--port", type=int, default=8188)

    add(
        "exec",
        command_exec,
        "Run any command in the environment: python dev exec -- CMD ... A script's own folder is not on its import path.",
        takes_more=True,
    )

    queue = add("queue", command_queue, "Queue a workflow, in the format artists share or in API format, on a running or a fresh host.")
    queue.add_argument("workflow", help="workflow file")
    queue.add_argument(
        "--set", action="append", default=[], metavar="NODE.input=value", help="change an input; NODE is an id, a title or a class"
    )
    queue.add_argument(
        "--input", action="append", default=[], metavar="IMAGE", help="image for the next node that loads one, in the order of their ids"
    )
    queue.add_argument("--out", default="outputs", metavar="DIR", help="where the results go (default: outputs)")
    queue.add_argument("--server", metavar="URL", help="a running host; without it one is started")
    queue.add_argument("--json", action="store_true", help="the last line of the output is a JSON object")

    demo = add("demo", command_demo, "Degrade a photograph, restore it on the host without training, and measure.")
    demo.add_argument("--input", metavar="PHOTO", help="a photograph of your own (default: one that comes with scikit-image)")
    demo.add_argument("--degradation", choices=["noise", "lowlight", "haze", "grey"], default="noise")
    demo.add_argument("--set", action="append", default=[], metavar="NODE.input=value", help="change an input of the workflow")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", default="outputs", metavar="DIR", help="where before.png, after.png and compare.png go (default: outputs)")
    demo.add_argument("--server", metavar="URL", help="a running host; without it one is started")
    demo.add_argument("--json", action="store_true", help="the last line of the output is a JSON object")

    bench = add(
        "bench", command_bench, "Run a measurement of dev/bench. Further arguments, such as --quick and --json, go to it.", takes_more=True
    )
    bench.add_argument("name", help="the measurement, for example ld_rps")

    add("train-lab", command_train_lab, "Train the lab prior. Further arguments go to the recipe.", takes_more=True)
    add("test", command_test, "Check everything; with pytest arguments, run only the tests they choose.", takes_more=True)
    return parser


def command_demo(options: argparse.Namespace, _: list[str]) -> int:
    """Restores one degraded photograph."""
    if options.input:
        spare_photograph(Path(options.input), Path(options.out))
    arguments = ["--degradation", options.degradation, "--seed", str(options.seed), "--out", options.out]
    arguments += ["--input", options.input] if options.input else []
    arguments += [f"--set={setting}" for setting in options.set] + (["--json"] if options.json else [])
    return run_against_host(ensure_environment(options.host), "mend.dev.demo_run", arguments, options.server)


def spare_photograph(photo: Path, out: Path) -> None:
    """Refuses an output folder in which the demonstration would write over the user's own photograph."""
    for file in (out / name for name in DEMO_FILES):
        if file.exists() and photo.exists() and file.samefile(photo):
            raise DevError(f"the demo would write over {photo}: name another folder with --out, or rename the photograph.")


def command_bench(options: argparse.Namespace, arguments: list[str]) -> int:
    """Runs one measurement."""
    folder = Path(__file__).with_name("bench")
    names = sorted(file.stem for file in folder.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))
    if options.name not in names:
        raise DevError(f"no measurement {options.name}; there are {', '.join(names)}")
    return run_module(ensure_environment(options.host), f"mend.dev.bench.{options.name}", arguments)


def command_train_lab(options: argparse.Namespace, arguments: list[str]) -> int:
    """Trains the lab prior, in the cache folder unless another is named."""
    return run_module(ensure_environment(options.host), "mend.lab.train", ["--cache", str(cache.home() / "lab"), *arguments])


def command_test(options: argparse.Namespace, arguments: list[str]) -> int:
    """Checks everything."""
    return run_checks(options.host, arguments)


def command_queue(options: argparse.Namespace, _: list[str]) -> int:
    """Runs a workflow and saves what it makes."""
    environment = ensure_environment(options.host)
    arguments = [options.workflow, "--out", options.out]
    arguments += [f"--set={setting}" for setting in options.set] + [f"--input={image}" for image in options.input]
    arguments += ["--json"] if options.json else []
    return run_against_host(environment, "mend.dev.queue_run", arguments, options.server)


def run_against_host(environment: Environment, module: str, arguments: list[str], url: str | None) -> int:
    """Runs a module that wants --server URL, on the host at `url` or on a fresh one whose log is shown if it dies."""
    if url:
        return run_module(environment, module, [*arguments, "--server", url])
    with tempfile.TemporaryDirectory(prefix="mend-log-", ignore_cleanup_errors=True) as folder:
        with running_server(environment, log=Path(folder) / "server.log") as server:
            code = run_module(environment, module, [*arguments, "--server", server.url])
            if server.process.poll() is not None:
                say(f"the host ended with exit code {server.process.returncode}:\n{log_end(server)}")
            return code


def command_serve(options: argparse.Namespace, extra: list[str]) -> int:
    """Keeps a server running until Ctrl-C."""
    environment = ensure_environment(options.host)
    with running_server(environment, port=options.port, extra=extra, keep_files=True) as server:
        say(f"ComfyUI {environment.version} with Mend: {server.url} (files in {workspace.base_folder()}; Ctrl-C stops it)")
        return server.process.wait()


def command_exec(options: argparse.Namespace, command: list[str]) -> int:
    """Runs a command and returns its exit code."""
    if not command:
        raise DevError("nothing to run: python dev exec -- CMD ...")
    environment = ensure_environment(options.host)
    return run_in_environment(environment, resolve_command(environment, command))
