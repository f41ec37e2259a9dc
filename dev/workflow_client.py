"""Talks to a running host over HTTP and its websocket. Runs inside the environment."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import aiohttp

from . import workflow_prompt
from .workflow_prompt import Prompt, WorkflowError

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """What one run of a workflow left behind."""

    prompt_id: str
    seconds: float
    files: list[dict[str, str]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class Client:
    """A connection to one host, used as `async with Client(url) as client`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    async def __aenter__(self) -> Client:
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.session.close()

    async def object_info(self) -> dict[str, Any]:
        """The host's description of its nodes."""
        async with self.session.get(self.url + "/object_info") as response:
            response.raise_for_status()
            return await response.json()

    async def upload(self, path: Path) -> str:
        """Uploads an image and returns the name by which LoadImage finds it."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise WorkflowError(f"cannot read {path}: {error.strerror}") from error
        form = aiohttp.FormData()
        form.add_field("image", content, filename=path.name, content_type="application/octet-stream")
        async with self.session.post(self.url + "/upload/image", data=form) as response:
            if response.status != 200:
                raise WorkflowError(f"the host refused the upload of {path}: {await response.text() or response.reason}")
            stored = await response.json()
        return str(PurePosixPath(stored["subfolder"]) / stored["name"])

    async def run(self, prompt: Prompt, progress: Progress | None = None) -> Result:
        """Queues a prompt, waits for its end and returns what it left; raises WorkflowError with the host's words if it failed."""
        socket_url = self.url.replace("http", "ws", 1) + f"/ws?clientId={self.client_id}"
        start = time.monotonic()
        async with self.session.ws_connect(socket_url, max_msg_size=0, heartbeat=60) as socket:
            prompt_id, errors = await self.submit(prompt)
            try:
                await self.follow(socket, prompt, prompt_id, progress)
            except BaseException:
                await self.cancel(prompt_id)
                raise
        result = Result(prompt_id, time.monotonic() - start, errors=errors)
        async with self.session.get(f"{self.url}/history/{prompt_id}") as response:
            history = await response.json()
        collect(history[prompt_id]["outputs"], prompt, result)
        return result

    async def submit(self, prompt: Prompt) -> tuple[str, list[str]]:
        """Queues a prompt; returns its id and what was wrong with outputs that the host leaves out."""
        body = {"prompt": prompt, "client_id": self.client_id}
        async with self.session.post(self.url + "/prompt", json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise WorkflowError(rejection_text(text, prompt))
            answer = json.loads(text)
        return answer["prompt_id"], list(node_error_lines(answer.get("node_errors") or {}, prompt))

    async def follow(self, socket: aiohttp.ClientWebSocketResponse, prompt: Prompt, prompt_id: str, progress: Progress | None) -> None:
        """Reads the websocket until the prompt has ended."""
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "executing" and data.get("node") is None:
                return  # sent when the history is written, which is after execution_success
            if kind == "execution_error":
                raise WorkflowError(execution_error_text(data, prompt))
            if kind == "execution_interrupted":
                raise WorkflowError("the run was interrupted")
            if kind == "progress" and progress:
                progress(str(data["node"]), data["value"], data["max"])
        raise WorkflowError("the host closed the connection before the run ended; its log says why")

    async def cancel(self, prompt_id: str) -> None:
        """Takes a prompt out of the queue, or stops it if it runs; nothing happens if it has ended."""
        try:
            await self.session.post(self.url + "/queue", json={"delete": [prompt_id]})
            await self.session.post(self.url + "/interrupt", json={"prompt_id": prompt_id})
        except aiohttp.ClientError:
            return

    async def save(self, result: Result, folder: Path) -> None:
        """Downloads the files of a result into a folder, beside what is there, and notes their paths in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in result.files:
            query = {key: file[key] for key in ("filename", "subfolder", "type")}
            async with self.session.get(self.url + "/view", params=query) as response:
                response.raise_for_status()
                file["path"] = str(write_new(folder, Path(file["filename"]).name, await response.read()))


async def queue_workflow(
    client: Client,
    workflow: dict[str, Any],
    *,
    settings: Sequence[str] = (),
    inputs: Sequence[Path] = (),
    seed: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Converts a workflow, sets its seeds, applies settings, uploads inputs and runs it. `progress` gets lines to show."""
    object_info = await client.object_info()
    prompt = workflow_prompt.to_prompt(workflow, object_info)
    if seed is not None:
        workflow_prompt.set_seeds(prompt, seed, object_info)
    workflow_prompt.apply_settings(prompt, settings, object_info)
    takers = workflow_prompt.image_inputs(prompt, object_info)
    if len(inputs) > len(takers):
        raise WorkflowError(f"{len(inputs)} input images are given, but the workflow has {len(takers)} node(s) that load one")
    for path, (node_id, name) in zip(inputs, takers):
        prompt[node_id]["inputs"][name] = await client.upload(path)

    def show(node_id: str, value: int, total: int) -> None:
        progress(f"{workflow_prompt.node_label(prompt, node_id)} ({node_id}): {value}/{total}")

    return await client.run(prompt, show if progress else None)


def collect(outputs: dict[str, Any], prompt: Prompt, result: Result) -> None:
    """Sorts the outputs of a run, as its history lists them, into files and texts."""
    for node_id, output in outputs.items():
        for values in output.values():
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if isinstance(value, dict) and "filename" in value:
                    file = {"node": node_id, "title": workflow_prompt.node_label(prompt, node_id), "filename": value["filename"]}
                    file.update(subfolder=value.get("subfolder", ""), type=value.get("type", "output"))
                    result.files.append(file)
                elif isinstance(value, str):
                    result.texts.setdefault(node_id, []).append(value)


def write_new(folder: Path, name: str, content: bytes) -> Path:
    """Writes a file under this name, with a number added where the name is taken, and returns its path."""
    for number in itertools.count(1):
        path = folder / (name if number == 1 else f"{Path(name).stem}_{number}{Path(name).suffix}")
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            continue
        return path


def rejection_text(body: str, prompt: Prompt) -> str:
    """The host's reasons for refusing a prompt."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"the host refused the workflow: {body}"
    error = answer.get("error", {})
    if isinstance(error, str):
        error = {"message": error}
    first = ": ".join(part for part in (error.get("message"), error.get("details")) if part)
    return "\n".join([f"the host refused the workflow: {first}", *node_error_lines(answer.get("node_errors") or {}, prompt)])


def node_error_lines(node_errors: dict[str, Any], prompt: Prompt) -> Iterator[str]:
    """One line for each thing the host found wrong with a node."""
    for node_id, report in node_errors.items():
        for error in report["errors"]:
            yield f"node {node_id} ({workflow_prompt.node_label(prompt, node_id)}): {error['message']}: {error['details']}"


def execution_error_text(data: dict[str, Any], prompt: Prompt) -> str:
    """What went wrong while a node ran, with the host's traceback above it."""
    node_id = str(data.get("node_id"))
    trace = "".join(data.get("traceback") or [])
    message = str(data.get("exception_message", "")).strip()
    return f"{trace}node {node_id} ({workflow_prompt.node_label(prompt, node_id)}) failed: {data.get('exception_type')}: {message}"
