"""Every node is explained: in its schema, on its help page, in both languages, in a workflow, and by a test."""

import asyncio
import functools
import json
import re
from pathlib import Path

import pytest

from mend.nodes import MendExtension

ROOT = Path(__file__).resolve().parents[2]
NODES = {node.define_schema().node_id: node for node in asyncio.run(MendExtension().get_node_list())}
every_node = pytest.mark.parametrize("node_id", NODES)


@functools.cache
def schema(node_id):
    return NODES[node_id].GET_SCHEMA()


def inputs(node_id):
    """The inputs by the key that the editor looks their texts up with, those inside the options of an input included."""
    found = {}
    waiting = [(entry.id, entry) for entry in schema(node_id).inputs]
    while waiting:
        key, entry = waiting.pop(0)
        found[key.replace(".", "_")] = entry
        for option in getattr(entry, "options", None) or []:
            waiting += [(f"{key}.{inner.id}", inner) for inner in getattr(option, "inputs", [])]
    return found


def outputs(node_id):
    return {str(index): entry for index, entry in enumerate(schema(node_id).outputs)}


def shown(entry):
    return entry.display_name or entry.id


def expected_locale(node_id):
    """The English entry: the schema's own texts."""
    own = schema(node_id)
    ports = {"inputs": inputs(node_id), "outputs": outputs(node_id)}
    texts = {kind: {key: {"name": shown(entry), "tooltip": entry.tooltip} for key, entry in entries.items()} for kind, entries in ports.items()}
    return {"display_name": own.display_name, "description": own.description, **{kind: value for kind, value in texts.items() if value}}


@functools.cache
def locale(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@functools.cache
def help_page(node_id):
    return (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")


def section(node_id, title):
    """The text of one section of a help page."""
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", help_page(node_id), re.MULTILINE | re.DOTALL)
    assert match, f"{node_id}.md has no section '## {title}'"
    return match[1]


def workflow_types(value):
    """The classes of all nodes in a workflow, those in subgraphs included."""
    if isinstance(value, dict):
        return {value.get("type"), value.get("class_type")}.union(*map(workflow_types, value.values()))
    return set().union(*map(workflow_types, value)) if isinstance(value, list) else set()


@every_node
def test_names(node_id):
    own = schema(node_id)
    assert re.fullmatch(r"Mend[A-Z][A-Za-z0-9]+", node_id)
    assert own.display_name and own.display_name[0].isupper() and not own.display_name.startswith("Mend")
    assert re.fullmatch(r"restoration/[a-z-]+", own.category)


@every_node
def test_schema_explains_itself(node_id):
    own = schema(node_id)
    assert own.description and own.search_aliases
    missing = [f"input {key}" for key, entry in inputs(node_id).items() if not (entry.tooltip or "").strip()]
    missing += [f"output {key}" for key, entry in outputs(node_id).items() if not ((entry.tooltip or "").strip() and shown(entry))]
    assert not missing, f"{node_id} has no tooltip (or name) on {missing}"


@every_node
def test_help_page(node_id):
    assert help_page(node_id).startswith(f"# {schema(node_id).display_name}\n")
    assert len(help_page(node_id).split("## ")[0].split("\n", 1)[1].strip()) > 80, "the first paragraph says what the node does and when to use it"
    assert section(node_id, "What to turn").strip()
    for title, entries in (("Inputs", inputs(node_id)), ("Outputs", outputs(node_id))):
        if not entries:
            continue
        assert "| Parameter | Description | Data Type |" in section(node_id, title)
        rows = [line for line in section(node_id, title).splitlines() if line.startswith("| `")]
        assert [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows] == [entry.id if title == "Inputs" else shown(entry) for entry in entries.values()]
    if inputs(node_id):
        assert "| Parameter | Description | Data Type | Required | Range |" in section(node_id, "Inputs")


def marked(text):
    """What stands in backticks, which no translation changes."""
    return sorted(set(re.findall(r"`([^`\n]+)`", text)))


@every_node
def test_chinese_help_page(node_id):
    text, english = (ROOT / "web" / "docs" / node_id / "zh.md").read_text(encoding="utf-8"), help_page(node_id)
    assert text.startswith(f"# {locale('zh')[node_id]['display_name']}\n")
    assert re.findall(r"^\| (`[^`]+`) \|", text, re.MULTILINE) == re.findall(r"^\| (`[^`]+`) \|", english, re.MULTILINE), "the same ports in the same order"
    assert marked(text) == marked(english), "a page that was changed is changed in both languages"
    assert [len(heading) for heading in re.findall(r"^(#+) ", text, re.MULTILINE)] == [len(heading) for heading in re.findall(r"^(#+) ", english, re.MULTILINE)]
    assert text.count("\n- ") == english.count("\n- ")


@every_node
def test_english_is_what_the_schema_says(node_id):
    wanted = expected_locale(node_id)
    assert locale("en").get(node_id) == wanted, f'locales/en/nodeDefs.json needs\n"{node_id}": {json.dumps(wanted, indent=2)}'


@every_node
def test_chinese_covers_the_schema(node_id):
    wanted, found = expected_locale(node_id), locale("zh").get(node_id)
    assert found is not None, f"locales/zh/nodeDefs.json has no {node_id}"
    assert found.keys() == wanted.keys()
    texts = [found["display_name"], found["description"]]
    for kind in ("inputs", "outputs"):
        assert found.get(kind, {}).keys() == wanted.get(kind, {}).keys()
        for texts_of_port in found.get(kind, {}).values():
            assert texts_of_port.keys() == {"name", "tooltip"} and texts_of_port["name"]
            texts.append(texts_of_port["tooltip"])
    untranslated = [text for text in texts if not re.search(r"[\u4e00-\u9fff]", text)]
    assert not untranslated


@pytest.mark.parametrize("language", ["en", "zh"])
def test_locale_file_is_tidy(language):
    text = (ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
    assert list(locale(language)) == sorted(locale(language)), "sort the entries by node id"
    assert locale(language).keys() <= NODES.keys(), "an entry belongs to no node"
    assert text == json.dumps(locale(language), indent=2, ensure_ascii=False) + "\n", "indent by two spaces, without escapes"


@every_node
def test_a_test_names_the_node(node_id):
    files = [file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__).resolve()]
    assert any(node_id in file.read_text(encoding="utf-8") for file in files), f"no file under tests/ names {node_id}"


def test_workflows_use_every_node():
    files = sorted((ROOT / "workflows").glob("*.json"))
    if not files:
        pytest.skip(f"there is no workflow yet; waiting for one: {', '.join(sorted(NODES))}")
    used = set().union(*(workflow_types(json.loads(file.read_text(encoding="utf-8"))) for file in files))
    assert not NODES.keys() - used, f"no workflow uses {sorted(NODES.keys() - used)}"


def test_every_workflow_has_a_picture():
    """The host lists them as templates."""
    names = {suffix: {file.stem for file in (ROOT / "workflows").glob(f"*{suffix}")} for suffix in (".json", ".jpg")}
    assert names[".json"] == names[".jpg"]


def test_help_pages_belong_to_nodes():
    docs = ROOT / "web" / "docs"
    assert {file.stem for file in docs.glob("*.md")} | {file.parent.name for file in docs.glob("*/*.md")} <= NODES.keys()
