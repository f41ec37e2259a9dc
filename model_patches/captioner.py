"""Describes a degraded picture in words with a vision-language model from a local folder (the semantic prior of LD-RPS)."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

import comfy.model_management
import comfy.model_patcher
import comfy.utils

from . import folders, framing, host

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

NODE = "Describe Degraded Image"
ALTERNATIVE = "Or use Generate Text, which captions with a text encoder of the host's own."
BROKEN_FOLDER = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class _Holder(nn.Module):
    """Gives the host's patcher a module whose attributes it may set; `device` of a transformers model is read-only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class _Progress:
    """Streamer that moves the node's bar with every token and lets the user cancel between tokens."""

    def __init__(self, steps: int) -> None:
        self.bar = comfy.utils.ProgressBar(steps)
        self.seen_prompt = False

    def put(self, _: Tensor) -> None:
        host.interrupt_point()
        if self.seen_prompt:
            self.bar.update(1)
        self.seen_prompt = True

    def end(self) -> None:
        self.bar.update_absolute(self.bar.total)


def describe(folder: Path, image: Tensor, instruction: str, max_new_tokens: int) -> str:
    """Return one line that a captioner writes about the first picture of a batch. Greedy, so equal inputs give equal words.

    Args:
        folder: a transformers image-text-to-text model with safetensors weights.
        image: (B, H, W, C) in 0..1.
        instruction: what the captioner is asked, put before or after the picture as its own chat template wants.
        max_new_tokens: most tokens it may write.

    Raises:
        ValueError: the pictures or the folder cannot be used, or memory ran out.
    """
    framing.check_pictures(image, NODE)
    framing.check_finite(image[:1], NODE)
    check_folder(folder)
    load_device = comfy.model_management.text_encoder_device()
    dtype = run_dtype(load_device)
    processor, model = load(folder, dtype)
    patcher = comfy.model_patcher.ModelPatcher(_Holder(model), load_device, comfy.model_management.text_encoder_offload_device())
    try:
        # Its layers are not the host's own and cannot be streamed in: all or nothing.
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        inputs = prepare(processor, to_pil(image[0]), instruction, folder.name)
        tokens = _generate(model, inputs, dtype, max_new_tokens)
    except host.OUT_OF_MEMORY as error:
        raise ValueError(f"{NODE}: not enough memory for the captioner '{folder.name}'. Choose a smaller one. {ALTERNATIVE}") from error
    return one_line(processor.batch_decode(tokens, skip_special_tokens=True)[0])


def check_folder(folder: Path) -> None:
    """Raise a ValueError unless the folder has safetensors weights; pickled ones can run any code when they are opened."""
    if folders.weight_files(folder):
        return
    pickled = ", ".join(file.name for file in folders.weight_files(folder, folders.PICKLED))
    raise ValueError(f"{NODE}: captioner '{folder.name}' has no .safetensors weights, only {pickled or 'no weights at all'}, "
                     f"and pickled weights are never opened. Get its safetensors version. {ALTERNATIVE}")  # fmt: skip


def run_dtype(device: torch.device) -> torch.dtype:
    """Return the precision a captioner runs in on a device."""
    management = comfy.model_management
    if management.is_device_cpu(device):
        return torch.float32
    if management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if management.should_use_fp16(device) else torch.float32


def load(folder: Path, dtype: torch.dtype) -> "tuple[ProcessorMixin, PreTrainedModel]":
    """Read a processor and a model from a folder: local files only, safetensors only, no code from the folder."""
    import transformers

    dtype_option = {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, **local)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **local, **dtype_option)
    except BROKEN_FOLDER as error:
        raise _refusal(folder.name, "cannot be loaded", error) from error
    if not hasattr(processor, "image_processor"):
        raise _refusal(folder.name, "cannot look at pictures", None)
    return processor, model.eval()


def prepare(processor: "ProcessorMixin", picture: Image.Image, instruction: str, name: str) -> Any:
    """Return the model's inputs for one picture and what is asked about it."""
    text = instruction
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": instruction}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return processor(images=[picture], text=[text], return_tensors="pt")
    except (ValueError, TypeError, ImportError) as error:
        raise _refusal(name, "cannot take this picture and instruction", error) from error


def one_line(text: str) -> str:
    """Return the caption alone: no reasoning, line breaks or quotes, and no brackets, which a prompt would take for emphasis."""
    text = re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"[()*\"`]", " ", text).split()).replace(" ,", ",").replace(" .", ".")


def to_pil(picture: Tensor) -> Image.Image:
    """Turn one (H, W, C) picture in 0..1 into 8 bit RGB."""
    pixels = framing.to_rgb(picture[None])[0].float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


def _generate(model: "PreTrainedModel", inputs: Any, dtype: torch.dtype, max_new_tokens: int) -> Tensor:
    # Where the weights are, not where they were meant to go: a host told to keep nothing on the card leaves them behind.
    inputs = inputs.to(next(model.parameters()).device, dtype=dtype)
    tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, streamer=_Progress(max_new_tokens))
    prompt = inputs["input_ids"]
    repeats_prompt = tokens.shape[1] >= prompt.shape[1] and torch.equal(tokens[:, :prompt.shape[1]], prompt)
    return tokens[:, prompt.shape[1]:] if repeats_prompt else tokens


def _refusal(name: str, problem: str, error: Exception | None) -> ValueError:
    reason = f" ({str(error).strip().splitlines()[0]})" if error and str(error).strip() else ""
    return ValueError(f"{NODE}: captioner '{name}' {problem}{reason}. Choose the complete folder of an image-text-to-text model that the "
                      f"installed transformers knows without code of the model's own. {ALTERNATIVE}")  # fmt: skip
