"""A real server for the end-to-end tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mend.dev import environment, workspace
from mend.dev.server import Server, running_server
from mend.dev.workflow_client import Client, Result, queue_workflow
from mend.dev.workflow_prompt import read_workflow


@dataclass
class HostServer:
    """The running server, and a way to queue workflows on it."""

    server: Server

    @property
    def url(self) -> str:
        """Its address."""
        return self.server.url

    def log_text(self) -> str:
        """What it has logged so far."""
        return self.server.log_text()

    def queue(self, workflow: Path | dict, *, settings: Sequence[str] = (), inputs: Sequence[Path] = (), out: Path | None = None) -> Result:
        """Queues a workflow as `python dev queue` does; raises WorkflowError with the host's words when it fails."""

        async def run() -> Result:
            async with Client(self.url) as client:
                graph = workflow if isinstance(workflow, dict) else read_workflow(workflow)
                result = await queue_workflow(client, graph, settings=settings, inputs=inputs)
                if out:
                    await client.save(result, out)
                return result

        return asyncio.run(run())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A ComfyUI server with the pack in it, started once for the session."""
    base = tmp_path_factory.mktemp("server")
    workspace.prepare_base(base)
    with running_server(environment.ensure_environment(), base=base, log=base / "server.log") as started:
        yield HostServer(started)
