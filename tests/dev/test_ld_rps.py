"""What the zero-shot measurement says in words about its own figures."""

import pytest

from mend.dev.bench import ld_rps


def said(ours, start, degraded=15.0):
    """The verdict on one prior's figures in dB."""
    figures = {ld_rps.DEGRADED: degraded, ld_rps.CEILING: 25.0, ld_rps.START: start}
    plain = [{"method": method, "prior": "none", "psnr": psnr} for method, psnr in figures.items()]
    return ld_rps.verdict([*plain, {"method": "ours", "prior": "unet", "psnr": ours}])


@pytest.mark.parametrize("ours, start, remark", [
    (20.0, 22.0, ld_rps.LOSS),
    (14.0, 14.5, ld_rps.NO_GAIN),
    (14.0, 16.0, ld_rps.NO_GAIN),
    (22.0, 20.0, None),
])  # fmt: skip
def test_a_gain_is_only_spoken_of_where_there_is_one(ours, start, remark):
    text = said(ours, start)
    assert {other for other in (ld_rps.LOSS, ld_rps.NO_GAIN) if other in text} == ({remark} if remark else set())
