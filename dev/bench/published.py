"""The pack's own weights in lab/trained: stored in half precision, read back in full."""

import os
from pathlib import Path

from ...model_patches.weights_file import Weights, load_weights, save_weights
from ...training.trainee import Trainee
from .report import PACK

TRAINED = PACK / "lab" / "trained"


def weights_of(trainee: Trainee) -> Weights:
    """Return what a trainee has learned."""
    return Weights(trainee.kind, trainee.family, trainee.config, {name: tensor.detach() for name, tensor in trainee.state_dict().items()})


def halved(weights: Weights) -> Weights:
    """Return weights in half precision; single numbers, such as measured deviations, stay as they are."""
    tensors = {name: tensor.half() if tensor.ndim else tensor for name, tensor in weights.tensors.items()}
    return Weights(weights.kind, weights.family, weights.config, tensors, weights.name)


def store(weights: Weights, file: Path) -> None:
    """Store weights in half precision in place of a file, for everybody to read; until they are written the earlier ones stay."""
    unfinished = file.with_name(f"{file.stem}.unfinished.safetensors")
    unfinished.unlink(missing_ok=True)
    save_weights(halved(weights), unfinished)
    unfinished.chmod(0o644)
    os.replace(unfinished, file)


def full_weights(file: Path) -> Weights:
    """Read a file in full precision, to be measured or trained on."""
    stored = load_weights(file)
    return Weights(stored.kind, stored.family, stored.config, {name: tensor.float() for name, tensor in stored.tensors.items()}, file.name)
