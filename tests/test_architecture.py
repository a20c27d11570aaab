"""The direction of imports: a folder reads from those below it, and nothing from those above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tract_fx

ROOT = Path(__file__).parents[1]

# From the top down. Those of one row don't know each other, but for the last.
FOLDERS = (
    {"shell"},
    {"inspection"},
    {"export", "lightning"},
    {"trainers", "step", "reference", "eager", "accumulation"},
    {"importer", "artifacts"},
    {"passes"},
    {"modules"},
    {"preconditioner"},
    {
        *("atomic", "errors", "example_inputs", "extras", "function_mode", "ort_training"),
        *("program", "quiet", "recurrent", "torch_private", "torch_version", "version"),
    },
)
ROW = {folder: row for row, folders in enumerate(FOLDERS) for folder in folders}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in ((ROOT / "tract_fx", "tract_fx"), (ROOT / "passes", "tract_fx.passes")):
        for file in sorted(folder.rglob("*.py")):
            inner = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *inner)).removesuffix(".__init__"), file


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


ARROWS = [
    (name, other)
    for name, file in modules()
    for other in imported(file)
    if other.startswith("tract_fx.") and "." in name and name != "tract_fx.__main__"
]


def test_arrows_point_down() -> None:
    folders = {(name.split(".")[1], other.split(".")[1]) for name, other in ARROWS}
    face = {(a, b) for a, b in folders if b in tract_fx.__all__}
    assert {a for a, _ in face} <= {"shell"}, "below it the face is not imported"
    apart = {(a, b) for a, b in folders - face if a != b}
    assert len(apart) > 30
    last = len(FOLDERS) - 1
    assert not [(a, b) for a, b in apart if not (ROW[a] < ROW[b] or ROW[a] == ROW[b] == last)]


def test_the_two_graphs_do_not_know_each_other() -> None:
    one, two = "tract_fx.passes.fx_graph", "tract_fx.passes.onnx_graph"
    for here, there in ((one, two), (two, one)):
        assert not [a for a in ARROWS if a[0].startswith(here) and a[1].startswith(there)]
