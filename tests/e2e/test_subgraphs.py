"""The blueprints in subgraphs/ on a real server: offered in the node library, and the same restoration as the workflow they come from."""

import asyncio
import json

import pytest
from comfy_test.comfyui.validator import WorkflowValidation
from PIL import Image

from mend.dev.pack_checks import graph_alone, with_open_types
from mend.dev.workflow_client import Client
from mend.dev.workflow_prompt import executed_nodes, read_workflow, to_prompt
from mend.dev.workspace import PACK
from mend.tests.e2e.test_zero_shot import noisy_photograph, on_lab_prior

pytestmark = pytest.mark.zero_shot_e2e

ZERO_SHOT, ADAPTER = "Mend Zero-Shot Restore", "Mend Restore with Adapter"
WORKFLOWS = {ZERO_SHOT: "zero_shot_restore_sd", ADAPTER: "restore_with_adapter"}
INPUTS, OUTPUTS = -10, -20
SIZE = (64, 64)


def read(name):
    """A blueprint, its outer node, and the graph inside."""
    blueprint = read_workflow(PACK / "subgraphs" / f"{name}.json")
    return blueprint, blueprint["nodes"][0], blueprint["definitions"]["subgraphs"][0]


def original(name):
    """The workflow that a blueprint comes from, with the lab's model."""
    workflow = read_workflow(PACK / "workflows" / f"{WORKFLOWS[name]}.json")
    return on_lab_prior(workflow) if name == ZERO_SHOT else workflow


def answer(server, path):
    """What the server answers, as JSON."""

    async def get():
        async with Client(server.url) as client, client.session.get(client.url + path) as response:
            response.raise_for_status()
            return await response.json()

    return asyncio.run(get())


@pytest.fixture(scope="module")
def nodes(server):
    """The host's description of its nodes."""
    return answer(server, "/object_info")


def in_place(name, values=()):
    """The workflow with the blueprint's node where its middle was; the nodes inside have the ids that they have in the workflow.

    `values` are what an artist has set on the node outside, as the editor saves them: one for each widget, or none.
    """
    workflow, (blueprint, outer, graph) = original(name), read(name)
    inner = {node["id"]: node for node in graph["nodes"]}
    around = {node["id"]: node for node in executed_nodes(workflow) if node["id"] not in inner}
    slots = {(node["id"], slot): entry["name"] for node in workflow["nodes"] for slot, entry in enumerate(node["inputs"])}
    taken = {(link["target_id"], inner[link["target_id"]]["inputs"][link["target_slot"]]["name"]): link["origin_slot"]
             for link in graph["links"] if link["origin_id"] == INPUTS}  # fmt: skip
    given = {(link["origin_id"], link["origin_slot"]): link["target_slot"] for link in graph["links"] if link["target_id"] == OUTPUTS}
    links = []
    for number, origin, slot, target, target_slot, kind in workflow["links"]:
        if origin in around and target in inner:
            target, target_slot = outer["id"], taken[target, slots[target, target_slot]]
            outer["inputs"][target_slot]["link"] = number
        elif origin in inner and target in around:
            origin, slot = outer["id"], given[origin, slot]
        elif origin not in around or target not in around:
            continue
        links.append([number, origin, slot, target, target_slot, kind])
    outer["widgets_values"] = list(values)
    return {**workflow, "nodes": [*around.values(), outer], "links": links, "definitions": blueprint["definitions"]}


def unpacked(prompt, outer):
    """A prompt with the ids that the nodes of the blueprint have inside it."""
    return json.loads(json.dumps(prompt).replace(f'"{outer["id"]}:', '"'))


def test_the_host_offers_all_of_them_and_gives_them_out_unchanged(server):
    offered = answer(server, "/global_subgraphs")
    ours = {entry["name"]: key for key, entry in offered.items() if entry["info"]["node_pack"] == "custom_nodes.mend"}
    files = {file.stem: file for file in (PACK / "subgraphs").glob("*.json")}
    assert set(ours) == set(files) == set(WORKFLOWS)
    for name, key in ours.items():
        assert answer(server, f"/global_subgraphs/{key}")["data"] == files[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_graph_inside_fits_the_nodes_of_the_host(nodes, name):
    _, _, graph = read(name)
    order = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    flat = graph_alone({"nodes": graph["nodes"], "links": [[link[key] for key in order] for link in graph["links"]]})
    assert not WorkflowValidation(with_open_types(nodes)).validate(flat).errors
    for node in flat["nodes"]:
        described = nodes[node["type"]]
        names = [entry for section in ("required", "optional") for entry in described["input_order"].get(section, [])]
        assert sorted(entry["name"] for entry in node["inputs"]) == sorted(names), node["type"]
        assert [entry["type"] for entry in node["outputs"]] == described["output"], node["type"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_is_the_workflow_it_comes_from(nodes, name):
    _, outer, _ = read(name)
    assert unpacked(to_prompt(in_place(name), nodes), outer) == to_prompt(original(name), nodes)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_is_set_outside_arrives_inside(nodes, name):
    _, outer, _ = read(name)
    widgets = outer["properties"]["proxyWidgets"]
    values = [f"set outside: {number}" for number in range(len(widgets))]
    prompt = to_prompt(in_place(name, values), nodes)
    assert [prompt[f"{outer['id']}:{node}"]["inputs"][widget] for node, widget in widgets] == values


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_restores_a_picture(server, nodes, tmp_path, name):
    noisy_photograph()[1].resize(SIZE).save(tmp_path / "before.png")
    _, outer, _ = read(name)
    steps = [f"{outer['id']}:{node}.{widget}=2" for node, widget in outer["properties"]["proxyWidgets"] if widget == "steps"]
    result = server.queue(in_place(name), inputs=[tmp_path / "before.png"], settings=steps, out=tmp_path / "out")
    assert steps and not result.errors
    (saved,) = [file["path"] for file in result.files if file["type"] == "output"]
    assert Image.open(saved).size == SIZE
