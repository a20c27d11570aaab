"""Training in any ONNX Runtime, the update in the graph, beside PyTorch's in float64."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from forked import run_script
from nets import NETS, SIZE
from onnx_models import by_hand
from oracle import Spec as Layer
from oracle import relative_error, tract_gradient
from ort_reference import (
    Exported,
    assert_gradients,
    assert_same_state,
    export,
    seeded,
    without_dropout,
)
from tract_fx import (
    SGD,
    AdamW,
    import_onnx,
    inspect_graph,
    load_trainer,
    tract_module,
)
from tract_fx.errors import (
    DamagedArtifactsError,
    ExportError,
    MissingRuntimeError,
    TrainerStateError,
    UnsupportedModelError,
)
from tract_fx.ort_training import Device, session_options
from tract_fx.passes import find_onnx_input_layers, remove_tract_onnx
from tract_fx.step import expand

TESTS = Path(__file__).parent
CLASSES = 5

write = functools.partial(export, target="onnxruntime")


class Net(nn.Module):
    """Smooth, so that runs stay together; with running statistics, and dropout if wanted."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(dropout)
        self.head = nn.Linear(6 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x))).flatten(1)
        return self.head(self.drop(hidden))  # type: ignore[no-any-return]


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator) + 0.3, torch.arange(count) % CLASSES


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [batch((6, 4)[i % 2], i) for i in range(count)]


def model(dropout: float = 0.0) -> nn.Module:
    return tract_module(seeded(lambda: Net(dropout)), batch(2)[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The model with an update by SGD; its folder is nobody's to change."""
    folder = tmp_path_factory.mktemp("step") / "a"
    return write(model(), batch(4)[0], folder, optimizer=SGD(lr=0.1))


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(exported.directory, tmp_path / "a"))


Optimizer = Callable[..., torch.optim.Optimizer]


def groups(parameters: Any, **settings: float) -> torch.optim.Optimizer:
    """AdamW with other weight decays for biases and the norm."""
    weight, gain, shift, head, bias = parameters
    chosen: list[dict[str, Any]] = [
        {"params": [weight, head]},
        {"params": [shift, bias], "weight_decay": 0.0},
        {"params": [gain], "weight_decay": 0.2},
    ]
    return torch.optim.AdamW(chosen, **settings)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, tuple[SGD | AdamW, Optimizer]] = {
    "sgd": (SGD(lr=0.1), functools.partial(torch.optim.SGD, lr=0.1)),
    "momentum": (
        SGD(lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.05, max_grad_norm=0.5),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.05),
    ),
    "nesterov": (
        SGD(lr=0.05, momentum=0.9, weight_decay=0.02, nesterov=True),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.02, nesterov=True),
    ),
    "adamw, groups": (
        AdamW(lr=1e-2, weight_decay=0.5, weight_decays={"*.bias": 0.0, "norm.*": 0.2}),
        lambda parameters: groups(parameters, lr=1e-2, weight_decay=0.5),
    ),
    "adamw": (
        AdamW(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, max_grad_norm=0.5),
        functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_a_schedule(name: str, tmp_path: Path) -> None:
    config, reference = OPTIMIZERS[name]
    exported = write(model(), batch(4)[0], tmp_path / "a", optimizer=config)
    trainer, run = exported.trainer(), exported.run(reference)
    run.clip = config.max_grad_norm
    for i, (x, y) in enumerate(batches(10)):
        for group in run.optimizer.param_groups:
            group["lr"] = trainer.learning_rate = config.lr * (1 + i % 3)
        assert trainer.train_step(x, y) == pytest.approx(run.step(x, y), rel=1e-5)
    # AdamW divides a gradient by its size, and with it what is rounded in small ones.
    assert_same_state(trainer, run, 2e-5)
    moved = trainer.state_dict()["first.weight"]
    assert relative_error(moved.numpy(), exported.model.state_dict()["first.weight"]) > 1e-3
    x = batch(3)[0]
    assert relative_error(np.asarray(trainer.predict(x)), torch.tensor(run.predict(x))) < 1e-5


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_networks(name: str, tmp_path: Path) -> None:
    net = seeded(lambda: without_dropout(NETS[name]()))
    x = torch.randn(4, 3, SIZE, SIZE)
    exported = write(tract_module(net, x), x, tmp_path / "a", optimizer=SGD(lr=1e-3))
    trainer, run = exported.trainer(), exported.run(functools.partial(torch.optim.SGD, lr=1e-3))
    for count in (4, 3, 4):
        x, y = torch.randn(count, 3, SIZE, SIZE), torch.arange(count) % 10
        assert trainer.train_step(x, y) == pytest.approx(run.step(x, y), rel=2e-5)


def test_gradients_are_tract_s(tmp_path: Path) -> None:
    net = seeded(Net)
    exported = write(tract_module(net, batch(2)[0], lambda_=0.3), batch(4)[0], tmp_path / "a")
    trainer = exported.trainer()
    for count in (1, 6):
        x, y = batch(count)
        assert_gradients(trainer.compute_gradients(x, y), exported.gradients(x, y))
        plain: Any = copy.deepcopy(net).double()
        x = x.double()
        z = plain.first(x)
        z.retain_grad()
        F.cross_entropy(plain.head(torch.tanh(plain.norm(z)).flatten(1)), y).backward()
        assert z.grad is not None
        wanted = tract_gradient(Layer.of(plain.first), x, z.grad, 0.3)
        assert (
            relative_error(trainer.compute_gradients(*batch(count))["first.weight"], wanted) < 1e-5
        )


def test_without_float64_coarse_input_gives_nan(tmp_path: Path) -> None:
    exported = write(model(), batch(4)[0], tmp_path / "a", float64=False)
    text = (tmp_path / "a" / "training_model.onnx").read_bytes()
    made = [
        v for node in _nodes(ir.from_proto(onnx.load_from_string(text)).graph) for v in node.outputs
    ]
    tract = [v for v in made if str(v.name).startswith("tract/")]
    assert tract and not any(v.dtype == ir.DataType.DOUBLE for v in tract)
    trainer = exported.trainer()
    for count in (1, 6):  # fewer rows than columns, and more
        x, y = batch(count)
        assert_gradients(trainer.compute_gradients(x, y), exported.gradients(x, y))
        found = trainer.compute_gradients(100 + 50 * x, y)
        assert np.isnan(found["first.weight"]).all()
        assert np.isfinite(found["head.weight"]).all()
    verification = inspect_graph(tmp_path / "a", batch(6)).verification
    assert verification is not None and verification.verdict == "right"


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph())


def test_lambda_is_an_input(exported: Exported) -> None:
    """With a value of its own, which a feed replaces for one step."""
    session = onnxruntime.InferenceSession(exported.directory / "training_model.onnx")
    state = {n: t.detach().numpy() for n, t in exported.model.state_dict().items()}
    x, y = batch(6)
    given = {
        "x": x.numpy(),
        "target": y.numpy(),
        "learning_rate": np.float32(1),
        "step": np.int64(0),
    }
    feeds = {i.name: np.asarray({**state, **given}[i.name]) for i in session.get_inputs()}
    names = [value.name for value in session.get_overridable_initializers()]
    assert names == ["tract/first/lambda"]
    for lambda_ in (0.1, 0.7):
        (new,) = session.run(
            ["first.weight_new"], {**feeds, names[0]: np.array(lambda_, np.float32)}
        )
        other = tract_module(seeded(Net), x, lambda_=lambda_).double()
        F.cross_entropy(other(x.double()), y).backward()
        wanted = other.get_parameter("first.weight").grad
        assert wanted is not None
        assert relative_error(state["first.weight"] - new, wanted) < 1e-4
    plain = remove_tract_onnx(exported.directory / "training_model.onnx")
    session = onnxruntime.InferenceSession(plain.SerializeToString())
    (new,) = session.run(["first.weight_new"], feeds)  # without λ
    other = seeded(Net).double()
    F.cross_entropy(other(x.double()), y).backward()
    wanted = other.get_parameter("first.weight").grad
    assert wanted is not None
    assert relative_error(state["first.weight"] - new, wanted) < 1e-4


def test_providers_by_name(exported: Exported) -> None:
    """The one that every build has, by its name and with options; any other starts or is named."""
    losses = []
    names: list[Any] = ["cpu", "CPUExecutionProvider", ("CPUExecutionProvider", {})]
    for device in names:
        trainer = load_trainer(exported.directory, device=device)
        assert trainer.device == "cpu"
        losses.append([trainer.train_step(x, y) for x, y in batches(3)])
    assert losses[0] == losses[1] == losses[2]
    others: list[Any] = ["NoSuchExecutionProvider", ("CUDAExecutionProvider", {"device_id": 7})]
    for device in others:
        with pytest.raises(MissingRuntimeError, match=r"Execution"):
            load_trainer(exported.directory, device=device)


def test_accumulation_is_the_mean_gradient(tmp_path: Path) -> None:
    config = AdamW(lr=1e-2, accumulate=3, max_grad_norm=0.5)
    exported = write(model(), batch(4)[0], tmp_path / "a", optimizer=config)
    trainer = exported.trainer()
    run = exported.run(functools.partial(torch.optim.AdamW, lr=1e-2))
    for i, (x, y) in enumerate(batches(9)):
        loss = exported.loss_of(run.model, x, y)
        (loss / 3).backward()
        assert trainer.train_step(x, y) == pytest.approx(float(loss.detach()), rel=1e-5)
        if i % 3 == 2:
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
            run.optimizer.step()
            run.optimizer.zero_grad()
        elif i == 1:
            with pytest.raises(TrainerStateError, match="1 times more"):
                trainer.save(tmp_path / "b")
    assert (trainer.updates, trainer.batches) == (3, 9)
    assert_same_state(trainer, run, 2e-5)


RESUMED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_stock_runtime import batches
from tract_fx import load_trainer

trainer = load_trainer(sys.argv[2])
for x, y in batches(6)[3:]:
    trainer.train_step(x, y)
trainer.save(sys.argv[3])
"""


def test_resumed_in_another_process_bit_for_bit(tmp_path: Path) -> None:
    """Dropout, momentum, running statistics, the learning rate and the counts."""
    config = AdamW(lr=1e-2)
    exported = write(model(0.4), batch(4)[0], tmp_path / "a", optimizer=config, seed=3)
    whole, first = exported.trainer(), exported.trainer()
    first.learning_rate = whole.learning_rate = 5e-3
    losses = [whole.train_step(x, y) for x, y in batches(6)]
    assert losses[:3] == [first.train_step(x, y) for x, y in batches(3)]
    first.save(tmp_path / "half")
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED)
    done = run_script(script, str(TESTS), str(tmp_path / "half"), str(tmp_path / "end"))
    assert done.returncode == 0, done.stderr
    end = load_trainer(tmp_path / "end")
    assert (end.updates, end.batches, end.learning_rate) == (6, 6, 5e-3)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, end.state_dict()[key]), key
    x, y = batch(5)
    assert end.train_step(x, y) == whole.train_step(x, y)
    other = load_trainer(tmp_path / "a", seed=4)
    assert other.train_step(*batches(1)[0]) != losses[0]


def test_the_saved_model_is_pytorch_s(exported: Exported, tmp_path: Path) -> None:
    trainer = exported.trainer()
    for x, y in batches(3):
        trainer.train_step(x, y)
    trainer.save(tmp_path / "b")
    back = seeded(Net, 7)
    back.load_state_dict(load_file(tmp_path / "b" / "model.safetensors"))
    x = batch(3)[0]
    with torch.no_grad():
        assert relative_error(np.asarray(trainer.predict(x)), back.eval()(x)) < 1e-5
    fresh = exported.trainer()
    fresh.load_state_dict(back.state_dict())
    np.testing.assert_array_equal(fresh.predict(x), trainer.predict(x))
    fresh.load(tmp_path / "b")
    assert fresh.train_step(*batch(4)) == trainer.train_step(*batch(4))


class Mixed(nn.Module):
    """Tied weights, a single number, a frozen parameter, a constant, a layer without gradients."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Linear(12, 12), nn.Linear(12, 12)
        self.mid.weight, self.factor = self.first.weight, nn.Parameter(torch.tensor(1.5))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12), requires_grad=False)
        self.register_buffer("mean", torch.linspace(-1, 1, 12))
        self.unused, self.head = nn.Linear(2, 2), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x - self.mean)) * self.scale
        return self.head(torch.tanh(self.mid(hidden)) * self.factor)  # type: ignore[no-any-return]


def test_what_is_tied_frozen_and_unused(tmp_path: Path) -> None:
    x = torch.randn(4, 12)
    net = tract_module(seeded(Mixed), x, layers=["first"])
    exported = write(net, x, tmp_path / "a", optimizer=SGD(lr=0.1, momentum=0.9))
    trainer = exported.trainer()
    run = exported.run(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    for seed in range(4):
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        y = torch.arange(5)
        assert trainer.train_step(x, y) == pytest.approx(run.step(x, y), rel=1e-5)
    assert_same_state(trainer, run, 1e-5)


@pytest.mark.parametrize("name", ["factor_new", "factor_grad", "factor.momentum_buffer_new"])
def test_names_of_its_own_are_refused(name: str, tmp_path: Path) -> None:
    proto = by_hand(
        "h = MatMul (x, w) y = Mul (h, factor)",
        {"w": (12, CLASSES), "factor": (CLASSES,)},
        "float[N,12] x",
        f"float[N,{CLASSES}] y",
    )
    proto.graph.input[0].name = proto.graph.node[0].input[0] = name
    with pytest.raises(ExportError, match=rf"name '{name}'.*Rename"):
        write(proto, None, tmp_path / "a", optimizer=SGD(lr=0.1, momentum=0.9))
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_framework(tmp_path: Path) -> None:
    proto = by_hand(
        "h = MatMul (x, w1) a = Add (h, b1) r = Tanh (a) o = MatMul (r, w2) y = Add (o, b2)",
        {"w1": (8, 6), "b1": (6,), "w2": (6, 3), "b2": (3,)},
        "float[N,8] x",
        "float[N,3] y",
    )
    write(proto, None, tmp_path / "a", optimizer=SGD(lr=0.1))
    trainer = load_trainer(tmp_path / "a")
    values = {n: v.double().requires_grad_() for n, v in trainer.state_dict().items()}
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    y, lambda_ = torch.arange(20) % 3, 0.1
    z = x.double() @ values["w1"] + values["b1"]
    z.retain_grad()
    F.cross_entropy(torch.tanh(z) @ values["w2"] + values["b2"], y).backward()
    assert z.grad is not None
    found = trainer.compute_gradients(x, y)
    assert relative_error(found["w1"].T, tract_gradient(Layer("linear"), x, z.grad, lambda_)) < 1e-5
    for name in ("b1", "w2", "b2"):
        wanted = values[name].grad
        assert wanted is not None
        assert relative_error(found[name], wanted) < 1e-5


def test_verification_sees_a_lost_lambda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = expand.insert  # type: ignore[attr-defined]

    def insert(graph: Any, name: str, gradient: Any, lambda_: Any, *more: Any) -> None:
        real(graph, name, gradient, lambda_ * np.float32(1.02), *more)

    monkeypatch.setattr(expand, "insert", insert)
    with pytest.raises(ExportError, match="TrAct's weight gradient"):
        write(model(), batch(4)[0], tmp_path / "a", verify=True)
    assert not list(tmp_path.iterdir())


def test_tensors_of_another_model_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DamagedArtifactsError):
        load_trainer(folder)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "float16"}, {"plain": True}], ids=["float32", "float16", "plain"]
)
def test_a_step_is_inspected_without_its_update(options: dict[str, Any], tmp_path: Path) -> None:
    config = AdamW(accumulate=2, max_grad_norm=1.0)
    write(model(), batch(4)[0], tmp_path / "a", optimizer=config, **options)
    for subject in (tmp_path / "a", tmp_path / "a" / "training_model.onnx"):
        inspection = inspect_graph(subject, batch(6), backward="expanded")
        assert [layer.record.name for layer in inspection.layers] == ["first"]
        verification = inspection.verification
        assert verification is not None
        if "plain" in options:
            assert verification.weights == ()
            continue
        assert verification.verdict == "right"
        assert verification.weights[0].operator.error < 1e-5
        assert {f"gradient of {n}" for n in ("norm.weight", "norm.bias", "head.weight")} < {
            check.name for check in verification.others
        }
        rounded = any("float16" in note for note in inspection.notes)
        assert rounded == ("precision" in options and subject.is_dir())


def test_an_altered_lambda_is_seen(folder: Path) -> None:
    file = folder / "training_model.onnx"
    graph = ir.load(file)
    value = graph.graph.initializers["tract/first/lambda"]
    value.const_value = ir.tensor(np.array(0.2, np.float32), name=value.name)
    ir.save(graph, file)
    inspection = inspect_graph(file)
    assert inspection.layers[0].record.lambda_ == pytest.approx(0.2)


def test_a_step_leaves_no_gradients(exported: Exported) -> None:
    """Nor is it taken for a forward graph, in which TrAct would be on no layer."""
    trainer = exported.trainer()
    for look in (find_onnx_input_layers, import_onnx):
        with pytest.raises(UnsupportedModelError, match="step for any ONNX Runtime"):
            look(exported.directory / "training_model.onnx")
    trainer.train_step(*batch(4))
    with pytest.raises(TrainerStateError, match="compute_gradients"):
        trainer.gradients()


def test_webgpu_is_asked_for_the_layout_that_is_right() -> None:
    entry = "ep.webgpuexecutionprovider.preferredLayout"
    options = session_options(Device("WebGpuExecutionProvider"))
    assert options.get_session_config_entry(entry) == "NCHW"
    with pytest.raises(RuntimeError, match="preferredLayout"):
        session_options().get_session_config_entry(entry)
