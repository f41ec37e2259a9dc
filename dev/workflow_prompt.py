"""From a workflow file to the prompt the host executes. Runs inside the environment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from comfy_cli import workflow_to_api

Prompt = dict[str, dict[str, Any]]
NEVER_EXECUTED = {"Note", "MarkdownNote", "PrimitiveNode", "GetNode", "SetNode", "Reroute"}
MUTED_OR_BYPASSED = {2, 4}
BOOLEANS = {"true": True, "false": False}


class WorkflowError(Exception):
    """What is wrong with a workflow, a setting or an input, in words for the person who queued it."""


def read_workflow(path: Path) -> dict[str, Any]:
    """The JSON object in a workflow file."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WorkflowError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from error
    if not isinstance(workflow, dict):
        raise WorkflowError(f"{path} is not a workflow: it holds no JSON object")
    return workflow


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """The prompt of a workflow in either format. `object_info` is the host's own description of its nodes."""
    if "nodes" not in workflow and isinstance(workflow.get("prompt"), dict):
        workflow = workflow["prompt"]
    if workflow_to_api.is_api_format(workflow):
        return {node_id: dict(node, inputs=dict(node.get("inputs", {}))) for node_id, node in workflow.items() if "class_type" in node}
    if not isinstance(workflow.get("nodes"), list):
        raise WorkflowError("this is not a workflow: it has neither a list of nodes nor nodes by their ids")
    refuse_unknown_nodes(workflow, object_info)
    try:
        prompt = workflow_to_api.convert_ui_to_api(workflow, object_info)
    except workflow_to_api.WorkflowConversionError as error:
        raise WorkflowError(f"the workflow cannot be converted: {error}") from error
    refuse_lost_nodes(workflow, prompt)
    return prompt


def executed_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes at the top of a workflow in UI format that the host is to execute."""
    nodes = [node for node in workflow["nodes"] if isinstance(node, dict)]
    return [node for node in nodes if node.get("type") not in NEVER_EXECUTED and node.get("mode", 0) not in MUTED_OR_BYPASSED]


def refuse_unknown_nodes(workflow: dict[str, Any], object_info: dict[str, Any]) -> None:
    """Names the nodes the host does not have: the converter would guess at their inputs."""
    subgraphs = {graph.get("id") for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    unknown = sorted({str(node.get("type")) for node in executed_nodes(workflow)} - set(object_info) - subgraphs)
    if unknown:
        raise WorkflowError(f"the host has no node {', '.join(unknown)}. Install the pack that has it, or a newer ComfyUI.")


def refuse_lost_nodes(workflow: dict[str, Any], prompt: Prompt) -> None:
    """Names the nodes the converter left out: it logs and goes on where it cannot make sense of one."""
    kept = {node_id.split(":")[0] for node_id in prompt}
    lost = [f"{node['id']} ({node['type']})" for node in executed_nodes(workflow) if str(node["id"]) not in kept]
    if lost:
        raise WorkflowError(f"the converter could not convert node {', '.join(lost)}; its log is above.")


def node_label(prompt: Prompt, node_id: str) -> str:
    """How a node is named to people: its title, else its class."""
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type") or node_id


def find_node(prompt: Prompt, name: str) -> str:
    """The id of the node with this id, title or class, in this order; an error where that is not exactly one."""
    if name in prompt:
        return name
    for matches in (
        [node_id for node_id in prompt if node_label(prompt, node_id) == name],
        [node_id for node_id, node in prompt.items() if node["class_type"] == name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise WorkflowError(f"{name} is the name of several nodes: {', '.join(matches)}. Use the id.")
    there = ", ".join(f"{node_id} ({node_label(prompt, node_id)})" for node_id in prompt)
    raise WorkflowError(f"there is no node {name} in the workflow. There are {there}.")


def apply_settings(prompt: Prompt, settings: Iterable[str], object_info: dict[str, Any]) -> None:
    """Applies settings of the form NODE.input=value, where NODE is an id, a title or a class."""
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, input_name = target.partition(".")
        if not (equals and dot and input_name):
            raise WorkflowError(f"--set {setting}: it should read NODE_ID.input=value")
        node = prompt[find_node(prompt, name)]
        schema = input_schema(object_info.get(node["class_type"], {}))
        if input_name not in node["inputs"] and input_name.split(".")[0] not in schema:
            known = ", ".join(dict.fromkeys([*node["inputs"], *schema]))
            raise WorkflowError(f"--set {setting}: {node['class_type']} has no input {input_name}. It has {known}.")
        spec = input_spec(schema, node["inputs"], input_name)
        value = parse_value(text, spec)
        if kind_of(spec) == "BOOLEAN" and not isinstance(value, list) and value not in (True, False):
            raise WorkflowError(f"--set {setting}: {input_name} is on or off; it takes true or false.")
        node["inputs"][input_name] = value


def input_schema(node_info: dict[str, Any]) -> dict[str, Any]:
    """All inputs of a node, by name, as the host describes them."""
    inputs = node_info.get("input", {})
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def input_spec(schema: dict[str, Any], inputs: dict[str, Any], name: str) -> Any:
    """How the host describes an input; None where it does not. What belongs to a choice of a dynamic combo is described with the choice."""
    outer, dot, inner = name.partition(".")
    if name in schema or not dot or kind_of(schema.get(outer)) != "COMFY_DYNAMICCOMBO_V3":
        return schema.get(name)
    chosen = [option for option in schema[outer][1]["options"] if option["key"] == inputs.get(outer)]
    return input_schema({"input": chosen[0]["inputs"]}).get(inner) if chosen else None


def kind_of(spec: Any) -> str | None:
    """The type of an input; None where it is not described or is a list of choices."""
    return spec[0] if isinstance(spec, (list, tuple)) and spec and isinstance(spec[0], str) else None


def parse_value(text: str, spec: Any) -> Any:
    """The value a setting stands for: text for a text input, else JSON where it is JSON, or Python's True or False."""
    if kind_of(spec) == "STRING":
        return text
    try:
        return json.loads(text)
    except ValueError:
        # The host takes every text but an empty one for true. Among choices the word may be the name of one.
        return BOOLEANS.get(text.lower(), text) if spec is None or kind_of(spec) == "BOOLEAN" else text


def image_inputs(prompt: Prompt, object_info: dict[str, Any]) -> list[tuple[str, str]]:
    """The (node id, input) pairs that take an uploaded image, in the order of their ids."""
    found = []
    for node_id, node in prompt.items():
        for name, spec in input_schema(object_info.get(node["class_type"], {})).items():
            if len(spec) > 1 and isinstance(spec[1], dict) and spec[1].get("image_upload"):
                found.append((node_id, name))
    return sorted(found, key=lambda pair: [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in pair[0].split(":")])


def set_seeds(prompt: Prompt, seed: int, object_info: dict[str, Any]) -> None:
    """Gives every seed widget of the workflow this value."""
    for node in prompt.values():
        for name, spec in input_schema(object_info.get(node["class_type"], {})).items():
            is_seed = len(spec) > 1 and isinstance(spec[1], dict) and spec[1].get("control_after_generate")
            if is_seed and isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = seed
