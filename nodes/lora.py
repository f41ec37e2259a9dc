"""LoRA files of any origin: the host reads most spellings of their keys, and the pack's normaliser the others."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..model_patches.host_lora import with_lora
from ..model_patches.lora_keys import is_text_encoder_key, native_lora

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NODE = "Load LoRA of Any Origin"
log = logging.getLogger(__name__)


class LoadAnyLora(io.ComfyNode):
    """Declares Load LoRA of Any Origin."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendLoadAnyLora",
            display_name=NODE,
            category="restoration/weights",
            description="Apply a LoRA file that Load LoRA does not take, or takes only in part: files from training scripts of diffusers and PEFT "
            "name their layers in other ways. For all other files Load LoRA does the same. Keys for text encoders need Load LoRA (Model and CLIP).",
            search_aliases=["lora", "peft", "diffusers lora", "lora not loaded", "lora key not loaded", "adapter_model"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained on."),
                io.Combo.Input("file", options=folder_paths.get_filename_list("loras"), tooltip="A file in models/loras."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip="How much of it is applied. 0 leaves the model alone."),
                io.Float.Input(
                    "alpha", default=0.0, min=0.0, max=100000.0, step=0.5, advanced=True,
                    tooltip="lora_alpha of the adapter_config.json beside the file, if the file itself holds no alpha. 0: the same as its rank.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the LoRA.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: "ModelPatcher", file: str, strength: float, alpha: float = 0.0) -> io.NodeOutput:
        """Return the patched model."""
        path = folder_paths.get_full_path_or_raise("loras", file)
        if Path(path).suffix.lower() != ".safetensors":
            raise ValueError(f"{NODE}: {file} is not a safetensors file. Other formats can hold programs; convert it first.")
        try:
            held = comfy.utils.load_torch_file(path, safe_load=True)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{NODE}: {file} is not a safetensors file, or only a part of one ({error}). Download it again.") from error
        tensors, left = native_lora(held, model.model, alpha or None)
        text = [key for key in left if is_text_encoder_key(key)]
        if not tensors:
            raise ValueError(f"{NODE}: no layer of 'model' is named in {file} ({_some(left)}). It was made for another model.")
        if len(text) < len(left):
            log.warning("%s: %s has keys for no layer of this model, which are left out: %s", NODE, file, _some([key for key in left if key not in text]))
        if text:
            log.warning("%s: %s also has %d keys for text encoders. Load LoRA (Model and CLIP) applies those; set its strength_model to 0 so that "
                        "the model's part does not count twice.", NODE, file, len(text))
        return io.NodeOutput(with_lora(model, tensors, strength) if strength else model.clone())


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "it is empty"


NODES = [LoadAnyLora]
