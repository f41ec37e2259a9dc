"""Folders, pairs of folders, pictures in memory and shards: what is found, what is left out, and what the user is told."""

import os

import numpy as np
import pytest
import torch

from mend.tests.training.picture_files import encoded, fill, levels, write_shard
from mend.training import sources
from mend.training.pictures import StoredPicture
from mend.training.screening import screen
from mend.training.shards import shard_files


def names(source):
    return [sample.name for sample in source.samples]


def left_out(source):
    return {entry.reason: list(entry.names) for entry in source.left_out}


def test_folders_are_searched_and_sorted(tmp_path):
    fill(tmp_path / "b", 1)
    fill(tmp_path, 2, ending="jpg")
    fill(tmp_path / ".thumbnails", 1)
    (tmp_path / "._00.jpg").write_bytes(b"resource fork")
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "A.PNG").write_bytes(encoded(levels(9, 9)))
    assert names(sources.good_folder(tmp_path)) == ["00.jpg", "01.jpg", "A.PNG", "b/00.png"]


def test_linked_folders_count_once(tmp_path):
    fill(tmp_path / "data" / "a", 1)
    fill(tmp_path / "elsewhere", 1)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "b")
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "loop")
    assert names(sources.good_folder(tmp_path / "data")) == ["a/00.png", "b/00.png"]


def test_captions(tmp_path):
    fill(tmp_path, 4)
    fill(tmp_path, 1, ending="jpg", first=4)
    (tmp_path / "00.txt").write_text(" a cat\n", encoding="utf-8")
    (tmp_path / "01.txt").write_bytes("\ufeffein K\u00e4tzchen".encode())
    (tmp_path / "02.txt").write_text("")
    (tmp_path / "04.txt").write_text("two lines,\nkept")
    captions = [sample.caption for sample in sources.good_folder(tmp_path).samples]
    assert captions == ["a cat", "ein K\u00e4tzchen", "", "", "two lines,\nkept"]


def test_a_caption_in_another_encoding_is_named(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "00.txt").write_bytes("K\u00e4tzchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"Paired Data: .*00\.txt is not UTF-8 text. Save it"):
        sources.good_folder(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "a file", "empty", "texts"])
def test_a_folder_without_pictures_is_named(tmp_path, kind):
    folder = tmp_path / "data"
    if kind == "a file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
        if kind == "texts":
            (folder / "a.txt").write_text("a")
    reason = {"missing": "is not there", "a file": "is a file", "empty": "holds no pictures", "texts": "holds no pictures (1 other"}
    for call in (lambda: sources.good_folder(folder), lambda: sources.paired_folders(fill(tmp_path / "good", 1), folder)):
        with pytest.raises(ValueError) as error:
            call()
        assert f"folder is {folder}" in str(error.value) and reason[kind] in str(error.value)


def test_pairs_match_by_name_whatever_the_format(tmp_path):
    good, bad = fill(tmp_path / "good" / "x", 4).parent, fill(tmp_path / "bad" / "x", 3, first=2, ending="jpg").parent
    fill(bad / "y", 1)
    fill(good / "x", 1, first=3, ending="webp")
    (good / "x" / "02.txt").write_text("a cat")
    source = sources.paired_folders(good, bad)
    assert names(source) == ["x/02.png", "x/03.png"] and [sample.caption for sample in source.samples] == ["a cat", ""]
    assert [sample.degraded.file.name for sample in source.samples] == ["02.jpg", "03.jpg"]
    assert left_out(source) == {
        "have no degraded picture of the same name": ["x/00.png", "x/01.png"],
        "have no good picture of the same name": ["x/04.jpg", "y/00.png"],
        "have the name of another but for the format": ["x/03.webp"],
    }


def test_no_pairs_at_all(tmp_path):
    good, bad = fill(tmp_path / "good", 9), fill(tmp_path / "bad", 1, first=20)
    with pytest.raises(ValueError) as error:
        sources.paired_folders(good, bad)
    assert "Paired Data: no picture in good_folder has one of the same name in degraded_folder" in str(error.value)
    assert "00.png, 01.png, 02.png, 03.png, 04.png, ..." in str(error.value) and "20.png" in str(error.value)
    with pytest.raises(ValueError, match="are the same folder"):
        sources.paired_folders(good, tmp_path / "bad" / ".." / "good")


def test_screening_reads_headers_only(tmp_path, monkeypatch, caplog):
    fill(tmp_path, 2, 64, 64)
    fill(tmp_path, 2, 20, 90, first=2)
    whole = encoded(levels(64, 64))
    (tmp_path / "04.png").write_bytes(whole[:200])
    (tmp_path / "05.png").write_bytes(b"no picture")
    monkeypatch.setattr(StoredPicture, "pixels", None)
    kept, out = screen(sources.good_folder(tmp_path), 32)
    assert [sample.name for sample in kept] == ["00.png", "01.png", "04.png"]
    assert {entry.reason: entry.names for entry in out} == {
        "are smaller than the crop of 32 pixels": ("02.png (20 x 90 pixels)", "03.png (20 x 90 pixels)"),
        "cannot be read": ("05.png (not a picture of a format that can be read)",),
    }
    assert "2 left out that are smaller than the crop of 32 pixels: 02.png (20 x 90 pixels), 03.png" in caplog.text


def test_nothing_left_says_why(tmp_path):
    fill(tmp_path, 7, 20, 20)
    with pytest.raises(ValueError) as error:
        screen(sources.good_folder(tmp_path), 32)
    text = str(error.value)
    assert f"nothing can be trained on in folder ({tmp_path})" in text and "7 left out that are smaller than the crop of 32 pixels" in text
    assert text.endswith("Lower crop below 32, or give larger pictures.")


def test_pairs_of_different_sizes_are_named(tmp_path):
    good, bad = fill(tmp_path / "good", 2, 64, 64), fill(tmp_path / "bad", 2, 64, 64)
    fill(bad, 1, 16, 16)
    kept, out = screen(sources.paired_folders(good, bad), 32)
    assert [sample.name for sample in kept] == ["01.png"]
    assert out == [sources.LeftOut("differ in size from their degraded picture", ("00.png (64 x 64 and 16 x 16 pixels)",))]
    fill(bad, 2, 16, 16)
    with pytest.raises(ValueError, match="Enlarge the degraded pictures to the size of the good ones first"):
        screen(sources.paired_folders(good, bad), 32)


def test_connected_pictures():
    images = [torch.rand(1, 9, 9, 3), torch.rand(2, 8, 8, 4), torch.rand(1, 7, 7, 1)]
    source = sources.connected_pictures(images, ["a ", "b", "c"])
    assert names(source) == [f"picture {index}" for index in (1, 2, 3, 4)]
    assert [sample.caption for sample in source.samples] == ["a", "b", "b", "c"]
    assert np.array_equal(source.samples[2].good.pixels(), images[1][1, ..., :3].numpy())
    assert source.samples[3].good.pixels().shape == (7, 7, 3)
    assert [sample.caption for sample in sources.connected_pictures(images, ["all"]).samples] == ["all"] * 4
    assert [sample.caption for sample in sources.connected_pictures(images, list("abcd")).samples] == list("abcd")
    assert [sample.caption for sample in sources.connected_pictures(images).samples] == [""] * 4
    source = sources.connected_pictures(images, degraded=[image * 0.5 for image in images])
    assert np.array_equal(source.samples[0].degraded.pixels(), images[0][0].numpy() * 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": []}, "images is an empty list"),
        ({"images": [torch.rand(1, 9, 9, 2)]}, "Paired Data: 'images' has 2 channels"),
        ({"images": [torch.full((1, 9, 9, 3), float("nan"))]}, "Paired Data: 'images' has NaN"),
        ({"images": [torch.rand(3, 9, 9, 3)], "texts": ["a", "b"]}, "texts holds 2 captions for 3 pictures"),
        ({"images": [torch.rand(3, 9, 9, 3)], "degraded": [torch.rand(2, 9, 9, 3)]}, "degraded holds 2 pictures for 3 in images"),
    ],
)
def test_unusable_connections(given, message):
    with pytest.raises(ValueError, match=message):
        sources.connected_pictures(**given)


def members(first, last, **also):
    """Members of a shard: pictures of the indices from first to last."""
    found = [(f"{index:04d}.png", encoded(levels(40, 40, seed=index))) for index in range(first, last)]
    return [*found, *also.items()]


def test_shards(tmp_path):
    large = encoded(levels(200, 200, seed=50), "TIFF")
    assert len(large) > 1 << 16
    write_shard(tmp_path / "train-000.tar", [
        *members(0, 2), ("0000.txt", b"a cat"), ("0000.json", b"{}"), ("0001.LQ.jpg", encoded(levels(40, 40, seed=9), "JPEG")),
        ("._0001.png", b"x"), ("sub/0001.gt.tif", large), ("sub/0001.degraded.png", encoded(levels(200, 200))), ("0007.cls", b"7"),
        ("0008.lq.png", encoded(levels(9, 9))), ("0009.seg.png", encoded(levels(9, 9))),
    ])  # fmt: skip
    write_shard(tmp_path / "train-001.tar", members(2, 3))
    source = sources.shards(tmp_path)
    assert names(source) == ["train-000.tar/0000", "train-000.tar/0001", "train-000.tar/sub/0001", "train-001.tar/0002"]
    assert [sample.caption for sample in source.samples] == ["a cat", "", "", ""]
    assert [sample.degraded is not None for sample in source.samples] == [False, True, True, False]
    assert left_out(source) == {"have no good picture": ["train-000.tar/0008"]}
    assert np.array_equal(source.samples[3].good.pixels(), levels(40, 40, seed=2))
    assert np.array_equal(source.samples[2].good.pixels(), levels(200, 200, seed=50))
    assert [sample.good.size() for sample in source.samples] == [(40, 40), (40, 40), (200, 200), (40, 40)]


def test_header_of_a_large_member_is_enough(tmp_path, monkeypatch):
    content = encoded(levels(200, 300), "BMP")
    write_shard(tmp_path / "a.tar", [("0.bmp", content)])
    picture = sources.shards(tmp_path / "a.tar").samples[0].good
    read, part = [], StoredPicture._part
    monkeypatch.setattr(StoredPicture, "_part", lambda self, length: read.append(length) or part(self, length))
    assert picture.size() == (200, 300) and len(content) > 1 << 16 and read == [1 << 16]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("train-{000..001}.tar", 2), ("train-*.tar", 3), ("train-00?.tar", 3), ("train-002.tar", 1), ("{train,test}.tar", None), ("", 3)],
)
def test_shards_by_pattern(tmp_path, pattern, found):
    for index in range(3):
        write_shard(tmp_path / f"train-{index:03d}.tar", members(index, index + 1))
    if found is None:
        with pytest.raises(ValueError, match="is not there"):
            shard_files(tmp_path / pattern)
    else:
        assert len(shard_files(tmp_path / pattern)) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.tar", "which is not there"), ("train-{000..004}.tar", "train-003.tar, which is not there"), ("x-*.tar", "fits no file"),
        ("empty", "which holds no .tar file"), ("cut.tar", "not a readable .tar file"), ("packed.tar.gz", "unpack .gz first"),
        ("text.tar", "not a readable .tar file"), ("words.tar", "holds no good pictures"),
        ("latin.tar", "the caption of latin.tar/0000 is not UTF-8"),
    ],
)  # fmt: skip
def test_unusable_shards_are_named(tmp_path, name, message):
    import gzip

    for index in range(3):
        write_shard(tmp_path / f"train-{index:03d}.tar", members(index, index + 1))
    whole = (tmp_path / "train-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "text.tar").write_text("no tar" * 200)
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "words.tar", [("0.txt", b"a")])
    write_shard(tmp_path / "latin.tar", [*members(0, 1), ("0000.txt", "\u00e4".encode("latin-1"))])
    with pytest.raises(ValueError) as error:
        sources.shards(tmp_path / name)
    assert str(error.value).startswith("Paired Data: ") and message in str(error.value)


def test_what_the_webdataset_library_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="shards are read without it")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for index in range(3):
            good, bad = (encoded(levels(40, 40, seed=seed)) for seed in (index, index + 10))
            writer.write({"__key__": f"sub/{index:04d}", "png": good, "lq.png": bad, "txt": f"number {index}"})
    source = sources.shards(tmp_path)
    assert [sample.caption for sample in source.samples] == ["number 0", "number 1", "number 2"]
    for index, sample in enumerate(source.samples):
        assert np.array_equal(sample.good.pixels(), levels(40, 40, seed=index))
        assert np.array_equal(sample.degraded.pixels(), levels(40, 40, seed=index + 10))


def test_states_change_with_the_files(tmp_path):
    fill(tmp_path, 2)
    before = sources.folder_state(tmp_path)
    assert before == sources.folder_state(tmp_path) and len(before) == 2
    (tmp_path / "00.txt").write_text("a")
    assert sources.folder_state(tmp_path) != before
    assert sources.folder_state(tmp_path / "none") == [] == sources.file_state(tmp_path / "none.tar")
