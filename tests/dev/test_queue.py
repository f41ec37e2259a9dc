"""`python dev queue`: what it shows while it waits, and where results go."""

import asyncio
import io
import json
import os
import sys
from pathlib import Path

import pytest
from aiohttp import web

from mend.dev import queue_run
from mend.dev.workflow_client import Client, Result, write_new


def test_a_taken_name_gets_a_number(tmp_path):
    paths = [write_new(tmp_path, "restored_00001_.png", content) for content in (b"a", b"b", b"c")]
    assert [path.name for path in paths] == ["restored_00001_.png", "restored_00001__2.png", "restored_00001__3.png"]
    assert [path.read_bytes() for path in paths] == [b"a", b"b", b"c"]


def test_results_go_beside_what_is_there(tmp_path):
    (tmp_path / "out.png").write_bytes(b"mine")
    saved = {"title": "Save", "filename": "out.png", "type": "output"}
    files = [{"node": "1", "subfolder": "", **saved}, {"node": "2:3", "subfolder": "deep", **saved}]
    result = Result("id", 1.0, files)

    async def view(request):
        return web.Response(body=f"from {request.query['subfolder']}".encode())

    async def save():
        application = web.Application()
        application.router.add_get("/view", view)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
                await client.save(result, tmp_path)
        finally:
            await runner.cleanup()

    asyncio.run(save())
    assert [Path(file["path"]).name for file in result.files] == ["out_2.png", "out_3.png"]
    assert [(tmp_path / name).read_bytes() for name in ("out.png", "out_2.png", "out_3.png")] == [b"mine", b"from ", b"from deep"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudo-terminal")
def test_progress_on_a_terminal_ends_its_line(monkeypatch):
    outer, inner = os.openpty()
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        lines = queue_run.ProgressLines()
        lines.end()
        lines("Sample (3): 1/2")
        lines("Sample (3): 2/2")
        lines.end()
        queue_run.say("done")
        shown = os.read(outer, 4096).decode()
    os.close(outer)
    assert shown.splitlines()[-1] == "[mend] done"
    assert shown.count("\n") == 2 and "2/2\r\n[mend] done" in shown


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    lines = queue_run.ProgressLines()
    for step in range(3):
        lines(f"Sample (3): {step}/2")
    lines.end()
    assert log.getvalue() == "[mend] Sample (3): 0/2\n"


def test_a_folder_that_cannot_be_made_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    workflow, taken = tmp_path / "workflow.json", tmp_path / "taken"
    workflow.write_text("{}")
    taken.touch()
    monkeypatch.setattr("sys.argv", ["queue", str(workflow), "--out", str(taken), "--json", "--server", "http://127.0.0.1:1"])
    assert queue_run.main() == 1
    assert "taken" in json.loads(capsys.readouterr().out)["error"]
