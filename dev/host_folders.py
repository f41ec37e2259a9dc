"""Which folders a server works in: all of our own, or with a ComfyUI of the user's the models and custom nodes that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .console import say
from .workspace import PACK

NAME = re.compile(r'^name *= *"(.+?)"', re.MULTILINE)


def own_folders(base: Path, files: Path) -> list[str]:
    """Options by which the host knows nothing but `base`, and keeps pictures in `files`."""
    return ["--base-directory", str(base), *picture_folders(files)]


def users_folders(host: Path, base: Path, files: Path, scratch: Path) -> list[str]:
    """Options by which a ComfyUI of the user's has its models, its custom nodes and, once, the pack; what it writes goes elsewhere."""
    copies = pack_copies(host / "custom_nodes")
    if len(copies) > 1 or any(not copy.samefile(PACK) for copy in copies):
        names = ", ".join(str(copy) for copy in copies)
        say(f"your models are there, but not your custom nodes: they hold this pack already ({names}), and it would load twice")
        return [*own_folders(base, files), *more_folders(model_folders(host / "models"), scratch)]
    options = ["--user-directory", str(base / "user"), *picture_folders(files)]
    return options if copies else [*options, *more_folders({"custom_nodes": str(base / "custom_nodes")}, scratch)]


def model_folders(models: Path) -> dict[str, str]:
    """The folders of models by their kind; the oldest host that the pack runs on cannot be given the one that holds them."""
    return {folder.name: str(folder) for folder in sorted(models.iterdir()) if folder.is_dir()} if models.is_dir() else {}


def more_folders(folders: dict[str, str], scratch: Path) -> list[str]:
    """Options by which the host looks into more folders, by their kind."""
    file = scratch / "more_folders.yaml"  # JSON is YAML
    file.write_text(json.dumps({"mend": folders}, ensure_ascii=False), encoding="utf-8")
    return ["--extra-model-paths-config", str(file)]


def picture_folders(files: Path) -> list[str]:
    """Options for where pictures come from and go to."""
    options = []
    for kind in ("input", "output"):
        (files / kind).mkdir(exist_ok=True)
        options += [f"--{kind}-directory", str(files / kind)]
    return options


def pack_copies(custom_nodes: Path) -> list[Path]:
    """The folders in a custom_nodes folder that hold this pack in whichever version, and are not disabled."""
    if not custom_nodes.is_dir():
        return []
    name = project_name(PACK)
    return [folder for folder in sorted(custom_nodes.iterdir()) if folder.suffix != ".disabled" and project_name(folder) == name]


def project_name(folder: Path) -> str | None:
    """The name that a pack's pyproject.toml gives it; None where there is none."""
    try:
        found = NAME.search((folder / "pyproject.toml").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found.group(1) if found else None
