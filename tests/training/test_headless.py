"""Training from a configuration file: what it may say, and every way to start it from a folder called x-main."""

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mend.lab.prior import WEIGHTS
from mend.model_patches.encoder_features import feature_channels
from mend.model_patches.fusion_patch import new_fusion
from mend.model_patches.weights_file import load_weights, save_weights
from mend.tests import tiny_models
from mend.tests.training.dummies import DUMMY, KIND, same, weights
from mend.tests.training.picture_files import encoded, levels
from mend.tests.training.tiny_training import models
from mend.training import headless, kinds
from mend.training.checkpoint import LOCK
from mend.training.run_config import ConfigError, read_config, start_weights

HOST, PACK = Path(os.environ["COMFYUI_PATH"]), Path(__file__).resolve().parents[2]
TOML = """
name = "small"
output = "trained/small.safetensors"
[model]
diffusion_model = "tiny.safetensors"
[weights]
kind = "dummy"
seed = 1
[data]
source = "folder of good pictures"
folder = "photographs"
degradations = [[{kind = "gaussian noise", sigma = 40}]]
crop = 64
[training]
steps = 4
batch = 2
rate = 1e-2
validate_every = 2
"""
REGISTER = '\nfrom mend.tests.training.dummies import DUMMY  # noqa: E402\n\nKINDS["dummy"] = DUMMY\n'


def write_data(folder):
    """Put photographs and the configuration into a folder; returns the latter."""
    (folder / "photographs").mkdir(parents=True)
    for number in range(12):
        (folder / "photographs" / f"{number}.png").write_bytes(encoded(levels(70, 70, seed=number)))
    tensors = tiny_models.model("sd3").model.diffusion_model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tiny.safetensors")
    (folder / "small.toml").write_text(TOML)
    return folder / "small.toml"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, KIND, DUMMY)
    return write_data(tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A host with the pack in custom_nodes/x-main, which can train the dummy."""
    root = tmp_path_factory.mktemp("host") / "ComfyUI"
    pack = root / "custom_nodes" / "x-main"
    pack.mkdir(parents=True)
    for entry in HOST.iterdir():
        if entry.name != "custom_nodes":
            (root / entry.name).symlink_to(entry)
    for entry in PACK.iterdir():
        if entry.name not in ("training", ".git"):
            (pack / entry.name).symlink_to(entry)
    shutil.copytree(PACK / "training", pack / "training", ignore=shutil.ignore_patterns("__pycache__"))
    with open(pack / "training" / "kinds.py", "a") as file:
        file.write(REGISTER)
    return pack


def started(arguments, cwd, **more):
    """Start Python as a user's shell would, knowing nothing of the host or the pack."""
    unknown = ("PYTHONPATH", "PYTHONSAFEPATH", "COMFYUI_PATH")
    variables = {name: value for name, value in os.environ.items() if name not in unknown} | {"OMP_NUM_THREADS": "1", **more}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=variables, **pipes)


def ended(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def test_training_in_process(config, tmp_path):
    assert headless.main([str(config)]) == 0
    trained = load_weights(tmp_path / "trained" / "small.safetensors")
    assert (trained.kind, trained.family, trained.config) == (KIND, "none", {"width": 3}) and not same(trained.tensors, weights(1).tensors)
    kept = sorted(file.name for file in (tmp_path / "runs" / "small").iterdir() if file.name != LOCK)
    assert kept == ["checkpoint_000000004.safetensors", "run.json", "validation"]
    headless.main([str(config)])
    assert [file.name for file in (tmp_path / "trained").iterdir()] == ["small.safetensors"], "a finished run writes no second file"
    config.write_text(TOML.replace("steps = 4", "steps = 6"))
    headless.main([str(config)])
    assert sorted(file.name for file in (tmp_path / "trained").iterdir()) == ["small.safetensors", "small_2.safetensors"], "nothing is written over"


def test_json_and_weights_from_a_file(config, tmp_path):
    headless.main([str(config)])
    content = {"model": {"lab": "dit"}, "weights": {"file": "trained/small.safetensors"}, "output": "further.safetensors",
               "data": {"source": "folder of good pictures", "folder": "photographs", "degradations": [[{"kind": "jpeg", "quality": 20}]], "crop": 64},
               "training": {"steps": 2, "batch": 2}}  # fmt: skip
    (tmp_path / "further.json").write_text(json.dumps(content))
    assert headless.main([str(tmp_path / "further.json")]) == 0
    before, after = (load_weights(tmp_path / name).tensors for name in ("trained/small.safetensors", "further.safetensors"))
    assert all(0 < float((tensor - before[name]).abs().max()) < 1e-3 for name, tensor in after.items()), "two steps of 1e-4 from there"


@pytest.mark.parametrize("old, new, code, message", [
    ("[model]", "[modell]", 2, "there is no modell; there are data, model, name"),
    ("[training]\n", "", 2, r"has no table \[training\]"),
    ("[model]", "[model", 2, "small.toml cannot be read"),
    ('diffusion_model = "tiny.safetensors"', "", 1, r"\[model\] needs exactly one of lab = .unet., .dit. or .pixel., checkpoint"),
    ('diffusion_model = "tiny.safetensors"', 'checkpoint = "none.safetensors"', 1, "checkpoint = 'none.safetensors': there is no file"),
    ('"tiny.safetensors"', '"tiny.safetensors"\nvae = "none.safetensors"', 1, "vae = 'none.safetensors': there is no file"),
    ('"tiny.safetensors"', '"tiny.safetensors"\nclip = "tiny.safetensors"\nclip_type = "x"', 1, "clip_type is 'x'; choose one of stable_diffusion"),
    ('diffusion_model = "tiny.safetensors"', 'lab = "net"', 1, r"\[model\] lab is 'net'; choose one of unet, dit, pixel\."),
    ('kind = "dummy"', 'kind = "unheard_of"', 1, "weights of the kind unheard of cannot be trained; there are .*dummy"),
    ('kind = "dummy"', "", 1, r"\[weights\] needs either file"),
    ('diffusion_model = "tiny.safetensors"', 'vae = "tiny.safetensors"', 1, "vae = 'tiny.safetensors': ComfyUI knows no VAE of this layout"),
    ('kind = "dummy"', 'kind = "detail_experts"\nperceptual = "none"', 1, "new detail experts take size .* perceptual .*; found {.*'none'"),
    ('kind = "dummy"\nseed = 1', 'kind = "detail_experts"\nseed = -1', 1, "new detail experts take size .* seed"),
    ('kind = "dummy"', 'kind = "fusion"\nstart = "none.safetensors"', 1, "start = 'none.safetensors': there is no file .*/none.safetensors"),
    ('kind = "dummy"', 'kind = "fusion"\nstart = 5', 1, "start = 5: give the name of a file"),
    ('kind = "dummy"', 'kind = "fusion"\nsingle = "no"', 1, "a new fusion takes preset"),
    ('kind = "dummy"', 'kind = "degradation_estimator"\ntokenizer = ""', 1, "tokenizer = '': there is no file"),
    ('folder = "photographs"', 'folder = "nowhere"', 1, "nowhere"),
    ("steps = 4", "stepps = 4", 1, "there is no setting stepps; there are steps, batch"),
    ("steps = 4", "steps = -4", 1, "steps is -4; give a number from 1"),
    ('name = "small"', 'name = "a/b"', 1, "the run name 'a/b' cannot be the name of a folder"),
])  # fmt: skip
def test_mistakes_are_named(config, caplog, old, new, code, message):
    assert old in TOML
    config.write_text(TOML.replace(old, new, 1))
    assert headless.main([str(config)]) == code
    assert re.search(message, caplog.text), caplog.text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.toml cannot be read: No such file"):
        read_config(tmp_path / "none.toml")


def test_paths_are_relative_to_the_file(config, tmp_path):
    read = read_config(config)
    assert read.runs == tmp_path / "runs" and read.output == tmp_path / "trained" / "small.safetensors" and read.path("/abs") == Path("/abs")


def test_a_fusion_starts_from_a_file_beside_the_configuration(config, tmp_path, monkeypatch):
    given = models("sd15")
    first = new_fusion(given.model.model, feature_channels(given.vae), seed=3)
    save_weights(first, tmp_path / "one.safetensors")
    config.write_text(TOML.replace('kind = "dummy"\nseed = 1', 'kind = "fusion"\nstart = "one.safetensors"\nrank = 2'))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = start_weights(read_config(config), given)
    assert second.config == first.config | {"rank": 2} and all(torch.equal(second.tensors[name], t) for name, t in first.tensors.items())


def test_detail_experts_learn_on_a_vae_alone(config, tmp_path):
    vae = 'vae = "lab vae.safetensors"'
    (tmp_path / "lab vae.safetensors").symlink_to(WEIGHTS / "vae.safetensors")
    kind = 'kind = "detail_experts"\nperceptual = 0\nwindow = 64'
    text = TOML.replace('diffusion_model = "tiny.safetensors"', vae).replace('kind = "dummy"', kind).replace("steps = 4", "steps = 1")
    config.write_text(text.replace("batch = 2", "batch = 1\nvalidation_pictures = 1"))
    assert headless.main([str(config)]) == 0
    trained = load_weights(tmp_path / "trained" / "small.safetensors")
    assert trained.kind == "detail_experts" and trained.config["window"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("form", ["the folder", "-m x-main.training"])
def test_every_way_to_start_it(installed, tmp_path, form):
    config = write_data(tmp_path)
    arguments, cwd = {
        "the folder": ([installed / "training"], tmp_path),
        "-m x-main.training": (["-m", "x-main.training"], installed.parent),
    }[form]
    code, output = ended(started([*arguments, config], cwd))
    assert code == 0, output
    assert "PSNR after 4 steps" in output and (tmp_path / "trained" / "small.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torchrun", "accelerate"])
def test_two_processes_of_the_installed_pack(installed, tmp_path, form):
    if form == "accelerate" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    config = write_data(tmp_path)
    launch = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                       "--dynamo_backend", "no"],
    }[form]
    code, output = ended(started([*launch, installed / "training" / "__main__.py", config], tmp_path))
    assert code == 0, output
    description = json.loads((tmp_path / "runs" / "small" / "run.json").read_text())
    assert description["run"]["settings"]["samples_per_step"] == 4, "2 samples in each of 2 processes"
    assert output.count("PSNR after 4 steps") == 1 and (tmp_path / "trained" / "small.safetensors").is_file()


@pytest.mark.slow
def test_a_signal_ends_it_after_the_step_and_it_goes_on(installed, config, tmp_path, caplog):
    config.write_text(TOML.replace("steps = 4", "steps = 100000").replace("validate_every = 2", "validate_every = 10"))
    process = started([installed / "training", config], tmp_path)
    folder, deadline = tmp_path / "runs" / "small", time.monotonic() + 200
    while not list(folder.glob("validation/*10_0.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == headless.EXIT_STOPPED and "start the same again to go on" in output, output
    (last,) = (int(file.stem.split("_")[1]) for file in folder.glob("checkpoint*"))
    config.write_text(TOML.replace("steps = 4", f"steps = {last + 1}").replace("validate_every = 2", "validate_every = 10"))
    caplog.set_level(logging.INFO)
    assert headless.main([str(config)]) == 0
    assert f"PSNR after {last + 1} steps" in caplog.text and "PSNR after 0 steps" not in caplog.text
