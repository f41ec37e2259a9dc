"""The benches that draw pictures for docs: with --quick they leave docs alone, with --json they end with their rows."""

import importlib
import json
import sys

import pytest
import torch
from PIL import Image

ROWS = [{"method": "x", "psnr": 20.0}]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs a bench's command with what it restores left out; returns what was asked for and what was printed."""
    monkeypatch.setenv("MEND_HOME", str(tmp_path / "home"))

    def run(name, step, answer, *arguments):
        bench = importlib.import_module(f"mend.dev.bench.{name}")
        calls = []
        monkeypatch.setattr(bench, "FILE", tmp_path / "docs.jpg")
        monkeypatch.setattr(bench, step, lambda *given: (calls.append(given), (answer, ROWS))[1])
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        if name == "degradation_picture":
            monkeypatch.setattr(bench, "Lab", lambda *given: None)
        bench.main()
        return calls[0]

    return run


@pytest.mark.parametrize("quick", [True, False])
def test_guidance_picture(asked, tmp_path, capsys, quick):
    cell = Image.new("RGB", (8, 8))
    onsets, weights = asked("guidance_picture", "cells", [[cell, cell], [cell, cell]], "--json", *(["--quick"] if quick else []))
    assert len(onsets) * len(weights) == (2 if quick else 10)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": ROWS}
    file = tmp_path / ("home/bench/docs.jpg" if quick else "docs.jpg")
    assert Image.open(file).size == (20, 20) and (tmp_path / "docs.jpg").exists() is not quick


@pytest.mark.parametrize("quick", [True, False])
def test_degradation_picture(asked, tmp_path, capsys, quick):
    parts = [torch.zeros(20, 8, 3)] * 3
    _, steps, way = asked("degradation_picture", "columns", parts, "--json", *(["--quick"] if quick else []))
    assert (steps, way.steps) == ((2, 1) if quick else (1000, 10))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": ROWS}
    file = tmp_path / ("home/bench/docs.jpg" if quick else "docs.jpg")
    assert Image.open(file).size == (32, 20) and (tmp_path / "docs.jpg").exists() is not quick


def test_the_tokenizers_figures_are_rows(monkeypatch, capsys):
    bench = importlib.import_module("mend.dev.bench.degradation_tokenizer")
    monkeypatch.setattr(bench, "measured", lambda *given: {"charts, psnr": 20.5, "estimator, right": 0.9})
    monkeypatch.setattr(bench, "photographs", lambda names: [])
    monkeypatch.setattr(sys, "argv", ["degradation_tokenizer", "--quick", "--json"])
    bench.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows == [{"figure": "charts, psnr", "value": 20.5}, {"figure": "estimator, right", "value": 0.9}]
