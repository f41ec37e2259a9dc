"""Rows of a measurement outlive the machine that measured them."""

import ast
import hashlib

import pytest

from mend.dev import cache
from mend.dev.bench import report


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A cache and a checkout of the test's own; returns a function that forgets the cache."""
    monkeypatch.setattr(report, "MEASURED", tmp_path / "docs" / "measured")
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("MEND_HOME", str(tmp_path / "first"))
    return lambda: monkeypatch.setenv("MEND_HOME", str(tmp_path / "second"))


def measured(bench="space", measure=True):
    return report.Results(report.results_file(bench), measure)


def test_kept_rows_are_known_on_another_machine(places):
    first = measured()
    first.get("a", lambda: {"psnr": 20.0})
    report.keep_rows(first)
    places()
    assert measured(measure=False).get("a", dict)["psnr"] == 20.0
    with pytest.raises(report.NotMeasured, match="Not measured yet, .*: b. Run the same without --measured"):
        measured(measure=False).get("b", dict)


def test_a_row_that_a_killed_run_left_torn_is_measured_again(places):
    results = measured()
    for key in "ab":
        results.get(key, lambda: {"psnr": 20.0})
    results.file.write_text(results.file.read_text()[:-5])
    again = measured()
    assert list(again.rows) == ["a"]
    again.get("b", lambda: {"psnr": 21.0})
    assert measured(measure=False).get("b", dict)["psnr"] == 21.0


def test_rows_of_earlier_code_and_no_others_make_room(places):
    results = measured()
    results.get("a", lambda: {"psnr": 20.0})
    report.MEASURED.mkdir()
    others = [report.MEASURED / name for name in ("space-other-000000000000.jsonl", "adapter-000000000000.jsonl")]
    for file in (*others, report.MEASURED / "space-000000000000.jsonl"):
        file.write_text("")
    report.keep_rows(results)
    assert sorted(report.MEASURED.iterdir()) == sorted([*others, report.MEASURED / results.file.name])


def test_rows_that_were_not_measured_anew_stay(places):
    report.MEASURED.mkdir()
    earlier = [report.MEASURED / f"space-{digit * 12}.jsonl" for digit in "01"]
    for file, keys in zip(earlier, ("ab", "a")):
        file.write_text("".join(f'{{"key": "{key}", "psnr": 20.0}}\n' for key in keys))
    results = measured()
    results.get("a", lambda: {"psnr": 21.0})
    report.keep_rows(results)
    assert earlier[0].exists() and not earlier[1].exists()
    results.get("b", lambda: {"psnr": 22.0})
    report.keep_rows(results)
    assert [file.name for file in report.MEASURED.iterdir()] == [results.file.name]


def test_rows_lie_where_everything_else_of_the_cache_does(places, monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("USERPROFILE", "/somebody")
    monkeypatch.setenv("MEND_HOME", "~/kept")
    assert report.results_file("space").parent == cache.home() / "bench" and "~" not in str(cache.home())
    monkeypatch.delenv("MEND_HOME")
    assert report.results_file("space").parent == cache.user_cache_folder() / "mend" / "bench"


def test_quick_pictures_leave_those_of_docs_alone(places):
    shown = report.PACK / "docs" / "shown.jpg"
    assert report.picture_file(shown, quick=False) == shown
    assert report.picture_file(shown, quick=True) == cache.home() / "bench" / "shown.jpg" and (cache.home() / "bench").is_dir()


def test_the_code_of_a_run_is_that_of_its_rows():
    assert report.of_this_code({"kind": "x"}) == {"kind": "x", "code": report.code()} and report.fingerprint() == report.fingerprint() != report.code()


def test_the_hash_of_code_is_the_same_under_every_python():
    source = 'def f(a: int = 1, *, b=None) -> str:\n    return f"{a:0{b}} x" if b else [None, {**b}]\n'
    # What 3.10, 3.11, 3.12 and 3.13 give, whose ast.dump differs.
    assert hashlib.sha256(repr(report.syntax(ast.parse(source))).encode()).hexdigest()[:12] == "3cc9e52312b9"


def test_a_machines_own_rows_come_first(places):
    results = measured()
    results.get("a", lambda: {"psnr": 20.0})
    report.keep_rows(results)
    results.get("b", lambda: {"psnr": 21.0})
    assert set(measured(measure=False).rows) == {"a", "b"}
