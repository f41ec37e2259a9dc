"""The measurement of windows of frames: a video by windows has no joins, and is as steady as its frames one by one."""

import torch

from mend.dev.bench.panning import FRAMES, LENGTH, SHARED, joins, moving_noise, video_rows


def test_where_windows_meet():
    assert (FRAMES, LENGTH, SHARED) == (33, 17, 8)
    # From 0, 9 and 16, each 17 long.
    assert joins() == [9, 16, 17, 26]


def test_the_noise_moves_with_the_camera():
    noise = moving_noise(16)
    assert noise.shape == (1, 16, FRAMES, 8, 8) and torch.equal(noise[:, :, 1:, :, :-1], noise[:, :, :-1, :, 1:])


def test_windows_leave_no_joins():
    rows = {row["way"]: row for row in video_rows()}
    assert [row["model_calls"] for row in rows.values()] == [8, 24, 16, 8 * FRAMES] and all(row["frames"] == FRAMES for row in rows.values())
    windows, hard, single = rows["windows"], rows["windows without overlap"], rows["frame by frame"]
    # Both are differences of one clip: a tenth is more than they vary from place to place.
    assert windows["jump_at_joins"] < 1.1 * windows["jump_elsewhere"] and hard["jump_at_joins"] > 1.5 * hard["jump_elsewhere"]
    assert windows["psnr"] >= single["psnr"] - 0.01 and windows["jump_elsewhere"] < single["jump_elsewhere"]
