"""The verification of ONNX training graphs: its numbers, and that it fails when TrAct is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreign_models import CASES, Foreign, initializers
from onnx_models import by_hand
from onnx_training import NETS, Training, batch_for, trained
from oracle import Spec, precondition, relative_error, rows, tract_gradient, weight_gradient
from tract_fx import export_training, load_trainer, tract_pass
from tract_fx.artifacts.directory import read_directory
from tract_fx.errors import DamagedArtifactsError, UnsupportedModelError
from tract_fx.inspection.onnx.batch import make_batch
from tract_fx.inspection.onnx.inspection import inspect_onnx
from tract_fx.inspection.onnx.runs import run_with_tract
from tract_fx.inspection.onnx.subject import read_subject
from tract_fx.inspection.records import Verification
from tract_fx.passes import remove_tract_onnx, tract_onnx_pass
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.provenance import PREFIX, PROVENANCE
from tract_fx.passes.onnx_graph.treated import treated_calls, without_tract

CLASSES = 5
# Float32's gradients against float64, through a system of condition ~100.
FLOAT32 = 1e-5


class Net(nn.Module):
    """A first convolution, BatchNorm, dropout and a linear head."""

    def __init__(self, first: nn.Module, features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.BatchNorm2d(features)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        out: Tensor = self.head(self.drop(y).mean((2, 3)))
        return out


@dataclass(frozen=True)
class Case:
    """A model of torch's, and the batch that it is inspected on."""

    first: Callable[[], nn.Module]
    features: int
    dropout: float = 0.0
    channels: int = 3
    batch: int = 6

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(self.batch, self.channels, 8, 8, generator=generator) + 0.3

    def labels(self) -> Tensor:
        return torch.arange(self.batch) % CLASSES

    def net(self) -> Net:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Net(self.first(), self.features, self.dropout).train()


NETWORKS = {
    "conv": Case(lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), 6, dropout=0.3),
    "patchify": Case(lambda: nn.Conv2d(3, 7, 4, stride=4, bias=False), 7),
}


@dataclass
class Exports:
    """Directories of the networks, each written once."""

    folder: Path

    def directory(self, name: str) -> Path:
        place = self.folder / name
        if not place.exists():
            case = NETWORKS[name]
            model = tract_pass(torch.fx.symbolic_trace(case.net()), lambda_=0.2)
            export_training(model, case.images(), place, optimizer="sgd", verify=False)
        return place


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("inspected"))


def verified(model: Any, batch: Any = None) -> Verification:
    """The verification alone."""
    found = inspect_onnx(model, batch, backward=None, statistics=False).verification
    assert found is not None
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_against_pytorch_and_the_oracle(name: str, exports: Exports) -> None:
    """The plain gradient's distance is that of float64's in PyTorch; TrAct's own error is small."""
    case = NETWORKS[name]
    found = verified(exports.directory(name), (case.images(), case.labels()))
    assert found.passed, found
    assert found.problems == ()
    (check,) = found.weights
    assert check.parameter == "first.weight"
    assert check.operator.error < FLOAT32
    assert check.end_to_end is not None and check.floor is not None
    assert check.floor <= check.end_to_end < FLOAT32
    if not case.dropout:  # which draws other numbers in PyTorch
        net, x = case.net().double(), case.images().double()
        z = net.first(x)
        z.retain_grad()
        y = torch.tanh(net.norm(z))
        functional.cross_entropy(net.head(y.mean((2, 3))), case.labels()).backward()
        plain = weight_gradient(net.first, x, z.grad)
        exact = tract_gradient(net.first, x, z.grad, 0.2)
        assert check.plain == pytest.approx(relative_error(plain, exact), rel=1e-4)
    names = {other.name for other in found.others}
    parameters = {n for n, _ in case.net().named_parameters()} - {"first.weight"}
    assert names >= {"output loss", *(f"gradient of {n}" for n in parameters)}
    assert all(other.error < FLOAT32 for other in found.others)
    assert ("drew the same numbers" in found.note) == bool(case.dropout)
    assert verified(exports.directory(name), (case.images(), case.labels())) == found


def test_of_scikit_learn(tmp_path: Path) -> None:
    """A weight that lies as (n, out), read by MatMul; at batches of fewer and of more rows."""
    case: Foreign = CASES["classifier"]
    export_training(case.model(), None, tmp_path / "a", loss=case.loss, verify=False)
    for count in (3, 12):
        x, target = case.batch(count)
        found = verified(tmp_path / "a", (x, target))
        assert found.passed, found
        (check,) = found.weights
        assert check.parameter == case.weight
        floats = {k: v for k, v in initializers(case.model()).items() if v.dtype == np.float32}
        _, plain = case.reference(floats, x, target, None)
        _, exact = case.reference(floats, x, target, 0.1)
        distance = relative_error(plain[case.weight], exact[case.weight])
        assert check.plain == pytest.approx(distance, rel=1e-4)
        gradients = load_trainer(tmp_path / "a").compute_gradients(x, target)
        assert relative_error(gradients[case.weight], exact[case.weight]) < FLOAT32


@pytest.mark.parametrize("net", NETS)
def test_foreign_training_graphs(net: str) -> None:
    """By generate_artifacts and tract_onnx_pass; no checkpoint, open and fixed batch sizes."""
    training = trained(NETS[net][0]())
    found = verified(tract_onnx_pass(training.graph, lambda_=0.3), batch_for(net))
    assert found.passed, found
    assert "Random parameters" in found.note
    nothing = verified(training.graph, batch_for(net))
    assert not nothing.passed
    assert "No TrAct: every gradient in this training graph is the plain one" in nothing.problems


def test_gemm_with_a_scale_and_a_transposed_input() -> None:
    """Rows are the input's columns, and gW = alpha · xᵀ dz."""
    model = by_hand(
        "y = Gemm<alpha=3.0, transA=1>(x, w, b) h = Tanh(y) q = Mul(h, t) "
        "loss = ReduceSum<keepdims=0>(q)",
        {"w": (6, 5), "b": (5,)},
        "float[6,N] x, float[N,5] t",
        "float loss",
        20,
    )
    graph = tract_onnx_pass(trained(model, ("w", "b")).graph, lambda_=0.3)
    generator = np.random.default_rng(0)
    for count in (4, 9):
        x = generator.normal(size=(6, count)).astype(np.float32)
        t = generator.normal(size=(count, 5)).astype(np.float32)
        found = inspect_onnx(graph, (x, t), backward=None, statistics=False)
        assert found.verification is not None and found.verification.passed, found.verification
        assert found.layers[0].rows == count
        # The graph's parameters are random where it has no checkpoint: those of the inspection.
        (check,) = found.verification.weights
        assert check.end_to_end is not None and check.end_to_end < FLOAT32


def test_a_layer_that_is_called_twice() -> None:
    """Two terms of one gradient, each with TrAct; losing one of them shows."""
    model = by_hand(
        "y = MatMul(x, w) z = MatMul(u, w) s = Mul(y, z) h = Tanh(s) q = Mul(h, t) "
        "loss = ReduceSum<keepdims=0>(q)",
        {"w": (6, 5)},
        "float[N,6] x, float[N,6] u, float[N,5] t",
        "float loss",
        20,
    )
    graph = ir.from_proto(tract_onnx_pass(trained(model, ("w",)).graph))
    found = verified(graph)
    assert found.passed, found
    (check,) = found.weights
    assert len(check.nodes) == 2
    term = next(v for n in graph.graph for v in n.outputs if v.name == "w_grad_0")
    plain = plain_value(graph, next(iter(calls_of(graph))))
    for node, index in list(term.uses()):
        node.replace_input_with(index, plain)
    lost = verified(graph)
    assert not lost.passed
    assert lost.weights[0].operator.error > 0.01


def written(training: Training, graph: onnx.ModelProto, place: Path) -> Path:
    """A training graph and its checkpoint as generate_artifacts leaves them."""
    onnx.save(graph, place / "training_model.onnx")
    (place / "checkpoint").write_bytes(training.checkpoint)
    return place / "training_model.onnx"


def test_the_checkpoint_beside_a_grouped_convolution(tmp_path: Path) -> None:
    """Padded, dilated, two groups; the gradients at the checkpoint's values, by PyTorch."""
    model = by_hand(
        "y = Conv<pads=[2, 2, 2, 2], dilations=[2, 2], group=2>(x, w) h = Tanh(y) q = Mul(h, t) "
        "loss = ReduceSum<keepdims=0>(q)",
        {"w": (6, 2, 3, 3)},
        "float[N,4,7,7] x, float[N,6,7,7] t",
        "float loss",
        20,
    )
    training = trained(model, ("w",))
    file = written(training, tract_onnx_pass(training.graph, lambda_=0.2), tmp_path)
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(3, c, 7, 7, generator=generator) for c in (4, 6))
    found = verified(file, (x, t))
    assert found.passed and "Random" not in found.note, found
    (check,) = found.weights
    weight = torch.tensor(initializers(model)["w"]).double()
    z = functional.conv2d(x.double(), weight, padding=2, dilation=2, groups=2).requires_grad_()
    (torch.tanh(z) * t).sum().backward()
    assert z.grad is not None
    spec = Spec("conv", (3, 3), (1, 1), 2, "zeros", (2, 2), 2)
    plain, exact = weight_gradient(spec, x, z.grad), tract_gradient(spec, x, z.grad, 0.2)
    assert check.plain == pytest.approx(relative_error(plain, exact), rel=1e-4)
    assert check.end_to_end is not None and check.end_to_end < FLOAT32


def test_a_computed_weight(tmp_path: Path) -> None:
    """w = v · s: the chain rule behind TrAct's result is the graph's own, to both parameters."""
    model = by_hand(
        "w = Mul(v, s) y = MatMul(x, w) h = Tanh(y) q = Mul(h, t) loss = ReduceSum<keepdims=0>(q)",
        {"v": (6, 5), "s": (1, 5)},
        "float[N,6] x, float[N,5] t",
        "float loss",
        20,
    )
    training = trained(model, ("v", "s"))
    file = written(training, tract_onnx_pass(training.graph), tmp_path)
    found = verified(file, batch_of(9))
    assert found.passed, found
    assert {check.parameter for check in found.weights} == {"v", "s"}
    for check in found.weights:
        assert check.operator.error < FLOAT32 < check.plain
        assert check.end_to_end is not None and check.end_to_end < FLOAT32
    graph = onnx.load(file)
    accumulated = next(n for n in graph.graph.node if "v_grad.acc" in n.output[0])
    chain = next(n for n in graph.graph.node if accumulated.input[1] in n.output)
    while "w_grad" not in chain.input:  # through what sums up the broadcast
        chain = next(n for n in graph.graph.node if chain.input[0] in n.output)
    chain.input[list(chain.input).index("w_grad")] = f"{PREFIX}MatMul_y/plain_gradient"
    lost = verified(written(training, graph, tmp_path), batch_of(9))
    assert not lost.passed
    failed = [c.parameter for c in lost.weights if not c.operator.passed]
    assert failed == ["v"]
    assert "past TrAct" in lost.problems[0]


def batch_of(count: int) -> tuple[np.ndarray[Any, Any], ...]:
    generator = np.random.default_rng(0)
    return tuple(generator.normal(size=(count, n)).astype(np.float32) for n in (6, 5))


# The ways to lose it. Each edits a graph that was right.


def calls_of(model: ir.Model) -> dict[str, str]:
    """The terms by the calls that TrAct is on."""
    records = [n.metadata_props[PROVENANCE] for n in model.graph if PROVENANCE in n.metadata_props]
    return {entry["call"]: entry["term"] for entry in map(json.loads, records)}


def plain_value(model: ir.Model, call: str) -> ir.Value:
    name = f"{PREFIX}{call}/plain_gradient"
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def accumulators_read_the_plain_gradient(model: ir.Model) -> None:
    (call,) = calls_of(model)
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == calls_of(model)[call]:
                node.replace_input_with(index, plain_value(model, call))


def a_node_of_the_pass_hands_the_plain_gradient_on(model: ir.Model) -> None:
    ((call, term),) = calls_of(model).items()
    last = next(n for n in model.graph if any(v.name == term for v in n.outputs))
    copy = ir.node("Identity", [plain_value(model, call)], name="copy")
    copy.metadata_props[PROVENANCE] = last.metadata_props[PROVENANCE]
    result = last.outputs[0]
    result.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
    result.name, copy.outputs[0].name = "aside", term
    model.graph.insert_after(last, copy)


def twice_lambda_in_all_forms(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.op_type == "Where" and PROVENANCE in node.metadata_props:
            ridge, graph = node.outputs[0], node.graph
            assert graph is not None
            double = ir.node("Add", [ridge, ridge], name=f"{node.name}_twice")
            double.outputs[0].name = f"{ridge.name}_twice"
            double.metadata_props[PROVENANCE] = node.metadata_props[PROVENANCE]
            for reader, index in list(ridge.uses()):
                reader.replace_input_with(index, double.outputs[0])
            for index in range(2):
                double.replace_input_with(index, ridge)
            graph.insert_after(node, double)


def patches_of_another_stride(model: ir.Model, form: str = "") -> None:
    for node in model.graph.all_nodes():
        if node.op_type == "Conv" and PROVENANCE in node.metadata_props and form in str(node.name):
            node.attributes.add(ir.AttrInt64s("strides", [1, 1]))


def patches_of_other_entries(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        if name.endswith("/units"):
            assert value.const_value is not None
            array = value.const_value.numpy().copy()
            array[[0, 1]] = array[[1, 0]]
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)


LOST = {
    "rewired": (accumulators_read_the_plain_gradient, "past TrAct"),
    "bypassed": (a_node_of_the_pass_hands_the_plain_gradient_on, ""),
    "another λ": (twice_lambda_in_all_forms, ""),
    "another stride": (patches_of_another_stride, ""),
    "other patches": (patches_of_other_entries, ""),
}


def beside_its_checkpoint(directory: Path, edit: Callable[[ir.Model], None], place: Path) -> Path:
    """An edited training graph in a folder of its own."""
    model = ir.load(directory / "training_model.onnx")
    edit(model)
    model.graph.sort()
    ir.save(model, place / "training_model.onnx")
    shutil.copy(directory / "checkpoint", place)
    return place / "training_model.onnx"


@pytest.mark.parametrize("way", LOST)
def test_it_fails_when_tract_is_lost(way: str, exports: Exports, tmp_path: Path) -> None:
    edit, problem = LOST[way]
    case = NETWORKS["conv"]
    file = beside_its_checkpoint(exports.directory("conv"), edit, tmp_path)
    found = verified(file, (case.images(), case.labels()))
    assert not found.passed
    assert "Random parameters" not in found.note
    (check,) = found.weights
    assert not check.operator.passed
    if way in {"rewired", "bypassed"}:
        assert check.operator.error == pytest.approx(check.plain, rel=1e-3)
    assert problem in " ".join(found.problems)
    assert bool(problem) == bool(found.problems)
    assert all(o.passed for o in found.others if o.name.startswith(("output", "gradient")))


FORMS = {
    "by_rows/in_float32": "TrAct on first with 16 rows",
    "by_columns/in_float64": "TrAct on first with 96 rows, not standardised",
    "by_rows/in_float64": "TrAct on first with 16 rows, not standardised",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["another stride", "no λ"])
def test_it_fails_for_the_form_that_did_not_run(
    way: str, form: str, exports: Exports, tmp_path: Path
) -> None:
    """The batch has 96 standardised rows; what the graph does with others is verified, too."""
    case = NETWORKS["conv"]

    def edit(model: ir.Model) -> None:
        if way == "another stride":
            patches_of_another_stride(model, f"{form}/")
        for node in model.graph.all_nodes():
            if way == "no λ" and str(node.name).endswith(f"{form}/regularised"):
                node.replace_input_with(1, node.inputs[0])

    file = beside_its_checkpoint(exports.directory("conv"), edit, tmp_path)
    found = verified(file, (case.images(), case.labels()))
    # Another stride makes another number of rows, which ONNX Runtime can't multiply: it may refuse
    # the whole graph for it.
    refused = way == "another stride" and form.startswith("by_rows")
    assert ("ONNX Runtime" in found.note) == refused
    failed = [o.name for o in found.others if not o.passed]
    assert FORMS[form] in failed if refused else failed == [FORMS[form]]
    assert found.weights[0].operator.passed
    assert not found.passed


def test_removed(exports: Exports) -> None:
    plain = remove_tract_onnx(exports.directory("conv") / "training_model.onnx")
    found = verified(plain)
    assert not found.passed
    assert found.weights == () and found.problems[0].startswith("No TrAct")


def test_nodes_without_provenance(exports: Exports) -> None:
    """A tool that drops the metadata: nothing says any more where TrAct is."""
    model = onnx.load(exports.directory("conv") / "training_model.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]
    found = verified(model)
    assert not found.passed
    assert "dropped the nodes' metadata" in found.problems[0]


def test_nodes_that_are_gone(exports: Exports) -> None:
    model = onnx.load(exports.directory("conv") / "training_model.onnx")
    kept = [t for t in model.graph.initializer if not t.name.endswith("/lambda")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    with pytest.raises(UnsupportedModelError, match="lambda"):
        verified(model)


def test_a_lambda_that_was_edited(exports: Exports, tmp_path: Path) -> None:
    """λ is an initializer of the graph, and may be another one: it is what the graph says."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[f"{PREFIX}first/lambda"]
        value.const_value = ir.Tensor(np.asarray(0.7, np.float32), name=value.name)

    file = beside_its_checkpoint(exports.directory("conv"), edit, tmp_path)
    found = inspect_onnx(file, backward=None, statistics=False)
    assert found.layers[0].record.lambda_ == 0.7
    assert found.verification is not None and found.verification.passed


def test_a_manifest_that_says_otherwise(exports: Exports, tmp_path: Path) -> None:
    """A directory whose manifest was made anew for another λ, and for a layer without TrAct."""
    place = tmp_path / "a"
    shutil.copytree(exports.directory("patchify"), place)
    manifest = read_directory(place)
    layer = manifest.layers[0]
    more = dataclasses.replace(layer, name="head", node="node_linear")
    other = dataclasses.replace(layer, lambda_=0.5)
    changed = dataclasses.replace(manifest, layers=(other, more))
    (place / "manifest.json").write_text(changed.to_json(), encoding="utf-8")
    found = verified(place)
    assert not found.passed and found.weights[0].operator.passed
    assert [("0.5" in p and "0.2" in p) or "head" in p for p in found.problems] == [True, True]


def test_a_directory_that_was_altered(exports: Exports, tmp_path: Path) -> None:
    place = tmp_path / "a"
    shutil.copytree(exports.directory("patchify"), place)
    with (place / "training_model.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(DamagedArtifactsError, match="bytes"):
        inspect_onnx(place)


def test_an_input_that_is_not_finite(exports: Exports) -> None:
    case = NETWORKS["patchify"]
    x = case.images()
    x[0, 0, 0, 0] = torch.nan
    assert not verified(exports.directory("patchify"), (x, case.labels())).passed


def test_zero_gradients_verify_nothing() -> None:
    training = trained(NETS["mlp"][0]())
    x, t = batch_for("mlp")
    found = verified(tract_onnx_pass(training.graph), (x, np.zeros_like(t)))
    assert not found.passed
    assert "nothing to compare" in found.problems[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_is_the_oracles(name: str, exports: Exports) -> None:
    """What the calls' own nodes make of one-hot weights: the oracle's rows, to the last bit."""
    case = NETWORKS[name]
    subject = read_subject(exports.directory(name))
    plain, present = without_tract(subject.model)
    located = locate(subject.model, subject.trainable, subject.frozen, present)
    treated, _ = treated_calls(subject.model, plain, located.findings.layers)
    batch = make_batch(subject, {"x": case.images(), "target": case.labels()})
    (call,) = run_with_tract(subject.model, plain, treated, batch).calls
    layer, x = case.net().first, case.images()
    assert call.output_gradient is not None and call.own_gradient is not None
    np.testing.assert_array_equal(call.rows(call.images).numpy(), rows(layer, x))
    exact = weight_gradient(layer, x, call.output_gradient)
    assert relative_error(call.own_gradient, exact) < 1e-12
    assert call.incoming is not None and relative_error(call.incoming, exact) < FLOAT32
    expected = precondition(layer, call.incoming, x, 0.2)
    # Float32's rounding of gW is outside the rows' space, and the oracle divides it by lambda.
    assert relative_error(call.precondition(call.incoming), expected) < FLOAT32
