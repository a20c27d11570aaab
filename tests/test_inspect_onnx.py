"""What an inspection of an ONNX graph shows: layers, forms, what changed, and the backward pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from onnx_models import by_hand, exported_to_onnx
from onnx_training import HEAD, NETS, batch_for, trained
from tract_fx.errors import (
    DamagedArtifactsError,
    FailedRunError,
    InvalidBatchError,
    UnsupportedModelError,
)
from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.onnx.batch import make_batch
from tract_fx.inspection.onnx.inspection import inspect_onnx
from tract_fx.inspection.onnx.subject import read_subject
from tract_fx.inspection.records import GraphView
from tract_fx.passes import remove_tract_onnx, tract_onnx_pass
from tract_fx.passes.onnx_graph.provenance import PREFIX


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    """Training graphs with TrAct."""
    return {name: tract_onnx_pass(trained(build()).graph) for name, (build, _) in NETS.items()}


def shown(model: Any, batch: Any = None, **options: Any) -> Inspection:
    """An inspection without what takes runs of its own."""
    return inspect_onnx(model, batch, **{"verify": False, "statistics": False, **options})


@pytest.mark.parametrize(
    ("net", "count", "form", "gram"),
    [
        (
            "convnet",
            2,
            "Inverse of the Gram (n × n), on the weight's gradient; an If chooses it by the "
            "batch's size",
            "patches by Conv with unit kernels 1×3, pads 1×1×1×1, 4 FusedMatMul per image and "
            "ReduceSum",
        ),
        (
            "convnet-static",
            5,
            "Inverse of the Gram (n × n), on the weight's gradient",
            "patches by Conv with unit kernels 1×3, pads 1×1×1×1, 4 FusedMatMul per image and "
            "ReduceSum",
        ),
        (
            "mlp",
            9,
            "Inverse of the Gram (n × n), on the weight's gradient; an If chooses it by the "
            "batch's size",
            "rows by Reshape, Gemm",
        ),
        (
            "mlp",
            4,
            "Inverse of XXᵀ (R × R), on the output's gradient; an If chooses it by the batch's "
            "size",
            "rows by Reshape, FusedMatMul",
        ),
        (
            "mlp-static",
            5,
            "Inverse of XXᵀ (R × R), on the output's gradient",
            "rows by Reshape, FusedMatMul",
        ),
    ],
)
def test_layers(
    net: str, count: int, form: str, gram: str, graphs: dict[str, onnx.ModelProto]
) -> None:
    inspection = shown(graphs[net], batch_for(net, count))
    (layer,) = inspection.layers
    x = batch_for(net, count)[0]
    columns, per_image = (27, 49) if "conv" in net else (6, 1)
    assert layer.taken and layer.on_input and layer.record.lambda_ == 0.1
    assert layer.record.weight == ("w",)
    assert (layer.rows, layer.columns) == (count * per_image, columns)
    assert (layer.input_shape, layer.input_dtype) == (x.shape, "float32")
    assert layer.form == form
    # The pads' attribute alone: strides and dilations are not stated in this model.
    assert layer.gram == gram
    assert (inspection.kind, inspection.others, inspection.refusals) == ("onnx", 1, ())
    assert inspection.batch.startswith(f"x float32 {'×'.join(map(str, x.shape))}")


def test_the_patchify_form(graphs: dict[str, onnx.ModelProto]) -> None:
    model = by_hand(
        "y = Conv<strides=[4, 4], kernel_shape=[4, 4]>(x, w) h = Relu(y) " + HEAD,
        {"w": (2, 1, 4, 4), "u": (8, 2), "c": (2,)},
        "float[30,1,8,8] x, float[30,2] t",
        "float loss",
        20,
    )
    graph = tract_onnx_pass(trained(model, ("w", "u", "c")).graph)
    (layer,) = shown(graph).layers
    assert layer.gram == "patches by Reshape and Transpose, Gemm"
    assert (layer.rows, layer.columns) == (None, 16)


def test_what_is_not_known_without_a_run(graphs: dict[str, onnx.ModelProto]) -> None:
    inspection = shown(graphs["mlp"])
    (layer,) = inspection.layers
    assert (layer.rows, layer.input_shape, layer.columns) == (None, None, 6)
    assert layer.form == (
        "by the batch's size (If): Inverse of XXᵀ (R × R), on the output's gradient, or Inverse of "
        "the Gram (n × n), on the weight's gradient; in float64 where the input is not "
        "standardised (If)"
    )
    assert inspection.batch == "" and inspection.verification is None
    assert inspection.notes[0].startswith("Nothing was run")


def test_a_layer_that_is_not_on_the_input() -> None:
    training = trained(NETS["mlp"][0]())
    inspection = shown(tract_onnx_pass(training.graph, layers={"u": 0.4}), batch_for("mlp"))
    named, first = inspection.layers
    assert (named.record.weight, named.record.lambda_, named.on_input) == (("u",), 0.4, False)
    assert named.rows == 5 and "named by the user" in named.note
    assert (first.record.weight, first.taken, first.on_input) == (("w",), False, True)
    assert first.note == "TrAct was put on another layer"
    assert inspection.others == 0


def test_plain_training_graphs() -> None:
    """Nothing to run; what the pass would take, and no difference."""
    inspection = inspect_onnx(trained(NETS["convnet"][0]()).graph, batch_for("convnet"))
    (layer,) = inspection.layers
    assert not layer.taken and "the pass would take this one" in layer.note
    assert inspection.forward.before == inspection.forward.after
    assert inspection.forward.lines() == []
    assert inspection.statistics is None
    assert inspection.verification is not None and not inspection.verification.passed
    assert inspection.backward is not None
    assert "tract" not in {node.kind for node in inspection.backward.short.nodes}


def test_lines_of_a_model_that_torch_exported() -> None:
    """torch's exporter notes the line of each node; those of PyTorch's own files don't count."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x / 2).mean((2, 3)))  # type: ignore[no-any-return]

    _, model = exported_to_onnx(Own(), (torch.randn(2, 3, 8, 8),))
    (layer,) = shown(model).layers
    assert layer.source is not None
    assert Path(layer.source.file) == Path(__file__) and "self.stem(x / 2)" in layer.source.text


def test_forward_models(tmp_path: Path) -> None:
    """Layers and refusals as locating gives them; where TrAct goes in."""
    model = by_hand(
        "m = BatchNormalization(x, k, k2, k3, k4) h = Conv(m, w) r = Relu(h) y = Conv(r, v) "
        "z = Conv(x, a)",
        {
            **{k: (3,) for k in ("k", "k2", "k3", "k4")},
            "w": (4, 3, 3, 3),
            "v": (4, 4, 3, 3),
            "a": (2, 3, 1, 1),
        },
        "float[N,3,9,9] x",
        "y, z",
    )
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    inspection = inspect_onnx(file, backward="expanded", whole=True)
    assert [layer.record.weight for layer in inspection.layers] == [("a",)]
    assert [refusal.op for refusal in inspection.refusals] == ["BatchNormalization"]
    assert inspection.subject == str(file)
    assert inspection.backward is None
    assert "export_training" in inspection.notes[0]
    assert inspection.verification is not None and not inspection.verification.passed
    assert "forward graph" in inspection.verification.problems[0]
    assert "y = Conv(r, v)" in inspection.forward.after.splitlines()
    assert "Conv" in {node.label for node in inspection.forward.view.nodes}


@pytest.mark.parametrize("net", NETS)
def test_the_difference(net: str, graphs: dict[str, onnx.ModelProto]) -> None:
    """Names are equal on both sides: TrAct's lines are added, and the gradient gives way."""
    diff = shown(graphs[net]).forward
    before, after = diff.before.splitlines(), diff.after.splitlines()
    (gone,) = (line for line in before if line not in after)
    call = "Conv_y" if "conv" in net else "Gemm_y"
    own = f"{PREFIX}{call}/"
    assert gone.split(" = ")[0].endswith("w_grad, b_grad" if "conv" in net else "w_grad")
    assert gone.replace("w_grad", f"{own}plain_gradient") in after
    kept = iter(after)
    assert all(line == gone or line in kept for line in before)  # in the same order
    new = [line for line in after if line not in before]
    results = [line for line in new if line.startswith("w_grad = ")]
    assert len(results) == 1
    texts = [line for line in new if own not in line]
    branches = {t.strip() for t in texts if t not in results}
    assert branches - {"body:"} == {"then_branch:", "else_branch:"}
    assert any(line.startswith(f"{own}lambda = float scalar 0.1") for line in new)
    plain = remove_tract_onnx(graphs[net])
    assert shown(plain).forward.after == diff.before


def consistent(view: GraphView) -> dict[str, Any]:
    """A view's nodes by name: each once, behind what it reads."""
    seen: dict[str, Any] = {}
    for node in view.nodes:
        assert node.name not in seen
        assert set(node.inputs) <= seen.keys(), (node, view.title)
        seen[node.name] = node
    assert view.hidden >= 0
    return seen


@pytest.mark.parametrize("net", NETS)
def test_the_short_backward(net: str, graphs: dict[str, onnx.ModelProto]) -> None:
    inspection = shown(graphs[net], batch_for(net))
    assert inspection.backward is not None and inspection.backward.expanded is None
    nodes = consistent(inspection.backward.short)
    (tract,) = (node for node in nodes.values() if node.kind == "tract")
    assert (tract.label, tract.name, tract.part) == ("TrAct λ = 0.1", "w_grad", "backward")
    read = {"convnet-static": {"x", "plain_gradient"}, "mlp-static": {"x", "y_grad"}}
    assert set(tract.inputs) == read.get(net, {"x", "y_grad", "plain_gradient"})
    if net != "mlp-static":  # where TrAct computes the gradient anew
        assert nodes["plain_gradient"].label.startswith("ConvGrad" if "conv" in net else "Gemm")
    (accumulated,) = (n for n in nodes.values() if n.kind == "output" and "w_grad" in n.inputs)
    assert accumulated.label == "accumulate w"
    assert nodes["y"].part == "forward" and set(nodes["y"].inputs) == {"x", "w", "b"}
    assert nodes["w"].kind == "parameter" and nodes["x"].kind == "input"
    sizes = "5×3×7×7" if "conv" in net else "5×6"
    assert nodes["x"].detail == f"float32 {sizes}"
    assert tract.detail == ("float32 4×3×3×3" if "conv" in net else "float32 6×5")
    assert consistent(inspection.forward.view)["w_grad"].kind == "tract"


@pytest.mark.parametrize(
    ("net", "count", "size"), [("convnet", 5, "27×27"), ("mlp", 9, "6×6"), ("mlp", 4, "4×4")]
)
def test_the_expanded_backward(
    net: str, count: int, size: str, graphs: dict[str, onnx.ModelProto]
) -> None:
    """The form that ran, in stages, with the shapes that it had."""
    inspection = shown(graphs[net], batch_for(net, count), backward="expanded")
    assert inspection.backward is not None and inspection.backward.expanded is not None
    view = inspection.backward.expanded
    nodes = consistent(view)
    own = [node for node in nodes.values() if node.kind == "tract"]
    stages = list(dict.fromkeys(node.stage for node in own))
    assert stages == ["Gram", "factorisation", "solve"]
    (inverse,) = (node for node in own if node.label == "Inverse")
    assert (inverse.stage, inverse.detail) == ("factorisation", f"float32 {size}")
    (regularised,) = inverse.inputs
    assert nodes[regularised].label == "Add" and nodes[regularised].stage == "Gram"
    last = own[-1]
    (accumulated,) = (n for n in nodes.values() if n.kind == "output" and last.name in n.inputs)
    assert accumulated.label == "accumulate w"
    assert nodes["lambda"].label == "λ = 0.1"
    form = "by_rows" if size == "4×4" else "by_columns"
    assert all(node.name.startswith(form) for node in own)
    assert "other batches" in view.note


def test_both_forms_where_nothing_was_run(graphs: dict[str, onnx.ModelProto]) -> None:
    inspection = shown(graphs["mlp"], backward="expanded")
    assert inspection.backward is not None and inspection.backward.expanded is not None
    nodes = consistent(inspection.backward.expanded)
    (choice,) = (node for node in nodes.values() if node.label == "If")
    assert choice.name == "w_grad"
    forms = {f"by_{form}" for form in ("rows", "columns")}
    ends = {f"{form}/in_float32/gradient" for form in forms}
    ends |= {f"{form}/in_float64/guarded" for form in forms}
    assert set(choice.inputs) == ends
    assert len([node for node in nodes.values() if node.label == "Inverse"]) == 4


def test_whole_pictures(graphs: dict[str, onnx.ModelProto]) -> None:
    part = shown(graphs["convnet"]).backward
    whole = shown(graphs["convnet"], whole=True).backward
    assert part is not None and whole is not None
    assert whole.short.hidden == 0 < part.short.hidden
    labels = [node.label for node in whole.short.nodes]
    assert "ReduceSum → loss" in labels and "accumulate u" in labels
    consistent(whole.short)


def test_two_calls_of_one_layer() -> None:
    model = by_hand(
        "y = MatMul(x, w) z = MatMul(u, w) s = Mul(y, z) h = Tanh(s) q = Mul(h, t) "
        "loss = ReduceSum<keepdims=0>(q)",
        {"w": (6, 5)},
        "float[N,6] x, float[N,6] u, float[N,5] t",
        "float loss",
        20,
    )
    inspection = shown(tract_onnx_pass(trained(model, ("w",)).graph), backward="expanded")
    assert {layer.record.node for layer in inspection.layers} == {"MatMul_y", "MatMul_z"}
    assert inspection.backward is not None and inspection.backward.expanded is not None
    nodes = consistent(inspection.backward.short)
    assert {n.name for n in nodes.values() if n.kind == "tract"} == {"w_grad_0", "w_grad_1"}
    assert set(nodes["w_grad"].inputs) == {"w_grad_0", "w_grad_1"}
    consistent(inspection.backward.expanded)


def test_statistics_and_all_together(graphs: dict[str, onnx.ModelProto]) -> None:
    inspection = inspect_onnx(graphs["convnet"], batch_for("convnet"), backward="expanded")
    assert inspection.verification is not None and inspection.verification.passed
    assert inspection.statistics is not None
    (layer,) = inspection.statistics.layers
    assert len(layer.eigenvalues) == 27 and len(layer.images) == 5
    assert inspection.to_dict()["kind"] == "onnx"
    assert inspection.versions["onnxruntime"].startswith("1.")


BATCHES: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda x, t: (x, t),
    "mapping": lambda x, t: {"t": t, "x": x},
    "tensors": lambda x, t: (torch.from_numpy(x), torch.from_numpy(t)),
    "without targets": lambda x, t: x,
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches(kind: str, graphs: dict[str, onnx.ModelProto]) -> None:
    x, t = batch_for("mlp", 7)
    inspection = shown(graphs["mlp"], BATCHES[kind](x, t))
    assert inspection.layers[0].input_shape == (7, 6)
    assert inspection.batch == "x float32 7×6, t float32 7×2"
    assert ("Noise for t" in inspection.notes[0]) == (kind == "without targets")


@pytest.mark.parametrize(
    "batch",
    [
        (np.zeros((3, 5), np.float32),),
        (np.zeros((3, 6)),),
        {"y": np.zeros((3, 6), np.float32)},
        (np.zeros((3, 6), np.float32),) * 3,
        "x",
    ],
)
def test_batches_that_do_not_fit(batch: Any, graphs: dict[str, onnx.ModelProto]) -> None:
    with pytest.raises(InvalidBatchError):
        shown(graphs["mlp"], batch)


def labelled() -> onnx.ModelProto:
    """A loss of class indices; a height that is open, too."""
    return by_hand(
        "g = ReduceMean<axes=[2], keepdims=0>(x) y = Gemm(g, w, b) "
        "loss, p = SoftmaxCrossEntropyLoss(y, labels)",
        {"w": (6, 3), "b": (3,)},
        "float[N,6,H] x, int64[N] labels",
        "float loss",
        13,
    )


def test_noise() -> None:
    """Labels of all classes; the same noise every time; nothing of the process's random state."""
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    subject = read_subject(tract_onnx_pass(trained(labelled(), ("w", "b")).graph))
    one, other = make_batch(subject, None), make_batch(subject, None)
    assert one.feeds["x"].shape == (4, 6, 4)
    assert set(one.feeds["labels"]) <= {0, 1, 2} and len(set(one.feeds["labels"])) > 1
    for name, value in one.feeds.items():
        np.testing.assert_array_equal(value, other.feeds[name])
    assert one.note.startswith("Noise for x, labels. Random parameters")
    given = make_batch(subject, {"labels": np.zeros(9, np.int64)})
    assert given.feeds["x"].shape == (9, 6, 4)
    inspect_onnx(subject.model)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (str(np.random.get_state()), random.getstate())


def test_nothing_changes(tmp_path: Path) -> None:
    training = trained(NETS["convnet"][0]())
    graph = tract_onnx_pass(training.graph)
    onnx.save(graph, tmp_path / "training_model.onnx")
    (tmp_path / "checkpoint").write_bytes(training.checkpoint)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    serialized = graph.SerializeToString(deterministic=True)
    inspect_onnx(graph, batch_for("convnet"), backward="expanded")
    inspection = inspect_onnx(str(tmp_path / "training_model.onnx"), batch_for("convnet"))
    assert inspection.notes == ()
    assert serialized == graph.SerializeToString(deterministic=True)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    onnx.save(tract_onnx_pass(trained(NETS["mlp"][0]()).graph), tmp_path / "training_model.onnx")
    (tmp_path / "checkpoint").write_bytes(trained(NETS["convnet"][0]()).checkpoint)
    with pytest.raises(DamagedArtifactsError, match="another model's"):
        shown(tmp_path / "training_model.onnx")
    (tmp_path / "checkpoint").write_bytes(b"no checkpoint")
    with pytest.raises(DamagedArtifactsError, match="does not load"):
        shown(tmp_path / "training_model.onnx")


def test_what_can_not_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        inspect_onnx(3)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="there is no such file"):
        inspect_onnx(tmp_path / "absent.onnx")
    with pytest.raises(DamagedArtifactsError):
        inspect_onnx(tmp_path)  # a directory of something else


def test_a_batch_that_the_graph_fails_on() -> None:
    """A size that is open in the file, and not in the model."""
    model = by_hand(
        "r = Reshape(x, s) y = MatMul(r, w) h = Tanh(y) loss = ReduceSum<keepdims=0>(h)",
        {"w": (6, 5), "s": np.array([-1, 6])},
        "float[N,K] x",
        "float loss",
        20,
    )
    graph = tract_onnx_pass(trained(model, ("w",)).graph)
    with pytest.raises(FailedRunError, match="example_inputs"):
        inspect_onnx(graph, np.zeros((1, 5), np.float32))
