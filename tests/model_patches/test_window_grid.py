"""Statistics by windows: right in each window, the same in tiles, and smooth in between."""

import pytest
import torch

from mend.model_patches.window_grid import Windows

HEADS = 2


def maps(height, width, channels=8, seed=0):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))


def by_hand(q, k, temperature=1.0):
    """Transposed attention over everything."""
    q, k = (x.reshape(2, HEADS, -1, x.shape[2] * x.shape[3]) for x in (q, k))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    return (torch.einsum("bhcn,bhdn->bhcd", q, k) * temperature).softmax(-1)


ones = torch.ones(HEADS, 1, 1)


@pytest.mark.parametrize("side", [0, 8])
def test_one_window_is_the_whole_picture(side):
    windows = Windows(side, (8, 8))
    q, k, v = (maps(8, 8, seed=seed) for seed in range(3))
    matrices = windows.attention(q, k, HEADS, 2 * ones)
    torch.testing.assert_close(matrices[:, 0, 0], by_hand(q, k, 2.0))
    torch.testing.assert_close(windows.mix(matrices, v), (by_hand(q, k, 2.0) @ v.reshape(2, HEADS, 4, 64)).reshape(v.shape))
    torch.testing.assert_close(windows.mean(v)[..., 0, 0], v.mean((2, 3)))
    assert windows.spread(windows.mean(v)).shape == (2, 8, 1, 1)


def test_each_window_has_its_own():
    windows = Windows(4, (12, 8))
    q, k = maps(12, 8), maps(12, 8, seed=1)
    matrices, means = windows.attention(q, k, HEADS, ones), windows.mean(q)
    for row in range(3):
        for column in range(2):
            place = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            torch.testing.assert_close(matrices[:, row, column], by_hand(q[place], k[place]))
            torch.testing.assert_close(means[..., row, column], q[place].mean((2, 3)))


@pytest.mark.parametrize(("width", "last"), [(9, slice(4, 9)), (10, slice(8, 10)), (11, slice(8, 11))], ids=str)
def test_slivers_share_with_the_window_before(width, last):
    windows = Windows(4, (4, width))
    q, k = maps(4, width), maps(4, width, seed=1)
    torch.testing.assert_close(windows.attention(q, k, HEADS, ones)[:, 0, -1], by_hand(q[..., last], k[..., last]))
    torch.testing.assert_close(windows.mean(q)[..., 0, -1], q[..., last].mean((2, 3)))
    assert (windows.mean(q)[..., -2] == windows.mean(q)[..., -1]).all() == (width == 9)
    upright, (q, k) = Windows(4, (width, 4)), (x.transpose(2, 3) for x in (q, k))
    torch.testing.assert_close(upright.attention(q, k, HEADS, ones)[:, -1, 0], by_hand(q[..., last, :], k[..., last, :]))


def test_a_tile_that_begins_with_a_window_sees_the_same():
    q, k = maps(16, 24), maps(16, 24, seed=1)
    whole, tile = Windows(4, (16, 24)), Windows(4, (12, 16))
    place = (..., slice(4, 16), slice(8, 24))
    torch.testing.assert_close(tile.attention(q[place], k[place], HEADS, ones), whole.attention(q, k, HEADS, ones)[:, 1:, 2:])
    torch.testing.assert_close(tile.mean(q[place]), whole.mean(q)[..., 1:, 2:])


def test_equal_windows_leave_no_trace():
    windows, v = Windows(4, (13, 10)), maps(13, 10)
    matrix = torch.randn(2, 1, 1, HEADS, 4, 4, generator=torch.Generator().manual_seed(3))
    mixed = windows.mix(matrix.expand(-1, windows.rows, windows.columns, -1, -1, -1), v)
    torch.testing.assert_close(mixed, (matrix[:, 0, 0] @ v.reshape(2, HEADS, 4, -1)).reshape(v.shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(windows.spread(torch.ones(2, 3, windows.rows, windows.columns)), torch.ones(2, 3, 13, 10))


def test_windows_fade_into_each_other():
    windows = Windows(8, (24, 32))
    means = torch.zeros(1, 1, 3, 4)
    means[..., 1, 1] = 1
    spread = windows.spread(means)[0, 0]
    # From the middle of one window to the next: an eighth for each cell.
    assert spread.diff(dim=0).abs().max() <= 1 / 8 + 1e-6 and spread.diff(dim=1).abs().max() <= 1 / 8 + 1e-6
    matrices = means.movedim(1, -1)[..., None, None] * torch.eye(2)
    mixed = windows.mix(matrices, torch.ones(1, 2, 24, 32))
    torch.testing.assert_close(mixed[0, 0], spread)


def test_half_precision_does_not_overflow():
    q = 100 * maps(64, 64, 4).half().float()
    found = Windows(0, (64, 64)).attention(q.to(torch.float16), q.to(torch.float16), HEADS, ones.half())
    assert found.isfinite().all()


def test_large_windows_in_half_precision():
    # 256 x 256 places are more than half precision can count.
    x = 4 * torch.ones(1, 1, 256, 300, dtype=torch.float16)
    assert torch.equal(Windows(256, (256, 300)).mean(x), 4 * torch.ones(1, 1, 1, 2, dtype=torch.float16))
