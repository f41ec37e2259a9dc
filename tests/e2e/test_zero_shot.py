"""The shared zero-shot workflows on a real server, as an artist runs them."""

import numpy as np
import pytest
import torch
from PIL import Image

from mend.degradations.evaluation import degrade
from mend.dev import demo_run
from mend.dev.workflow_prompt import WorkflowError, executed_nodes, read_workflow
from mend.dev.workspace import PACK

pytestmark = pytest.mark.zero_shot_e2e

LAB = PACK / "workflows" / "zero_shot_restore.json"
SD = PACK / "workflows" / "zero_shot_restore_sd.json"
SIZE = (75, 61)


def noisy_photograph():
    """A small piece of the default photograph, of odd size, and the same under the evaluation's noise."""
    truth = demo_run.centre_crop(demo_run.default_photograph(), *SIZE)
    pixels = torch.from_numpy(np.asarray(truth, dtype=np.float32) / 255)[None]
    spoilt = (degrade(pixels, "noise", 0)[0].clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    return truth, Image.fromarray(spoilt)


def restored(server, picture, folder, **more):
    """The picture that the lab workflow saves."""
    picture.save(folder / "before.png")
    result = server.queue(LAB, inputs=[folder / "before.png"], out=folder / "out", **more)
    (saved,) = [file["path"] for file in result.files if file["type"] == "output"]
    return Image.open(saved)


def test_a_noisy_photograph_comes_back_better_in_its_own_size(server, tmp_path):
    truth, before = noisy_photograph()
    after = restored(server, before, tmp_path)
    assert (after.size, after.mode) == (SIZE, "RGB")
    # Far below what the lab prior gains (several dB), far above chance.
    assert demo_run.measure(after, truth)["psnr"] > demo_run.measure(before, truth)["psnr"] + 1


def test_transparency_is_kept(server, tmp_path):
    _, before = noisy_photograph()
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1)))
    before.putalpha(alpha)
    after = restored(server, before, tmp_path, settings=["MendNoiseMatchedStart.steps=2"])
    assert (after.size, after.mode) == (SIZE, "RGBA")
    # 8 bits to a float, through a mask and back to 8 bits, where the host cuts off instead of rounding.
    assert np.abs(np.asarray(after)[..., 3].astype(int) - np.asarray(alpha)).max() <= 1


@pytest.mark.parametrize("kind", demo_run.SETTINGS)
def test_every_degradation_of_the_demo_runs(server, tmp_path, kind):
    _, before = noisy_photograph()
    settings = [*demo_run.SETTINGS[kind], demo_run.CAPTION, "MendNoiseMatchedStart.steps=2"]
    assert restored(server, before, tmp_path, settings=settings).size == SIZE


def test_the_sd_workflow_lacks_nothing_but_a_checkpoint(server, tmp_path):
    _, before = noisy_photograph()
    before.save(tmp_path / "before.png")
    with pytest.raises(WorkflowError) as refused:
        server.queue(SD, inputs=[tmp_path / "before.png"])
    complaints = [line for line in str(refused.value).splitlines() if line.startswith("node ")]
    assert len(complaints) == 1 and "(Your Checkpoint): Value not in list: ckpt_name" in complaints[0]


def on_lab_prior(workflow):
    """The workflow with Load Lab Prior where it has the checkpoint loader; both give MODEL, CLIP and VAE in this order."""
    (loader,) = [node for node in workflow["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    loader.update(type="MendLoadLabPrior", widgets_values=["unet"], properties={"Node name for S&R": "MendLoadLabPrior"})
    return workflow


def test_the_sd_workflow_runs_once_it_has_a_model(server, tmp_path):
    _, before = noisy_photograph()
    before.save(tmp_path / "before.png")
    workflow = on_lab_prior(read_workflow(SD))
    result = server.queue(workflow, inputs=[tmp_path / "before.png"], settings=["MendNoiseMatchedStart.steps=2"], out=tmp_path / "out")
    assert not result.errors
    (saved,) = [file["path"] for file in result.files if file["type"] == "output"]
    assert Image.open(saved).size == SIZE


def test_describing_nodes_wait_to_be_switched_on():
    workflow = read_workflow(SD)
    describing = {"CLIPLoader", "TextGenerate", "MendDescribeDegradedImage"}
    assert describing <= {node["type"] for node in workflow["nodes"]}
    assert not describing & {node["type"] for node in executed_nodes(workflow)}
