"""The records as data, and files: the right form by suffix, whole or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from forked import run_script
from inspections import EVERY, conv_net, hostile, onnx_graph
from tract_fx.errors import ArtifactsWriteError, UnsupportedFormatError
from tract_fx.inspection.records import Backward
from tract_fx.inspection.render.files import SCHEMA, to_data

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's dot")


@pytest.mark.parametrize("name", EVERY)
def test_data_survives_json(name: str) -> None:
    data = to_data(EVERY[name]())
    assert data["schema"] == SCHEMA
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text) == data


def missing(record: Any, data: Any, path: str = "") -> list[str]:
    """Paths of fields that the data lacks or has with another value."""
    if dataclasses.is_dataclass(record):
        found = []
        for field in dataclasses.fields(record):
            key = field.name.rstrip("_")
            where = f"{path}.{key}"
            if key not in data:
                found.append(where)
            else:
                found += missing(getattr(record, field.name), data[key], where)
        return found
    if isinstance(record, tuple):
        if len(record) != len(data):
            return [path]
        pairs = zip(record, data, strict=True)
        return [p for i, (r, d) in enumerate(pairs) for p in missing(r, d, f"{path}[{i}]")]
    if isinstance(record, float) and not math.isfinite(record):
        return [] if data == str(record) else [path]
    return [] if record == data else [path]


@pytest.mark.parametrize("name", EVERY)
def test_data_has_every_field(name: str) -> None:
    assert missing(EVERY[name](), to_data(EVERY[name]())) == []


def test_data_has_the_verdicts_and_plain_names() -> None:
    data = conv_net().to_dict()
    assert data["verification"]["passed"] is True
    assert data["verification"]["weights"][0]["operator"]["passed"] is True
    assert [layer["taken"] for layer in data["layers"]] == [True, False]
    assert data["layers"][0]["record"]["lambda"] == 0.1
    assert data["layers"][0]["record"]["geometry"]["padding"] == [[3, 3], [3, 3]]
    assert data["backward"]["short"]["hidden"] == 411


def test_numbers_that_are_none_are_strings() -> None:
    weight = hostile().to_dict()["verification"]["weights"][0]
    assert (weight["operator"]["error"], weight["end_to_end"]) == ("nan", "inf")
    assert (weight["floor"], weight["plain"]) == (None, "-inf")
    assert onnx_graph().to_dict()["statistics"]["layers"][0]["plain_correlation"] == "nan"


def test_a_value_without_a_form_is_an_error() -> None:
    with pytest.raises(TypeError, match="has no form"):
        to_data(conv_net(batch=object()))


def test_json_files_hold_the_data(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "report.json"
    assert hostile().save(path) == path
    assert json.loads(path.read_text(encoding="utf-8")) == hostile().to_dict()
    assert list(path.parent.iterdir()) == [path]


@needs_dot
def test_the_suffix_decides(tmp_path: Path) -> None:
    starts = {
        ".html": "<!DOCTYPE html>",
        ".svg": "<?xml",
        ".dot": "digraph",
        ".json": '{\n  "schema"',
        ".HTML": "<!DOCTYPE html>",
    }
    for suffix, start in starts.items():
        path = conv_net().save(str(tmp_path / f"report{suffix}"))
        assert path.read_text(encoding="utf-8").startswith(start)


def test_the_picture_is_the_one_that_shows_most(tmp_path: Path) -> None:
    whole = conv_net()
    assert whole.backward is not None
    for changes, wanted in (
        ({}, "linalg_cholesky_ex"),
        ({"backward": Backward(whole.backward.short, None)}, "convolution_backward"),
        ({"backward": None}, "max_pool2d"),
    ):
        text = conv_net(**changes).save(tmp_path / "x.dot").read_text(encoding="utf-8")
        assert wanted in text
    assert "backward" not in text


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.html.gz", ".html"])
def test_other_suffixes_are_refused_with_the_list(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"\.html, \.svg, \.dot, \.json"):
        conv_net().save(tmp_path / "sub" / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = conv_net().save(tmp_path / "report.json")
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ArtifactsWriteError, match=r"can't be written .no space.*another place"):
        onnx_graph().save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = conv_net().save(tmp_path / "report.json")
    path.chmod(0o640)
    onnx_graph().save(path)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "name", ["file/report.json", "folder.json", f"{'x' * 300}.json", "null\0.json"]
)
def test_what_stands_in_the_way_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactsWriteError, match="can't be written"):
        conv_net().save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_of_full_length_is_written(tmp_path: Path) -> None:
    assert conv_net().save(tmp_path / f"{'x' * 250}.json").is_file()


WITHOUT = """
import sys
file, tests, *missing = sys.argv[1:]
for name in (*missing, *sys.modules):
    if name.split(".")[0] in missing:
        sys.modules[name] = None
sys.path.insert(0, tests)
from inspections import conv_net
from tract_fx.errors import MissingRuntimeError
try:
    print(conv_net().save(file).stat().st_size > 0)
except MissingRuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("suffix", "without", "says"),
    [
        (".json", "graphviz jinja2 matplotlib rich", "True"),
        (".dot", "jinja2 matplotlib rich", "True"),
        (".html", "jinja2", "needs the package jinja2"),
        (".dot", "graphviz", "needs the package graphviz"),
    ],
)
def test_each_kind_needs_its_own_packages_alone(
    suffix: str, without: str, says: str, tmp_path: Path
) -> None:
    """In a process of its own, in which a package can't be imported."""
    script = tmp_path / "saved.py"
    script.write_text(WITHOUT)
    file, tests = tmp_path / f"x{suffix}", Path(__file__).parent
    done = run_script(script, str(file), str(tests), *without.split())
    assert says in done.stdout, done.stderr


def test_half_of_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    odd = conv_net(subject="half \ud83d")
    assert odd.save(tmp_path / "x.json").stat().st_size > 0
    assert odd.save(tmp_path / "x.html").stat().st_size > 0
