"""Pairs are the same bits for the same generator, whatever was asked before, and the user hears of what cannot be used."""

import logging
import pickle
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mend.degradations.recipe import Recipe
from mend.tests.training.picture_files import JPEG, NOISE, encoded, fill, levels, write_shard
from mend.training import sources
from mend.training.pairs import Pairs, collate, preview
from mend.training.trainee import Batch, Pair

LONG = Recipe.from_json([{"kind": "haze"}, {"kind": "real-esrgan"}, {"kind": "poisson noise"}])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    texts = (one.caption, one.words) == (other.caption, other.words)
    return texts and torch.equal(one.clean, other.clean) and torch.equal(one.degraded, other.degraded)


def folder_pairs(folder, recipes=(NOISE,), crop=32, **settings):
    return Pairs(sources.good_folder(folder), recipes, crop, **settings)


def connected(count=1, height=40, width=48, recipes=(NOISE,), crop=32, **settings):
    """Pictures in which red counts the rows and green the columns."""
    rows, columns = torch.meshgrid(torch.arange(height) / 255.0, torch.arange(width) / 255.0, indexing="ij")
    images = [torch.stack([rows, columns, torch.full_like(rows, index / 255)], -1)[None] for index in range(count)]
    return Pairs(sources.connected_pictures(images), recipes, crop, **settings)


@pytest.fixture
def twelve(tmp_path):
    """A folder of twelve pictures."""
    return fill(tmp_path / "twelve", 12)


def test_a_pair_is_a_crop_and_its_degradation(tmp_path):
    fill(tmp_path, 1, 40, 48)
    (tmp_path / "00.txt").write_text("a cat")
    pair = folder_pairs(tmp_path, [JPEG]).pair(0, generator())
    assert pair.clean.shape == pair.degraded.shape == (32, 32, 3) and pair.clean.dtype == pair.degraded.dtype == torch.float32
    assert (pair.caption, pair.words) == ("a cat", "compressed")
    picture = torch.from_numpy(levels(40, 48).astype(np.float32)) / 255
    windows = [picture[top:top + 32, left:left + 32] for top in range(9) for left in range(17)]
    assert any(torch.equal(pair.clean, window) or torch.equal(pair.clean, window.flip(1)) for window in windows)
    assert torch.equal(pair.degraded, JPEG.apply(pair.clean[None], 0)[0][0])


@pytest.mark.parametrize("recipe", [NOISE, LONG], ids=["noise", "long"])
def test_the_generator_decides_everything(twelve, recipe):
    pairs = folder_pairs(twelve, [recipe, JPEG])
    state = torch.get_rng_state()
    first = [pairs.pair(index, generator(index)) for index in range(6)]
    backwards = [pairs.pair(index, generator(index)) for index in reversed(range(6))][::-1]
    afresh = folder_pairs(twelve, [recipe, JPEG])
    assert all(same(one, other) for one, other in zip(first, backwards, strict=True))
    assert all(same(one, afresh.pair(index, generator(index))) for index, one in enumerate(first))
    assert not same(pairs.pair(0, generator(1)), pairs.pair(0, generator(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_and_copies_give_the_same(twelve):
    pairs = folder_pairs(twelve, [LONG])
    alone = [pairs.pair(index, generator(index)) for index in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda index: pairs.pair(index, generator(index)), range(12)))
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert same(alone[0], pickle.loads(pickle.dumps(pairs)).pair(0, generator()))


def test_the_generator_is_left_in_one_state(tmp_path):
    fill(tmp_path / "a", 3, 40, 40)
    fill(tmp_path / "b", 3, 90, 70)
    states = []
    for pairs in (folder_pairs(tmp_path / "a"), folder_pairs(tmp_path / "b", [LONG, JPEG], flip=False)):
        own = generator()
        pairs.pair(1, own)
        states.append(own.get_state())
    assert torch.equal(*states)


def test_indices_go_around(twelve):
    pairs = folder_pairs(twelve)
    assert len(pairs) == 11
    assert same(pairs.pair(2, generator()), pairs.pair(13, generator())) and same(pairs.pair(10, generator()), pairs.pair(-1, generator()))


def test_damage_is_drawn_anew_each_time():
    pairs = connected(2, 32, 32, flip=False)
    found = [*(pairs.pair(0, generator(seed)) for seed in range(3)), pairs.validation(0), pairs.validation(1)]
    noises = [pair.degraded - pair.clean for pair in found]
    assert not any(torch.equal(one, other) for place, one in enumerate(noises) for other in noises[:place])


def test_crops_reach_every_place_and_every_edge():
    pairs = connected(height=40, width=37, flip=False)
    corners = Counter()
    for seed in range(900):
        clean = (pairs.pair(0, generator(seed)).clean * 255).round().int()
        corners[tuple(clean[0, 0, :2].tolist())] += 1
    assert set(corners) == {(top, left) for top in range(9) for left in range(6)}
    # 900 crops over 54 places are 16.7 each; the deviation is 4.
    assert max(corners.values()) < 16.7 + 5 * 4


def test_a_picture_of_the_size_of_the_crop_is_used_whole():
    pairs = connected(height=32, width=32, flip=False)
    assert torch.equal(pairs.pair(0, generator()).clean, connected(height=32, width=32).validation(0).clean)


def test_half_are_mirrored_and_both_pictures_alike():
    flipped = 0
    pictures = torch.rand(1, 40, 48, 3, generator=generator())
    pairs = Pairs(sources.connected_pictures([pictures], degraded=[pictures * 0.5]), (), 32)
    for seed in range(200):
        pair = pairs.pair(0, generator(seed))
        assert torch.equal(pair.degraded, pair.clean * 0.5)
        ordered = connected().pair(0, generator(seed)).clean[0, :, 1]
        flipped += bool(ordered[0] > ordered[-1])
    # 200 coins have a deviation of 7.
    assert abs(flipped - 100) < 4 * 7
    fixed = connected(flip=False)
    assert all(fixed.pair(0, generator(seed)).clean[0, 0, 1] < fixed.pair(0, generator(seed)).clean[0, -1, 1] for seed in range(20))


def test_flipping_changes_nothing_else():
    for seed in range(8):
        one, other = (connected(recipes=[JPEG, NOISE], flip=flip).pair(0, generator(seed)) for flip in (True, False))
        assert torch.equal(one.clean, other.clean) or torch.equal(one.clean, other.clean.flip(1))
        assert one.words == other.words


def test_recipes_are_drawn_in_equal_shares():
    grey = Recipe.from_json([{"kind": "grey"}])
    pairs = connected(recipes=[NOISE, grey, Recipe()])
    words = Counter(pairs.pair(0, generator(seed)).words for seed in range(600))
    # 600 draws of a third have a deviation of 11.5.
    assert set(words) == {"noisy", "black and white", ""} and all(abs(count - 200) < 4 * 11.5 for count in words.values())


def test_pairs_of_two_folders_stay_together(tmp_path):
    good, bad = fill(tmp_path / "good", 3), tmp_path / "bad"
    bad.mkdir()
    for index in range(3):
        (bad / f"{index:02d}.png").write_bytes(encoded(255 - levels(40, 48, seed=index)))
    pairs = Pairs(sources.paired_folders(good, bad), (), 32)
    for seed in range(6):
        pair = pairs.pair(seed, generator(seed))
        assert torch.equal((pair.clean * 255).round() + (pair.degraded * 255).round(), torch.full((32, 32, 3), 255.0)) and pair.words == ""


def test_shards_may_mix_what_has_a_partner_and_what_has_none(tmp_path):
    write_shard(tmp_path / "a.tar", [
        ("0.png", encoded(levels(40, 40))), ("0.lq.png", encoded(levels(40, 40, seed=1))), ("1.png", encoded(levels(40, 40, seed=2))),
    ])  # fmt: skip
    pairs = Pairs(sources.shards(tmp_path / "a.tar"), [NOISE], 32)
    assert pairs.pair(0, generator()).words == "" and pairs.pair(1, generator()).words == "noisy"
    assert same(pairs.pair(1, generator()), pickle.loads(pickle.dumps(pairs)).pair(1, generator()))


def test_16_bits_stay(tmp_path):
    pixels = levels(32, 32, kind=np.uint16)
    (tmp_path / "deep.png").write_bytes(encoded(pixels))
    clean = folder_pairs(tmp_path, [Recipe()], flip=False).pair(0, generator()).clean
    assert torch.equal((clean.double() * 65535).round(), torch.from_numpy(pixels.astype(np.float64)))


def test_validation_is_always_the_same_and_centred():
    pairs = connected(count=3, height=40, width=48, recipes=[NOISE, JPEG])
    found = [pairs.validation(index) for index in range(4)]
    assert all(same(one, pairs.validation(index)) for index, one in enumerate(found))
    assert (found[0].clean[0, 0, :2] * 255).tolist() == [4, 8]
    assert [pair.words for pair in found] == ["noisy", "compressed", "noisy", "compressed"]


def test_held_out_pictures_are_not_trained_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fill(tmp_path, 40, 32, 32)
    pairs = folder_pairs(tmp_path, [Recipe()], flip=False)
    trained = {sample.name for sample in pairs.training}
    held_out = {sample.name for sample in pairs.held_out}
    assert (len(trained), len(held_out), pairs.validation_count) == (36, 4, 4) and not trained & held_out and "held out" not in caplog.text
    seen = [pairs.validation(index).clean for index in range(4)]
    assert not any(torch.equal(pairs.pair(index, generator()).clean, clean) for index in range(36) for clean in seen)
    assert [sample.name for sample in pairs.held_out] == [sample.name for sample in folder_pairs(tmp_path).held_out]
    assert len(folder_pairs(tmp_path, held_out=2).held_out) == 2
    # A hash picks them: neither the first nor the last by name.
    names = sorted(trained | held_out)
    assert held_out != set(names[-4:]) and held_out != set(names[:4])


@pytest.mark.parametrize(("count", "held_out", "left"), [(9, 8, 0), (10, 8, 1), (30, 0, 0), (1, 8, 0), (95, 8, 8)])
def test_how_many_are_held_out(caplog, count, held_out, left):
    caplog.set_level(logging.INFO)
    pairs = connected(count, 32, 32, held_out=held_out)
    assert (len(pairs), pairs.validation_count) == (count - left, left or count)
    assert ("validation uses training pictures" in caplog.text) == (left == 0)


def test_unreadable_pictures_give_way_to_the_next(tmp_path, caplog):
    fill(tmp_path, 4)
    whole = (tmp_path / "01.png").read_bytes()
    for name in ("01.png", "02.png"):
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
    pairs = folder_pairs(tmp_path)
    assert len(pairs) == 4
    first = [pairs.pair(index, generator(5)) for index in (1, 2, 3, 1)]
    assert all(same(pair, first[2]) for pair in first)
    lines = [record.message for record in caplog.records if "takes its place" in record.message]
    assert len(lines) == 2 and "01.png" in lines[0] and "truncated" in lines[0] and "02.png" in lines[1]
    assert same(folder_pairs(tmp_path).pair(2, generator(5)), first[2])


def test_the_last_gives_way_to_the_first(tmp_path):
    fill(tmp_path, 3)
    pairs = folder_pairs(tmp_path)
    (tmp_path / "02.png").unlink()
    assert same(pairs.pair(2, generator()), pairs.pair(0, generator()))


def test_nothing_readable_stops(tmp_path):
    fill(tmp_path, 3)
    pairs = folder_pairs(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    for call in (lambda: pairs.pair(0, generator()), lambda: pairs.validation(0)):
        with pytest.raises(ValueError, match="Paired Data: none of the 3 pictures in folder .* can be read any more"):
            call()


def test_a_picture_that_shrank_gives_way(tmp_path, caplog):
    fill(tmp_path, 2)
    pairs = folder_pairs(tmp_path)
    fill(tmp_path, 1, 20, 48)
    assert same(pairs.pair(0, generator()), pairs.pair(1, generator()))
    assert "it is 48 x 20 pixels now" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipes": ()}, "degradations is not connected, and images has good pictures without degraded ones. Connect the"),
        ({"crop": 40}, "crop is 40; it has to be a multiple of 16"),
        ({"crop": 0}, "crop is 0; it has to be a multiple of 16"),
        ({"held_out": -1}, "held_out is -1"),
        ({"crop": 64}, "1 left out that are smaller than the crop of 64 pixels: picture 1 .40 x 48 pixels."),
    ],
)
def test_unusable_settings(settings, message):
    with pytest.raises(ValueError, match=f"Paired Data: .*{message}"):
        connected(**settings)


def test_recipes_that_nothing_needs_are_mentioned(caplog):
    pictures = torch.rand(1, 32, 32, 3)
    Pairs(sources.connected_pictures([pictures], degraded=[pictures]), [NOISE], 32)
    assert "degradations are not used" in caplog.text


def test_fingerprint_tells_data_and_settings_apart(tmp_path):
    folder = fill(tmp_path / "a", 12)

    def fingerprint(recipes=(NOISE,), **settings):
        return folder_pairs(folder, recipes, **settings).fingerprint()

    first = fingerprint()
    assert first == fingerprint() and first == folder_pairs(fill(tmp_path / "b", 12)).fingerprint()
    others = [fingerprint(crop=16), fingerprint(flip=False), fingerprint(held_out=0), fingerprint([JPEG]), fingerprint([NOISE, JPEG])]
    (folder / "03.txt").write_text("a")
    others.append(fingerprint())
    (folder / "03.txt").unlink()
    (folder / "03.png").write_bytes(encoded(levels(41, 48)))
    others.append(fingerprint())
    (folder / "03.png").unlink()
    others.append(fingerprint())
    assert len({first, *others}) == 1 + len(others)


def test_fingerprint_of_connected_pictures():
    pictures = [torch.zeros(1, 32, 32, 3), torch.ones(1, 32, 32, 3)]
    first, again, other = (Pairs(sources.connected_pictures(given), [NOISE], 32) for given in (pictures, pictures, pictures[::-1]))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_pictures_are_read_when_asked_for(tmp_path):
    fill(tmp_path, 6, 512, 512)
    whole = 6 * 512 * 512 * 3
    tracemalloc.start()
    try:
        pairs = folder_pairs(tmp_path)
        made = tracemalloc.get_traced_memory()[1]
        for index in range(6):
            pairs.pair(index, generator())
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert made < whole / 4 and kept < whole / 4 and len(pickle.dumps(pairs)) < whole / 100


def test_pairs_made_inside_a_node_can_be_trained_with():
    with torch.inference_mode():
        pairs = Pairs(sources.connected_pictures([torch.rand(1, 40, 40, 3)]), [LONG], 32)
        pair = pairs.pair(0, generator())
        batch = collate([pair, pair])
    for tensor in (pair.clean, pair.degraded, batch.clean, batch.degraded):
        assert not tensor.is_inference() and not tensor.requires_grad and tensor.is_contiguous()
    outside = pairs.pair(0, generator())
    assert same(pair, outside) and not outside.clean.is_inference()


def test_half_precision_pictures_are_taken():
    pictures = torch.rand(1, 32, 32, 3).half()
    pairs = Pairs(sources.connected_pictures([pictures]), [NOISE], 32, flip=False)
    assert torch.equal(pairs.pair(0, generator()).clean, pictures[0].float())


def test_collate_keeps_the_order():
    pairs = [Pair(torch.full((4, 4, 3), float(index)), torch.zeros(4, 4, 3), f"caption {index}", f"words {index}") for index in range(3)]
    batch = collate(pairs)
    assert isinstance(batch, Batch) and batch.clean.shape == batch.degraded.shape == (3, 4, 4, 3)
    assert batch.clean[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.captions == ("caption 0", "caption 1", "caption 2") and batch.words == ("words 0", "words 1", "words 2")


def test_preview_shows_pairs_side_by_side(twelve):
    shown = preview(folder_pairs(twelve))
    assert shown.shape == (4, 32, 64, 3) and not torch.equal(shown[0], shown[1])
    assert preview(connected(2)).shape == (2, 32, 64, 3)


def test_summary_counts(tmp_path):
    fill(tmp_path, 12)
    fill(tmp_path, 1, 8, 8, first=12)
    (tmp_path / "03.txt").write_text("a")
    assert folder_pairs(tmp_path, [NOISE, JPEG]).summary().splitlines() == [
        "11 pictures to train on, 1 held out for validation",
        "1 with a caption",
        "1 left out that are smaller than the crop of 32 pixels: 12.png (8 x 8 pixels)",
        "2 recipes of degradations",
    ]
