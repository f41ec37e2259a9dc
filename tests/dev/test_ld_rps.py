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
    given = {"quick": False, "prior": list(ld_rps.PRIORS), "seeds": 3}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize("part, changes, whole", [
    ("table", {}, True), ("table", {"quick": True}, False), ("table", {"prior": ["unet"]}, False), ("table", {"prior": ["dit", "unet"]}, False),
    ("table", {"seeds": 1}, False), ("ablations", {"prior": ["unet"]}, True), ("published", {"prior": ["unet"], "seeds": 1}, True),
    ("ablations", {"quick": True}, False), ("published", {"prior": ["dit", "unet"]}, False),
], ids=str)  # fmt: skip
def test_only_a_run_that_has_it_all_writes_a_section(part, changes, whole):
    assert ld_rps.is_whole(part, options(**changes)) == whole


def row(method, n, psnr=20.0, prior="unet", degradation="haze"):
    return {"method": method, "degradation": degradation, "prior": prior, "n": n, "psnr": psnr, "seconds": 2.0}


def test_sections_of_other_damage_and_of_other_parts_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EVIDENCE", tmp_path / "docs" / "evidence.md")
    for kind, psnr in (("noise", 21.0), ("haze", 22.0), ("haze", 23.0)):
        plain = [row(method, 4, 15.0, "none", kind) for method in (ld_rps.DEGRADED, ld_rps.CEILING, ld_rps.START)]
        reference = [row(ld_rps.PUBLISHED, 1, 19.0, degradation=kind), row("ours", 1, psnr, degradation=kind)]
        ld_rps.write_evidence({(kind, "table"): [*plain, *plain, row("ours", 4, psnr, degradation=kind)]}, 1)
        if psnr < 23:
            ld_rps.write_evidence({(kind, "published"): reference, (kind, "ablations"): [row("ours, without text", 2, psnr, degradation=kind)]}, 1)
    text = report.EVIDENCE.read_text()
    assert text.count("## Zero-shot restoration") == 1 and text.count("### Zero-shot, noise\n") == text.count("### Zero-shot, haze\n") == 1
    assert "+6.00 dB against degraded" in text and "+8.00 dB against degraded" in text and "+7.00 dB against degraded" not in text
    assert text.count("the published schedule\n") == 2 and "ours ends +3.00 dB from it, in about 1/1 of its time" in text
    assert text.count("| ours, without text | haze | unet | 2 |") == 1 and text.count("| degraded | haze |") == 1


class Kept:
    """The rows that a machine may have."""

    def __init__(self, *names):
        self.names, self.kind = names, "unet"

    def restored(self, method, degradation, recipe):
        return row(method, 1, 23.0)

    def published(self, degradation, full):
        return self.get(ld_rps.PUBLISHED, lambda: row(ld_rps.PUBLISHED, 1))

    def get(self, name, make):
        if name not in self.names:
            raise report.NotMeasured(name)
        return make() if name == ld_rps.PUBLISHED else {"psnr": 0.0, "seconds": 7200.0, "steps": 675}


@pytest.mark.parametrize("known, said", [
    ((), None), (("haze|unet|reference estimate",), "2.0 hours"), ((ld_rps.PUBLISHED,), "+3.00 dB from it"),
], ids=["nothing", "its time", "all"])  # fmt: skip
def test_the_published_schedule_is_told_of_as_far_as_it_is_known(known, said):
    bench = Kept(*known)
    bench.results = bench.prior = bench
    rows = list(ld_rps.published_rows(bench, "haze", full=False))
    assert said in ld_rps.published_text(rows) if said else rows == []


@pytest.mark.parametrize("ours, start, remark", [
    (20.0, 22.0, ld_rps.LOSS),
    (14.0, 14.5, ld_rps.NO_GAIN),
    (14.0, 16.0, ld_rps.NO_GAIN),
    (22.0, 20.0, None),
])  # fmt: skip
def test_a_gain_is_only_spoken_of_where_there_is_one(ours, start, remark):
    text = said(ours, start)
    assert {other for other in (ld_rps.LOSS, ld_rps.NO_GAIN) if other in text} == ({remark} if remark else set())
