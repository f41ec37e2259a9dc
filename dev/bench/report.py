"""What measurements share: rows that survive an interruption, tables, and the sections of docs/evidence.md."""

import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..cache import home

PACK = Path(__file__).parents[2]
EVIDENCE = PACK / "docs" / "evidence.md"
# The rows behind the evidence of benches that take many hours: a machine that never measured them need not start again to add one.
MEASURED = PACK / "docs" / "measured"
TITLE = "# Evidence\n\nEach section is written by the command that it names; do not edit.\n"
ROOMS = ("samplers", "model_patches", "degradations", "training", "lab")
BENCH_FILES = ("scenes.py", "classical.py", "zero_shot.py", "kept_run.py")
DIGITS = {"rate": 4, "psnr": 2, "psnr_std": 2, "ssim": 3, "haarpsi": 3, "gain": 2, "gmsd": 3}


class NotMeasured(SystemExit):
    """A row is asked for that no run has measured yet; whoever cannot do without it ends the command with this message."""

    def __init__(self, row: str) -> None:
        super().__init__(f"Not measured yet, so there is no table to write: {row}. Run the same without --measured.")


class Results:
    """Rows by name, kept in a file as they come.

    Args:
        file: where they are kept.
        measure: compute rows that are not there; otherwise asking for one raises NotMeasured.
    """

    def __init__(self, file: Path, measure: bool = True) -> None:
        self.file, self.measure = file, measure
        file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = {row["key"]: row for row in map(json.loads, _whole_lines(file))}

    @contextmanager
    def only_known(self) -> Iterator[None]:
        """Measure nothing new for as long as the context is open."""
        self.measure, before = False, self.measure
        try:
            yield
        finally:
            self.measure = before

    def get(self, key: str, make: Callable[[], dict]) -> dict:
        """Return the row of a key, computing it once."""
        if key not in self.rows:
            if not self.measure:
                raise NotMeasured(key)
            self.rows[key] = {"key": key, **make()}
            with self.file.open("a") as stream:
                stream.write(json.dumps(self.rows[key]) + "\n")
            say(f"  {key}: {self.rows[key]['psnr']:.2f} dB, {self.rows[key].get('seconds', 0):.1f} s")
        return self.rows[key]


def _whole_lines(file: Path) -> list[str]:
    """Lines of a file of rows; a last one that a killed run left torn is cut off, so that the next row starts a line of its own."""
    text = file.read_text() if file.exists() else ""
    whole, end, torn = text.rpartition("\n")
    if torn:
        file.write_text(whole + end)
    return whole.splitlines()


def results_file(bench: str) -> Path:
    """Where a measurement keeps its rows: one file for each state of the code and of the lab's weights."""
    file = home() / "bench" / f"{bench}-{fingerprint()}.jsonl"
    committed = MEASURED / file.name
    if committed.exists() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(committed, file)
    return file


def picture_file(file: Path, quick: bool) -> Path:
    """Where a picture of docs is written: a quick one beside the rows, so that the one of docs stays."""
    if not quick:
        return file
    folder = home() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / file.name


def keep_rows(results: Results) -> None:
    """Put a measurement's rows where they can be committed, in the place of those of earlier code that were all measured anew."""
    MEASURED.mkdir(exist_ok=True)
    bench = results.file.name.rpartition("-")[0]
    shutil.copyfile(results.file, MEASURED / results.file.name)
    for earlier in MEASURED.glob("*.jsonl"):
        if earlier.name.rpartition("-")[0] == bench and earlier.name != results.file.name and Results(earlier).rows.keys() <= results.rows.keys():
            earlier.unlink()


def of_this_code(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a training run with the code: what other code trained is not what this one would."""
    return {**description, "code": code()}


@cache
def code() -> str:
    """Hash of the code that is loaded when it is first asked for, less its comments and docstrings; the same under every Python."""
    digest = hashlib.sha256()
    for file in sorted(_loaded_files()):
        digest.update(repr(syntax(_without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))).encode())
    return digest.hexdigest()[:12]


def fingerprint() -> str:
    """Hash of what a figure depends on: the code, and the lab's weights."""
    digest = hashlib.sha256(code().encode())
    for file in sorted((PACK / "lab" / "weights").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _loaded_files() -> set[Path]:
    loaded = {Path(module.__file__).resolve() for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    rooms = [(PACK / room).resolve() for room in ROOMS]
    bench = {(Path(__file__).parent / name).resolve() for name in BENCH_FILES}
    return {file for file in loaded if file.suffix == ".py" and (file in bench or any(room in file.parents for room in rooms))}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def syntax(node: Any) -> Any:
    """A syntax tree as tuples, less what holds nothing: Pythons differ in which empty fields there are, and in empty texts of formats."""
    if isinstance(node, list):
        return [syntax(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.JoinedStr):
        return "JoinedStr", [syntax(part) for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    return type(node).__name__, [(name, syntax(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]


def markdown(rows: list[dict], columns: tuple[str, ...]) -> str:
    """Format rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [_cell(name, row.get(name, "-")) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: object) -> str:
    return f"{value:.{DIGITS.get(name, 1)}f}" if isinstance(value, float) else str(value)


def write_section(bench: str, text: str) -> None:
    """Put a measurement's section into docs/evidence.md, in place of its last one; other sections stay as they are."""
    begin, end = f"<!-- {bench} -->", f"<!-- end of {bench} -->"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    known = EVIDENCE.read_text(encoding="utf-8") if EVIDENCE.exists() else TITLE
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end) + r"\n", re.DOTALL)
    EVIDENCE.parent.mkdir(exist_ok=True)
    EVIDENCE.write_text(pattern.sub(lambda _: section, known) if pattern.search(known) else f"{known}\n{section}", encoding="utf-8")


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
