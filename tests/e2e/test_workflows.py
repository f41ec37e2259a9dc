"""The other shared workflows that run anywhere, on a real server with the weights that come with the pack."""

import pytest
from PIL import Image

from mend.dev import demo_run
from mend.dev.workspace import PACK
from mend.tests.e2e.test_zero_shot import SIZE, noisy_photograph

# For noise, and weights that were made for it: the picture has to come back better. The others are made for other damage, or larger pictures.
BETTER = ("restore_with_adapter", "restore_with_learned_prompt", "everything_together")
OTHERS = ("restore_with_visual_instruction", "restore_blind", "restore_with_fusion", "sharpen_any_restoration")
QUICK = {"everything_together": ["MendBridgeSigmas.steps=3"]}


@pytest.mark.parametrize("name", [*BETTER, *OTHERS])
def test_it_runs_to_its_end(server, tmp_path, name):
    truth, before = noisy_photograph()
    before.save(tmp_path / "before.png")
    workflow = PACK / "workflows" / f"{name}.json"
    result = server.queue(workflow, inputs=[tmp_path / "before.png"], out=tmp_path / "out", settings=QUICK.get(name, []))
    saved = [Image.open(file["path"]) for file in result.files if file["type"] == "output"]
    assert saved and all(picture.size == SIZE and picture.tobytes() != before.tobytes() for picture in saved)
    if name in BETTER:
        best = max(demo_run.measure(picture, truth)["psnr"] for picture in saved)
        assert best > demo_run.measure(before, truth)["psnr"] + 1, f"{best:.2f} dB"


@pytest.mark.parametrize("name", ["restore_blind", "restore_with_visual_instruction"])
def test_transparency_is_kept(server, tmp_path, name):
    _, before = noisy_photograph()
    before.putalpha(Image.linear_gradient("L").resize(SIZE))
    before.save(tmp_path / "before.png")
    result = server.queue(PACK / "workflows" / f"{name}.json", inputs=[tmp_path / "before.png"], out=tmp_path / "out")
    (saved,) = [Image.open(file["path"]) for file in result.files if file["type"] == "output"]
    assert (saved.size, saved.mode) == (SIZE, "RGBA") and saved.getchannel("A").getextrema()[0] < 10
