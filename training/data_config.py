"""Paired data from a configuration, for training without the node editor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..degradations.recipe import Recipe
from .pairs import Pairs
from .sources import FOLDER, NODE, SHARDS, TWO_FOLDERS, Source, good_folder, paired_folders, shards

PATHS = {FOLDER: ("folder",), TWO_FOLDERS: ("good_folder", "degraded_folder"), SHARDS: ("shards",)}
SETTINGS = {"crop": int, "flip": bool, "held_out": int}


def pairs_from_config(config: Mapping[str, Any], base: Path) -> Pairs:
    """Build paired data from plain JSON with the names that the node uses.

    Args:
        config: for example {"source": "folder of good pictures", "folder": "photos", "degradations": [[{"kind": "jpeg", "quality": 30}]],
            "crop": 256, "flip": true, "held_out": 8}. The last three may be missing, and `degradations` where there are degraded pictures.
        base: folder that paths are relative to.

    Raises:
        ValueError: naming what is missing, unknown or wrong.
    """
    kind = config.get("source")
    if kind not in PATHS:
        raise ValueError(f"{NODE}: source is {kind!r}; choose one of {', '.join(PATHS)}.")
    known = {"source", "degradations", *PATHS[kind], *SETTINGS}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise ValueError(f"{NODE}: there is no setting {unknown[0]!r} for the source {kind!r}; known are {', '.join(sorted(known))}.")
    for name, wanted in SETTINGS.items():
        if name in config and type(config[name]) is not wanted:
            raise ValueError(f"{NODE}: {name} is {config[name]!r}; it has to be {'true or false' if wanted is bool else 'a whole number'}.")
    recipes = [_recipe(position, value) for position, value in enumerate(_list(config.get("degradations", [])), 1)]
    return Pairs(open_source(kind, config, base), recipes, **{name: config[name] for name in SETTINGS if name in config})


def open_source(kind: str, paths: Mapping[str, Any], base: Path) -> Source:
    """Open a source of files by the name of its kind.

    Args:
        kind: a key of PATHS.
        paths: what the names in PATHS[kind] stand for.
        base: folder that they are relative to.

    Raises:
        ValueError: for a path that is empty or has nothing to train on.
    """
    opened = {FOLDER: good_folder, TWO_FOLDERS: paired_folders, SHARDS: shards}[kind]
    return opened(*(full_path(paths.get(name), name, base) for name in PATHS[kind]))


def full_path(text: Any, name: str, base: Path) -> Path:
    """Return the path that a user means; quotes around it are taken off.

    Raises:
        ValueError: for an empty one.
    """
    stripped = text.strip().strip("\"'").strip() if isinstance(text, str) else ""
    if not stripped:
        raise ValueError(f"{NODE}: {name} is empty. Give a path: a complete one, or one in {base}.")
    return base / Path(stripped).expanduser()


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{NODE}: degradations is {value!r}; it has to be a list of recipes, each a list of steps.")
    return value


def _recipe(position: int, value: Any) -> Recipe:
    try:
        return Recipe.from_json(value)
    except ValueError as error:
        raise ValueError(f"{NODE}: degradations, recipe {position}: {error}") from error
