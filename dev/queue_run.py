"""The part of `python dev queue` that runs inside the environment."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from pathlib import Path

import aiohttp

from .console import say
from .workflow_client import Client, Result, queue_workflow
from .workflow_prompt import WorkflowError, read_workflow

SECONDS_BETWEEN_LINES = 5


class ProgressLines:
    """Shows progress: over itself on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.last_shown = 0.0

    def __call__(self, line: str) -> None:
        if sys.stderr.isatty():
            self.last_shown = time.monotonic()
            sys.stderr.write(f"\r\033[K[mend] {line}")
            sys.stderr.flush()
        elif time.monotonic() - self.last_shown >= SECONDS_BETWEEN_LINES:
            self.last_shown = time.monotonic()
            say(line)

    def end(self) -> None:
        """Leaves the line that was written over."""
        if sys.stderr.isatty() and self.last_shown:
            sys.stderr.write("\n")


def build_parser() -> argparse.ArgumentParser:
    """The options that `python dev queue` shares with this part."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NODE_ID.input=value")
    parser.add_argument("--input", dest="inputs", action="append", default=[], type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--server", required=True)
    return parser


async def queue(options: argparse.Namespace) -> Result:
    """Runs the workflow and downloads what it made."""
    workflow = read_workflow(options.workflow)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    lines = ProgressLines()
    async with Client(options.server) as client:
        try:
            result = await queue_workflow(client, workflow, settings=options.settings, inputs=options.inputs, progress=lines)
        finally:
            lines.end()
        if options.out:
            await client.save(result, options.out)
    return result


def report(result: Result, as_json: bool) -> None:
    """Says what came out, in words or as one line of JSON."""
    if as_json:
        answer = {"prompt_id": result.prompt_id, "seconds": round(result.seconds, 2), "files": result.files, "texts": result.texts}
        sys.stdout.write(json.dumps(answer | ({"errors": result.errors} if result.errors else {})) + "\n")
        return
    for file in result.files:
        sys.stdout.write(f"{file['title']}: {file.get('path') or file['filename']}\n")
    for node_id, texts in result.texts.items():
        sys.stdout.write(f"{node_id}: {' '.join(texts)}\n")
    say(f"done in {result.seconds:.1f} s")


def main() -> int:
    """Queues the workflow named on the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    options = build_parser().parse_args()
    try:
        result = asyncio.run(queue(options))
    except (WorkflowError, aiohttp.ClientError, OSError) as error:
        say(f"error: {error}")
        if options.json:
            sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    report(result, options.json)
    for error in result.errors:
        say(f"error: {error}")
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
