"""What benchmarks remember: pairs, and what a function makes of pictures."""

import pytest
import torch
from PIL import Image

from mend.degradations.recipe import Recipe, Step
from mend.dev.bench.remembered import FewPairs, Remembered, SamePairs
from mend.training.pairs import Pairs
from mend.training.sources import good_folder


@pytest.fixture
def source(tmp_path):
    for index in range(3):
        pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index}.png")
    return good_folder(tmp_path)


def made(kind, source, charts=0):
    pairs = kind(source, [Recipe((Step.of("gaussian noise", {"sigma": 25}),))], crop=32, held_out=0)
    return pairs.with_charts(charts) if charts else pairs


@pytest.mark.parametrize(("kind", "variants"), [(SamePairs, 1), (FewPairs, 3)])
def test_a_picture_has_so_many_variants_and_each_is_made_once(source, kind, variants):
    pairs = made(kind, source)
    found = [pairs.pair(1, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert len({id(pair) for pair in found}) == len({float(pair.degraded.sum()) for pair in found}) == variants
    again = made(kind, source)
    assert all(torch.equal(pair.degraded, again.pair(4, torch.Generator().manual_seed(seed)).degraded) for seed, pair in enumerate(found))


def test_pairs_with_charts_are_not_those_without(source):
    plain = made(FewPairs, source)
    plain.pair(0, torch.Generator().manual_seed(0))
    charted = plain.with_charts(32).pair(0, torch.Generator().manual_seed(0))
    assert charted.chart is not None and plain.pair(0, torch.Generator().manual_seed(0)).chart is None


def test_runs_on_pairs_of_different_kinds_are_told_apart(source):
    assert len({made(kind, source).fingerprint() for kind in (Pairs, SamePairs, FewPairs)}) == 3


def test_a_function_is_asked_once_for_each_picture_and_the_file_knows_it(tmp_path):
    asked, file = [], tmp_path / "kept.safetensors"

    def double(pictures):
        asked.append(len(pictures))
        return 2 * pictures

    pictures = torch.rand(3, 4, 4, 3)
    remembered = Remembered(double, file)
    assert torch.equal(remembered(pictures[:2]), 2 * pictures[:2]) and torch.equal(remembered(pictures), 2 * pictures)
    assert asked == [2, 1]
    remembered.save()
    assert torch.equal(Remembered(double, file)(pictures), 2 * pictures) and asked == [2, 1]
