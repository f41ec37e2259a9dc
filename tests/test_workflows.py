"""The shared workflows as files: each tells an artist what it is for, and nothing in it lies on anything else."""

import itertools

import pytest

from mend.dev.workflow_prompt import read_workflow
from mend.dev.workspace import PACK

FILES = sorted((PACK / "workflows").glob("*.json"))
NOTES = {"MarkdownNote", "Note"}
ANY = "*"
# The title of a node stands above its position.
TITLE = 30

pytestmark = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def overlap(one, other):
    """Whether two nodes lie on each other in the editor."""
    (left, top), (width, height) = one["pos"], one["size"]
    (x, y), (w, h) = other["pos"], other["size"]
    return left < x + w and x < left + width and top - TITLE < y + h and y - TITLE < top + height


def test_a_note_says_what_to_do(file):
    assert any(node["type"] in NOTES for node in read_workflow(file)["nodes"])


def test_no_note_covers_a_node(file):
    pairs = itertools.combinations(read_workflow(file)["nodes"], 2)
    found = [(a["id"], b["id"]) for a, b in pairs if NOTES & {a["type"], b["type"]} and overlap(a, b)]
    assert not found, f"these nodes overlap: {found}"


def test_both_ends_of_every_link_know_it(file):
    workflow = read_workflow(file)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, target_slot, _ in workflow["links"]:
        output, entry = nodes[origin]["outputs"][slot], nodes[target]["inputs"][target_slot]
        assert number in output["links"] and entry["link"] == number and entry["type"] in (output["type"], ANY), number
    taken = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(taken) == sorted(link[0] for link in workflow["links"])
