"""MendPairedData through the host: every source, lists and their texts, and what it tells the artist."""

import pytest
import torch

from mend.nodes.training_data import PairedData
from mend.tests.training.picture_files import encoded, fill, levels, write_shard
from mend.training.sources import KINDS

GREY = {"kind": "grey", "kind.greyness": 1.0}
JPEG = {"kind": "jpeg", "kind.quality": 20}


def recipe_nodes(*settings):
    """Degrade Image nodes 10, 11, ..., each on the picture of node 9."""
    nodes = {"9": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}}
    for index, kind in enumerate(settings, 10):
        nodes[str(index)] = {"class_type": "MendDegradeImage", "inputs": {"image": ["9", 0], "seed": 0, **kind}}
    return nodes


def prompt(inputs, recipes=(GREY,), **more):
    """Paired Data with recipes connected, and all that it gives."""
    links = {f"degradations.degradation_{index}": [str(10 + index), 2] for index in range(len(recipes))}
    captures = {str(20 + index): {"class_type": "TestCapture", "inputs": {"value": ["1", index]}} for index in range(3)}
    settings = {"crop": 64, "flip": True, "held_out": 8, **links, **inputs}
    return {"1": {"class_type": "MendPairedData", "inputs": settings}, **recipe_nodes(*recipes), **captures, **more}


@pytest.fixture
def run(run_prompt):
    """Pairs, preview and info of a node that ran in the host."""

    def call(inputs, recipes=(GREY,), given=None, **more):
        values = run_prompt(prompt(inputs, recipes, **more), given=given).values
        return values["20"], values["21"], values["22"]

    return call


@pytest.fixture
def refused(run_prompt):
    """What the host says where the node fails."""

    def call(inputs, recipes=(GREY,), given=None, **more):
        result = run_prompt(prompt(inputs, recipes, **more), given=given, check=False)
        assert not result.success
        return result.error_text()

    return call


@pytest.fixture
def photos(base_folder, tmp_path):
    """A folder in the host's input folder, with three captions."""
    folder = fill(base_folder / "input" / tmp_path.name, 12, 64, 80)
    for index in range(3):
        (folder / f"{index:02d}.txt").write_text(f"number {index}")
    return folder


def one_folder(folder):
    return {"source": KINDS[0], "source.folder": str(folder)}


def draw(pairs, index=0, seed=0):
    return pairs.pair(index, torch.Generator().manual_seed(seed))


def steps(pairs):
    return [recipe.to_json() for recipe in pairs.recipes]


def test_all_sources_are_offered():
    combo = next(entry for entry in PairedData.GET_SCHEMA().inputs if entry.id == "source")
    assert tuple(option.key for option in combo.options) == KINDS


@pytest.mark.parametrize("complete", [True, False])
def test_folder_of_good_pictures(run, photos, complete):
    pairs, shown, info = run(one_folder(photos if complete else photos.name))
    assert len(pairs) == 11 and shown.shape == (4, 64, 128, 3)
    assert info.splitlines() == ["11 pictures to train on, 1 held out for validation", "3 with a caption", "1 recipe of degradations"]
    pair = draw(pairs)
    assert (pair.words, pair.caption) == ("black and white", pairs.training[0].caption) and not pair.clean.is_inference()
    assert torch.equal(shown[0, :, 64:], pair.clean) and torch.equal(shown[0, :, :64], pair.degraded)


def test_several_degradations(run, photos):
    pairs, _, info = run(one_folder(photos), (GREY, JPEG))
    assert steps(pairs) == [[{"kind": "grey", "greyness": 1.0}], [{"kind": "jpeg", "quality": 20.0}]]
    assert {draw(pairs, seed=seed).words for seed in range(20)} == {"black and white", "compressed"}
    assert info.endswith("2 recipes of degradations")


def test_two_folders(run, photos, tmp_path):
    bad = fill(tmp_path / "bad", 5, 64, 80, first=2, ending="jpg")
    pairs, _, info = run({"source": KINDS[1], "source.good_folder": photos.name, "source.degraded_folder": str(bad)}, ())
    assert len(pairs) == 5 and draw(pairs).caption == "number 2"
    assert "7 left out that have no degraded picture of the same name: 00.png, 01.png, 07.png, 08.png, 09.png, ..." in info


def test_shards(run, photos):
    write_shard(photos / "a.tar", [("0.png", encoded(levels(64, 64))), ("0.lq.png", encoded(levels(64, 64, seed=1))), ("0.txt", b"a cat")])
    pairs, _, _ = run({"source": KINDS[3], "source.shards": f"{photos.name}/*.tar"}, ())
    assert (len(pairs), draw(pairs).caption) == (1, "a cat")


def test_the_hosts_datasets_connect(run, photos):
    loader = {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": photos.name}}
    pairs, _, _ = run({"source": KINDS[2], "source.images": ["2", 0], "source.texts": ["2", 1]}, **{"2": loader})
    captions = {sample.caption for sample in [*pairs.training, *pairs.held_out]}
    assert len(pairs) == 11 and captions == {"", "number 0", "number 1", "number 2"}
    assert not draw(pairs).clean.is_inference()


def test_a_list_that_was_degraded_in_the_graph(run, photos):
    loader = {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": photos.name}}
    degrade = {"class_type": "MendDegradeImage", "inputs": {"image": ["2", 0], "seed": 0, **JPEG}}
    inputs = {"source": KINDS[2], "source.images": ["2", 0]}
    pairs, _, _ = run({**inputs, "source.degraded": ["3", 0]}, (), **{"2": loader, "3": degrade})
    assert len(pairs) == 11 and draw(pairs).words == "" and not torch.equal(draw(pairs).clean, draw(pairs).degraded)
    # The recipe comes once for each picture of the list, and is one recipe.
    pairs, _, _ = run({**inputs, "degradations.degradation_0": ["3", 2]}, (), **{"2": loader, "3": degrade})
    assert steps(pairs) == [[{"kind": "jpeg", "quality": 20.0}]]


def test_a_batch_connects(run):
    given = {"class_type": "TestGiven", "inputs": {"name": "images"}}
    pairs, shown, _ = run({"source": KINDS[2], "source.images": ["2", 0]}, given={"images": torch.rand(3, 64, 64, 3)}, **{"2": given})
    assert len(pairs) == 3 and shown.shape == (3, 64, 128, 3)


def test_a_changed_folder_is_noticed(run_prompt, photos):
    first, again = (run_prompt(prompt(one_folder(photos))) for _ in range(2))
    assert "1" not in first.cached and "1" in again.cached
    (photos / "03.txt").write_text("new")
    assert run_prompt(prompt(one_folder(photos))).values["22"].splitlines()[1] == "4 with a caption"
    fill(photos, 8, 64, 80, first=12)
    assert run_prompt(prompt(one_folder(photos))).values["22"].startswith("18 pictures to train on, 2 held out")


def test_changed_shards_are_noticed(run_prompt, photos):
    inputs = {"source": KINDS[3], "source.shards": str(photos)}
    write_shard(photos / "a.tar", [("0.png", encoded(levels(64, 64)))])
    assert "1" not in run_prompt(prompt(inputs)).cached and "1" in run_prompt(prompt(inputs)).cached
    write_shard(photos / "b.tar", [("0.png", encoded(levels(64, 64)))])
    assert run_prompt(prompt(inputs)).values["22"].startswith("2 pictures")


def test_mistakes_are_named(refused, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs, recipes, message in (
        (one_folder(""), (GREY,), "Paired Data: folder is empty. Give a path"),
        (one_folder("nowhere"), (GREY,), "which is not there. Give a folder of pictures"),
        (one_folder(tmp_path / "empty"), (GREY,), "which holds no pictures"),
        (one_folder(photos), (), "Paired Data: degradations is not connected"),
        ({**one_folder(photos), "crop": 512}, (GREY,), "12 left out that are smaller than the crop of 512 pixels"),
        ({**one_folder(photos), "crop": 32}, (GREY,), "crop"),
        ({"source": KINDS[3], "source.shards": "nowhere.tar"}, (), "which is not there"),
        ({"source": KINDS[2]}, (), "images"),
    ):
        assert message in refused(inputs, recipes)
