"""The one file format for everything the pack trains: safetensors with kind, family and config in the metadata."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# The family of what fits every model.
ANY_FAMILY = "any"

VERSION = "1"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Weights:
    """Weights of one kind, as they stand in a file or go from node to node.

    Attributes:
        kind: what they are, such as "restoration_adapter".
        family: the base model they were made for, as model_patches/anatomy.py names it.
        config: everything that is not in the shapes; plain JSON.
        tensors: by name.
        name: what to call them in messages.
    """

    kind: str
    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    name: str = "the weights"
    # Not handed on by dataclasses.replace: other tensors make other modules.
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, what: str, make: Callable[[], Made]) -> Made:
        """Return what `make` returned when it was first asked for `what`: modules made of these weights live as long as they do."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    def expect(self, kind: str, node: str) -> None:
        """Check the kind.

        Raises:
            ValueError: naming the node, the weights and both kinds.
        """
        if self.kind != kind:
            raise ValueError(f"{node}: {self.name} is of the kind {in_words(self.kind)}, and this node applies the kind {in_words(kind)}. "
                             "Connect other weights.")


def save_weights(weights: Weights, file: Path) -> None:
    """Write weights atomically; a file of that name is never replaced.

    Raises:
        FileExistsError: when there is one.
        OSError: when the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    config = json.dumps(weights.config, sort_keys=True)
    metadata = {"mend.kind": weights.kind, "mend.version": VERSION, "mend.family": weights.family, "mend.config": config}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        _write({name: tensor.detach().cpu().contiguous() for name, tensor in weights.tensors.items()}, temporary, metadata)
        _publish(temporary, file)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(file: Path) -> Weights:
    """Read weights.

    Raises:
        ValueError: for anything that is not a file of this pack, whole and of a version that is known; the message says what to do.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}. Put it into models/mend, or choose another.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a safetensors file, or only a part of one ({error}). Download or save it again.") from error
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror or error}). Check the file's permissions and its disk.") from error
    missing = [key for key in ("mend.kind", "mend.version", "mend.family", "mend.config") if key not in metadata]
    if missing:
        raise ValueError(f"{file.name} was not made by this pack: its metadata lacks {', '.join(missing)}. LoRA files of others go to Load LoRA.")
    if metadata["mend.version"] != VERSION:
        raise ValueError(f"{file.name} has version {metadata['mend.version']} of the file format, and this pack reads {VERSION}. Update the pack.")
    try:
        config = json.loads(metadata["mend.config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{file.name} was not made by this pack: its description is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} was not made by this pack: its description is {metadata['mend.config'][:40]!r}, and not a set of values.")
    return Weights(metadata["mend.kind"], metadata["mend.family"], config, tensors, file.name)


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def in_words(kind: str) -> str:
    """Return what messages call a kind of weights."""
    return kind.replace("_", " ")


def _write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file and see it onto the disk, so that no power cut leaves a name for something that is not there."""
    save_file(tensors, file, metadata)
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def _publish(temporary: Path, file: Path) -> None:
    """Give a finished file its name, unless the name is taken. Not every file system has hard links, which leave no moment in between."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:
        if file.exists():
            raise FileExistsError(file) from None
        os.rename(temporary, file)
