"""`tract-fx locate` and `tract-fx inspect`: what they print and write, and how they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from forked import run_script
from test_shell import done, mlp, refused, run
from tract_fx import AdamW, export_training, tract_module

NETS = """
import sys

import torch
from torch import nn

def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

def treated():
    from tract_fx import tract_pass
    return tract_pass(torch.fx.symbolic_trace(conv()), lambda_=0.5)

def talkative():
    print("made")
    return Talkative()

def quits():
    sys.exit(7)

def quits_later():
    return Quits()

class Talkative(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        print("run")
        return self.head(torch.relu(self.stem(x)))

class Quits(Talkative):
    def forward(self, x):
        sys.exit(7)

class Branching(Talkative):
    def forward(self, x):
        y = self.stem(x)
        return self.head(y + 1 if y.sum() > 0 else y)

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(x.dim() - 1):
            x = x + 0
        return self.head(torch.relu(self.stem(x)))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.a(x) + self.b(x) + (x * self.scale).sum()
"""  # noqa: E501 (Python in a text)
SHAPE = ("--input-shape", "4,3,8,8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("inspected_nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "inspected_nets", raising=False)
    onnx.save(mlp(), "mlp.onnx")
    return tmp_path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspected") / "a"
    export_training(mlp(), None, place, optimizer=AdamW(lr=0.05), verify=False)
    return place


def save_program(name: str, *, tract: bool) -> None:
    x = torch.randn(4, 3, 8, 8)
    net: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    if tract:
        net = tract_module(net, x)
    torch.export.save(torch.export.export(net, (x,)), name)


def test_locate_takes_every_kind_of_target(folder: Path, artifacts: Path) -> None:
    save_program("net.pt2", tract=False)
    for target, weight in {
        "inspected_nets:conv": "0.weight",
        "net.pt2": "0.weight",
        "mlp.onnx": "w1",
        str(artifacts / "training_model.onnx"): "w1",
    }.items():
        assert weight in done("locate", target), target
    assert "λ = 0.5" in done("locate", "inspected_nets:treated")
    assert "stem.weight" in done("locate", "inspected_nets:Untraceable", "--input-shape", "4,8")


def test_locate_says_why_not(folder: Path) -> None:
    result = run("locate", "inspected_nets:Two")
    assert result.exit_code == 1
    assert "a.weight" in result.stdout and "trained parameter" in result.stdout
    assert result.stderr.startswith("error: 3 operations") and result.stderr.count("\n") == 1
    assert "--input-shape" in refused(1, "locate", "inspected_nets:Untraceable")
    assert "no such file" in refused(1, "locate", "nowhere.onnx")


def test_inspect_shows_layers_and_the_change(folder: Path) -> None:
    shown = done("inspect", "inspected_nets:conv", *SHAPE)
    assert "144 rows × 27 columns" in shown and "lambda_=0.1" in shown
    assert "Verification" not in shown and "Backward" not in shown
    assert "lambda_=0.3" in done("inspect", "inspected_nets:conv", *SHAPE, "--lambda", "0.3")
    assert "lambda_=0.5" in done("inspect", "inspected_nets:treated", *SHAPE)


def test_inspect_verifies(folder: Path) -> None:
    save_program("treated.pt2", tract=True)
    save_program("plain.pt2", tract=False)
    assert "✔" in done("inspect", "inspected_nets:conv", *SHAPE, "--verify")
    assert "✔" in done("inspect", "treated.pt2", "--as-is", "--verify")
    result = run("inspect", "plain.pt2", "--as-is", "--verify")
    assert result.exit_code == 3 and "○ Not verified: TrAct is on no layer" in result.stdout
    assert done("inspect", "plain.pt2", "--as-is", "--html", "plain.html")  # nothing asked
    assert run("inspect", "inspected_nets:conv", *SHAPE, "--as-is", "--verify").exit_code == 3


def test_inspect_backward(folder: Path) -> None:
    short = done("inspect", "inspected_nets:conv", *SHAPE, "--backward")
    assert "convolution_backward" in short and "cholesky" not in short
    assert done("inspect", "--backward", "inspected_nets:conv", *SHAPE) == short
    expanded = done("inspect", "inspected_nets:conv", *SHAPE, "--backward=expanded")
    assert "cholesky" in expanded
    assert "sideways" in refused(2, "inspect", "inspected_nets:conv", "--backward=sideways")


def test_inspect_writes_everything(folder: Path) -> None:
    target = ("inspect", "inspected_nets:conv", *SHAPE)
    result = run(*target, "--html", "a/report.html", "--json", "report.json", "--picture", "p.dot")
    assert result.exit_code == 0, result.output
    assert "Written: a/report.html" in result.stderr
    page = Path("a/report.html").read_text(encoding="utf-8")
    assert "Statistics" in page and "Verification" in page
    stored = json.loads(Path("report.json").read_text())
    assert stored["verification"]["passed"] and stored["statistics"]["layers"]
    assert "digraph" in Path("p.dot").read_text()
    for option, file in (("--html", "a/report.html"), ("--json", "report.json")):
        assert f"{file}: it exists" in refused(1, *target, option, file)
    Path("p.dot").write_text("mine")
    assert "--overwrite" in refused(1, *target, "--picture", "p.dot")
    assert Path("p.dot").read_text() == "mine"
    done(*target, "--picture", "p.dot", "--overwrite")
    assert "digraph" in Path("p.dot").read_text()
    printed = json.loads(done(*target, "--json", "-", "--verify"))
    assert printed["verification"]["passed"] and printed["statistics"] is None


def test_inspect_a_batch_from_a_file(folder: Path) -> None:
    images = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
    np.savez("in_order.npz", images)
    np.savez("by_name.npz", input=images)
    for file in ("in_order.npz", "by_name.npz"):
        shown = done("inspect", "inspected_nets:conv", "--data", file, "--statistics")
        assert "216 rows" in shown, file
        assert "condition" in shown
    Path("broken.npz").write_bytes(b"PK nonsense")
    assert "broken.npz" in refused(1, "inspect", "inspected_nets:conv", "--data", "broken.npz")
    arguments = ("inspect", "inspected_nets:conv", "--data", "in_order.npz", *SHAPE)
    assert "--input-shape" in refused(2, *arguments)


def test_a_batch_leaves_out_no_place(folder: Path) -> None:
    x = np.zeros((4, 3, 8, 8), np.float32)
    np.savez("gap.npz", arr_1=x)
    np.savez("twice.npz", arr_0=x, arr_00=x)
    for file in ("gap.npz", "twice.npz"):
        assert "in order" in refused(1, "inspect", "inspected_nets:conv", "--data", file), file
    np.savez("more.npz", arr_0=x, arr_1=x, arr_10=x)
    assert "arr_10" in refused(1, "inspect", "inspected_nets:conv", "--data", "more.npz")


def test_what_the_model_prints_is_no_result(folder: Path) -> None:
    for target in ("talkative", "Talkative"):
        name = f"inspected_nets:{target}"
        result = run("inspect", name, "--input-shape", "4,8", "--json", "-", "--verify")
        assert result.exit_code == 0 and json.loads(result.stdout)["verification"]["passed"]
        assert "run" in result.stderr
        located = run("locate", name, "--input-shape", "4,8")
        assert "made" not in located.stdout and "stem.weight" in located.stdout


def test_a_model_that_ends_the_process(folder: Path) -> None:
    for target in ("quits", "quits_later", "Quits"):
        for command in ("inspect", "locate"):
            line = refused(1, command, f"inspected_nets:{target}", "--input-shape", "4,8")
            assert "SystemExit: 7" in line, (command, target)
    line = refused(1, "export", "inspected_nets:quits", "out", "--input-shape", "4,8")
    assert "SystemExit: 7" in line


def test_torch_prints_no_graph_beside_the_error(folder: Path) -> None:
    arguments = ("inspect", "inspected_nets:Branching", "--input-shape", "4,8")
    line = refused(1, *arguments)  # one line alone
    assert "torch.export failed on Branching" in line
    debugged = run(*arguments, "--debug")
    assert debugged.exit_code == 1 and "def forward(self, arg0_1" in debugged.stderr
    wrong = refused(1, "inspect", "inspected_nets:treated", "--input-shape", "4,2,8,8")
    assert "the model fails" in wrong


FULL = """
import os, runpy, sys
with open("/dev/full", "wb") as full:
    os.dup2(full.fileno(), 1)
sys.path.insert(0, os.getcwd())
runpy.run_module("tract_fx", run_name="__main__")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [(), ("--json", "-")])
def test_a_full_disk_is_told_in_one_line(folder: Path, more: tuple[str, ...]) -> None:
    target = ("inspect", "inspected_nets:conv", *SHAPE)
    Path("full.py").write_text(FULL)
    ended = run_script(Path("full.py").absolute(), *target, *more)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the standard output") and ended.stderr.count("\n") == 1
    Path("file").write_text("")
    assert "can't be written" in refused(1, *target, "--json", "file/report.json")


def test_locate_takes_a_directory_of_an_export(folder: Path, artifacts: Path) -> None:
    assert "w1" in done("locate", artifacts)
    Path("empty").mkdir()
    assert "no training_model.onnx" in refused(1, "locate", "empty")


def test_inspect_onnx(folder: Path, artifacts: Path) -> None:
    for target in (artifacts, artifacts / "training_model.onnx"):
        shown = done("inspect", target, "--verify", "--backward=expanded")
        assert "✔" in shown and "Inverse" in shown, target
    forward = run("inspect", "mlp.onnx", "--verify")
    assert forward.exit_code == 3 and "○ Not verified" in forward.stdout
    assert "as it is" in refused(2, "inspect", "mlp.onnx", "--lambda", "0.3")


def test_inspect_refuses(folder: Path) -> None:
    assert "--input-shape" in refused(1, "inspect", "inspected_nets:conv")
    assert ".html" in refused(1, "inspect", "inspected_nets:conv", *SHAPE, "--html", "x.pdf")
    arguments = ("inspect", "inspected_nets:conv", *SHAPE, "--as-is", "--lambda", "0.1")
    assert "--as-is" in refused(2, *arguments)
    result = run("inspect", "inspected_nets:conv", *SHAPE, "--netron", "--json", "x.json")
    assert result.exit_code == 2 and "Netron" in result.stderr
    assert not result.stdout and not Path("x.json").exists()  # told before the work
    for option in ("--html", "--picture"):
        assert option in refused(2, "inspect", "inspected_nets:conv", *SHAPE, option, "-")
    wrong = refused(1, "inspect", "inspected_nets:conv", "--input-shape", "4,5,8,8")
    assert "example inputs" in wrong


def test_netron(folder: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started on the file, where it is installed; else the message says how to get it."""
    monkeypatch.setitem(sys.modules, "netron", None)
    assert "pip install netron" in refused(1, "inspect", artifacts, "--netron")
    Path("netron.py").write_text("")
    monkeypatch.delitem(sys.modules, "netron")
    monkeypatch.syspath_prepend(str(folder))
    started: list[list[str]] = []
    monkeypatch.setattr("tract_fx.shell.inspect_command.subprocess.Popen", started.append)
    done("inspect", artifacts, "--netron")
    ((executable, *rest),) = started
    assert executable == sys.executable
    assert rest[:2] == ["-m", "netron"] and rest[-1] == str(artifacts / "training_model.onnx")


@pytest.mark.parametrize("command", ["locate", "inspect"])
def test_help(command: str) -> None:
    text = done(command, "--help")
    assert f"tract-fx {command} " in text and "Exit codes:" in text
