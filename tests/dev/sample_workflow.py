"""A workflow in the format artists share, with one of each kind of widget, link and node that the converter has to know."""

from __future__ import annotations

from typing import Any


def socket(name: str, kind: str, link: int | None = None, widget: bool = False) -> dict[str, Any]:
    """An input as the editor saves it."""
    return {"name": name, "type": kind, "link": link, **({"widget": {"name": name}} if widget else {})}


def node(number: int | str, kind: str, inputs: list, outputs: list, values: list, mode: int = 0, **more: Any) -> dict[str, Any]:
    """A node as the editor saves it; `outputs` are (type, links) pairs."""
    saved = [{"name": output, "type": output, "links": links} for output, links in outputs]
    return {"id": number, "type": kind, "mode": mode, "inputs": inputs, "outputs": saved, "widgets_values": values, **more}


BYPASSED, MUTED = 4, 2
SUBGRAPH = "11111111-2222-3333-4444-555555555555"


def inverting_subgraph() -> dict[str, Any]:
    """A subgraph that inverts an image."""
    inner = node(1, "ImageInvert", [socket("image", "IMAGE", 1)], [("IMAGE", [2])], [])
    links = [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0, "type": "IMAGE"},
        {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "IMAGE"},
    ]
    ends = {
        "inputs": [{"id": "a", "name": "image", "type": "IMAGE", "linkIds": [1]}],
        "outputs": [{"id": "b", "name": "IMAGE", "type": "IMAGE", "linkIds": [2]}],
    }
    return {"id": SUBGRAPH, "name": "Invert", "nodes": [inner], "links": links, "inputNode": {"id": -10}, "outputNode": {"id": -20}, **ends}


def workflow() -> dict[str, Any]:
    """Two images, resized in two ways and put in one batch."""
    resize = [
        socket("input", "IMAGE,MASK", 1),
        socket("resize_type", "COMFY_DYNAMICCOMBO_V3", widget=True),
        socket("resize_type.width", "INT", widget=True),
        socket("resize_type.height", "INT", widget=True),
        socket("resize_type.crop", "COMBO", widget=True),
        socket("scale_method", "COMBO", widget=True),
    ]
    nodes = [
        node(1, "EmptyImage", [], [("IMAGE", [1, 5])], [64, 48, 1, 8421504]),
        node(2, "ResizeImageMaskNode", resize, [("IMAGE", [2])], ["scale dimensions", 40, 32, "center", "area"]),
        node(3, "BatchImagesNode", [socket("images.image0", "IMAGE", 2), socket("images.image1", "IMAGE", 6)], [("IMAGE", [3, 10])], []),
        node(4, "SaveImage", [socket("images", "IMAGE", 3), socket("filename_prefix", "STRING", widget=True)], [], ["kept"], title="Keep"),
        node(5, "ImageFlip", [socket("image", "IMAGE", 5)], [("IMAGE", [7])], ["x-axis: vertically"], mode=BYPASSED),
        node(
            6,
            "ImageScale",
            [socket("image", "IMAGE", 7), socket("height", "INT", 9, widget=True)],
            [("IMAGE", [8])],
            ["area", 40, 32, "center"],
        ),
        node(7, "Reroute", [socket("", "*", 8)], [("IMAGE", [12])], []),
        node(8, "PrimitiveNode", [], [("INT", [9])], [32, "fixed"]),
        node(9, "PreviewImage", [socket("images", "IMAGE", 10)], [], [], mode=MUTED),
        node(10, "RandomNoise", [socket("noise_seed", "INT", widget=True)], [("NOISE", [11])], [7, "randomize"]),
        node(11, "PreviewAny", [socket("source", "*", 11)], [], []),
        node(12, "Note", [], [], ["read me"]),
        node(13, SUBGRAPH, [socket("image", "IMAGE", 12)], [("IMAGE", [6])], []),
    ]
    links = [[1, 1, 0, 2, 0], [2, 2, 0, 3, 0], [3, 3, 0, 4, 0], [5, 1, 0, 5, 0], [7, 5, 0, 6, 0], [8, 6, 0, 7, 0], [12, 7, 0, 13, 0],
             [6, 13, 0, 3, 1], [9, 8, 0, 6, 1], [10, 3, 0, 9, 0], [11, 10, 0, 11, 0]]  # fmt: skip
    kinds = {9: "INT", 11: "NOISE"}
    return {
        "nodes": nodes,
        "links": [[*link, kinds.get(link[0], "IMAGE")] for link in links],
        "definitions": {"subgraphs": [inverting_subgraph()]},
    }


def number(default: int, **more: Any) -> list[Any]:
    """A whole-number input as the host describes it."""
    return ["INT", {"default": default, "min": 0, "max": 9999, **more}]


def choice(*options: str) -> list[Any]:
    """A combo input as the host describes it."""
    return ["COMBO", {"options": list(options), "multiselect": False}]


def described(inputs: dict[str, Any], *outputs: str, title: str = "") -> dict[str, Any]:
    """A node as the host describes it."""
    return {"input": {"required": inputs}, "input_order": {"required": list(inputs)}, "output": list(outputs), "display_name": title}


def object_info() -> dict[str, Any]:
    """The host's description of the nodes in the workflow, as far as conversion needs it."""
    image = {"image": ["IMAGE", {}]}
    sides = {"width": number(512), "height": number(512), "crop": choice("disabled", "center")}
    resize = {
        "options": [
            {"key": "scale dimensions", "inputs": {"required": sides}},
            {"key": "by multiplier", "inputs": {"required": {"multiplier": ["FLOAT", {}]}}},
        ]
    }
    grow = {"template": {"input": {"required": image}, "prefix": "image", "min": 1, "max": 50}}
    return {
        "EmptyImage": described({"width": number(512), "height": number(512), "batch_size": number(1), "color": number(0)}, "IMAGE"),
        "ResizeImageMaskNode": described(
            {
                "input": ["COMFY_MATCHTYPE_V3", {"template": {"template_id": "input_type", "allowed_types": "IMAGE,MASK"}}],
                "resize_type": ["COMFY_DYNAMICCOMBO_V3", resize],
                "scale_method": choice("area", "lanczos"),
            },
            "COMFY_MATCHTYPE_V3",
        ),
        "BatchImagesNode": described({"images": ["COMFY_AUTOGROW_V3", grow]}, "IMAGE"),
        "SaveImage": described({"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "ComfyUI"}]}),
        "ImageFlip": described({**image, "flip_method": choice("x-axis: vertically")}, "IMAGE"),
        "ImageInvert": described(image, "IMAGE"),
        "ImageScale": described({**image, "upscale_method": choice("area"), **sides}, "IMAGE"),
        "PreviewImage": described({"images": ["IMAGE", {}]}),
        "RandomNoise": described({"noise_seed": number(0, control_after_generate=True)}, "NOISE"),
        "PreviewAny": described({"source": ["*", {}]}),
        "LoadImage": described({"image": [["a.png"], {"image_upload": True}]}, "IMAGE", "MASK"),
    }
