"""With a ComfyUI of the user's the host has its models and custom nodes, the pack once, and writes elsewhere."""

import asyncio
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from mend.dev import host_folders, launching, server, workspace
from mend.dev.console import DevError
from mend.dev.environment import ensure_environment
from mend.dev.workflow_client import Client

NODE = """
class Theirs:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "theirs"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
NODE_CLASS_MAPPINGS = {"Theirs": Theirs}
"""


@pytest.fixture
def users(tmp_path):
    """A ComfyUI of the user's: a few folders."""
    host = tmp_path / "ComfyUI"
    (host / "custom_nodes").mkdir(parents=True)
    (host / "models" / "checkpoints").mkdir(parents=True)
    return host


@pytest.fixture
def base(tmp_path):
    workspace.prepare_base(tmp_path / "base")
    return tmp_path / "base"


def options(host, base, scratch):
    """The host's options in pairs."""
    given = host_folders.users_folders(host, base, scratch, scratch)
    return dict(zip(given[::2], given[1::2]))


def copy_of_the_pack(folder, name="mend-restoration"):
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    return folder


def test_the_users_models_and_nodes_are_found_and_the_pack_is_added(users, base, tmp_path):
    copy_of_the_pack(users / "custom_nodes" / "other", "another-pack")
    copy_of_the_pack(users / "custom_nodes" / "mend.disabled")
    given = options(users, base, tmp_path)
    assert "--base-directory" not in given and "--models-directory" not in given
    more = json.loads(Path(given["--extra-model-paths-config"]).read_text(encoding="utf-8"))
    assert more == {"mend": {"custom_nodes": str(base / "custom_nodes")}}
    written = [given[f"--{kind}-directory"] for kind in ("input", "output", "user")]
    assert written == [str(tmp_path / "input"), str(tmp_path / "output"), str(base / "user")] and all(Path(folder).is_dir() for folder in written)


def test_a_pack_that_is_among_the_users_nodes_is_not_added_again(users, base, tmp_path):
    workspace.link_folder(workspace.PACK, users / "custom_nodes" / "restoration")
    assert "--extra-model-paths-config" not in options(users, base, tmp_path)


def test_the_users_nodes_stay_away_where_they_hold_another_copy(users, base, tmp_path, capsys):
    copy = copy_of_the_pack(users / "custom_nodes" / "installed")
    given = options(users, base, tmp_path)
    more = json.loads(Path(given["--extra-model-paths-config"]).read_text(encoding="utf-8"))
    assert given["--base-directory"] == str(base) and more == {"mend": {"checkpoints": str(users / "models" / "checkpoints")}}
    assert str(copy) in capsys.readouterr().err


def test_without_the_users_own_everything_is_ours(base, tmp_path):
    given = host_folders.own_folders(base, base)
    assert given[:2] == ["--base-directory", str(base)] and str(base / "output") in given
    assert str(tmp_path / "output") in host_folders.own_folders(base, tmp_path)


def test_a_port_that_another_program_has_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DevError, match=f"cannot serve on port {port}: .*choose another with --port"):
            with server.running_server(ensure_environment(), port=port):
                pass
    server.check_port(port)


def test_a_port_with_lingering_connections_is_free():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), listening.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)  # the side that closes first is the one that lingers
    server.check_port(port)


def test_a_number_that_is_no_port_is_refused():
    with pytest.raises(DevError, match="cannot serve on port 70000"):
        server.check_port(70000)


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["absent", "linked", "copied"])
def test_a_server_on_the_users_comfyui(users, base, tmp_path, monkeypatch, pack):
    if ensure_environment().is_users:
        pytest.skip("the host is the user's own: too much to copy")
    host = ensure_environment().host
    skipped = {str(host): {"models", "custom_nodes", "tests-unit"}}
    shutil.copytree(host, users, dirs_exist_ok=True, ignore=lambda folder, names: skipped.get(str(folder), {"__pycache__"}))
    (users / "models" / "checkpoints" / "theirs.safetensors").touch()
    (users / "custom_nodes" / "theirs.py").write_text(NODE)
    if pack == "copied":
        copy_of_the_pack(users / "custom_nodes" / "installed")
    elif pack == "linked":
        workspace.link_folder(workspace.PACK, users / "custom_nodes" / "restoration")
    monkeypatch.setattr(workspace, "base_folder", lambda: base)
    monkeypatch.setenv("COMFYUI_PATH", str(users))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    before = {path.relative_to(users) for path in users.rglob("*") if "__pycache__" not in path.parts}

    async def object_info(url):
        async with Client(url) as client:
            return await client.object_info()

    with server.running_server(ensure_environment(), log=tmp_path / "log") as running:
        nodes = asyncio.run(object_info(running.url))
    assert nodes["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == ["theirs.safetensors"]
    assert ("Theirs" in nodes) == (pack != "copied")
    name = "restoration" if pack == "linked" else "mend"
    assert nodes["MendFPAMAlignment"]["python_module"] == f"custom_nodes.{name}"
    log = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    packs = [Path(line.split(": ")[-1].strip()).name for line in log.splitlines() if " seconds" in line]
    assert len({"mend", "restoration"} & set(packs)) == 1 and packs.count(name) == 1 and "IMPORT FAILED" not in log
    assert {path.relative_to(users) for path in users.rglob("*") if "__pycache__" not in path.parts} == before
    assert launching.child_environment(ensure_environment())["COMFYUI_PATH"] == str(users)
