"""`python dev demo`: what it measures, what it shows and what it prints, around a workflow that is queued elsewhere."""

import json
import math

import numpy as np
import pytest
from PIL import ExifTags, Image

from mend.degradations.evaluation import NAMES
from mend.dev import commands, demo_run
from mend.dev.workflow_client import Result
from mend.dev.workflow_prompt import WorkflowError


def solid(value, size=(32, 32)):
    return Image.new("RGB", size, (value, value, value))


def options(tmp_path, *more):
    return demo_run.build_parser().parse_args(["--server", "http://nowhere", "--out", str(tmp_path / "out"), *more])


@pytest.fixture
def queued(monkeypatch):
    """What would be queued; the restored picture is the degraded one."""
    asked = {}

    async def restore(server, before, settings, seed, folder):
        asked.update(before=before, settings=settings, seed=seed)
        return Image.open(before).convert("RGB"), Result("id", 1.25)

    monkeypatch.setattr(demo_run, "restore", restore)
    return asked


def test_measure():
    figures = demo_run.measure(solid(110), solid(100))
    assert figures.keys() == {"psnr", "ssim"}
    assert figures["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert 0 < figures["ssim"] < 1 and demo_run.measure(demo_run.degraded(solid(99), "noise", 0), solid(99))["ssim"] < 0.5


def test_side_by_side():
    both = demo_run.side_by_side(solid(10, (20, 30)), solid(200, (20, 30)))
    assert both.size == (40 + demo_run.GAP, 30)
    assert both.getpixel((19, 0)) == (10, 10, 10) and both.getpixel((20 + demo_run.GAP, 29)) == (200, 200, 200)
    assert both.getpixel((21, 15)) == (255, 255, 255)


@pytest.mark.parametrize(("size", "fitted"), [((513, 7), None), ((300, 200), (288, 192)), ((1024, 512), (512, 256)), ((16, 31), (16, 16))])
def test_users_photographs_are_made_to_fit(tmp_path, size, fitted):
    file = tmp_path / "photo.png"
    solid(7, size).save(file)
    if fitted is None:
        with pytest.raises(WorkflowError, match=r"photo.png is too small: the demo needs at least 16 pixels"):
            demo_run.users_photograph(file)
    else:
        assert demo_run.users_photograph(file).size == fitted


def test_users_photographs_are_turned_as_the_camera_was_held(tmp_path):
    photo = Image.new("RGB", (48, 32), (255, 0, 0))
    photo.paste((0, 0, 255), (0, 0, 24, 32))
    turn = Image.Exif()
    turn[ExifTags.Base.Orientation] = 6  # a quarter clockwise
    photo.save(tmp_path / "photo.jpg", exif=turn)
    upright = demo_run.users_photograph(tmp_path / "photo.jpg")
    assert upright.size == (32, 48)
    above, below = upright.getpixel((16, 8)), upright.getpixel((16, 40))
    assert above[2] > 200 > above[0] and below[0] > 200 > below[2]


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(WorkflowError, match=r"cannot read .*notes.txt as a picture"):
        demo_run.users_photograph(tmp_path / "notes.txt")


def test_the_default_photograph():
    assert demo_run.default_photograph().size == (demo_run.DEFAULT_SIDE, demo_run.DEFAULT_SIDE)


def test_every_degradation_has_its_settings():
    assert demo_run.SETTINGS.keys() == set(NAMES)
    for kind, weight in (("lowlight", "exposure"), ("haze", "clarity")):
        assert any(setting.startswith(f"MendQualityPrior.{weight}=0.") for setting in demo_run.SETTINGS[kind])


@pytest.mark.parametrize("kind", demo_run.SETTINGS)
def test_what_is_queued_and_written(tmp_path, queued, kind):
    given = options(tmp_path, "--degradation", kind, "--seed", "4", "--set", "KSamplerSelect.sampler_name=heun")
    figures = demo_run.demonstrate(given)
    assert queued["seed"] == 4
    assert queued["settings"] == [*demo_run.SETTINGS[kind], demo_run.CAPTION, "KSamplerSelect.sampler_name=heun"]
    before, after, both = (Image.open(given.out / f"{name}.png") for name in ("before", "after", "compare"))
    assert before.size == after.size and both.size == (2 * before.width + demo_run.GAP, before.height)
    assert figures["before"] == figures["after"] == demo_run.measure(before, demo_run.default_photograph())


def test_own_photographs_get_no_words(tmp_path, queued):
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "mine.png")
    demo_run.demonstrate(options(tmp_path, "--input", str(tmp_path / "mine.png")))
    assert queued["settings"] == demo_run.SETTINGS["noise"]


def test_the_files_that_are_spared_are_those_that_are_written(tmp_path, queued):
    given = options(tmp_path)
    demo_run.demonstrate(given)
    assert sorted(file.name for file in given.out.iterdir()) == sorted(commands.DEMO_FILES)


@pytest.mark.parametrize("name", commands.DEMO_FILES)
def test_the_users_photograph_is_never_written_over(tmp_path, capsys, name):
    photo = tmp_path / name
    photo.write_bytes(b"mine")
    roundabout = tmp_path / "folder" / ".." / name
    (tmp_path / "folder").mkdir()
    assert commands.main(["demo", "--input", str(roundabout), "--out", str(tmp_path)]) == 1
    assert f"the demo would write over {roundabout}: name another folder with --out" in capsys.readouterr().err
    assert photo.read_bytes() == b"mine"


def test_other_photographs_and_folders_are_no_trouble(tmp_path):
    (tmp_path / "before.png").touch()
    (tmp_path / "mine.png").touch()
    commands.spare_photograph(tmp_path / "mine.png", tmp_path)
    commands.spare_photograph(tmp_path / "before.png", tmp_path / "out")
    commands.spare_photograph(tmp_path / "missing.png", tmp_path)


def test_the_last_line_is_json(tmp_path, queued, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--server", "http://nowhere", "--out", str(tmp_path), "--json"])
    assert demo_run.main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() == {"before", "after", "seconds"} and figures["seconds"] == 1.2
    assert figures["before"].keys() == figures["after"].keys() == {"psnr", "ssim"}


def test_an_unreachable_host_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--server", "http://127.0.0.1:9", "--out", str(tmp_path)])
    assert demo_run.main() == 1
    assert "error: " in capsys.readouterr().err
