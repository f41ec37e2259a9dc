"""The blueprints in subgraphs/ as files: their parts fit together, and they ship. What the host makes of them is in e2e/test_subgraphs.py."""

import pytest
from pathspec import GitIgnoreSpec

from mend.dev.workflow_prompt import read_workflow
from mend.dev.workspace import PACK

FILES = sorted((PACK / "subgraphs").glob("*.json"))
INPUTS, OUTPUTS = -10, -20

pytestmark = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def parts(file):
    """The node an artist sees, and the graph inside it."""
    blueprint = read_workflow(file)
    (outer,) = blueprint["nodes"]
    (graph,) = blueprint["definitions"]["subgraphs"]
    return outer, graph


def test_it_is_one_named_node_with_a_description(file):
    outer, graph = parts(file)
    assert outer["type"] == graph["id"]
    assert outer["title"] == graph["name"] == file.stem
    assert graph["category"] and graph["description"] == read_workflow(file)["extra"]["BlueprintDescription"]


def test_both_ends_of_every_link_know_it(file):
    _, graph = parts(file)
    nodes = {node["id"]: node for node in graph["nodes"]}
    ends = set()
    for link in graph["links"]:
        number, origin, target = link["id"], link["origin_id"], link["target_id"]
        source = (graph["inputs"] if origin == INPUTS else nodes[origin]["outputs"])[link["origin_slot"]]
        taker = (graph["outputs"] if target == OUTPUTS else nodes[target]["inputs"])[link["target_slot"]]
        assert number in source["linkIds" if origin == INPUTS else "links"], link
        assert number in taker["linkIds"] if target == OUTPUTS else number == taker["link"], link
        assert source["type"] == taker["type"] == link["type"], link
        ends |= {(number, "from"), (number, "to")}
    assert len(ends) == 2 * len(graph["links"]), "two links have the same id"
    told = [number for end in graph["inputs"] for number in end["linkIds"]]
    told += [number for node in nodes.values() for output in node["outputs"] for number in output["links"]]
    taken = [number for end in graph["outputs"] for number in end["linkIds"]]
    taken += [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(told) == sorted(taken) == sorted(link["id"] for link in graph["links"])


def test_every_socket_and_widget_outside_leads_inside(file):
    outer, graph = parts(file)
    assert [(entry["name"], entry["type"]) for entry in outer["inputs"]] == [(entry["name"], entry["type"]) for entry in graph["inputs"]]
    assert [(entry["name"], entry["type"]) for entry in outer["outputs"]] == [(entry["name"], entry["type"]) for entry in graph["outputs"]]
    nodes, links = {node["id"]: node for node in graph["nodes"]}, {link["id"]: link for link in graph["links"]}
    promoted = []
    for entry, socket in zip(outer["inputs"], graph["inputs"]):
        targets = [links[number] for number in socket["linkIds"]]
        widgets = [nodes[link["target_id"]]["inputs"][link["target_slot"]].get("widget") for link in targets]
        if "widget" in entry:
            promoted += [[str(targets[0]["target_id"]), widgets[0]["name"]]]
        else:
            assert targets and not any(widgets), entry["name"]
    assert outer["properties"]["proxyWidgets"] == promoted


def test_ids_are_not_used_twice(file):
    outer, graph = parts(file)
    ids = [outer["id"], *(node["id"] for node in graph["nodes"])]
    assert len(set(ids)) == len(ids) and max(ids) == graph["state"]["lastNodeId"]
    assert max(link["id"] for link in graph["links"]) == graph["state"]["lastLinkId"]


def test_it_ships(file):
    ignored = GitIgnoreSpec.from_lines((PACK / ".comfyignore").read_text(encoding="utf-8").splitlines())
    assert not ignored.match_file(file.relative_to(PACK).as_posix())
    assert ignored.match_file("tests/test_subgraphs.py"), "the list is not read as it is meant"
