"""The folder of one run: what it is a run of, its last checkpoints, its validation pictures. Nothing in it is ever half written."""

import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"
LOCK = "run.lock"
# safetensors gives the system's number in its text only; 112 is Windows' for a full disk.
_FULL = {errno.ENOSPC, errno.EDQUOT, 112}
# Some network drives have no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_NAME = re.compile(r"[^\W_][\w .-]*")


class TrainingError(RuntimeError):
    """Training cannot go on for a reason the user can do something about."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. What is random follows from the seed and the step, so the step is also the place in both.

    Attributes:
        step: steps taken.
        tensors: by name.
        facts: everything else; plain JSON.
    """

    step: int
    tensors: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any]


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: the folder, which exists.
        keep: checkpoints that stay; older ones are deleted.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from training in this folder; the system lets go of it when this process ends, however it ends.

        On a drive without locks nobody is kept out, and the log says so.

        Raises:
            TrainingError: when somebody trains here already, or the folder cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            with _complaining(self.path):
                self._take(lock)
                for file in _leftovers(self.path):
                    file.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _take(self, lock: FileLock) -> None:
        try:
            lock.acquire()
        except Timeout as error:
            raise TrainingError(f"somebody trains in {self.path} at this moment. Wait for that to end, or give this run another "
                                "name.") from error
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            logging.warning("Mend: the drive of %s has no locks (%s); see to it that nobody else trains in this folder", self.path, error)

    def steps(self) -> list[int]:
        """Return the steps of which there are checkpoints, latest first."""
        return sorted((int(file.stem.partition("_")[2]) for file in self.path.glob("checkpoint_*.safetensors")), reverse=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and delete those that are too many.

        Raises:
            TrainingError: when it cannot be written; earlier ones are intact then.
        """
        metadata = {"mend.kind": "checkpoint", "mend.version": VERSION, "mend.step": str(checkpoint.step)}
        metadata["mend.facts"] = json.dumps(checkpoint.facts)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        with _replacing(self._file(checkpoint.step)) as temporary:
            save_file(tensors, temporary, metadata)
        for step in self.steps()[self.keep :]:
            try:
                self._file(step).unlink(missing_ok=True)
            except OSError as error:  # a virus scanner, or another program on Windows, holds it: the next save tries again
                logging.warning("Mend: %s cannot be deleted (%s)", self._file(step), error)

    def load(self) -> Checkpoint | None:
        """Return the latest checkpoint that is whole, None where there is none."""
        for step in self.steps():
            try:
                return _read(self._file(step))
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                logging.warning("Mend: %s is broken (%s); going back to the checkpoint before it", self._file(step), error)
        return None

    def save_pictures(self, step: int, sheet: Tensor) -> None:
        """Write validation pictures (n, H, W, 3) of uint8 as PNG files.

        Raises:
            TrainingError: when they cannot be written.
        """
        with _complaining(self.path):
            (self.path / "validation").mkdir(exist_ok=True)
        for number, picture in enumerate(sheet):
            with _replacing(self._picture(step, number)) as temporary:
                Image.fromarray(picture.numpy()).save(temporary, "PNG")

    def pictures(self, step: int, number: int) -> Tensor | None:
        """Return the `number` validation pictures of a step as they were saved, None if any is missing."""
        files = [self._picture(step, index) for index in range(number)]
        if not all(file.is_file() for file in files):
            return None
        return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])

    def _file(self, step: int) -> Path:
        return self.path / f"checkpoint_{step:09d}.safetensors"

    def _picture(self, step: int, number: int) -> Path:
        return self.path / "validation" / f"{step:09d}_{number}.png"


def open_run(base: Path, name: str, description: dict[str, Any], steps: int, keep: int = 2) -> RunFolder:
    """Open the folder to train in: that of an earlier run with the same description that has not gone beyond `steps`, or a new one.

    A folder of another run is left alone; the new one is then called <name>_2, <name>_3 and so on.

    Args:
        base: where the folders of all runs lie.
        name: of the run.
        description: what two runs must share for one to go on where the other stopped; plain JSON.
        steps: that the run shall take in all.
        keep: checkpoints that stay.

    Raises:
        ValueError: for a name that cannot be a folder's.
        TrainingError: when the folder cannot be made.
    """
    name = name.strip()
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise ValueError(f"the run name {name!r} cannot be the name of a folder. Use letters, digits, spaces, '-' and '_'.")
    wanted = json.loads(json.dumps({"mend.version": VERSION, "run": description}))
    for number in count(1):
        run = RunFolder(base / (name if number == 1 else f"{name}_{number}"), keep)
        with _complaining(run.path):
            if _is_empty(run.path):
                return _begin(run, wanted)
        if _description(run.path) == wanted and max(run.steps(), default=0) <= steps:
            return run
    raise AssertionError("count never ends")


def _begin(run: RunFolder, description: dict[str, Any]) -> RunFolder:
    run.path.mkdir(parents=True, exist_ok=True)
    with _replacing(run.path / "run.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return run


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not {*folder.iterdir()} - {folder / LOCK, *_leftovers(folder)})


def _leftovers(folder: Path) -> list[Path]:
    """What a process that was killed while writing has left; safetensors writes to a name of its own, .tmp and six letters, first."""
    return [file for pattern in (".*.tmp", ".tmp??????", "validation/.*.tmp") for file in folder.glob(pattern)]


def _description(folder: Path) -> Any:
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read(file: Path) -> Checkpoint:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        if metadata["mend.version"] != VERSION:
            raise ValueError(f"version {metadata['mend.version']} of the format")
        # Copies: what stays mapped to the file would keep it from being deleted or replaced on Windows.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - not a dict
    return Checkpoint(int(metadata["mend.step"]), tensors, json.loads(metadata["mend.facts"]))


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Offer a name to write to; what is there afterwards takes the place of `file` at one stroke, once it is on the disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _complaining(file.parent):
        try:
            yield temporary
            with open(temporary, "r+b") as written:
                os.fsync(written.fileno())
            os.replace(temporary, file)
            _sync_folder(file.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _complaining(folder: Path) -> Iterator[None]:
    """Say of failed writing where it was and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else 0
        reason = "the disk is full" if code in _FULL else str(error)
        raise TrainingError(
            f"the run folder {folder} cannot be written: {reason}. Earlier checkpoints in it are whole: "
            f"{'make room' if code in _FULL else 'see to it'} and start again to go on from the last one."
        ) from error
