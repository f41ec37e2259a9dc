"""What the zero-shot measurement says in words about its own figures."""

from types import SimpleNamespace

import pytest

from mend.dev.bench import ld_rps, report


def said(ours, start, degraded=15.0):
    """The verdict on one prior's figures in dB."""
    figures = {ld_rps.DEGRADED: degraded, ld_rps.CEILING: 25.0, ld_rps.START: start}
    plain = [{"method": method, "prior": "none", "psnr": psnr} for method, psnr in figures.items()]
    return ld_rps.verdict([*plain, {"method": "ours", "prior": "unet", "psnr": ours}])


def options(**changes):
    given = {"quick": False, "prior": list(ld_rps.PRIORS), "seeds": 3, "degradation": None, "ablations": list(ld_rps.RECIPES), "reference": "estimate"}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize("changes, whole", [
    ({}, True), ({"degradation": ["haze"]}, True), ({"degradation": ["haze"], "ablations": ["haze"], "reference": "full"}, True),
    ({"quick": True}, False), ({"prior": ["unet"]}, False), ({"prior": ["dit", "unet"]}, False), ({"seeds": 1}, False),
    ({"ablations": []}, False), ({"degradation": ["haze"], "ablations": ["noise"]}, False), ({"reference": "none"}, False),
], ids=str)  # fmt: skip
def test_only_a_run_that_has_it_all_writes_a_section(changes, whole):
    assert ld_rps.is_whole(options(**changes)) == whole


def row(method, n, psnr=20.0, prior="unet", degradation="haze"):
    return {"method": method, "degradation": degradation, "prior": prior, "n": n, "psnr": psnr, "seconds": 2.0}


def test_sections_of_other_damage_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EVIDENCE", tmp_path / "docs" / "evidence.md")
    for kind, psnr in (("noise", 21.0), ("haze", 22.0), ("haze", 23.0)):
        plain = [row(method, 4, 15.0, "none", kind) for method in (ld_rps.DEGRADED, ld_rps.CEILING, ld_rps.START)]
        reference = [row(ld_rps.PUBLISHED, 1, 19.0, degradation=kind), row("ours", 1, psnr, degradation=kind)]
        ld_rps.write_evidence([*plain, row("ours", 4, psnr, degradation=kind), *reference], 1)
    text = report.EVIDENCE.read_text()
    assert text.count("## Zero-shot restoration") == 1 and text.count("### Zero-shot, noise") == text.count("### Zero-shot, haze") == 1
    assert "+6.00 dB against degraded" in text and "+8.00 dB against degraded" in text and "+7.00 dB against degraded" not in text
    assert "ours ends +4.00 dB from it, in about 1/1 of its time" in text


@pytest.mark.parametrize("ours, start, remark", [
    (20.0, 22.0, ld_rps.LOSS),
    (14.0, 14.5, ld_rps.NO_GAIN),
    (14.0, 16.0, ld_rps.NO_GAIN),
    (22.0, 20.0, None),
])  # fmt: skip
def test_a_gain_is_only_spoken_of_where_there_is_one(ours, start, remark):
    text = said(ours, start)
    assert {other for other in (ld_rps.LOSS, ld_rps.NO_GAIN) if other in text} == ({remark} if remark else set())
