"""Windows of tokens: together they are the whole, and nothing shows where they meet."""

import pytest
import torch

from mend.model_patches.daff import DAFF, WINDOW, Layout, initialise
from mend.model_patches.host import trained_operations
from mend.model_patches.token_windows import in_windows


def maps(height, width, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, height, width, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (30, 5), (5, 40), (33, 17), (16, 16)], ids=str)
def test_what_is_done_place_by_place_is_done_whole(size):
    a, b = maps(*size)
    torch.testing.assert_close(in_windows(lambda a, b: a * b + a, a, b, 8), a * b + a)


def test_half_precision_keeps_its_corners():
    a, b = (each.half() for each in maps(50, 70))
    mixed = in_windows(lambda a, b: a + b, a, b, 48)
    assert mixed.dtype == torch.float16
    # One rounding at the end: half of the last bit of numbers below 8.
    torch.testing.assert_close(mixed, a + b, atol=2**-9, rtol=2**-11)


def test_few_tokens_are_one_window():
    seen = []
    in_windows(lambda a, b: (seen.append(a.shape), a)[1], *maps(4, 16), 8)
    assert seen == [(2, 3, 4, 16)]


def test_windows_are_of_one_size_and_overlap_by_half():
    seen, (a, _) = [], maps(20, 11)
    places = torch.arange(220.0).reshape(1, 1, 20, 11).expand(2, -1, -1, -1)
    in_windows(lambda a, b: (seen.append(b[0, 0]), a)[1], a, places, 8)
    assert {tuple(window.shape) for window in seen} == {(8, 8)}
    rows, columns = (sorted({int(window[0, 0]) // 11 for window in seen}), sorted({int(window[0, 0]) % 11 for window in seen}))
    assert rows == [0, 4, 8, 12] and columns == [0, 3]


def daff():
    network = DAFF(Layout(channels=8, features=8, embedding=8, width=64, patch=1, tokens=False), trained_operations)
    initialise(network, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (network.zero, network.embedding.out):
            layer.weight.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    return network


@torch.no_grad()
def test_an_even_picture_is_the_same_in_windows(monkeypatch):
    network, time = daff(), torch.tensor([500.0])
    x, e = torch.full((1, 8, 24, 20), 0.3), torch.full((1, 8, 24, 20), -0.2)
    whole = network(x, e, time, {})
    monkeypatch.setattr("mend.model_patches.daff.WINDOW", 8)
    torch.testing.assert_close(network(x, e, time, {}), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_seam_shows(monkeypatch):
    network, time = daff(), torch.tensor([500.0])
    across = torch.sin(torch.arange(48) / 8 + torch.arange(8.0)[:, None, None]).expand(1, 8, 48, 48).contiguous()
    whole = network(across, across.transpose(2, 3), time, {})
    monkeypatch.setattr("mend.model_patches.daff.WINDOW", 16)
    tiled = network(across, across.transpose(2, 3), time, {})
    assert not torch.equal(tiled, whole), "windows see less"
    steps = (tiled[..., 1:] - tiled[..., :-1]).abs().amax((0, 1, 2))
    # Windows begin at multiples of 8; a seam would be a step there that is larger than those around it.
    seams, elsewhere = steps[7::8], torch.cat([steps[i::8] for i in range(7)])
    assert seams.max() <= 1.2 * elsewhere.max()


def test_windows_of_pictures_are_large():
    # 512 pixels at a token for every latent cell, as published.
    assert WINDOW * 8 == 512


@torch.no_grad()
def test_a_fresh_one_hears_the_degraded_picture_as_loud_as_the_latent():
    network = DAFF(Layout(32, 64, 32, 128, 2, False), trained_operations)
    initialise(network, torch.Generator().manual_seed(0))
    loud = {}
    for name in ("latent_in", "lq_in"):
        getattr(network, name).register_forward_hook(lambda _, inputs, output, name=name: loud.update({name: output.std().item()}))
    draw = torch.Generator().manual_seed(1)
    x, features = (torch.randn(1, channels, 16, 16, generator=draw) for channels in (32, 64))
    change = network(x, network.embed(features), torch.tensor([500.0]), {})
    # What leaves is still nothing; inside, neither is twice as loud as the other.
    assert not change.any() and 0.5 < loud["lq_in"] / loud["latent_in"] < 2


def test_videos_are_fused_a_few_frames_at_once(monkeypatch):
    layout = Layout(channels=8, features=8, embedding=8, width=64, patch=2, tokens=True)
    network = DAFF(layout, trained_operations)
    initialise(network, torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.zero.weight.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    generator, frames = torch.Generator().manual_seed(2), 7
    x, e = (torch.randn(shape, generator=generator) for shape in ((2, frames * 16, 8), (2, 8, frames, 8, 8)))
    time, seen, fuse = torch.tensor([10.0, 900.0]), [], network._fuse
    monkeypatch.setattr(network, "_fuse", lambda latent, *args: (seen.append(len(latent) * latent.shape[-2] * latent.shape[-1]), fuse(latent, *args))[1])
    whole = network(x, e, time, {})
    assert seen == [2 * frames * 16]
    monkeypatch.setattr("mend.model_patches.daff.AT_ONCE", 3 * 16)
    with torch.no_grad():
        parts = network(x, e, time, {})
    assert len(seen) == 6 and max(seen[1:]) == 3 * 16
    # Matrix products of other sizes add in another order.
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
