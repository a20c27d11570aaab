"""Files of other frameworks: how they are given, their batch dimension, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from foreign_models import (
    CASES,
    FLOAT32,
    Foreign,
    assert_gradients,
    conv_net,
    initializers,
    mlp,
)
from onnx_models import by_hand, exported_to_onnx
from oracle import Spec, relative_error, tract_gradient
from tract_fx import (
    InvalidBatchError,
    UnsupportedTrainingError,
    export_training,
    inspect_graph,
    load_trainer,
)
from tract_fx.artifacts.manifest import Manifest
from tract_fx.errors import ExportError, UnsupportedModelError


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def test_auto_pad_of_an_open_size_is_refused(tmp_path: Path) -> None:
    model = by_hand(
        """h = Conv <auto_pad="SAME_UPPER", kernel_shape=[3, 3], strides=[2, 2]> (x, w)
        g = GlobalAveragePool (h)
        y = Flatten (g)""",
        {"w": (4, 3, 3, 3)},
        inputs="float[N,3,H,W] x",
        outputs="float[N,4] y",
    )
    with pytest.raises(ExportError, match="not fixed"):
        export_training(model, torch.randn(2, 3, 8, 8), tmp_path / "a")


class _Gated(nn.Module):
    """The gate is detached: a gradient goes through one factor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h * h.detach())  # type: ignore[no-any-return]


def test_what_was_detached_in_torch_stays_detached(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, target = _Gated(), torch.randn(4, 6), torch.randn(4, 3)
    _, proto = exported_to_onnx(model, (x,))
    export_training(proto, None, tmp_path / "a", loss="mse")
    found = load_trainer(tmp_path / "a").compute_gradients(x.numpy(), target.numpy())
    rows = x.double()
    model.double()
    functional.mse_loss(model(rows), target.double()).backward()
    weight = model.stem.weight.grad
    assert weight is not None
    expected = {name: p.grad for name, p in model.named_parameters()}
    expected["stem.weight"] = torch.linalg.solve(
        rows.mT @ rows / 4 + 0.1 * torch.eye(6).double(), weight, left=False
    )
    for name, gradient in expected.items():
        assert gradient is not None
        assert relative_error(found[name], gradient.numpy()) < FLOAT32, name


@pytest.mark.parametrize("way", ["path", "text", "proto", "ir"])
def test_ways_to_give_a_model(way: str, tmp_path: Path) -> None:
    model = mlp()
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    given: Any = {
        "path": file,
        "text": str(file),
        "proto": model,
        "ir": ir.serde.deserialize_model(model),
    }[way]
    before = ir.to_proto(given) if way == "ir" else model
    content = before.SerializeToString(deterministic=True)
    export_training(given, None, tmp_path / "a")
    assert_gradients(CASES["mlp"], load_trainer(tmp_path / "a"), initializers(model))
    after = ir.to_proto(given) if way == "ir" else model
    assert after.SerializeToString(deterministic=True) == content


@pytest.mark.parametrize("opset", [13, 18])
def test_weights_in_a_file_beside_the_model(opset: int, tmp_path: Path) -> None:
    model = mlp(opset)
    values = initializers(model)
    file = tmp_path / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    export_training(file, None, tmp_path / "a")
    assert_gradients(CASES["mlp"], load_trainer(tmp_path / "a"), values)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UnsupportedModelError, match=r"weights\.bin"):
        export_training(file, None, tmp_path / "b")


def cut_off(file: Path) -> Any:
    with (file.parent / "weights.bin").open("r+b") as weights:
        weights.truncate(100)
    return file


def linked(file: Path) -> Any:
    """As Hugging Face's hub keeps what it has downloaded."""
    (file.parent / "blobs").mkdir()
    folder = file.parent / "snapshot"
    folder.mkdir()
    for i, part in enumerate(("model.onnx", "weights.bin")):
        (file.parent / part).rename(file.parent / "blobs" / str(i))
        (folder / part).symlink_to(file.parent / "blobs" / str(i))
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (cut_off, r"weights\.bin' up to byte \d+, and that has 100 bytes.*again"),
        (linked, r"blobs/1', and a model may read its own folder alone.*local_dir="),
        (lambda file: onnx.load(file, load_external_data=False), r"not there.*path of the \.onnx"),
    ],
    ids=["cut off", "linked", "not loaded"],
)
def test_weights_in_a_file_that_does_not_hold_them(given: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = given(file)
    for call in (
        lambda: export_training(model, None, tmp_path / "a"),
        lambda: inspect_graph(model),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            call()


def batches(manifest: Manifest) -> set[object]:
    return {spec.shape[0] for spec in (*manifest.inputs, *manifest.targets)}


@pytest.mark.parametrize("batch", ["?", "1", "4"])
def test_batches_of_any_size(batch: str, tmp_path: Path) -> None:
    """A batch that the file fixes is opened, one without a name is the targets' too."""
    model = conv_net(batch=batch)
    written = export_training(model, None, tmp_path / "a")
    assert batches(written.manifest) == {"batch"}
    trainer = load_trainer(tmp_path / "a")
    assert_gradients(CASES["conv"], trainer, initializers(model), count=5)
    x, target = CASES["conv"].batch(4)
    with pytest.raises(InvalidBatchError, match="'target'"):
        trainer.train_step(x, target[:3])


def test_a_reshape_that_repeats_the_fixed_batch_is_opened(tmp_path: Path) -> None:
    model = by_hand(
        """shape = Constant <value = int64[2] {1, 192}> ()
        f = Reshape (x, shape)
        h = MatMul (f, w1)
        y = Add (h, b1)""",
        {"w1": (192, 3), "b1": (3,)},
        inputs="float[1,3,8,8] x",
        outputs="float[1,3] y",
    )
    case = Foreign(
        lambda: model,
        lambda p, x: x @ p["w1"] + p["b1"],
        lambda _, z: z.clone(),
        "w1",
        transposed=True,
        before=lambda x: x.flatten(1),
        classes=3,
    )
    export_training(model, None, tmp_path / "a")
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model))


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("y = Add (l, each)", "run on 4"), ("y = Softmax <axis=0> (l)", "'y' is another one")],
)
def test_a_fixed_batch_that_can_not_be_opened_is_refused(
    ending: str, reason: str, tmp_path: Path
) -> None:
    """Rows that have numbers of their own, or that look at one another."""
    model = mlp(batch="2", ending=ending)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3), np.float32), "each"))
    with pytest.raises(ExportError, match=reason):
        export_training(model, None, tmp_path / "a", loss="mse")
    assert not (tmp_path / "a").exists()


def test_bytes_as_input(tmp_path: Path) -> None:
    """Images as uint8, which the model casts itself; labels of another dtype are refused."""
    model = by_hand(
        """c = Cast <to=1> (x)
        s = Constant <value = float {128.0}> ()
        n = Div (c, s)
        o = Constant <value = float {1.0}> ()
        m = Sub (n, o)
        f = Flatten (m)
        y = Gemm (f, gw, gb)""",
        {"gw": (27, 3), "gb": (3,)},
        inputs="uint8[N,3,3,3] x",
        outputs="float[N,3] y",
    )
    images = np.random.default_rng(0).integers(256, size=(40, 3, 3, 3), dtype=np.uint8)
    export_training(model, images, tmp_path / "a", lambda_=0.3)
    trainer = load_trainer(tmp_path / "a")
    target = np.arange(40) % 3
    found = trainer.compute_gradients(images, target)
    rows = torch.tensor(images).double().flatten(1) / 128 - 1
    p = {k: torch.tensor(v).double() for k, v in initializers(model).items()}
    z = (rows @ p["gw"] + p["gb"]).requires_grad_()
    functional.cross_entropy(z, torch.tensor(target)).backward()
    assert z.grad is not None
    expected = tract_gradient(Spec("linear"), rows, z.grad, 0.3).T
    assert relative_error(found["gw"], expected) < FLOAT32
    with pytest.raises(InvalidBatchError, match="int64"):
        trainer.train_step(images, target.astype(np.int32))
    with pytest.raises(InvalidBatchError, match="uint8"):
        export_training(model, images.astype(np.float32), tmp_path / "b")


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (np.zeros((4, 8)), "float64"),
        (np.zeros((4, 9), np.float32), r"\(4, 9\)"),
        (torch.zeros(4, 8, 1), r"\(4, 8, 1\)"),
        (torch.zeros(0, 8), r"\(0, 8\)"),
        ({"z": torch.zeros(4, 8)}, "'z' by name"),
        ((torch.zeros(4, 8), torch.zeros(4, 8)), "2 by order"),
    ],
)
def test_wrong_example_inputs(example: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidBatchError, match=reason):
        export_training(mlp(), example, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_open_sizes_need_example_inputs(tmp_path: Path) -> None:
    model = by_hand(
        """h = Conv <kernel_shape=[3, 3]> (x, w)
        g = GlobalAveragePool (h)
        y = Flatten (g)""",
        {"w": (4, 3, 3, 3)},
        inputs="float[N,3,H,W] x",
        outputs="float[N,4] y",
    )
    with pytest.raises(UnsupportedTrainingError, match="beside the batch"):
        export_training(model, None, tmp_path / "a")
    export_training(model, {"x": torch.randn(2, 3, 8, 8)}, tmp_path / "a")


def test_weights_that_are_constant_nodes_are_refused(tmp_path: Path) -> None:
    model = by_hand(
        "w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> () y = MatMul (x, w)",
        {},
        inputs="float[N,2] x",
        outputs="float[N,3] y",
    )
    with pytest.raises(UnsupportedTrainingError, match="LiftConstantsToInitializersPass"):
        export_training(model, None, tmp_path / "a")


def test_float64_weights_are_refused(tmp_path: Path) -> None:
    model = by_hand(
        "y = MatMul (x, w)",
        {"w": np.ones((2, 3))},
        inputs="double[N,2] x",
        outputs="double[N,3] y",
    )
    with pytest.raises(UnsupportedTrainingError, match="DOUBLE"):
        export_training(model, None, tmp_path / "a")


def exported_by_torch(exporter: str, file: Path) -> torch.nn.Module:
    """A net that torch exports for inference, treated as anybody's file."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 5),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"optimize": True}
    if exporter == "dynamo":
        options["dynamic_shapes"] = ({0: torch.export.Dim.DYNAMIC},)
    if exporter == "script":
        options = {"dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(
        net,
        (x,),
        str(file),
        dynamo=exporter != "script",
        input_names=["x"],
        verbose=False,
        **options,
    )
    return net


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("exporter", ["dynamo", "fixed", "script"])
def test_files_of_torch(exporter: str, tmp_path: Path) -> None:
    net = exported_by_torch(exporter, tmp_path / "net.onnx")
    export_training(tmp_path / "net.onnx", None, tmp_path / "a", lambda_=0.2)
    trainer = load_trainer(tmp_path / "a")
    case = Foreign(
        mlp,
        lambda p, x: functional.conv2d(x, p["0.weight"], p["0.bias"], padding=1),
        lambda p, z: functional.linear(
            functional.max_pool2d(functional.relu(z), 2).flatten(1), p["4.weight"], p["4.bias"]
        ),
        "0.weight",
        Spec("conv", (3, 3), (1, 1), 1, "zeros", (1, 1), 1),
    )
    assert_gradients(case, trainer, {k: v.numpy() for k, v in net.state_dict().items()}, 0.2)
    state = trainer.state_dict()
    net.load_state_dict(state)
    x = case.batch(7)[0]
    found = trainer.predict(x)
    assert not isinstance(found, tuple)
    with torch.no_grad():
        assert relative_error(found, net(x)) < FLOAT32


def test_a_training_graph_is_not_exported_again(tmp_path: Path) -> None:
    export_training(mlp(), None, tmp_path / "a")
    with pytest.raises(UnsupportedModelError, match="tract-fx rewrite"):
        export_training(tmp_path / "a" / "training_model.onnx", None, tmp_path / "b")


def test_files_of_onnx_before_ir_4(tmp_path: Path) -> None:
    """Initializers are inputs too, the opset is 6; the outputs lie beside these files."""
    data = Path(onnx.__file__).parent / "backend/test/data/pytorch-converted"
    for case in ("test_Conv2d_groups", "test_Linear"):
        model = onnx.load(data / case / "model.onnx")
        assert model.ir_version == 3
        x, y = (
            numpy_helper.to_array(onnx.load_tensor(data / case / f"test_data_set_0/{name}_0.pb"))
            for name in ("input", "output")
        )
        export_training(model, x, tmp_path / case, loss="mse")
        trainer = load_trainer(tmp_path / case)
        found = trainer.predict(x)
        assert not isinstance(found, tuple)
        assert relative_error(found, torch.tensor(y)) < FLOAT32
        assert {len(g) for g in trainer.compute_gradients(x, y).values()} == {y.shape[1]}


def test_a_c_that_no_gemm_reads_is_no_parameter(tmp_path: Path) -> None:
    model = by_hand(
        "h = Gemm <beta = 0.0> (x, w1, c) r = Tanh (h) y = Gemm <beta = 0.0, alpha = 2.0> (r, w2)",
        {"w1": (8, 6), "w2": (6, 3), "c": (6,)},
        outputs="float[N,3] y",
    )
    case = Foreign(
        lambda: model,
        lambda p, x: x @ p["w1"],
        lambda p, z: 2 * torch.tanh(z) @ p["w2"],
        "w1",
        transposed=True,
        size=(8,),
        classes=3,
    )
    export_training(model, None, tmp_path / "a")
    trainer = load_trainer(tmp_path / "a")
    assert {spec.name for spec in trainer.manifest.parameters} == {"w1", "w2"}
    assert_gradients(case, trainer, initializers(model))


def test_values_that_are_called_like_gradients(tmp_path: Path) -> None:
    model = mlp(ending="l_grad = Neg (l) y = Neg (l_grad)")
    export_training(model, None, tmp_path / "a")
    case = CASES["mlp"]
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model))
