"""The configuration file of a run without the node editor: what it says, and the models and weights it names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

    from ..model_patches.weights_file import Weights
    from .trainee import Models

TABLES = {"model", "weights", "data", "training"}
KEYS = {"name", "runs", "output"}
# What of the table [weights] is a file.
FILES = ("tokenizer", "start")


class ConfigError(ValueError):
    """The configuration cannot be followed; the message says where and why."""


@dataclass(frozen=True)
class Config:
    """What to train, on what, how, and where it goes.

    Attributes:
        folder: of the file; paths in it are relative to this.
        name: of the run.
        runs: folder in which the run's own folder lies.
        output: file for the trained weights.
        model, weights, data, training: the tables.
    """

    folder: Path
    name: str
    runs: Path
    output: Path
    model: dict[str, Any]
    weights: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]

    def path(self, text: str) -> Path:
        """Return the path that is meant by one in the file."""
        return self.folder / Path(text).expanduser()


def read_config(file: Path) -> Config:
    """Read a configuration from TOML, or from JSON of the same form.

    Raises:
        ConfigError: when it is not there, cannot be read, or has parts that are missing or unknown.
    """
    try:
        content = _parse(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error
    unknown, missing = sorted(set(content) - TABLES - KEYS), sorted(TABLES - set(content))
    if unknown:
        raise ConfigError(f"{file}: there is no {', '.join(unknown)}; there are {', '.join(sorted(KEYS | TABLES))}.")
    if missing:
        raise ConfigError(f"{file} has no table [{missing[0]}]; it needs {', '.join(f'[{name}]' for name in sorted(TABLES))}.")
    folder, name = file.resolve().parent, content.get("name", file.stem)
    runs, output = (Path(content.get(key, default)).expanduser() for key, default in (("runs", "runs"), ("output", f"{name}.safetensors")))
    return Config(folder, name, folder / runs, folder / output, **{table: content[table] for table in TABLES})


def _parse(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.loads(text)
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ValueError("Python 3.10 reads TOML only with the package tomli. Install it, or write the same as .json") from error
    return tomllib.loads(text)


def load_models(config: Config) -> "Models":
    """Load MODEL, CLIP and VAE as the table [model] says; a VAE alone for what learns on nothing else, which is for trainees to tell.

    Raises:
        ConfigError: when it says nothing, or names files that are not there.
    """
    from .trainee import Models

    table = config.model
    ways = [way for way in ("lab", "checkpoint", "diffusion_model") if way in table] or [way for way in ("vae",) if way in table]
    if len(ways) != 1:
        raise ConfigError("[model] needs exactly one of lab = \"unet\", \"dit\" or \"pixel\", checkpoint = FILE, and diffusion_model = FILE with clip "
                          "and vae; detail experts learn on vae = FILE alone.")
    if ways == ["lab"]:
        from ..lab.prior import KINDS, load_lab_prior

        if table["lab"] not in KINDS:
            raise ConfigError(f"[model] lab is {table['lab']!r}; choose one of {', '.join(KINDS)}.")
        return Models(*load_lab_prior(table["lab"]))
    import comfy.sd

    if ways == ["checkpoint"]:
        file = _existing(config, "checkpoint", table["checkpoint"])
        return Models(*comfy.sd.load_checkpoint_guess_config(str(file), output_vae=True, output_clip=True)[:3])
    file = _existing(config, "diffusion_model", table["diffusion_model"]) if "diffusion_model" in table else None
    model = None if file is None else comfy.sd.load_diffusion_model(str(file))
    clip = _load_clip(config) if "clip" in table else None
    return Models(model, clip, _load_vae(config) if "vae" in table else None)


def start_weights(config: Config, models: "Models") -> "Weights":
    """Load the weights to start from, or make fresh ones, as the table [weights] says.

    Raises:
        ConfigError: when it says nothing or names a file that is not there.
        ValueError: when the weights cannot be made.
    """
    from ..model_patches.published_prompt import load_file
    from .kinds import new_weights

    table = dict(config.weights)
    if ("file" in table) == ("kind" in table):
        raise ConfigError("[weights] needs either file = FILE to start from, or kind = KIND with its settings for fresh ones.")
    if "file" in table:
        return load_file(_existing(config, "file", table["file"]))
    for name in FILES:
        if name in table:
            table[name] = str(_existing(config, name, table[name]))
    return new_weights(table.pop("kind"), models, table)


def _load_clip(config: Config) -> "CLIP":
    import comfy.sd

    files, kind = config.model["clip"], config.model.get("clip_type", "stable_diffusion")
    paths = [str(_existing(config, "clip", file)) for file in ([files] if isinstance(files, str) else files)]
    if kind.upper() not in comfy.sd.CLIPType.__members__:
        raise ConfigError(f"[model] clip_type is {kind!r}; choose one of "
                          f"{', '.join(name.lower() for name in comfy.sd.CLIPType.__members__)}.")
    return comfy.sd.load_clip(paths, clip_type=comfy.sd.CLIPType[kind.upper()])


def _load_vae(config: Config) -> "VAE":
    import comfy.sd
    import comfy.utils

    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(_existing(config, "vae", config.model["vae"]))))
    if vae.first_stage_model is None:
        raise ConfigError(f"vae = {config.model['vae']!r}: ComfyUI knows no VAE of this layout.")
    return vae


def _existing(config: Config, name: str, text: str) -> Path:
    if not isinstance(text, str):
        raise ConfigError(f"{name} = {text!r}: give the name of a file.")
    path = config.path(text)
    if not path.is_file():
        raise ConfigError(f"{name} = {text!r}: there is no file {path}.")
    return path
