"""The `tract-fx` command: what it writes, what it prints, how it ends."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

from forked import run_script
from onnx_models import by_hand, training_graph
from oracle import Spec, relative_error, tract_gradient
from tract_fx import (
    SGD,
    AdamW,
    MissingRuntimeError,
    UnsupportedTrainingError,
    export_training,
    extras,
    load_trainer,
)
from tract_fx.artifacts.manifest import TensorSpec
from tract_fx.passes import tract_onnx_pass
from tract_fx.passes.onnx_graph.models import as_ir_model
from tract_fx.passes.onnx_graph.provenance import present_lambdas
from tract_fx.shell import reporting
from tract_fx.shell.app import app
from tract_fx.shell.train_command import _right_classes
from tract_fx.trainers.ort_trainer import OrtTrainer

# Float32 on noise, through one layer's system of condition ~10.
FLOAT32 = 1e-5

COMMANDS = ("export", "rewrite", "train")

NETS = '''
import torch
from torch import nn

class Untraceable(nn.Module):
    """Its forward pass asks for a value, at which fx gives up."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, flag=None):
        for _ in range(x.dim() - 1):
            x = x + 0
        return self.head(torch.relu(self.stem(x)))

def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

def treated():
    from tract_fx import tract_pass
    return tract_pass(torch.fx.symbolic_trace(conv()), lambda_=0.5)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.a(x) + self.b(x)

def fails():
    raise RuntimeError("no such\\nweights")

def number():
    return 3
'''


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code: int, *arguments: object) -> str:
    """Run a command that fails; an explained failure is one line on the standard error."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, factories and data."""
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp(), "mlp.onnx")
    Path("shell_nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "shell_nets", raising=False)
    x, target = data(50)
    np.savez("data.npz", x=x, target=target, more=x)
    return tmp_path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's artifacts, written once."""
    place = tmp_path_factory.mktemp("shell") / "a"
    export_training(mlp(), None, place, optimizer=AdamW(lr=0.05), verify=False)
    return place


@pytest.fixture
def exported(folder: Path, written: Path) -> Path:
    """The working directory with artifacts in `a`."""
    shutil.copytree(written, "a")
    return folder


def mlp() -> onnx.ModelProto:
    return by_hand(
        "h = MatMul (x, w1) a = Add (h, b1) r = Relu (a) o = MatMul (r, w2) y = Add (o, b2)",
        {"w1": (8, 6), "b1": (6,), "w2": (6, 3), "b2": (3,)},
        inputs="float[N,8] x",
        outputs="float[N,3] y",
    )


def data(count: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 8)).astype(np.float32)
    return x, (x[:, :3]).argmax(axis=1)


def preconditioned(directory: str, gradient: Any, x: Any, lambda_: float) -> float:
    """Error of a linear layer's gradient in a directory, given that of the plain one."""
    found = load_trainer(directory).compute_gradients(*batch_of(x))
    name = next(iter(found))
    damped = x.T.astype(np.float64) @ x / len(x) + lambda_ * np.eye(x.shape[1])
    return relative_error(found[name], np.linalg.solve(damped, gradient.astype(np.float64)))


def batch_of(x: Any) -> tuple[Any, Any]:
    return x, data(len(x))[1]


def test_version() -> None:
    from tract_fx import __version__

    assert done("--version").strip() == f"tract-fx {__version__}"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example_and_the_exit_codes(command: str) -> None:
    text = done(*command.split(), "--help")
    assert "Example" in text
    assert "  tract-fx " in text
    assert "Exit codes: 0" in text
    if command in ("", "inspect"):
        assert re.search(r"3, .*the gradient is wrong", " ".join(text.split()))


def test_export_of_an_onnx_file(folder: Path) -> None:
    text = done("export", "mlp.onnx", "a", "--lambda", 0.3, "--lr", 0.01, "--max-grad-norm", 2)
    for part in ("w1", "λ = 0.3", "4 tensors, 75 numbers", "cross_entropy", "lr=0.01"):
        assert part in text, text
    for file in ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"):
        assert file in text
    manifest = load_trainer("a").manifest
    assert manifest.optimizer == AdamW(lr=0.01, max_grad_norm=2.0)
    done("export", "mlp.onnx", "plain", "--plain")
    x, target = data(12)
    plain = load_trainer("plain").compute_gradients(x, target)["w1"]
    assert preconditioned("a", plain, x, 0.3) < FLOAT32


def test_export_options(folder: Path) -> None:
    done(
        *("export", "mlp.onnx", "a", "--optimizer", "sgd", "--momentum", 0.9, "--nesterov"),
        *("--weight-decay", 0.01, "--accumulate", 2, "--loss", "mse", "--output", "a"),
        *("--layer", "w1=0.7", "--trainable", "w1", "--trainable", "b1", "--seed", 5),
        "--no-verify",
    )
    manifest = load_trainer("a").manifest
    assert manifest.optimizer == SGD(momentum=0.9, nesterov=True, weight_decay=0.01, accumulate=2)
    assert manifest.loss == "mse"
    assert manifest.targets[0].shape == ("batch", 6)
    assert [layer.lambda_ for layer in manifest.layers] == [0.7]
    assert [s.name for s in manifest.parameters if s.trainable] == ["w1", "b1"]
    assert manifest.seed == 5


def test_export_of_a_factory(folder: Path) -> None:
    """Its first layer's gradient is TrAct's of the same seed's weights."""
    done("export", "shell_nets:conv", "a", "--input-shape", "4,3,8,8", "--seed", 3, "--lambda", 1)
    trainer = load_trainer("a")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()
        x, target = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    z = net[0](x.double())
    z.retain_grad()
    nn.functional.cross_entropy(net[1:](z), target).backward()
    expected = tract_gradient(Spec.of(net[0]), x, z.grad, 1.0)
    found = trainer.compute_gradients(x, target)
    assert relative_error(found["0.weight"], expected) < FLOAT32


def test_export_of_a_model_that_fx_can_not_trace(folder: Path) -> None:
    text = done("export", "shell_nets:Untraceable", "a", "--input-shape", "x=4,8")
    assert "stem" in text
    assert [layer.name for layer in load_trainer("a").manifest.layers] == ["stem"]


def test_export_of_a_treated_model_keeps_its_lambda(folder: Path) -> None:
    assert "λ = 0.5" in done("export", "shell_nets:treated", "a", "--input-shape", "4,3,8,8")


def test_export_of_a_program(folder: Path) -> None:
    """Example inputs are the program's own."""
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(net, (torch.randn(4, 8),), dynamic_shapes=dynamic)
    torch.export.save(program, "net.pt2")
    done("export", "net.pt2", "a")
    state = load_trainer("a").state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_layers_that_were_not_taken_are_named(folder: Path) -> None:
    error = refused(1, "export", "shell_nets:Two", "a", "--input-shape", "4,8")
    assert "--layer" in error or "layers=" in error
    text = done("export", "shell_nets:Two", "a", "--input-shape", "4,8", "--layer", "a=0.2")
    assert "not on" in text and "b (linear" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("missing.onnx", "a"), "no such file"),
        (("data.npz", "a"), "kind can't be told"),
        (("shell_nets:fails", "a", "--input-shape", "4,8"), "RuntimeError: no such weights"),
        (("shell_nets:number", "a", "--input-shape", "4,8"), "a int"),
        (("shell_nets:missing", "a"), "AttributeError"),
        (("no_such_module:net", "a"), "ModuleNotFoundError"),
        (("shell_nets:conv", "a"), "--input-shape"),
        (("mlp.onnx", "a", "--lambda", "0"), "λ"),
        (("mlp.onnx", "a", "--layer", "w9"), "'w9': no linear layer"),
        (("mlp.onnx", "a", "--layer", "W1"), "Did you mean 'w1'?"),
        (("mlp.onnx", "a", "--trainable", "w9"), "'w9'"),
        (("mlp.onnx", "a", "--lr", "-1"), "lr"),
        (("mlp.onnx", "a", "--input-shape", "4,9"), "(4, 9)"),
        (("mlp.onnx", "there"), "--overwrite"),
    ],
)
def test_export_refuses(arguments: tuple[str, ...], reason: str, folder: Path) -> None:
    Path("there").mkdir()
    Path("there", "own.txt").write_text("mine")
    assert reason in refused(1, "export", *arguments)
    assert not Path("a").exists()
    assert [file.name for file in Path("there").iterdir()] == ["own.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "mlp.onnx"),
        ("export", "mlp.onnx", "a", "--momentum", "0.9"),
        ("export", "mlp.onnx", "a", "--nesterov"),
        ("export", "mlp.onnx", "a", "--plain", "--lambda", "0.1"),
        ("export", "mlp.onnx", "a", "--layer", "w1=much"),
        ("export", "mlp.onnx", "a", "--input-shape", "4,x"),
        ("export", "mlp.onnx", "a", "--input-shape", "4,8:number"),
        ("export", "mlp.onnx", "a", "--input-shape", "x=4,8", "--input-shape", "4,8"),
        ("export", "mlp.onnx", "a", "--optimizer", "lion"),
        ("rewrite", "mlp.onnx"),
        ("rewrite", "mlp.onnx", "--in-place", "-o", "b.onnx"),
        ("rewrite", "mlp.onnx", "-o", "b.onnx", "--remove", "--lambda", "0.1"),
        ("train", "a"),
        ("train", "a", "--data", "data.npz", "--save", "b", "--epochs", "0"),
        ("dance",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], folder: Path) -> None:
    refused(2, *arguments)
    assert not Path("a").exists()


def test_the_nearest_name_of_a_loss(folder: Path) -> None:
    for name, says in (
        ("crossentropy", "Did you mean 'cross_entropy'?"),
        ("huber", "loss's name."),
    ):
        error = refused(2, "export", "mlp.onnx", "a", "--loss", name)
        assert f"{says} A shell can take cross_entropy, mse, " in error
    with pytest.raises(UnsupportedTrainingError, match=r"Did you mean 'cross_entropy'\?"):
        export_training("mlp.onnx", None, "a", loss="CrossEntropyLoss")
    with pytest.raises(UnsupportedTrainingError, match=r"Did you mean 'adamw'\?"):
        export_training("mlp.onnx", None, "a", optimizer="Adam")


def test_an_export_says_what_it_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(reporting, "messages", lambda: terminal)
    assert run("export", "mlp.onnx", "a", "--no-verify").exit_code == 0, shown.getvalue()
    assert "Exporting mlp.onnx: writing the directory" in shown.getvalue()


def test_debug_shows_the_traceback(folder: Path) -> None:
    result = run("export", "shell_nets:fails", "a", "--input-shape", "4,8", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError | TypeError)
    assert isinstance(result.exception.__cause__, RuntimeError)


def test_a_frozen_first_layer_is_a_warning_of_one_line(folder: Path) -> None:
    result = run("export", "mlp.onnx", "a", "--trainable", "w2")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("warning: w1") and result.stderr.count("\n") == 1


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(module: str, name: str) -> Any:
        raise MissingRuntimeError(
            f"{name} needs the package onnx", "it is not there", "pip install"
        )

    monkeypatch.setattr(extras, "load", load)
    for arguments in (
        ("export", "mlp.onnx", "a"),
        ("rewrite", "mlp.onnx", "-o", "b.onnx"),
        ("train", "a", "--data", "data.npz", "--save", "b"),
    ):
        assert "the package onnx" in refused(1, *arguments)


@pytest.fixture
def theirs(folder: Path) -> Path:
    """A training graph as somebody else's generate_artifacts call writes it."""
    Path("theirs").mkdir()
    training_graph(mlp(), Path("theirs"), ["w1", "b1", "w2", "b2"])
    return Path("theirs", "training_model.onnx")


def lambdas(path: object) -> dict[str, float]:
    return present_lambdas(as_ir_model(Path(str(path))))


def test_rewrite(theirs: Path) -> None:
    content = {file: file.read_bytes() for file in theirs.parent.iterdir()}
    text = done("rewrite", theirs, "-o", "new/out.onnx", "--lambda", 0.3)
    assert "TrAct is on: w1" in text and "λ = 0.3" in text and "new/out.onnx" in text
    assert lambdas("new/out.onnx") == {"MatMul_h": 0.3}
    expected = tract_onnx_pass(theirs, lambda_=0.3)
    assert Path("new/out.onnx").read_bytes() == expected.SerializeToString()
    assert {file: file.read_bytes() for file in theirs.parent.iterdir()} == content
    assert [file.name for file in Path("new").iterdir()] == ["out.onnx"]

    before = Path("new/out.onnx").read_bytes()
    assert "--overwrite" in refused(1, "rewrite", theirs, "-o", "new/out.onnx")
    assert Path("new/out.onnx").read_bytes() == before
    text = done("rewrite", theirs, "-o", "new/out.onnx", "--overwrite", "--layer", "w2=0.7")
    assert lambdas("new/out.onnx") == {"MatMul_o": 0.7}


def test_rewrite_in_place_and_back(theirs: Path) -> None:
    os.chmod(theirs, 0o640)
    done("rewrite", theirs, "--in-place")
    assert lambdas(theirs) == {"MatMul_h": 0.1}
    text = done("rewrite", theirs, "--in-place", "--lambda", 0.2)
    assert "was on" in text and lambdas(theirs) == {"MatMul_h": 0.2}
    assert "was on" in done("rewrite", theirs, "--in-place", "--remove")
    assert lambdas(theirs) == {}
    assert "there was none" in done("rewrite", theirs, "--in-place", "--remove")
    assert theirs.stat().st_mode & 0o777 == 0o640
    assert sum(file.name.endswith(".tmp") for file in theirs.parent.iterdir()) == 0


def test_rewrite_that_fails_leaves_the_file(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = theirs.read_bytes()

    def fail(source: object, place: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert "No space left" in refused(1, "rewrite", theirs, "--in-place")
    assert theirs.read_bytes() == before
    assert sum(file.name.endswith(".tmp") for file in theirs.parent.iterdir()) == 0


def test_rewrite_refuses(theirs: Path, exported: Path) -> None:
    assert "training graph" in refused(1, "rewrite", "mlp.onnx", "-o", "out.onnx")
    assert "'w9'" in refused(1, "rewrite", theirs, "-o", "out.onnx", "--layer", "w9")
    assert "can't be read" in refused(1, "rewrite", "data.npz", "-o", "out.onnx")
    assert "directory" in refused(1, "rewrite", theirs, "-o", ".", "--overwrite")
    error = refused(1, "rewrite", "a/training_model.onnx", "--in-place")
    assert "manifest" in error
    load_trainer("a")
    assert not Path("out.onnx").exists()


def assert_equal(first: OrtTrainer, second: OrtTrainer) -> None:
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def trained_by_hand(epochs: int) -> OrtTrainer:
    """What the command does with --seed 4 and --batch-size 16: another order in each epoch."""
    trainer = load_trainer("a")
    x, target = data(50)
    for epoch in range(epochs):
        order = np.random.default_rng([4, 4 * epoch]).permutation(50)
        for start in range(0, 50, 16):
            rows = order[start : start + 16]
            trainer.train_step(x[rows], target[rows])
    return trainer


def test_train(exported: Path) -> None:
    """Two epochs and two more are four; the last batch is short; losses are those of the graph."""
    options = ("--data", "data.npz", "--batch-size", 16, "--seed", 4)
    whole = done("train", "a", *options, "--epochs", 4, "--save", "b", "--eval-data", "data.npz")
    done("train", "a", *options, "--epochs", 2, "--save", "c")
    assert_equal(trained_by_hand(2), load_trainer("c"))
    done("train", "c", *options, "--epochs", 2, "--save", "c", "--overwrite")
    first, second = (load_trainer(name) for name in "bc")
    assert first.updates == second.updates == 16
    assert_equal(first, second)
    x, target = data(50)
    parts = [slice(start, start + 16) for start in range(0, 50, 16)]
    loss = sum(first.evaluate(x[p], target[p]) * len(x[p]) for p in parts) / 50
    accuracy = (np.asarray(first.predict(x)).argmax(axis=1) == target).mean()
    lines = whole.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [f"epoch {i}" for i in range(1, 5)]
    assert f"eval loss {loss:.6g}, accuracy {accuracy:.2%}" in lines[3]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[:4]]
    assert losses[3] < losses[0]
    assert "Saved: b (16 updates)" in whole


@pytest.mark.parametrize(
    ("classes", "ignored", "counts"),
    [(3, None, (2, 4)), (3, 2, (1, 3)), (3, -100, (2, 4)), (None, None, (0, 0))],
)
def test_accuracy_is_of_class_indices_that_count(
    classes: int | None, ignored: int | None, counts: tuple[int, int]
) -> None:
    """Whatever the loss is called, by what the manifest says of the target."""
    target = TensorSpec("y", "int64", ("batch",), classes, ignored)
    scores = np.eye(3, dtype=np.float32)[[0, 2, 2, 1]]
    trainer: Any = SimpleNamespace(
        manifest=SimpleNamespace(targets=(target,), inputs=()), predict=lambda: scores
    )
    assert _right_classes(trainer, {"y": np.array([0, 1, 2, 0])}) == counts


def test_train_with_accumulation_ends_at_an_update(folder: Path) -> None:
    done("export", "mlp.onnx", "a", "--accumulate", 3)
    done("train", "a", "--data", "data.npz", "--batch-size", 25, "--epochs", 5, "--save", "b")
    assert (load_trainer("b").batches, load_trainer("b").updates) == (9, 3)
    error = refused(1, "train", "a", "--data", "data.npz", "--epochs", 1, "--save", "c")
    assert "micro-batches" in error


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": (5, 8)}, "target"),
        ({"x": (5, 8), "target": (4,)}, "x: 5, target: 4"),
        ({"x": (0, 8), "target": (0,)}, "above zero"),
        ({"x": (5, 9), "target": (5,)}, "(5, 9)"),
        ({"x": (5, 8), "target": (5, 1)}, "(5, 1)"),
    ],
)
def test_data_that_does_not_fit(
    arrays: dict[str, tuple[int, ...]], reason: str, exported: Path
) -> None:
    dtypes = {"x": np.float32, "target": np.int64}
    zeros = {name: np.zeros(shape, dtypes[name]) for name, shape in arrays.items()}
    np.savez("odd.npz", **zeros)  # type: ignore[arg-type]
    assert reason in refused(1, "train", "a", "--data", "odd.npz", "--save", "b")
    assert not Path("b").exists()


def test_train_refuses(exported: Path) -> None:
    options = ("--save", "b")
    assert "data.txt" in refused(1, "train", "a", "--data", "data.txt", *options)
    Path("data.txt").write_text("1 2 3")
    assert ".npz" in refused(1, "train", "a", "--data", "data.txt", *options)
    np.save("alone.npy", np.zeros((2, 6), np.float32))
    assert ".npz" in refused(1, "train", "a", "--data", "alone.npy", *options)
    np.savez("objects.npz", x=np.array([None, {}]), target=np.zeros(2, np.int64))
    assert ".npz" in refused(1, "train", "a", "--data", "objects.npz", *options)
    assert "missing" in refused(1, "train", "missing", "--data", "data.npz", *options)
    error = refused(1, "train", "a", "--data", "data.npz", "--save", "a")
    assert "--overwrite" in error
    # Before the training, not behind it.
    error = refused(1, "train", "a", "--data", "data.npz", "--save", "data.npz/b")
    assert "(Not a directory): the system refuses" in error
    assert "tpu" in refused(1, "train", "a", "--data", "data.npz", *options, "--device", "tpu")


def test_as_processes(folder: Path) -> None:
    """The entry points themselves: output and errors on their streams, the exit codes."""
    script = folder / "command.py"
    script.write_text("from tract_fx.shell.app import app; app()")
    made = run_script(script, "export", "mlp.onnx", "a", cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "TrAct" in made.stdout
    assert made.stderr == ""
    command = [sys.executable, "-m", "tract_fx", "rewrite", "mlp.onnx", "--in-place"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
