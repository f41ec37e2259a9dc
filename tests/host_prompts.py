"""Runs prompts in this process, through the host's own executor and with the pack loaded as the host loads it."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import execution
import nodes
import server
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from mend.tests import tiny_models

Prompt = dict[str, dict[str, Any]]
Listener = Callable[[str, dict[str, Any]], None]


class PromptFailed(AssertionError):
    """A prompt that the host refused, or that failed or was interrupted while it ran."""


@dataclass
class PromptResult:
    """What a prompt left: `values` of TestCapture nodes, `outputs` as in the history, and the events in their order."""

    success: bool
    values: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, for example "progress"."""
        return [data for event, data in self.events if event == kind]

    @property
    def cached(self) -> list[str]:
        """The nodes whose outputs came from an earlier run."""
        return [node for data in self.of("execution_cached") for node in data["nodes"]]

    def error_text(self) -> str:
        """What went wrong, in the host's words."""
        lines = [f"node {node_id} ({report['class_type']}): {error['message']}: {error['details']}"
                 for node_id, report in self.node_errors.items() for error in report["errors"]]  # fmt: skip
        if self.error and "exception_message" in self.error:
            lines += [
                *self.error.get("traceback", []),
                f"node {self.error['node_id']} ({self.error['node_type']}): {self.error['exception_message']}",
            ]
        elif self.error:
            lines.append(str(self.error))
        return "\n".join(lines)


class EventServer:
    """Stands where the executor expects the server, and keeps what would go to the browser."""

    client_id: str | None = "test"
    last_node_id: str | None = None
    last_prompt_id: str | None = None
    sockets_metadata: dict[str, Any] = {}

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.listener: Listener | None = None

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        """Keeps one event; called by the executor."""
        self.events.append((event, data))
        if self.listener:
            self.listener(event, data)


class PromptRunner:
    """Runs prompts one after another on one executor, so that its cache of node outputs is at work between them."""

    def __init__(self) -> None:
        self.server = EventServer()
        self.executor = execution.PromptExecutor(
            self.server, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0}
        )
        self.count = 0

    def __call__(
        self, prompt: Prompt, *, given: dict[str, Any] | None = None, on_event: Listener | None = None, check: bool = True
    ) -> PromptResult:
        """Runs a prompt in API format. TestGiven nodes hand out the values of `given`; a failure raises PromptFailed unless check=False."""
        TestGiven.values = dict(given or {})
        TestCapture.values = {}
        result = self._run(prompt, on_event)
        if check and not result.success:
            raise PromptFailed(result.error_text())
        return result

    def _run(self, prompt: Prompt, on_event: Listener | None) -> PromptResult:
        self.count += 1
        prompt_id = f"test-{self.count}"
        prompt = copy.deepcopy(prompt)  # the host notes in it what IS_CHANGED said
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(prompt_id, prompt, None))
        if not valid:
            return PromptResult(False, node_errors=node_errors, error=error)
        self.server.events = []
        self.server.listener = on_event
        set_progress_hook(self.server)
        self.executor.execute(prompt, prompt_id, {"client_id": self.server.client_id}, outputs)
        failures = [data for event, data in self.executor.status_messages if event in ("execution_error", "execution_interrupted")]
        return PromptResult(
            self.executor.success, dict(TestCapture.values), self.executor.history_result["outputs"], list(self.server.events),
            node_errors, failures[0] if failures else None,
        )  # fmt: skip


def set_progress_hook(receiver: EventServer) -> None:
    """Makes progress bars report to `receiver`, as the host's main program does."""

    def hook(value: int, total: int, preview: Any, prompt_id: str | None = None, node_id: str | None = None) -> None:
        context = get_executing_context()
        node_id = node_id or (context.node_id if context else receiver.last_node_id)
        comfy.model_management.throw_exception_if_processing_interrupted()
        get_progress_state().update_progress(node_id, value, total, preview)
        receiver.send_sync("progress", {"value": value, "max": total, "node": node_id, "preview": preview})

    comfy.utils.set_progress_bar_global_hook(hook)


class AnyType(str):
    """A socket type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")


class TestTinyModel:
    """Hands out a tiny MODEL with conditionings, VAE and LATENT to go with it."""

    CATEGORY = "test"
    FUNCTION = "build"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "VAE", "LATENT")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as the host wants them declared."""
        return {
            "required": {"family": (list(tiny_models.FAMILIES),)},
            "optional": {"batch": ("INT", {"default": 1}), "seed": ("INT", {"default": 0})},
        }

    def build(self, family: str, batch: int = 1, seed: int = 0) -> tuple[Any, ...]:
        """MODEL, positive, negative, VAE, LATENT."""
        return (
            tiny_models.model(family, seed),
            tiny_models.conditioning(family, 1),
            tiny_models.conditioning(family, 2),
            tiny_models.vae(tiny_models.CHANNELS[family]),
            tiny_models.latent(family, batch),
        )


class TestGiven:
    """Hands out a value of the test's own, by its name in `given`."""

    CATEGORY = "test"
    FUNCTION = "give"
    RETURN_TYPES = (ANY,)
    values: dict[str, Any] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as the host wants them declared."""
        return {"required": {"name": ("STRING",)}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> int:
        """Another object under the same name is another input."""
        return id(cls.values[name])

    def give(self, name: str) -> tuple[Any]:
        """The value of this name."""
        return (self.values[name],)


class TestCapture:
    """Keeps what arrives, as `values[node id]` of the result."""

    CATEGORY = "test"
    FUNCTION = "keep"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    values: dict[str, Any] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as the host wants them declared."""
        return {"required": {"value": (ANY,)}, "hidden": {"node_id": "UNIQUE_ID"}}

    def keep(self, value: Any, node_id: str) -> dict[str, Any]:
        """Keeps the value."""
        TestCapture.values[node_id] = value
        return {}


def load_nodes(pack: Path) -> None:
    """Loads the host's extra nodes, the pack and the nodes for tests."""
    server.PromptServer(asyncio.new_event_loop())  # nodes register routes and replacements with it while they load
    failed = asyncio.run(load_extra_nodes())
    if failed:
        raise RuntimeError(f"the host could not load {failed}")
    for node in (TestTinyModel, TestGiven, TestCapture):
        nodes.NODE_CLASS_MAPPINGS[node.__name__] = node
    before = set(nodes.NODE_CLASS_MAPPINGS)
    if not asyncio.run(nodes.load_custom_node(os.fspath(pack))) or set(nodes.NODE_CLASS_MAPPINGS) == before:
        raise RuntimeError(f"the host could not load the pack from {pack}; its log, in the captured output, says why")


async def load_extra_nodes() -> Any:
    """Loads the nodes the host keeps in comfy_extras."""
    return await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
