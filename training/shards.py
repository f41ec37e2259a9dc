"""WebDataset shards: plain tar files, indexed once and then read anywhere.

The webdataset library reads shards from front to back, which would tie a sample to the ones read before it. To read a tar file in any order
no more is needed than the place and length of each member, so that is what is kept.
"""

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from ..model_patches import host
from .decoding import suffixes
from .pictures import StoredPicture

# The rule of the format: everything up to the first dot of the file name belongs together.
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
GOOD_ROLES, DEGRADED_ROLES = ("", "good", "clean", "gt", "hq"), ("degraded", "lq")
CAPTIONS = ("txt", "caption")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass
class Record:
    """What a shard holds under one key."""

    good: StoredPicture | None = None
    degraded: StoredPicture | None = None
    caption: bytes = field(default=b"", repr=False)


def shard_files(pattern: Path) -> list[Path]:
    """Return the shards that a path means, sorted.

    Args:
        pattern: a tar file, a folder of them, or a name with * or ? or a range such as {000..012} in its last part.

    Raises:
        ValueError: when there are none, or one of a range is missing; the text goes after the name of an input.
    """
    if pattern.is_dir():
        files = sorted(pattern.glob("*.tar"))
        if not files:
            raise ValueError(f"names the folder {pattern}, which holds no .tar file")
        return files
    files = [file for name in _names(pattern.name) for file in _matching(pattern.with_name(name))]
    return list(dict.fromkeys(files))


def read_index(shard: Path) -> dict[str, Record]:
    """Return the samples of a shard by key, in the order of the shard; only captions are read.

    Raises:
        ValueError: when it is no tar file, or damaged; the text goes after the name of an input.
    """
    records: dict[str, Record] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                host.interrupt_point()
                _take(archive, member, shard, records)
                archive.members.clear()  # tarfile keeps them all, which a large shard does not need
    except (tarfile.TarError, OSError, EOFError) as error:
        advice = "Fetch or make it again, and unpack .gz first"
        raise ValueError(f"names {shard}, which is not a readable .tar file ({error}). {advice}") from error
    return records


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path, records: dict[str, Record]) -> None:
    match = MEMBER.fullmatch(member.name)
    if match is None or not member.isreg() or member.issparse():
        return
    key, extension = match[1], match[2].lower()
    role, _, last = extension.rpartition(".")
    if extension in CAPTIONS:
        records.setdefault(key, Record()).caption = archive.extractfile(member).read()
    elif f".{last}" in suffixes() and role in GOOD_ROLES + DEGRADED_ROLES:
        picture = StoredPicture(shard, member.size, member.offset_data)
        setattr(records.setdefault(key, Record()), "good" if role in GOOD_ROLES else "degraded", picture)


def _names(name: str) -> list[str]:
    match = RANGE.search(name)
    if match is None:
        return [name]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [f"{name[:match.start()]}{number:0{len(match[1])}}{rest}" for number in numbers for rest in _names(name[match.end():])]


def _matching(file: Path) -> list[Path]:
    if any(sign in file.name for sign in "*?"):
        files = sorted(found for found in file.parent.glob(file.name) if found.is_file())
        if not files:
            raise ValueError(f"names {file}, which fits no file")
        return files
    if not file.is_file():
        raise ValueError(f"names {file}, which is not there")
    return [file]
