"""Where training pictures come from: a folder, two folders of pairs, pictures in memory, or WebDataset shards."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..model_patches import host
from ..model_patches.framing import rgb_pictures
from .decoding import suffixes
from .pictures import GivenPicture, Picture, StoredPicture
from .shards import read_index, shard_files

NODE = "Paired Data"
FOLDER, TWO_FOLDERS, CONNECTED, SHARDS = KINDS = ("folder of good pictures", "two folders", "connected pictures", "WebDataset shards")


@dataclass(frozen=True)
class Sample:
    """A good picture with what belongs to it.

    Attributes:
        name: unique within its source.
        good: the picture.
        degraded: the same picture as it is when damaged; None if it is to be made.
        caption: what it shows, or empty.
    """

    name: str
    good: Picture
    degraded: Picture | None = None
    caption: str = ""


@dataclass(frozen=True)
class LeftOut:
    """Pictures that are not used, by name, and why: "have no ..."."""

    reason: str
    names: tuple[str, ...]

    def text(self) -> str:
        """Return a sentence with the first few names."""
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        return f"{len(self.names)} left out that {self.reason}: {shown}"


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order, and what was left out already.

    Attributes:
        place: the input and what it names, for messages.
    """

    place: str
    samples: tuple[Sample, ...]
    left_out: tuple[LeftOut, ...] = ()


def good_folder(folder: Path, name: str = "folder") -> Source:
    """Return all pictures below a folder, with the text files of the same name as captions.

    Raises:
        ValueError: when there is no such folder, or no picture in it, or a caption is not UTF-8; naming `name`, the input.
    """
    files = _files(folder, name)
    pictures = _pictures(files, folder, name)
    samples = (Sample(path, picture, caption=_caption(files, path, folder)) for path, picture in pictures.items())
    return Source(f"{name} ({folder})", tuple(samples))


def paired_folders(good: Path, degraded: Path) -> Source:
    """Return the pictures that both folders have under the same name, whatever their formats.

    Raises:
        ValueError: as `good_folder` does, or when no name is in both folders.
    """
    if good.resolve() == degraded.resolve():
        raise ValueError(f"{NODE}: good_folder and degraded_folder are the same folder, {good}. Give two folders.")
    files, others = _files(good, "good_folder"), _files(degraded, "degraded_folder")
    twice: list[str] = []
    first = _by_stem(_pictures(files, good, "good_folder"), twice)
    second = _by_stem(_pictures(others, degraded, "degraded_folder"), twice)
    both = sorted(first.keys() & second.keys())
    lonely = (
        LeftOut("have no degraded picture of the same name", tuple(first[stem][0] for stem in sorted(first.keys() - second.keys()))),
        LeftOut("have no good picture of the same name", tuple(second[stem][0] for stem in sorted(second.keys() - first.keys()))),
        LeftOut("have the name of another but for the format", tuple(twice)),
    )
    if not both:
        raise ValueError(f"{NODE}: no picture in good_folder has one of the same name in degraded_folder: {lonely[0].text()}; "
                         f"{lonely[1].text()}. Names and subfolders have to be the same but for the ending.")  # fmt: skip
    samples = (Sample(first[stem][0], first[stem][1], second[stem][1], _caption(files, first[stem][0], good)) for stem in both)
    return Source(f"good_folder ({good})", tuple(samples), tuple(entry for entry in lonely if entry.names))


def connected_pictures(images: Sequence[Tensor], texts: Sequence[str] = (), degraded: Sequence[Tensor] = ()) -> Source:
    """Return pictures that are in memory, in their order.

    Args:
        images: each (B, H, W, C).
        texts: captions: none, one for all, one a tensor or one a picture.
        degraded: none, or one a tensor, of the same batch.

    Raises:
        ValueError: when there are none, or the lists do not go together.
    """
    good = [list(rgb_pictures(image, NODE, "images")) for image in images]
    bad = [list(rgb_pictures(image, NODE, "degraded")) for image in degraded]
    if not good:
        raise ValueError(f"{NODE}: images is an empty list. Connect a node that gives at least one picture.")
    if bad and [len(batch) for batch in bad] != [len(batch) for batch in good]:
        held, wanted = sum(map(len, bad)), sum(map(len, good))
        raise ValueError(f"{NODE}: degraded holds {held} pictures for {wanted} in images. Give one for each, in the same order.")
    captions = _spread(texts, [len(batch) for batch in good])
    clean = [GivenPicture(picture) for batch in good for picture in batch]
    damaged = [GivenPicture(picture) for batch in bad for picture in batch] or [None] * len(clean)
    parts = zip(clean, damaged, captions, strict=True)
    return Source("images", tuple(Sample(f"picture {index}", *part) for index, part in enumerate(parts, 1)))


def shards(pattern: Path) -> Source:
    """Return the samples of WebDataset shards: a picture, perhaps a degraded one (key.lq.png, key.degraded.jpg) and a caption (key.txt).

    Raises:
        ValueError: when a shard is missing or damaged, has no good picture, or has a caption that is not UTF-8.
    """
    try:
        found = {f"{shard.name}/{key}": record for shard in shard_files(pattern) for key, record in read_index(shard).items()}
    except ValueError as error:
        raise ValueError(f"{NODE}: shards {error}.") from error
    samples = tuple(
        Sample(name, record.good, record.degraded, _text(record.caption, f"the caption of {name}"))
        for name, record in sorted(found.items()) if record.good is not None
    )  # fmt: skip
    if not samples:
        raise ValueError(f"{NODE}: shards names {pattern}, which holds no good pictures such as 0001.jpg.")
    alone = tuple(name for name, record in sorted(found.items()) if record.good is None)
    return Source(f"shards ({pattern})", samples, (LeftOut("have no good picture", alone),) if alone else ())


def folder_state(folder: Path) -> list[tuple[str, int, int]]:
    """Return (path below the folder, bytes, time of change) of all that `good_folder` looks at; nothing if there is no folder."""
    return [(path, state.st_size, state.st_mtime_ns) for path, state in sorted(_walk(folder))]


def file_state(pattern: Path) -> list[tuple[str, int, int]]:
    """Return (path, bytes, time of change) of the shards that a path means; nothing if there are none."""
    try:
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in shard_files(pattern)]
    except (ValueError, OSError):
        return []


def _files(folder: Path, name: str) -> dict[str, os.stat_result]:
    """Return all files below a folder by their path in it, sorted."""
    if not folder.is_dir():
        raise ValueError(f"{NODE}: {name} is {folder}, which is {'a file' if folder.exists() else 'not there'}. Give a folder of pictures.")
    return dict(sorted(_walk(folder)))


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files below a folder by their path in it, those in linked folders too, but nothing hidden."""
    seen: set[tuple[int, int]] = set()
    waiting = [("", str(folder))] if folder.is_dir() else []
    while waiting:
        host.interrupt_point()
        prefix, parent = waiting.pop()
        state = os.stat(parent)
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        with os.scandir(parent) as entries:
            shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        yield from ((prefix + entry.name, entry.stat()) for entry in shown if entry.is_file())
        waiting += [(f"{prefix}{entry.name}/", entry.path) for entry in reversed(shown) if entry.is_dir()]


def _pictures(files: dict[str, os.stat_result], folder: Path, name: str) -> dict[str, Picture]:
    known = suffixes()
    found = [path for path in files if os.path.splitext(path)[1].lower() in known]
    if not found:
        raise ValueError(f"{NODE}: {name} is {folder}, which holds no pictures ({len(files)} other files). Give a folder with .png, .jpg, "
                         f".webp, .tif or other pictures; subfolders count.")  # fmt: skip
    return {path: StoredPicture(folder / path, files[path].st_size) for path in found}


def _by_stem(pictures: dict[str, Picture], twice: list[str]) -> dict[str, tuple[str, Picture]]:
    """Return path and picture by the path without its ending; those that have it in common with an earlier one go to `twice`."""
    found: dict[str, tuple[str, Picture]] = {}
    for path, picture in pictures.items():
        if found.setdefault(os.path.splitext(path)[0], (path, picture))[0] != path:
            twice.append(path)
    return found


def _caption(files: dict[str, os.stat_result], path: str, folder: Path) -> str:
    beside = os.path.splitext(path)[0] + ".txt"
    return _text((folder / beside).read_bytes(), str(folder / beside)) if beside in files else ""


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{NODE}: {where} is not UTF-8 text. Save it as UTF-8, or take it away.") from error


def _spread(texts: Sequence[str], batches: list[int]) -> list[str]:
    """Return one caption a picture."""
    count = sum(batches)
    if len(texts) == count:
        return [text.strip() for text in texts]
    if len(texts) <= 1:
        return [(texts[0] if texts else "").strip()] * count
    if len(texts) != len(batches):
        raise ValueError(f"{NODE}: texts holds {len(texts)} captions for {count} pictures in images. Give one each, or one for all.")
    return [text.strip() for text, batch in zip(texts, batches, strict=True) for _ in range(batch)]
