"""Paired data from a configuration is what the node would make, and mistakes in it are named."""

import pytest
import torch

from mend.degradations.recipe import Recipe
from mend.tests.training.picture_files import JPEG, encoded, fill, levels, write_shard
from mend.training import sources
from mend.training.data_config import pairs_from_config
from mend.training.pairs import Pairs

GOOD = {"source": "folder of good pictures", "folder": "good", "degradations": [JPEG.to_json()], "crop": 32}


@pytest.fixture
def base(tmp_path):
    """A folder with data of all kinds."""
    fill(tmp_path / "good", 12)
    fill(tmp_path / "bad", 12)
    write_shard(tmp_path / "a.tar", [("0.png", encoded(levels(40, 40)))])
    return tmp_path


def test_folder(base):
    pairs = pairs_from_config(GOOD, base)
    assert pairs.fingerprint() == Pairs(sources.good_folder(base / "good"), [JPEG], 32).fingerprint()
    pairs = pairs_from_config({**GOOD, "folder": f' "{base / "good"}" ', "flip": False, "held_out": 0}, base / "elsewhere")
    assert len(pairs) == 12 and not pairs.flip


def test_other_sources(base):
    pairs = pairs_from_config({"source": "two folders", "good_folder": "good", "degraded_folder": "bad", "crop": 32}, base)
    pair = pairs.pair(0, torch.Generator())
    assert torch.equal(pair.clean, pair.degraded)
    assert len(pairs_from_config({"source": "WebDataset shards", "shards": "*.tar", "degradations": [[]], "crop": 32}, base)) == 1
    assert pairs_from_config({**GOOD, "degradations": [[], [{"kind": "grey"}]]}, base).recipes[0] == Recipe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "source is None; choose one of folder of good pictures, two folders, WebDataset shards"),
        ({"source": "connected pictures"}, "source is 'connected pictures'; choose one of"),
        ({"sauce": 1}, "there is no setting 'sauce'"),
        ({"good_folder": "good"}, "there is no setting 'good_folder' for the source 'folder of good pictures'"),
        ({"folder": ""}, "folder is empty. Give a path"),
        ({"folder": None}, "folder is empty. Give a path"),
        ({"folder": "none"}, "which is not there"),
        ({"crop": "32"}, "crop is '32'; it has to be a whole number"),
        ({"crop": True}, "crop is True; it has to be a whole number"),
        ({"flip": 1}, "flip is 1; it has to be true or false"),
        ({"degradations": {}}, "it has to be a list of recipes"),
        ({"degradations": [{"kind": "jpeg"}]}, "degradations, recipe 1: a recipe of degradations has to be a list of steps"),
        ({"degradations": [[], [{"kind": "fog"}]]}, "degradations, recipe 2: step 1 of a recipe: unknown degradation 'fog'"),
        ({"degradations": []}, "degradations is not connected"),
    ],
)
def test_mistakes_are_named(base, changes, message):
    with pytest.raises(ValueError) as error:
        pairs_from_config({**GOOD, **changes}, base)
    assert str(error.value).startswith("Paired Data: ") and message in str(error.value)
