"""From a workflow file to a prompt."""

import pytest

from mend.dev import workflow_prompt
from mend.dev.workflow_prompt import WorkflowError
from mend.tests.dev import sample_workflow


@pytest.fixture
def info():
    return sample_workflow.object_info()


@pytest.fixture
def prompt(info):
    return workflow_prompt.to_prompt(sample_workflow.workflow(), info)


def test_every_kind_of_widget_and_node_is_converted(prompt):
    inputs = {node_id: node["inputs"] for node_id, node in prompt.items()}
    inverted = inputs.pop(next(node_id for node_id in inputs if ":" in node_id))
    assert inverted == {"image": ["6", 0]}
    assert inputs["3"]["images.image0"] == ["2", 0] and inputs["3"]["images.image1"][0].startswith("13:")
    assert inputs["2"] == {
        "input": ["1", 0], "resize_type": "scale dimensions", "resize_type.width": 40, "resize_type.height": 32,
        "resize_type.crop": "center", "scale_method": "area",
    }  # fmt: skip
    assert inputs["6"] == {"image": ["1", 0], "upscale_method": "area", "width": 40, "height": 32, "crop": "center"}
    assert inputs["10"] == {"noise_seed": 7}
    assert inputs["4"] == {"images": ["3", 0], "filename_prefix": "kept"}
    assert set(inputs) == {"1", "2", "3", "4", "6", "10", "11"}


def test_api_format_passes_unchanged(prompt, info):
    assert workflow_prompt.to_prompt(prompt, info) == prompt
    assert workflow_prompt.to_prompt({"prompt": prompt}, info) == prompt


def test_unknown_nodes_are_named(info):
    del info["ImageScale"]
    with pytest.raises(WorkflowError, match="no node ImageScale"):
        workflow_prompt.to_prompt(sample_workflow.workflow(), info)


@pytest.mark.parametrize("name", ["4", "Keep", "SaveImage"])
def test_settings_find_nodes_by_id_title_and_class(prompt, info, name):
    workflow_prompt.apply_settings(prompt, [f"{name}.filename_prefix=12"], info)
    assert prompt["4"]["inputs"]["filename_prefix"] == "12"


def test_settings_reach_dynamic_inputs_and_take_links(prompt, info):
    workflow_prompt.apply_settings(prompt, ["2.resize_type.width=16", 'ImageScale.image=["3",0]'], info)
    assert prompt["2"]["inputs"]["resize_type.width"] == 16
    assert prompt["6"]["inputs"]["image"] == ["3", 0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("4.prefix=a", "SaveImage has no input prefix. It has .*filename_prefix"),
        ("99.x=1", "no node 99"),
        ("nonsense", "NODE_ID.input=value"),
    ],
)
def test_wrong_settings_are_explained(prompt, info, setting, message):
    with pytest.raises(WorkflowError, match=message):
        workflow_prompt.apply_settings(prompt, [setting], info)


@pytest.fixture
def switched(info):
    """A node with a switch, one with a switch that comes with a choice, and choices that are called as switches are."""
    switch = ["BOOLEAN", {"default": True}]
    files = {"recursive": switch, "ending": ["STRING", {}]}
    captions = {"options": [{"key": "files", "inputs": {"required": files}}, {"key": "none", "inputs": {}}]}
    inputs = {"on": switch, "source": ["COMFY_DYNAMICCOMBO_V3", captions], "mode": sample_workflow.choice("True", "False")}
    info["Switch"] = sample_workflow.described(inputs)
    return {"1": {"class_type": "Switch", "inputs": {"on": True, "source": "files", "source.recursive": True}}}


@pytest.mark.parametrize("name", ["on", "source.recursive"])
@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("true", True), ("1", True), ("False", False), ("FALSE", False), ("0", False), ('["3", 0]', ["3", 0])],
)
def test_switches_take_true_and_false_in_any_case(switched, info, name, text, value):
    workflow_prompt.apply_settings(switched, [f"1.{name}={text}"], info)
    assert switched["1"]["inputs"][name] == value and not isinstance(switched["1"]["inputs"][name], str)


@pytest.mark.parametrize("text", ["no", "off", "2", "null", '"False"', ""])
def test_switches_refuse_everything_else(switched, info, text):
    with pytest.raises(WorkflowError, match=f"--set 1.on={text}: on is on or off; it takes true or false"):
        workflow_prompt.apply_settings(switched, [f"1.on={text}"], info)


def test_words_for_true_and_false_stay_words_where_words_are_asked_for(switched, info):
    workflow_prompt.apply_settings(switched, ["1.mode=False", "1.source.ending=False"], info)
    assert (switched["1"]["inputs"]["mode"], switched["1"]["inputs"]["source.ending"]) == ("False", "False")


def test_a_choice_without_inputs_describes_none(switched, info):
    workflow_prompt.apply_settings(switched, ["1.source=none", "1.source.recursive=False"], info)
    assert switched["1"]["inputs"]["source.recursive"] is False


def test_seeds_are_set_where_there_is_a_seed_widget(prompt, info):
    workflow_prompt.set_seeds(prompt, 99, info)
    assert prompt["10"]["inputs"] == {"noise_seed": 99}
    assert prompt["1"]["inputs"]["width"] == 64


def test_image_inputs_come_in_the_order_of_their_ids(info):
    loader = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}
    prompt = {"10": loader, "2": loader, "1": {"class_type": "EmptyImage", "inputs": {}}, "3:4": loader}
    assert workflow_prompt.image_inputs(prompt, info) == [("2", "image"), ("3:4", "image"), ("10", "image")]


def test_image_inputs_take_ids_that_are_words(info):
    loader = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}
    found = workflow_prompt.image_inputs({"load": loader, "2": loader, "10:a": loader}, info)
    assert found == [("2", "image"), ("10:a", "image"), ("load", "image")]


@pytest.mark.parametrize("data", [{}, {"name": "a package", "version": "1"}, {"nodes": None}])
def test_what_is_no_workflow_is_refused(info, data):
    with pytest.raises(WorkflowError, match="this is not a workflow"):
        workflow_prompt.to_prompt(data, info)


def test_broken_files_are_explained(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(WorkflowError, match="broken.json is not JSON"):
        workflow_prompt.read_workflow(file)
    with pytest.raises(WorkflowError, match="cannot read .*missing.json"):
        workflow_prompt.read_workflow(tmp_path / "missing.json")
