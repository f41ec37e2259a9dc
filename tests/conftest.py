"""Starts the host in this process, before any test module can import something of it, and offers it to the tests.

Run the tests with `python dev test`, or `python dev exec -- python -m pytest ...`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

if "COMFYUI_PATH" not in os.environ:
    pytest.exit("run the tests through the environment: python dev test, or python dev exec -- python -m pytest", returncode=4)

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != CHECKOUT]  # its folder `nodes` hides the host's module

BASE = Path(tempfile.mkdtemp(prefix="mend-tests-"))


def boot_host(base: Path) -> None:
    """Sets the host's options, which it reads while it is imported."""
    import utils.install_util  # noqa: F401 - before comfy/ reaches sys.path, whose utils.py would take the name on the oldest host

    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    vars(args).update(cpu=not torch.accelerator.is_available(), base_directory=str(base), disable_api_nodes=True)
    torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where other work shares the cores


boot_host(BASE)

from mend.dev import workspace  # noqa: E402

workspace.prepare_base(BASE)


def pytest_sessionfinish() -> None:
    """Removes the base folder of this session."""
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module mend.tests.tiny_models: tiny.model("sd15"), tiny.conditioning(...), tiny.latent(...), tiny.vae()."""
    from mend.tests import tiny_models

    return tiny_models


@pytest.fixture(scope="session")
def host_nodes() -> ModuleType:
    """The host's module `nodes` with its extra nodes, the pack and the nodes for tests loaded."""
    import nodes
    from mend.tests import host_prompts

    host_prompts.load_nodes(BASE / "custom_nodes" / workspace.PACK_NAME)
    return nodes


@pytest.fixture
def run_prompt(host_nodes: ModuleType) -> Iterator["host_prompts.PromptRunner"]:  # noqa: F821 - importing it needs the booted host
    """Runs prompts in API format in this process; one executor, hence one cache, per test."""
    from mend.tests.host_prompts import PromptRunner

    yield PromptRunner()


@pytest.fixture
def base_folder() -> Path:
    """The base directory of the host in this process, with models, input and output in it."""
    return BASE
