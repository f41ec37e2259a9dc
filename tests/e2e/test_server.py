"""The harness itself: a real server with the pack, and workflows queued on it."""

import asyncio

import pytest
from PIL import Image

from mend.dev.workflow_client import Client
from mend.dev.workflow_prompt import WorkflowError
from mend.tests.dev import sample_workflow


@pytest.mark.zero_shot_e2e
def test_pack_is_registered_and_nothing_failed_to_import(server):
    async def object_info():
        async with Client(server.url) as client:
            return await client.object_info()

    nodes = asyncio.run(object_info())
    assert [name for name, node in nodes.items() if node["python_module"] == "custom_nodes.mend"]
    log = server.log_text()
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_shared_workflow_runs_and_its_files_arrive(server, tmp_path):
    result = server.queue(sample_workflow.workflow(), settings=["Keep.filename_prefix=made"], out=tmp_path)
    sizes = [Image.open(file["path"]).size for file in result.files if file["title"] == "Keep"]
    assert sizes == [(40, 32), (40, 32)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made_00001_.png", "made_00002_.png"]
    assert result.texts["11"]


def test_inputs_are_uploaded_in_order(server, tmp_path):
    prompt, pictures = {}, []
    for number, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
        pictures.append(tmp_path / f"{colour}.png")
        prompt[str(number)] = {"class_type": "LoadImage", "inputs": {"image": "not there.png"}}
        prompt[str(number + 2)] = {"class_type": "SaveImage", "inputs": {"images": [str(number), 0], "filename_prefix": colour}}
    result = server.queue(prompt, inputs=pictures, out=tmp_path / "out")
    colours = {file["node"]: Image.open(file["path"]).getpixel((0, 0)) for file in result.files}
    assert colours == {"3": (255, 0, 0), "4": (0, 0, 255)}
    with pytest.raises(WorkflowError, match="3 input images are given, but the workflow has 2"):
        server.queue(prompt, inputs=[*pictures, pictures[0]])


def test_refused_workflow_says_why(server):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": -5, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}, "_meta": {"title": "Keep"}},
    }
    with pytest.raises(WorkflowError, match=r"node 1 \(EmptyImage\): Value -5 smaller than min"):
        server.queue(prompt)


def test_failing_node_says_why(server):
    prompt = {
        "1": {"class_type": "RegexReplace", "inputs": {"string": "a", "regex_pattern": "(", "replace": "b"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(WorkflowError, match=r"node 1 \(RegexReplace\) failed: .*unterminated subpattern"):
        server.queue(prompt)
