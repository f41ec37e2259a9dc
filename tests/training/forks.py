"""Training in child processes that are killed or work together. Run as a module of its own process, since autograd must not have run before a fork.

    python -m mend.tests.training.forks kill FOLDER      trains in children that die again and again, and says whether it made a difference
    python -m mend.tests.training.forks pair FOLDER      trains in two processes and in one, and says how far apart they end
"""

import json
import logging
import math
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mend.lab import headless

headless.boot()

import diffusers.optimization  # noqa: E402, F401 - once for all children
import diffusers.training_utils  # noqa: E402, F401

from mend.tests.training.dummies import DummyPairs, Watcher, same, trainee  # noqa: E402
from mend.training import loop  # noqa: E402
from mend.training.checkpoint import open_run  # noqa: E402
from mend.training.processes import ALONE, joined  # noqa: E402
from mend.training.settings import Settings  # noqa: E402
from mend.training.trainee import Models  # noqa: E402

MOST_KILLS = 40
LONG = Settings(steps=150, batch=2, accumulate=2, rate=1e-2, schedule="cosine", warmup=10, ema=0.95, validate_every=25, save_every=0)


def main(command, folder):
    """Run one of the experiments and print what it found as JSON."""
    torch.set_num_threads(1)
    loop.MOST_TIME_SAVING = math.inf  # a checkpoint after every step, so that children die while writing too
    logging.basicConfig(filename=folder / "log.txt", level=logging.WARNING)
    found = killed_again_and_again(folder) if command == "kill" else two_processes(folder)
    sys.stdout.write(json.dumps(found) + "\n")


def in_child(work):
    """Start a child that does some work and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def result(settings, folder=None, processes=ALONE, stop_after=None):
    """Train the dummy, in a run folder where one is given and this is the first process."""
    learner, pairs = trainee(), DummyPairs()
    run = None
    if folder is not None and processes.rank == 0:
        run = open_run(folder, "run", loop.describe_run(learner, pairs, Models(), settings, processes), settings.steps)
    return loop.train(learner, pairs, Models(), settings, run, Watcher(stop_after=stop_after if processes.rank == 1 else None), processes)


def save(file, settings, *arguments, **more):
    """Train and keep the weights."""
    made = result(settings, *arguments, **more)
    save_file({**made.tensors, "losses": torch.tensor(made.losses, dtype=torch.float64)}, file)


def killed_again_and_again(folder):
    """Kill children at random moments until one lives to the end; compare with a run that nothing happened to."""
    moments, kills, leftovers = random.Random(0), 0, 0
    while True:
        child = in_child(lambda: save(folder / "killed.safetensors", LONG, folder))
        deadline = time.monotonic() + (moments.uniform(0.02, 0.35) if kills < MOST_KILLS else math.inf)
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        leftovers += len(list(folder.glob("run/.*tmp*")))
    names = sorted(path.name for path in folder.glob("run*"))
    child = in_child(lambda: save(folder / "whole.safetensors", LONG))
    _, last = os.waitpid(child, 0)
    alike = same(load_file(folder / "killed.safetensors"), load_file(folder / "whole.safetensors"))
    return {"kills": kills, "leftovers": leftovers, "status": [status, last], "alike": alike, "folders": names,
            "files": sorted(path.name for path in (folder / "run").iterdir())}


def two_processes(folder):
    """Train in two processes, stopped and gone on with on the way, and in one with the batch doubled."""
    short = Settings(steps=20, batch=2, accumulate=2, rate=1e-2, ema=0.9, validate_every=10)
    whole = Settings(**{**vars(short), "batch": 4})
    statuses = together(lambda rank, processes: result(short, folder, processes, stop_after=7))
    steps = [int(file.stem.split("_")[1]) for file in folder.glob("run/checkpoint*")]
    statuses += together(lambda rank, processes: save(folder / f"rank{rank}.safetensors", short, folder, processes))
    # In one process the same run folder holds a finished run.
    statuses.append(os.waitpid(in_child(lambda: save(folder / "folder.safetensors", whole, folder)), 0)[1])
    statuses.append(os.waitpid(in_child(lambda: save(folder / "one.safetensors", whole)), 0)[1])
    first, second, one, same_folder = (load_file(folder / f"{name}.safetensors") for name in ("rank0", "rank1", "one", "folder"))
    apart = max(float((tensor - one[name]).abs().max()) for name, tensor in first.items() if name != "losses")
    losses = float((first["losses"] / one["losses"] - 1).abs().max())
    return {"statuses": statuses, "stopped": steps, "ranks_alike": same(first, second), "apart": apart, "losses_apart": losses,
            "folder_alike": same(first, same_folder), "folders": sorted(path.name for path in folder.iterdir() if path.is_dir())}


def together(work):
    """Do the same in two processes that torch.distributed joins, as torchrun would start them; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with joined() as processes:
            work(rank, processes)

    children = [in_child(lambda rank=rank: start(rank)) for rank in range(2)]
    return [os.waitpid(child, 0)[1] for child in children]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
