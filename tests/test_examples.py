"""Every script in examples/ runs, and what the demo leaves behind is what it says."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from nbformat import NotebookNode
from typer.testing import CliRunner

from executed_notebook import TUTORIAL, executed, stored
from forked import run_script
from image_folders import write_images

sys.path.insert(0, str(TUTORIAL.parent))

import demo
from _demo_data import light_unevenly, read_digits

EXAMPLES = TUTORIAL.parent
# Modules that a script is made of start with an underscore; these have tests of their own.
SCRIPTS = sorted(
    {path.name for path in EXAMPLES.glob("[!_]*.py")}
    - {"demo.py", "browser_training.py", "cifar.py"}
)


def run(script: str, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    # Neither colours nor line breaks in what is compared.
    return run_script(EXAMPLES / script, *arguments, cwd=cwd, NO_COLOR="1", COLUMNS="500")


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs(script: str, tmp_path: Path) -> None:
    finished = run(script, [], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's dot")
def test_tutorial_runs_and_holds_the_outputs_of_its_code() -> None:
    """Its cells assert what they say. `make notebook` brings the outputs up to date."""
    kept, new = stored(), executed()
    assert outputs(kept) == outputs(new)
    shown = {kind for _, kinds in outputs(kept) for kind in kinds}
    assert shown == {"stdout", "text/html", "text/plain", "image/png", "image/svg+xml"}
    assert TUTORIAL.stat().st_size < 400_000
    assert re.findall(r"/(?:home|root|tmp|work)/", TUTORIAL.read_text()) == []


def outputs(notebook: NotebookNode) -> list[tuple[int, list[str]]]:
    """When each cell with code ran, and the kinds of what it gave; not what libraries warn of."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    given = [[o for o in cell.outputs if o.get("name") != "stderr"] for cell in code]
    kinds = [[k for o in outputs for k in o.get("data", [o.get("name")])] for outputs in given]
    return [(cell.execution_count, sorted(k)) for cell, k in zip(code, kinds, strict=True)]


@pytest.fixture(params=["digits", "images"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What a small demo writes: `results.json`, and the plots beside it."""
    seeds = "1" if request.param == "images" else "2"  # the least, and what is to be averaged
    arguments = ["--epochs", "2", "--seeds", seeds, "--out", "out", "--batch-size", "8"]
    if request.param == "images":
        folder = write_images(tmp_path / "images")
        arguments += ["--data", str(folder), "--train-limit", "12", "--image-size", "8"]
    else:
        arguments += ["--batch-size", "64"]
    finished = run("demo.py", arguments, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    report = html.unescape((tmp_path / "out" / "report.html").read_text())
    if "Not trained in ONNX Runtime" in finished.stdout:
        pytest.skip("needs ONNX Runtime Training")
    for plot in ("accuracy", "losses"):
        assert (tmp_path / "out" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "out" / f"{plot}.svg").read_text()
    written: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert bool(written["note"]) == (request.param == "digits")
    assert written["note"] in report and written["note"] in finished.stdout
    written["runtimes"] = json.loads((tmp_path / "out" / "losses.json").read_text())
    return written


def test_demo_compares_like_with_like(results: dict[str, Any]) -> None:
    plain, tract = results["accuracy"]["plain"], results["accuracy"]["tract"]
    for arm in (plain, tract):
        seeds = 2 if results["note"] else 1
        assert [len(accuracies) for accuracies in arm] == seeds * [3]
        assert all(0 <= accuracy <= 1 for accuracies in arm for accuracy in accuracies)
    assert [accuracies[0] for accuracies in plain] == [accuracies[0] for accuracies in tract]
    if results["note"]:  # the few images of noise may well come out alike
        assert plain != tract
    differences = [b[-1] - a[-1] for a, b in zip(plain, tract, strict=True)]
    assert results["final_difference"] == pytest.approx(differences)
    for accuracies, epoch in zip(plain, results["epochs_to_plain_final"]["plain"], strict=True):
        assert accuracies[epoch] >= accuracies[-1]
    times = results["step_milliseconds"]
    assert results["cost"] == times["tract"] / times["plain"] > 0
    check_runtimes(results)


def check_runtimes(results: dict[str, Any]) -> None:
    """ONNX Runtime trained on the same batches from the same start, and what is said is so."""
    runtimes = results["runtimes"]
    pytorch, onnx_runtime = runtimes["pytorch"], runtimes["onnx_runtime"]
    assert pytorch["accuracies"] == results["accuracy"]["tract"][0]
    assert len(pytorch["losses"]) == (2 * (1347 // 64) if results["note"] else 2)
    # Rounding alone comes to less than 1e-6 in so few steps on the digits; another order of the
    # batches, a constant learning rate or plain gradients come to 0.05 and more.
    assert onnx_runtime["losses"] == pytest.approx(pytorch["losses"], abs=1e-4)
    if results["note"]:  # two steps may well come out alike
        assert onnx_runtime["losses"] != pytorch["losses"]
    assert onnx_runtime["accuracies"] == pytest.approx(pytorch["accuracies"], abs=0.02)
    pairs = zip(pytorch["losses"], onnx_runtime["losses"], strict=True)
    assert runtimes["largest_difference"] == max(abs(a - b) for a, b in pairs)


def test_uneven_light_is_a_contrast_a_brightness_and_a_slope_of_each_image() -> None:
    ink = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    lit = light_unevenly(ink, torch.Generator().manual_seed(0)).view(500, 64, 1)
    x, y = torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 2, indexing="xy")
    light = torch.stack([torch.ones(8, 8), x, y], dim=-1).view(64, 3).expand(500, 64, 3)
    parts = torch.cat([ink.view(500, 64, 1), light], dim=-1)
    found = torch.linalg.lstsq(parts, lit).solution
    torch.testing.assert_close(parts @ found, lit)
    contrast, brightness, *slope = found.squeeze(-1).unbind(1)
    for drawn, least in (contrast, 0.1), (brightness, 0), (torch.hypot(*slope), 0):
        assert least - 1e-4 < drawn.min() < least + 0.05 and 0.95 < drawn.max() < 1 + 1e-4


def test_uneven_light_falls_on_training_and_test_images_and_is_always_the_same() -> None:
    even, lit, again = read_digits(), *[read_digits(uneven_light=True) for _ in range(2)]
    for split in ("train", "test"):
        of = [getattr(dataset, split) for dataset in (even, lit, again)]
        brightness = [each.images.mean((1, 2, 3)).std() for each in of]
        assert brightness[1] > 3 * brightness[0]
        assert torch.equal(of[1].images, of[2].images)
        assert torch.equal(of[1].labels, of[0].labels)


def missing(folder: Path) -> Path:
    return folder / "nowhere"


def without_train(folder: Path) -> Path:
    (folder / "test" / "cat").mkdir(parents=True)
    return folder


def without_classes(folder: Path) -> Path:
    (folder / "train").mkdir()
    return folder


def without_images(folder: Path) -> Path:
    for image in (write_images(folder) / "train").glob("*/*"):
        image.unlink()
    return folder


def one_class(folder: Path) -> Path:
    return write_images(folder, classes=["cat"])


def unknown_class(folder: Path) -> Path:
    (write_images(folder) / "test" / "bird").mkdir()
    return folder


def damaged_image(folder: Path) -> Path:
    (write_images(folder) / "train" / "dog" / "0.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (missing, "nowhere"),
        (without_train, "no such folder"),
        (without_classes, "no class folders"),
        (without_images, "no images in it"),
        (one_class, "one class alone (cat)"),
        (unknown_class, "classes that train/ lacks: bird"),
        (damaged_image, "0.png: not a readable image"),
    ],
)
def test_demo_explains_bad_data_in_one_line(prepare: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    app = typer.Typer()
    app.command()(demo.run)
    finished = CliRunner().invoke(app, ["--data", str(prepare(tmp_path / "data"))])
    assert finished.exit_code == 1
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stderr.startswith("error: ")
    assert message in finished.stderr


def test_demo_explains_a_bad_lambda_in_one_line(tmp_path: Path) -> None:
    # A process of its own from the start, as at the shell.
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--lambda", "0"],
        cwd=tmp_path,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stderr.startswith("error: ")
