"""Words are read off pictures by rules, and texts become ids of the words there are."""

import numpy as np
import pytest

from mend.lab.vocabulary import COLOURS, LENGTH, PAD, WORDS, describe, token_ids

SIDE = 64
BLACK, GREY, WHITE, RED, GREEN, BLUE = (0, 0, 0), (0.5, 0.5, 0.5), (1, 1, 1), (0.9, 0.1, 0.1), (0.1, 0.7, 0.1), (0.1, 0.2, 0.9)


def plain(colour, side=SIDE):
    return np.broadcast_to(np.float32(colour), (side, side, 3)).copy()


def with_box(rows, columns, colour=WHITE, ground=BLACK):
    image = plain(ground)
    image[slice(*rows), slice(*columns)] = colour
    return image


def waves(across, down):
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = 0.5 + 0.4 * np.sin(2 * np.pi * (across * x + down * y) / SIDE)
    return np.repeat(wave[..., None], 3, 2).astype(np.float32)


@pytest.mark.parametrize(("colour", "words"), [
    (BLACK, {"dark", "black", "colourless", "neutral"}), (GREY, {"grey", "colourless"}), (WHITE, {"glowing", "white"}),
    (RED, {"red", "vivid", "warm"}), (GREEN, {"green", "vivid"}), (BLUE, {"blue", "cool", "vivid", "top-blue"}),
    ((1.0, 0.5, 0.0), {"orange", "warm"}), ((0.5, 0.3, 0.1), {"brown"}), ((0.9, 0.9, 0.1), {"yellow"}),
    ((0.1, 0.9, 0.9), {"cyan", "cool"}), ((0.6, 0.1, 0.9), {"purple"}), ((0.9, 0.2, 0.6), {"pink"}),
])  # fmt: skip
def test_plain_colours(colour, words):
    found = describe(plain(colour))
    assert words <= set(found)
    assert {"flat", "smooth", "empty", "lit-evenly"} <= set(found)
    assert sum(word in COLOURS for word in found) == 1


@pytest.mark.parametrize(("value", "word"), [(0.1, "dark"), (0.2, "dim"), (0.4, "balanced"), (0.6, "bright"), (0.9, "glowing")])
def test_brightness(value, word):
    found = describe(plain((value,) * 3))
    assert found[0] == word and not set(found) & (set(WORDS[:5]) - {word})


@pytest.mark.parametrize(("bright", "word"), [
    (np.s_[:, :32], "lit-left"), (np.s_[:, 32:], "lit-right"), (np.s_[:32], "lit-top"), (np.s_[32:], "lit-bottom"), (np.s_[16:48, 16:48], "lit-centre"),
])  # fmt: skip
def test_light_comes_from_where_it_is_brighter(bright, word):
    image = plain((0.3, 0.3, 0.3))
    image[bright] = 0.8
    assert word in describe(image)


@pytest.mark.parametrize(("across", "down", "word"), [(4, 0, "vertical"), (0, 4, "horizontal"), (3, 3, "diagonal"), (3, -3, "diagonal")])
def test_directions(across, down, word):
    found = describe(waves(across, down))
    assert word in found and not set(found) & ({"horizontal", "vertical", "diagonal", "woven"} - {word})


@pytest.mark.parametrize(("rows", "columns", "words"), [
    ((24, 40), (24, 40), {"small-subject", "subject-centre", "square", "symmetric"}), ((24, 40), (4, 20), {"small-subject", "subject-left"}),
    ((24, 40), (44, 60), {"subject-right"}), ((8, 56), (26, 38), {"tall"}), ((26, 38), (8, 56), {"wide"}), ((8, 56), (8, 56), {"large-subject", "square"}),
])  # fmt: skip
def test_subjects(rows, columns, words):
    assert words <= set(describe(with_box(rows, columns)))


def test_a_disc_is_a_subject_in_the_centre():
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    disc = np.repeat((np.hypot(x, y) < 20).astype(np.float32)[..., None], 3, 2)
    assert {"large-subject", "subject-centre", "symmetric"} <= set(describe(disc))


def test_layout_of_sky_and_grass():
    image = plain((0.5, 0.5, 0.5))
    image[:24], image[40:] = (0.6, 0.7, 1.0), (0.1, 0.3, 0.05)
    assert {"top-light", "top-blue", "bottom-dark", "bottom-green"} <= set(describe(image))


def test_noise_is_busy_and_soft_pictures_are_not():
    noise = np.random.default_rng(0).random((SIDE, SIDE, 3), np.float32)
    assert {"busy", "sharp"} <= set(describe(noise)) and "blurred" in describe(waves(1, 0)) and "busy" not in describe(waves(1, 0))


def test_every_picture_is_described_by_words_of_the_lab():
    rng = np.random.default_rng(1)
    for _ in range(20):
        image = (rng.random((4, 4, 3), np.float32) ** rng.uniform(0.3, 3)).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        found = describe(image)
        assert set(found) <= set(WORDS) and len(found) == len(set(found))


def test_words_are_all_different():
    assert len(set(WORDS)) == len(WORDS) == PAD


def test_token_ids_skip_what_is_not_a_word():
    ids = token_ids("A photo of a RED, round thing. (warm) bright")
    assert [WORDS[index] for index in ids if index != PAD] == ["red", "round", "bright"]
    assert len(ids) == LENGTH and ids[3:] == [PAD] * (LENGTH - 3)


@pytest.mark.parametrize("text", ["", " , . ", "nothing known here"])
def test_texts_without_words_are_padding(text):
    assert token_ids(text) == [PAD] * LENGTH


def test_long_texts_are_cut():
    assert token_ids(" ".join(WORDS)) == list(range(LENGTH))
