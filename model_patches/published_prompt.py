"""The files that the authors of YPT (arXiv 2604.04924) publish: {'backend', 'deep_prompt_bank': {'prompts'}, 'alphas'}, saved by torch."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

import comfy.utils

from .folders import PUBLISHED
from .learned_prompt import KIND
from .weights_file import Weights, load_weights

# The bridge that the authors train on begins here.
T0 = 0.4
# What the authors call the models, the family each is, its width and its number of attention modules.
BACKENDS = {"flux": ("FLUX.1", 3072, 57), "wan": ("WAN 1.3B", 1536, 30)}


def load_file(file: Path) -> Weights:
    """Read weights of any kind: the pack's own files, and published prompts.

    Raises:
        ValueError: for anything else; the message says what to do.
    """
    return load_published(file) if file.suffix == PUBLISHED else load_weights(file)


def load_published(file: Path) -> Weights:
    """Read a published prompt. No code in the file is ever run.

    Raises:
        ValueError: for anything that is not such a file, whole.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}. Put it into models/mend, or choose another.")
    try:
        content = comfy.utils.load_torch_file(str(file), safe_load=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file.name} is not a published learned prompt, or only a part of one ({reason}). Of .pt files this pack reads "
                         "no others; nothing in it was run. Download it again, or look for a .safetensors file.") from error
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror or error}). Check the file's permissions and its disk.") from error
    return published_weights(content, file.name)


def published_weights(content: Any, name: str) -> Weights:
    """Return the weights in what such a file holds.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if not isinstance(content, dict) or not {"backend", "deep_prompt_bank", "alphas"} <= content.keys():
        held = ", ".join(sorted(map(str, content))[:4]) or "nothing" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{name} is not a published learned prompt: it holds {held}, and backend, deep_prompt_bank and alphas were "
                         "expected. Of .pt files this pack reads no others.")
    backend, bank, alphas = content["backend"], content["deep_prompt_bank"], content["alphas"]
    if backend not in BACKENDS:
        raise ValueError(f"{name} is a learned prompt for {backend!r}, and this pack knows those for {' and '.join(BACKENDS)}. "
                         "Update the pack.")
    family, width, modules = BACKENDS[backend]
    prompts = bank.get("prompts") if isinstance(bank, dict) else None
    if not _numbers(prompts) or prompts.ndim != 3 or len(prompts) != 1 or prompts.shape[1] == 0 or prompts.shape[2] != width:
        found = tuple(prompts.shape) if isinstance(prompts, Tensor) else type(prompts).__name__
        raise ValueError(f"{name} is incomplete: its prompts are {found}, and numbers of shape (1, L, {width}) were expected. "
                         "Download it again.")
    listed = isinstance(alphas, (list, tuple))
    if not listed or len(alphas) != modules or not all(_numbers(alpha) and alpha.numel() == 1 for alpha in alphas):
        found = f"{len(alphas)} entries" if listed else type(alphas).__name__
        raise ValueError(f"{name} is incomplete: its alphas are {found}, and {modules} numbers were expected. Download it again.")
    tensors = {"prompts": prompts.detach().float(), "alphas": torch.stack([alpha.detach().float().reshape(()) for alpha in alphas])}
    return Weights(KIND, family, {"length": prompts.shape[1], "t0": T0}, tensors, name)


def _numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
