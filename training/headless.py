"""Training from a configuration file, in one process or many."""

import argparse
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from .processes import Processes, joined
from .run_config import Config, ConfigError, load_models, read_config, start_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ..model_patches.weights_file import Weights
    from .loop import Progress
    from .state import Validation

SECONDS_BETWEEN_LINES = 10.0
EXIT_STOPPED = 130


def find_host() -> None:
    """Make the host importable: it is already, or COMFYUI_PATH names its folder, or the pack lies in its custom_nodes.

    Raises:
        ConfigError: when it cannot be found.
    """
    if importlib.util.find_spec("comfy") is not None:
        return
    given = os.environ.get("COMFYUI_PATH")
    for root in ([Path(given)] if given else []) + [Path(__file__).parents[3]]:
        if (root / "comfy" / "model_patcher.py").is_file():
            sys.path.insert(0, str(root))
            return
    raise ConfigError("ComfyUI is not found. Set COMFYUI_PATH to its folder, or start the pack from within its custom_nodes.")


def run(config: Config, processes: Processes) -> int:
    """Train as the configuration says; returns the exit code.

    Raises:
        ValueError: when something in the configuration or the data does not fit.
        TrainingError: when the run folder cannot be written, or training makes no sense any more.
    """
    from ..lab.headless import boot

    boot()
    from . import kinds
    from .checkpoint import open_run
    from .data_config import pairs_from_config
    from .loop import describe_run, train
    from .report import report
    from .settings import settings_of

    settings = settings_of(config.training)
    models = load_models(config)
    weights = start_weights(config, models)
    pairs, trainee = pairs_from_config(config.data, config.folder), kinds.trainee_of(weights, models)
    folder = None
    if processes.rank == 0:
        folder = open_run(config.runs, config.name, describe_run(trainee, pairs, models, settings, processes), settings.steps, settings.keep)
    with _stopped_by_signals() as observer:
        result = train(trainee, pairs, models, settings, folder, observer, processes)
    if folder is not None:
        logging.info("%s", report(result, folder.path))
        if result.finished:
            logging.info("trained weights: %s", save_beside(replace(weights, config=trainee.config, tensors=result.tensors), config.output))
    if not result.finished:
        logging.info("stopped after step %d; start the same again to go on", result.step)
    return 0 if result.finished else EXIT_STOPPED


def save_beside(weights: "Weights", file: Path) -> Path:
    """Write weights under this name, or with the next number where there are others; returns the file that holds them."""
    from ..model_patches.weights_file import load_weights, save_weights

    for number in count(1):
        numbered = file if number == 1 else file.with_name(f"{file.stem}_{number}{file.suffix}")
        if not numbered.exists():
            save_weights(weights, numbered)
            return numbered
        if _same(load_weights(numbered).tensors, weights.tensors):
            return numbered
    raise AssertionError("count never ends")


class LogObserver:
    """Tells of a run in the log, and ends it when a signal says so."""

    def __init__(self) -> None:
        self.stopping, self.told = False, time.monotonic()

    def stepped(self, progress: "Progress") -> None:
        """Log now and then."""
        from .report import progress_line

        if time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            logging.info("%s", progress_line(progress))
            self.told = time.monotonic()

    def validated(self, validation: "Validation", page: "Tensor") -> None:
        """Log the figures; the pictures are in the run folder."""
        logging.info("PSNR after %d steps: %.2f dB, degraded %.2f dB", validation.step, validation.restored, validation.degraded)

    def stop(self) -> bool:
        """Return whether a signal has come."""
        return self.stopping


def main(arguments: Sequence[str]) -> int:
    """Read the command line, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python custom_nodes/NAME/training", description="Train weights of Mend as a TOML or JSON file says.")
    parser.add_argument("config", type=Path, help="the configuration file; paths in it are relative to its folder")
    file = parser.parse_args(arguments).config
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        config = read_config(file)
        find_host()
        from .checkpoint import TrainingError
    except ConfigError as error:
        logging.error("error: %s", error)
        return 2
    try:
        with joined() as processes:
            return run(config, processes)
    except (ValueError, TrainingError) as error:
        logging.error("error: %s", error)
        return 1


@contextmanager
def _stopped_by_signals() -> Iterator[LogObserver]:
    """Offer an observer that ends the run after the current step at the first Ctrl-C or SIGTERM; the second acts at once."""
    observer = LogObserver()

    def stop(number: int, frame: object) -> None:
        observer.stopping = True
        signal.signal(number, before[number])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield observer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _same(one: "Mapping[str, Tensor]", other: "Mapping[str, Tensor]") -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())
