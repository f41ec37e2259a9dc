"""MendTrain under the host's own executor: what it hands out, what it shows, what it leaves on disk, and how it goes on."""

import re
import sys

import pytest
import torch

import comfy.model_management
from mend.tests import tiny_models
from mend.tests.nodes.restorations import node
from mend.tests.training.dummies import DUMMY, KIND, DummyPairs, Watcher, same, trainee, weights
from mend.training.loop import train
from mend.training.settings import Settings
from mend.training.trainee import Models

SETTINGS = dict(steps=6, batch_size=2, learning_rate=1e-2, seed=3, accumulate=1, schedule="constant", warmup=0, weight_decay=0.01, clip_gradient=1.0,
                ema=0.0, precision="fp32", gradient_checkpointing=False, validate_every=3, keep=2)  # fmt: skip
OUTPUTS = ("weights", "loss_map", "validation", "report")


@pytest.fixture
def training(run_prompt, host_nodes, monkeypatch, base_folder, request):
    """Trains the dummy on the node; the folder of the run is training.folder."""
    name = re.sub(r"\W+", " ", request.node.name).strip()
    return Training(run_prompt, host_nodes, monkeypatch, base_folder / "output" / "mend_training" / name)


class Training:
    """One node with captures on all outputs; `given` replaces what is connected."""

    def __init__(self, run_prompt, host_nodes, monkeypatch, folder):
        self.run_prompt, self.folder = run_prompt, folder
        self.kinds = sys.modules[host_nodes.NODE_CLASS_MAPPINGS["MendTrain"].__module__].kinds
        monkeypatch.setitem(self.kinds.KINDS, KIND, DUMMY)
        self.given = {"weights": weights(), "pairs": DummyPairs()}

    def __call__(self, on_event=None, check=True, extra=None, fresh=True, **changes):
        if fresh:
            self.run_prompt.executor.reset()
        prompt = {f"given {name}": node("TestGiven", name=name) for name in self.given}
        inputs = {**SETTINGS, "run_name": self.folder.name, **changes, **{name: [f"given {name}", 0] for name in self.given}}
        prompt["train"] = node("MendTrain", **inputs)
        prompt |= {name: node("TestCapture", value=["train", slot]) for slot, name in enumerate(OUTPUTS)} | (extra or {})
        return self.run_prompt(prompt, given=self.given, on_event=on_event, check=check)


def alone(**changes):
    """The same training without host and node."""
    settings = Settings(**{**dict(steps=6, batch=2, rate=1e-2, seed=3, validate_every=3), **changes})
    return train(trainee(), DummyPairs(), Models(), settings, None, Watcher())


class WithoutDiffusers:
    """Finds modules as Python does where the package was never installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_what_comes_out(training):
    result = training()
    expected = alone()
    trained = result.values["weights"]
    assert same(trained.tensors, expected.tensors) and (trained.kind, trained.family, trained.name) == (KIND, "none", training.folder.name)
    assert not any(tensor.is_inference() for tensor in trained.tensors.values())
    assert result.values["loss_map"] == {"loss": expected.losses} and len(expected.losses) == 6
    assert torch.equal(result.values["validation"], expected.page / 255) and result.values["validation"].shape == (3, 12, 36, 3)
    report = result.values["report"]
    first, last = expected.validations[0], expected.validations[-1]
    assert report.startswith("6 steps in ") and f"PSNR of the degraded validation pictures: {last.degraded:.2f} dB" in report
    assert f"{first.restored:.2f} dB after 0 steps, {last.restored:.2f} dB after 6" in report and f"run folder: {training.folder}" in report


def test_what_is_given_stays_as_it_is(training):
    before = {name: tensor.clone() for name, tensor in training.given["weights"].tensors.items()}
    assert not same(training().values["weights"].tensors, before)
    assert same(training.given["weights"].tensors, before)


def test_the_bar_moves_and_pictures_appear(training):
    bars = training().of("progress")
    assert [bar["value"] for bar in bars][-1] == 6 and all(bar["max"] == 6 and bar["node"] == "train" for bar in bars)
    previews = [(bar["value"], bar["preview"]) for bar in bars if bar["preview"]]
    assert [step for step, _ in previews] == [0, 3, 6], "the first one before the first step"
    kind, picture, size = previews[0][1]
    assert kind == "JPEG" and picture.size == (36, 12) and size >= 512


def test_the_hosts_graph_takes_the_losses(training):
    result = training(extra={"graph": node("LossGraphNode", loss=["train", 1], filename_prefix="loss")})
    assert result.outputs["graph"]["images"]


def test_cancelling_ends_within_a_step_and_queueing_again_goes_on(training):
    def cancel(event, data):
        if event == "progress" and data["value"] == 3:
            comfy.model_management.interrupt_current_processing()

    cancelled = training(cancel, check=False)
    assert not cancelled.success and cancelled.error.get("node_type") == "MendTrain" and "exception_message" not in cancelled.error
    assert [file.name for file in training.folder.glob("checkpoint*")] == ["checkpoint_000000003.safetensors"]
    again = training()
    # The host drops updates that follow each other quickly, so only on a slow machine is it cancelled before step 3 was validated.
    assert min(bar["value"] for bar in again.of("progress") if not bar["preview"]) >= 4
    assert same(again.values["weights"].tensors, alone().tensors)


def test_a_finished_run_is_not_trained_again(training):
    first = training()
    again = training()
    assert not again.of("progress") and same(first.values["weights"].tensors, again.values["weights"].tensors)
    for name in ("validation", "loss_map", "report"):
        one, other = first.values[name], again.values[name]
        assert torch.equal(one, other) if name == "validation" else one == other
    assert "train" in training(fresh=False).cached, "and as long as the host runs it is not even asked"


def test_more_steps_and_other_settings(training):
    training()
    assert [bar["value"] for bar in training(steps=8).of("progress")][-1] == 8
    assert [folder.name for folder in training.folder.parent.glob(training.folder.name + "*")] == [training.folder.name]
    training(learning_rate=1e-3)
    assert (training.folder.parent / f"{training.folder.name}_2").is_dir()


def test_another_model_makes_another_run(training):
    training.given["model"] = tiny_models.model("sd15", seed=1)
    training()
    training.given["model"] = tiny_models.model("sd15", seed=1)
    assert not training().of("progress"), "the same weights from another loader are the same model"
    training.given["model"] = tiny_models.model("sd15", seed=2)
    assert training().of("progress") and (training.folder.parent / f"{training.folder.name}_2").is_dir()


def test_gradient_checkpointing_reaches_the_trainee(training):
    seen = []

    class Curious(type(trainee())):
        def attach(self, models):
            seen.append(models.model.model_options["transformer_options"].get("patches", {}))
            return super().attach(models)

    training.kinds.KINDS[KIND] = type(DUMMY)(Curious, DUMMY.new)
    training.given["model"] = tiny_models.model("sd15")
    training(gradient_checkpointing=True)
    assert "forward_timestep_embed_patch" in seen[0]
    assert "patches" not in training.given["model"].model_options["transformer_options"]


@pytest.mark.parametrize("changes, message", [
    ({"run_name": "a/b"}, "Train: the run name 'a/b' cannot be the name of a folder. Use letters"),
    ({"steps": 20, "learning_rate": 1.0, "clip_gradient": 0.0}, "Train: the last 10 gradients up to step 10 were not finite"),
])  # fmt: skip
def test_errors_name_the_node(training, changes, message):
    if "learning_rate" in changes:
        training.given["weights"].tensors["bias"].fill_(float("inf"))
    result = training(check=False, **changes)
    assert not result.success and message in result.error_text()


def test_without_diffusers_it_says_what_to_install(training, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [WithoutDiffusers, *sys.meta_path])
    text = training(check=False).error_text()
    assert "Train: the Python package diffusers is not installed" in text and "pip install diffusers" in text


def test_weights_that_cannot_be_trained_are_refused(training):
    training.given["weights"] = weights().__class__("unheard_of", "none", {}, {}, "some.safetensors")
    result = training(check=False)
    assert "Train: weights of the kind unheard of cannot be trained; there are" in result.error_text() and "dummy" in result.error_text()


def test_the_full_range_of_settings(training):
    result = training(accumulate=2, schedule="cosine", warmup=2, ema=0.9, precision="bf16", clip_gradient=0.0, weight_decay=0.0, keep=3)
    assert same(result.values["weights"].tensors,
                alone(accumulate=2, schedule="cosine", warmup=2, ema=0.9, precision="bf16", clip=0.0, weight_decay=0.0).tensors)
