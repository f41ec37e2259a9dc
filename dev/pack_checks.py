"""comfy-test's levels and the host's own validation, run on the pack. Runs inside the environment.

`comfy-test run` would build an environment of its own or write into a home folder; its levels are called as its `lint` command
calls them. Its validation level counts widget values by position and takes the value of a seed's "control after generate" for the
next input, so it is given the graph alone; values are checked by the host itself, on the prompt the workflow converts to.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from comfy_test.comfyui.validator import WorkflowValidation
from comfy_test.common.config import TestConfig
from comfy_test.common.errors import TestError
from comfy_test.orchestration.context import LevelContext
from comfy_test.orchestration.levels import hazards, registration, syntax, warnings
from PIL import Image

from . import workflow_prompt
from .console import say
from .workflow_client import Client
from .workspace import PACK, PACK_NAME

# What comfy-test's reports may find: by check, where, and why it stands. They list only the first five or ten places of a finding.
ACCEPTED = {
    "weights": ("lab/", "the lab's small models are what tests and benches run on, without a download"),
    "sys-path": ("training/headless.py", "training without a server has to find the host"),
    "hardcoded-precision": ("", "weights are stored in half precision, and tests and benches have such pictures and models; the host chooses what runs"),
}
PLACE = re.compile(r"^ +(?:[\d.]+ MB +)?([^\s:]+)", re.MULTILINE)

MODEL_SUFFIXES = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf"}


def log_line(message: str) -> None:
    """Shows what comfy-test logs, less its debugging lines."""
    text = message.strip()
    if text and not text.startswith("[DEBUG]"):
        say(text)


def context(**more: Any) -> LevelContext:
    """What comfy-test's levels want to know."""
    folder = Path(tempfile.gettempdir())
    return LevelContext(config=TestConfig(name=PACK_NAME), node_dir=PACK, platform_name="dev", log=log_line, output_base=folder, **more)


def passes(name: str, level: Callable[[LevelContext], LevelContext], start: LevelContext) -> bool:
    """Runs one level and says how it ended."""
    try:
        level(start)
    except TestError as error:
        say(f"comfy-test {name}: FAILED: {error.message}\n{error.details or ''}")
        return False
    say(f"comfy-test {name}: passed")
    return True


def static() -> bool:
    """The levels that only read the source."""
    return all([passes("syntax", syntax.run, context()), nothing_new("warnings", warnings), nothing_new("hazards", hazards)])


def nothing_new(level: str, reports: ModuleType, pack: Path = PACK) -> bool:
    """Runs the checks of a level that only reports, which never fails by itself; what nobody has accepted fails."""
    good = True
    for *_, name, description, check in reports.CHECKS:
        for finding in check(pack):
            known = is_accepted(name, finding)
            say(f"[{level}] {name}: " + (f"accepted, {ACCEPTED[name][1]}" if known else f"FAILED: {description}\n{finding}"))
            good = good and known
    say(f"comfy-test {level}: {'passed' if good else 'FAILED'}")
    return good


def is_accepted(check: str, finding: str) -> bool:
    """Whether all places that a finding lists are where such a thing is accepted."""
    places = [PurePath(place).as_posix() for place in PLACE.findall(finding)]
    return check in ACCEPTED and bool(places) and all(place.startswith(ACCEPTED[check][0]) for place in places)


def registered(url: str, log: Path) -> bool:
    """The registration level, and that the host lists nodes of the pack."""
    os.environ["COMFY_TEST_LOGS_DIR"] = str(log.parent)
    if not passes("registration", registration.run, context(server_url=url)):
        return False
    ours = sorted(name for name, node in asyncio.run(object_info(url)).items() if node.get("python_module") == f"custom_nodes.{PACK_NAME}")
    say(f"{len(ours)} nodes of the pack: {', '.join(ours)}" if ours else "FAILED: the host lists no node of the pack; its log says why")
    return bool(ours)


async def object_info(url: str) -> dict[str, Any]:
    """The host's description of its nodes."""
    async with Client(url) as client:
        return await client.object_info()


async def workflows_valid(url: str) -> bool:
    """Every workflow of the pack fits the running host's nodes."""
    files = sorted((PACK / "workflows").glob("*.json"))
    valid = True
    async with Client(url) as client:
        nodes = await client.object_info()
        for file in files:
            problems = [problem async for problem in workflow_problems(client, nodes, file)]
            say(f"workflow {file.name}: " + ("valid" if not problems else "FAILED\n  " + "\n  ".join(problems)))
            valid = valid and not problems
    return valid


async def workflow_problems(client: Client, nodes: dict[str, Any], file: Path) -> AsyncIterator[str]:
    """What is wrong with one workflow: its graph by comfy-test, its values by the host."""
    try:
        workflow = workflow_prompt.read_workflow(file)
        for error in WorkflowValidation(with_open_types(nodes)).validate(graph_alone(workflow)).errors:
            yield str(error)
        prompt = workflow_prompt.to_prompt(workflow, nodes)
    except workflow_prompt.WorkflowError as error:
        yield str(error)
        return
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "placeholder.png"
        Image.new("RGB", (64, 64), "grey").save(picture)
        for node_id, name in workflow_prompt.image_inputs(prompt, nodes):
            prompt[node_id]["inputs"][name] = await client.upload(picture)
    async with client.session.post(client.url + "/validate", json={"prompt": prompt}) as response:
        for line in host_problems(await response.json(), prompt):
            yield line


def graph_alone(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow without widget values and without the nodes that only the editor knows."""
    subgraphs = {graph.get("id") for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    editor_only = workflow_prompt.NEVER_EXECUTED | subgraphs
    nodes = [{**node, "widgets_values": []} for node in workflow.get("nodes", []) if node.get("type") not in editor_only]
    kept = {node["id"] for node in nodes}
    return {**workflow, "nodes": nodes, "links": [link for link in workflow.get("links", []) if link[1] in kept and link[3] in kept]}


def with_open_types(nodes: dict[str, Any]) -> dict[str, Any]:
    """The node descriptions with outputs whose type follows from an input (COMFY_MATCHTYPE_V3) declared to fit everything."""
    return {
        name: {**node, "output": ["*" if kind.startswith("COMFY_") else kind for kind in node["output"]]} for name, node in nodes.items()
    }


def host_problems(answer: dict[str, Any], prompt: workflow_prompt.Prompt) -> Iterator[str]:
    """The host's complaints, less those about the user's own files, which a test machine does not have."""
    for node_id, report in answer["node_errors"].items():
        for error in report["errors"]:
            if not is_missing_file(error):
                yield f"node {node_id} ({workflow_prompt.node_label(prompt, node_id)}): {error['message']}: {error['details']}"
    if answer["error"] and not answer["node_errors"]:
        yield answer["error"]["message"]


def is_missing_file(error: dict[str, Any]) -> bool:
    """Whether the host only misses a model, a video or a sound."""
    value = error.get("extra_info", {}).get("received_value")
    if error["type"] == "value_not_in_list":
        return isinstance(value, str) and PurePath(value).suffix in MODEL_SUFFIXES
    return error["type"] == "custom_validation_failed" and (
        "Invalid video file" in error["details"] or "Invalid audio file" in error["details"]
    )


def main() -> int:
    """Runs the static levels, or with --server those that need a host."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--server")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--workflows", action="store_true")
    options = parser.parse_args()
    if options.server is None:
        return 0 if static() else 1
    good = registered(options.server, options.log)
    if options.workflows:
        good = asyncio.run(workflows_valid(options.server)) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
