"""The pack's one pair of nodes for files of weights, whatever their kind."""

from pathlib import Path

import torch

import folder_paths
from comfy_api.latest import io, ui

from ..model_patches import folders
from ..model_patches.errors import telling
from ..model_patches.published_prompt import load_file
from ..model_patches.weights_file import Weights, save_weights

LOAD, SAVE = "Load Mend Weights", "Save Mend Weights"
WeightsSocket = io.Custom("MEND_WEIGHTS")
PRECISIONS = {"half (fp16)": torch.float16, "half (bf16)": torch.bfloat16, "full (fp32)": torch.float32}


class LoadWeights(io.ComfyNode):
    """Declares Load Mend Weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendLoadWeights",
            display_name=LOAD,
            category="restoration/weights",
            description="Load what was trained with Mend: restoration adapters and other kinds of weights, one small file each; or a "
            "learned prompt as its authors publish it. Files lie in models/mend; those that come with the pack are in the same list.",
            search_aliases=["load adapter", "restoration adapter", "load mend", "mend weights", "learned prompt"],
            inputs=[
                io.Combo.Input("file", options=folders.weights_files(), tooltip="A file in models/mend, or one of the lab's.")
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="For the Apply node of their kind, or for Train.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Load again when the file has changed."""
        path = folder_paths.get_full_path(folders.MEND, file)
        return "" if path is None else str(Path(path).stat().st_mtime_ns)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Return the weights."""
        with telling(f"{LOAD}:"):
            return io.NodeOutput(load_file(Path(folder_paths.get_full_path(folders.MEND, file) or file)))


class SaveWeights(io.ComfyNode):
    """Declares Save Mend Weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendSaveWeights",
            display_name=SAVE,
            category="restoration/weights",
            description="Save trained weights as one file in models/mend, to load them again and to share them. Nothing is ever "
            "overwritten: each run writes a file with the next number.",
            search_aliases=["save adapter", "export adapter", "save mend", "mend weights"],
            inputs=[
                WeightsSocket.Input("weights", tooltip="What to save: from Train, a New node or Load Mend Weights."),
                io.String.Input(
                    "filename_prefix", default="restoration", tooltip="Start of the file's name; may name folders, as in faces/old."
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), default="half (fp16)",
                    tooltip="half: half the size, the same picture. full: to go on training later.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, weights: Weights, filename_prefix: str, precision: str) -> io.NodeOutput:
        """Write the next file and show its name."""
        folder = Path(folder_paths.get_folder_paths(folders.MEND)[0]) / weights.kind
        dtype = PRECISIONS[precision]
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() and tensor.ndim else tensor for name, tensor in weights.tensors.items()
        }
        stored = Weights(weights.kind, weights.family, weights.config, tensors)
        while True:
            file = _next_file(folder, filename_prefix)
            try:
                save_weights(stored, file)
            except FileExistsError:
                continue
            except OSError as error:
                raise _unwritable(file, error) from error
            return io.NodeOutput(ui=ui.PreviewText(f"models/mend/{weights.kind}/{file.relative_to(folder).as_posix()}"))


def _next_file(folder: Path, prefix: str) -> Path:
    """Return the first free name, as the host numbers its own files."""
    if not (folder / prefix).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{SAVE}: filename_prefix {prefix!r} leads out of models/mend. Use a name, or folders below it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        full, name, counter, _, _ = folder_paths.get_save_image_path(prefix or "weights", str(folder))
    except OSError as error:
        raise _unwritable(folder / prefix, error) from error
    return Path(full) / f"{name}_{counter:05}_.safetensors"


def _unwritable(file: Path, error: OSError) -> ValueError:
    return ValueError(f"{SAVE}: {file} cannot be written: {error.strerror or error}. Free some space or choose another filename_prefix.")


NODES = [LoadWeights, SaveWeights]
