"""Where the pack looks for files of weights."""

from pathlib import Path

import folder_paths

MEND = "mend"
CAPTIONERS = "captioner"
# Other packs keep their vision-language models under these keys, each model in a folder of its own.
SHARED_CAPTIONER_KEYS = ("LLM", "llm")
SAFE = ".safetensors"
# Learned prompts as their authors publish them; any other .pt file is refused when it is loaded.
PUBLISHED = ".pt"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Weights that come with the pack, trained on the lab prior.
TRAINED = Path(__file__).parents[1] / "lab" / "trained"


def register() -> None:
    """Register the key `mend` for models/mend, behind any folders that extra_model_paths.yaml has given it, and for what comes with the pack."""
    folder_paths.add_model_folder_path(MEND, str(Path(folder_paths.models_dir) / MEND))
    folder_paths.add_model_folder_path(MEND, str(TRAINED))
    paths, _ = folder_paths.folder_names_and_paths[MEND]
    # A key made by add_model_folder_path or by the yaml file has no extensions, which lists every file there is.
    folder_paths.folder_names_and_paths[MEND] = (paths, {SAFE, PUBLISHED})


def weights_files() -> list[str]:
    """Return the files of weights by name; captioners lie in the same folder and have a node of their own."""
    if MEND not in folder_paths.folder_names_and_paths:
        return []
    return [name for name in folder_paths.get_filename_list(MEND) if Path(name).parts[0] != CAPTIONERS]


def captioners() -> dict[str, Path]:
    """Return the captioner folders by name, sorted; of folders of the same name the first root's counts.

    A folder is listed if it has config.json and weights of any kind, so that pickled ones can be refused with a reason.
    """
    found: dict[str, Path] = {}
    for root in _captioner_roots():
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if (folder / "config.json").is_file() and weight_files(folder, (SAFE, *PICKLED)):
                found.setdefault(folder.name, folder)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def weight_files(folder: Path, suffixes: tuple[str, ...] = (SAFE,)) -> list[Path]:
    """Return the files directly in a folder that end in one of the suffixes, sorted."""
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes)


def _captioner_roots() -> list[Path]:
    registered = folder_paths.folder_names_and_paths
    own = [Path(path) / CAPTIONERS for path in registered[MEND][0]] if MEND in registered else []
    return own + [Path(path) for key in SHARED_CAPTIONER_KEYS if key in registered for path in registered[key][0]]
