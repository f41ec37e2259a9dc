"""The node that gathers pictures to train on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import folder_paths
from comfy_api.latest import io

from ..degradations.recipe import Recipe
from ..training import sources
from ..training.data_config import PATHS, full_path, open_source
from ..training.pairs import MULTIPLE, Pairs, preview
from .degradation import MendDegradation

MendPairs = io.Custom("MEND_PAIRS")
MOST_RECIPES = 16
RELATIVE = "A complete path, or one in ComfyUI's input folder."


def _path(name: str, tooltip: str) -> io.Input:
    return io.String.Input(name, default="", tooltip=f"{tooltip} {RELATIVE}")


def _options() -> list[io.DynamicCombo.Option]:
    return [
        io.DynamicCombo.Option(sources.FOLDER, [
            _path("folder", "Folder of good pictures, with all its subfolders. Captions are text files of the same names."),
        ]),
        io.DynamicCombo.Option(sources.TWO_FOLDERS, [
            _path("good_folder", "Folder of good pictures, with all its subfolders. Captions are text files of the same names."),
            _path("degraded_folder", "Folder of the same pictures, damaged, under the same names. Only the format may differ."),
        ]),
        io.DynamicCombo.Option(sources.CONNECTED, [
            io.Image.Input(
                "images", tooltip="Good pictures that are loaded already: a list, as Load Image-Text (from Folder) gives, or a batch.",
            ),
            io.Image.Input(
                "degraded", optional=True,
                tooltip="The same pictures, damaged, in the same order. Without it they are made by degradations.",
            ),
            io.String.Input("texts", optional=True, force_input=True, tooltip="Captions: one for each picture, or one for all."),
        ]),
        io.DynamicCombo.Option(sources.SHARDS, [
            _path(
                "shards", "WebDataset shards: a folder of .tar files, one of them, or several as in train-*.tar or train-{000..012}.tar. "
                "A picture 01.jpg may come with 01.lq.jpg or 01.degraded.jpg, and 01.txt.",
            ),
        ]),
    ]  # fmt: skip


class PairedData(io.ComfyNode):
    """Declares Paired Data."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendPairedData",
            display_name=sources.NODE,
            category="restoration/training",
            description="Gathers pictures to train a restoration on: good pictures that are damaged anew each time by the degradations you "
            "connect, or pairs of good and degraded pictures you have. Pictures are read when training needs them, not all at once.",
            search_aliases=["dataset", "training data", "image pairs", "lq hq", "load images from folder", "webdataset", "captions"],
            is_input_list=True,
            inputs=[
                io.DynamicCombo.Input("source", options=_options(), tooltip="Where the pictures are."),
                io.Autogrow.Input(
                    "degradations",
                    template=io.Autogrow.TemplatePrefix(
                        MendDegradation.Input(
                            "degradation", optional=True,
                            tooltip="The degradation output of the last node of a chain.",
                        ),
                        prefix="degradation_", min=0, max=MOST_RECIPES,
                    ),
                    tooltip="What is done to good pictures that have no degraded one. Of several, each sample draws one.",
                ),
                io.Int.Input(
                    "crop", default=256, min=64, max=4096, step=MULTIPLE,
                    tooltip="Side of the square that is cut out of each picture, in pixels; smaller pictures are left out. Large crops "
                    "cost memory and time: 256 to 512 suits SD 1.5, 512 to 1024 later models.",
                ),
                io.Boolean.Input("flip", default=True, tooltip="Mirror half of the samples. Turn it off for pictures with text."),
                io.Int.Input(
                    "held_out", default=8, min=0, max=1000,
                    tooltip="How many pictures are kept aside to validate with, at most a tenth of them. With fewer than ten pictures none is kept aside.",
                ),
            ],
            outputs=[
                MendPairs.Output(display_name="pairs", tooltip="The paired data, to train with."),
                io.Image.Output(
                    display_name="preview", tooltip="Four samples as training sees them: degraded on the left, good on the right.",
                ),
                io.String.Output(display_name="info", tooltip="How many pictures there are, and what was left out and why."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, source: dict, crop: list[int], flip: list[bool], held_out: list[int], degradations: dict[str, list[Recipe]] | None = None
    ) -> io.NodeOutput:  # fmt: skip
        """Return pairs, preview and info."""
        recipes = [given[0] for given in (degradations or {}).values() if given and given[0] is not None]
        pairs = Pairs(_source(source), recipes, crop[0], flip[0], held_out[0])
        return io.NodeOutput(pairs, preview(pairs), pairs.summary())

    @classmethod
    def fingerprint_inputs(cls, source: dict, **settings: Any) -> str:
        """Return names, lengths and times of change of the files, so that new pictures are noticed."""
        return repr([_state(source["source"][0], name, source.get(name)) for name in PATHS.get(source["source"][0], ())])


def _source(given: dict[str, Sequence[Any]]) -> sources.Source:
    kind = given["source"][0]
    if kind == sources.CONNECTED:
        return sources.connected_pictures(_all(given, "images"), _all(given, "texts"), _all(given, "degraded"))
    return open_source(kind, {name: given[name][0] for name in PATHS[kind]}, _input_folder())


def _state(kind: str, name: str, given: Sequence[str | None]) -> list[tuple[str, int, int]]:
    """Return what `fingerprint_inputs` says of one path; nothing of one that is linked or empty."""
    try:
        path = full_path(given[0], name, _input_folder())
    except ValueError:
        return []
    return sources.file_state(path) if kind == sources.SHARDS else sources.folder_state(path)


def _all(given: dict[str, Sequence[Any]], name: str) -> list[Tensor | str]:
    return [value for value in given.get(name) or () if value is not None]


def _input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


NODES = [PairedData]
