"""Forward models that PyTorch never saw: exported, trained by ONNX Runtime, held against float64.

The reference of each is written out in torch from the operators' meaning, and TrAct's gradient of
the first layer comes from the numpy oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from onnx_models import by_hand
from oracle import Spec, relative_error, tract_gradient
from tract_fx import (
    SGD,
    AdamW,
    FrozenLayerWarning,
    InvalidBatchError,
    UnsupportedTrainingError,
    export_training,
    load_trainer,
)
from tract_fx.errors import ExportError, TractError, UnsupportedModelError
from tract_fx.export.manifest import Manifest
from tract_fx.passes import find_onnx_input_layers, remove_tract_onnx, tract_onnx_pass
from tract_fx.trainers.ort_trainer import OrtTrainer

# Float32 on noise, through one layer's system of condition ~10 and a few layers behind it.
FLOAT32 = 1e-5
# A bias in front of a BatchNorm has the gradient zero, of which rounding is all that is left: its
# error is relative to the largest gradient.
VANISHING = {"cb"}

Parameters = dict[str, Tensor]
Function = Callable[[Parameters, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


LINEAR = Spec("linear")


@dataclass(frozen=True)
class Foreign:
    """A model, and what it computes.

    Attributes:
        model: Writes the ONNX model.
        first: The first layer, of float64 parameters and what it reads.
        rest: What comes behind it, to what the loss reads.
        weight: Name of the first layer's weight.
        spec: The first layer, for the oracle.
        transposed: Whether the weight lies as (in, out).
        size: Shape of an input, without the batch.
        before: What is in front of the first layer.
        loss: Name of the loss.
        classes: Number of classes, of cross entropy.
        targets: Shape of a target of another loss, without the batch.
    """

    model: Callable[[], onnx.ModelProto]
    first: Function
    rest: Function
    weight: str
    spec: Spec = LINEAR
    transposed: bool = False
    size: tuple[int, ...] = (3, 8, 8)
    before: Callable[[Tensor], Tensor] = lambda x: x
    loss: str = "cross_entropy"
    classes: int = 5
    targets: tuple[int, ...] = ()

    def batch(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, *self.size, generator=generator)
        if self.loss == "cross_entropy":
            return x, torch.randint(self.classes, (count,), generator=generator)
        if self.loss == "bce_with_logits":
            return x, torch.randint(2, (count, *self.targets), generator=generator).float()
        return x, torch.randn(count, *self.targets, generator=generator)

    def reference(
        self, values: Mapping[str, Any], x: Tensor, target: Tensor, lambda_: float | None
    ) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
        """The loss and all gradients in float64; λ None: plain ones."""
        parameters = {
            name: torch.as_tensor(np.array(value)).double().requires_grad_()
            for name, value in values.items()
        }
        layer_input = self.before(x.double())
        z = self.first(parameters, layer_input)
        z.retain_grad()
        loss = LOSSES[self.loss](self.rest(parameters, z), target)
        loss.backward()
        gradients = {k: v.grad.numpy() for k, v in parameters.items() if v.grad is not None}
        if lambda_ is not None:
            assert z.grad is not None
            exact = tract_gradient(self.spec, layer_input, z.grad, lambda_)
            gradients[self.weight] = exact.T if self.transposed else exact
        return loss.item(), gradients


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": lambda y, t: functional.mse_loss(y, t.double()),
    "bce_with_logits": lambda y, t: functional.binary_cross_entropy_with_logits(y, t.double()),
}


def conv_net(auto_pad: str = "SAME_UPPER", opset: int = 17, batch: str = "N") -> onnx.ModelProto:
    """Conv, BatchNormalization in inference mode, Relu, MaxPool, Gemm."""
    generator = np.random.default_rng(1)
    return by_hand(
        f"""
        h = Conv <auto_pad="{auto_pad}", kernel_shape=[3, 3], strides=[2, 2]> (x, cw, cb)
        b = BatchNormalization <epsilon=0.00001, momentum=0.9> (h, scale, shift, mean, var)
        r = Relu (b)
        p = MaxPool <kernel_shape=[2, 2], strides=[2, 2]> (r)
        f = Flatten (p)
        y = Gemm <transB=1> (f, gw, gb)
        """,
        {
            "cw": (4, 3, 3, 3),
            "cb": (4,),
            "scale": generator.uniform(0.5, 1.5, 4).astype(np.float32),
            "shift": (4,),
            "mean": generator.normal(size=4).astype(np.float32),
            "var": generator.uniform(0.5, 1.5, 4).astype(np.float32),
            "gw": (5, 16),
            "gb": (5,),
        },
        inputs=f"float[{batch},3,8,8] x",
        outputs=f"float[{batch},5] y",
        opset=opset,
    )


def conv_tail(p: Parameters, z: Tensor, training: bool = True) -> Tensor:
    mean, var = p["mean"].detach().clone(), p["var"].detach().clone()
    b = functional.batch_norm(z, mean, var, p["scale"], p["shift"], training)
    f = functional.max_pool2d(functional.relu(b), 2).flatten(1)
    return functional.linear(f, p["gw"], p["gb"])


def mlp(opset: int = 17, batch: str = "N", ending: str = "y = Softmax <axis=-1> (l)") -> Any:
    return by_hand(
        f"""
        h = MatMul (x, w1)
        a = Add (h, b1)
        r = Relu (a)
        o = MatMul (r, w2)
        l = Add (o, b2)
        {ending}
        """,
        {"w1": (8, 6), "b1": (6,), "w2": (6, 3), "b2": (3,)},
        inputs=f"float[{batch},8] x",
        outputs=f"float[{batch},3] y",
        opset=opset,
    )


def normalised_net() -> onnx.ModelProto:
    """Mean and standard deviation first, as initializers."""
    return by_hand(
        """
        c = Sub (x, mean)
        n = Div (c, std)
        h = Conv <kernel_shape=[3, 3], pads=[1, 1, 1, 1]> (n, cw)
        r = Relu (h)
        g = GlobalAveragePool (r)
        f = Flatten (g)
        y = Gemm (f, gw, gb)
        """,
        {
            "mean": np.full((1, 3, 1, 1), 0.5, np.float32),
            "std": np.full((1, 3, 1, 1), 0.25, np.float32),
            "cw": (4, 3, 3, 3),
            "gw": (4, 5),
            "gb": (5,),
        },
        inputs="float[N,3,8,8] x",
        outputs="float[N,5] y",
    )


def scikit_learn(kind: str, options: dict[str, Any] | None = None) -> onnx.ModelProto:
    """A small multi-layer perceptron of scikit-learn's, through skl2onnx."""
    from skl2onnx import to_onnx

    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 4)).astype(np.float32)
    settings: dict[str, Any] = {"hidden_layer_sizes": (6,), "max_iter": 2, "random_state": 0}
    with pytest.warns(ConvergenceWarning):
        if kind == "regressor":
            model: Any = MLPRegressor(**settings).fit(x, x.sum(axis=1))
        elif kind == "pipeline":
            model = make_pipeline(StandardScaler(), MLPClassifier(**settings))
            model.fit(3 * x + 1, generator.integers(3, size=60))
        else:
            classes = 2 if kind == "binary" else 3
            model = MLPClassifier(**settings).fit(x, generator.integers(classes, size=60))
    exported: onnx.ModelProto = to_onnx(model, x[:1], options=options)
    return exported


def dense(p: Parameters, x: Tensor) -> Tensor:
    return x @ p["coefficient"] + p["intercepts"]


def dense_tail(p: Parameters, z: Tensor) -> Tensor:
    return functional.relu(z) @ p["coefficient1"] + p["intercepts1"]


def of_scikit_learn(kind: str, **options: Any) -> Foreign:
    settings: dict[str, Any] = {
        "weight": "coefficient",
        "transposed": True,
        "size": (4,),
        "classes": 3,
        **options,
    }
    return Foreign(lambda: scikit_learn(kind), dense, dense_tail, **settings)


def strided_conv(before: int) -> Foreign:
    """The net of conv_net, whose one row and column of zeros auto_pad puts to one side.

    The oracle pads both sides alike: the zeros are put on in front of it.
    """
    margins = (before, 1 - before, before, 1 - before)
    return Foreign(
        conv_net,
        lambda p, x: functional.conv2d(x, p["cw"], p["cb"], stride=2),
        conv_tail,
        "cw",
        Spec("conv", (3, 3), (2, 2), 0, "zeros", (1, 1), 1),
        before=lambda x: functional.pad(x, margins),
    )


CASES = {
    "conv": strided_conv(0),
    "mlp": Foreign(
        mlp,
        lambda p, x: x @ p["w1"] + p["b1"],
        lambda p, z: functional.relu(z) @ p["w2"] + p["b2"],
        "w1",
        transposed=True,
        size=(8,),
        classes=3,
    ),
    "normalised": Foreign(
        normalised_net,
        lambda p, x: functional.conv2d(x, p["cw"], padding=1),
        lambda p, z: functional.relu(z).mean((2, 3)) @ p["gw"] + p["gb"],
        "cw",
        Spec("conv", (3, 3), (1, 1), 1, "zeros", (1, 1), 1),
        before=lambda x: (x - 0.5) / 0.25,
    ),
    "classifier": of_scikit_learn("classifier"),
    "binary": of_scikit_learn("binary", loss="bce_with_logits", targets=(1,)),
    "regressor": of_scikit_learn("regressor", loss="mse", targets=(1,)),
}


def initializers(model: onnx.ModelProto) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def assert_gradients(
    case: Foreign,
    trainer: OrtTrainer,
    values: Mapping[str, Any],
    lambda_: float | None = 0.1,
    count: int = 6,
) -> None:
    """Loss and gradients of a trainer, at the values that its parameters have."""
    x, target = case.batch(count, seed=count)
    floats = {k: v for k, v in values.items() if np.asarray(v).dtype == np.float32}
    loss, expected = case.reference(floats, x, target, lambda_)
    found = trainer.compute_gradients(x, target)
    assert trainer.train_step(x, target) == pytest.approx(loss, rel=FLOAT32)
    largest = max(float(np.linalg.norm(g)) for g in expected.values())
    for name, gradient in found.items():
        error = np.linalg.norm(gradient - expected[name].reshape(gradient.shape))
        scale = largest if name in VANISHING else float(np.linalg.norm(expected[name]))
        assert error / scale < FLOAT32, (name, error / scale)


@dataclass
class Exports:
    """Directories of the cases, each written once."""

    folder: Path
    done: dict[str, Path]

    def directory(self, name: str) -> Path:
        if name not in self.done:
            place = self.folder / name
            case = CASES[name]
            export_training(
                case.model(), None, place, loss=case.loss, optimizer=SGD(lr=0.1, momentum=0.9)
            )
            self.done[name] = place
        return self.done[name]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("foreign"), {})


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, exports: Exports) -> None:
    """At a batch size on either side of rows = columns, where the model has both."""
    case = CASES[name]
    for count in (3, 12):
        trainer = load_trainer(exports.directory(name))
        assert_gradients(case, trainer, initializers(case.model()), count=count)


@pytest.mark.parametrize("name", CASES)
def test_training_and_its_predictions(name: str, exports: Exports) -> None:
    """The loss goes down; the trained model, copied to torch, predicts what the trainer does."""
    case = CASES[name]
    trainer = load_trainer(exports.directory(name))
    x, target = case.batch(16)
    losses = [trainer.train_step(x, target) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    values = {**initializers(case.model()), **trainer.state_dict()}
    parameters = {k: torch.as_tensor(v).double() for k, v in values.items()}
    z = case.first(parameters, case.before(x.double()))
    scores = conv_tail(parameters, z, False) if name == "conv" else case.rest(parameters, z)
    outputs = trainer.predict(x)
    found = outputs[-1] if isinstance(outputs, tuple) else outputs
    if name == "binary":
        p = scores.sigmoid()
        scores = torch.cat([1 - p, p], dim=1)
    elif name in {"mlp", "classifier"}:
        scores = scores.softmax(1)
    assert relative_error(np.asarray(found), scores.reshape(found.shape)) < FLOAT32


def test_batch_norm_of_an_inference_export_is_trained(exports: Exports) -> None:
    """Running statistics move as ONNX says: by its momentum, to the variance with divisor N."""
    case, model = CASES["conv"], conv_net()
    trainer = load_trainer(exports.directory("conv"))
    before = initializers(model)
    x, target = case.batch(9)
    trainer.train_step(x, target)
    z = case.first(
        {k: torch.tensor(v).double() for k, v in before.items()}, case.before(x.double())
    )
    after = trainer.state_dict()
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    for name, batch in (("mean", mean), ("var", var)):
        expected = 0.9 * torch.tensor(before[name]).double() + 0.1 * batch
        assert relative_error(after[name], expected) < FLOAT32


@pytest.mark.parametrize(
    ("auto_pad", "opset"),
    [("SAME_LOWER", 11), ("SAME_LOWER", 15), ("SAME_UPPER", 21)],
)
def test_auto_pad_and_opsets(auto_pad: str, opset: int, tmp_path: Path) -> None:
    """ONNX Runtime's own gradient of such a Conv is that of one without padding."""
    model = conv_net(auto_pad, opset)
    model.ir_version = 12
    case = strided_conv(int(auto_pad == "SAME_LOWER"))
    export_training(model, None, tmp_path / "a")
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model))


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


def test_trainable_freezes_the_others(tmp_path: Path) -> None:
    """What is not named keeps its value and stays in the checkpoint."""
    model = mlp()
    export_training(model, None, tmp_path / "a", trainable=["w1", "b2"])
    trainer = load_trainer(tmp_path / "a")
    frozen = {s.name for s in trainer.manifest.parameters if not s.trainable}
    assert frozen == {"b1", "w2"}
    assert_gradients(CASES["mlp"], trainer, initializers(model))
    after, before = trainer.state_dict(), initializers(model)
    for name in ("w1", "b1", "w2", "b2"):
        assert np.array_equal(after[name], before[name]) == (name in frozen), name


def test_a_frozen_first_layer_leaves_tract_idle(tmp_path: Path) -> None:
    """As in PyTorch: it is said, and no later layer is taken in its place."""
    model = mlp()
    with pytest.warns(FrozenLayerWarning, match="w1"):
        export_training(model, None, tmp_path / "a", trainable=["w2", "b2"])
    assert_gradients(CASES["mlp"], load_trainer(tmp_path / "a"), initializers(model), None)
    export_training(model, None, tmp_path / "b", trainable=["w2", "b2"], layers=["w2"])
    found = load_trainer(tmp_path / "b").compute_gradients(*CASES["mlp"].batch(6))
    plain = load_trainer(tmp_path / "a").compute_gradients(*CASES["mlp"].batch(6))
    assert relative_error(found["w2"], plain["w2"]) > 0.1


def test_output_names_what_the_loss_reads(tmp_path: Path) -> None:
    """Squared errors of the logits here, not of the softmax that the model ends in."""
    model, case = mlp(), CASES["mlp"]
    export_training(model, None, tmp_path / "a", loss="mse", output="l")
    of_logits = Foreign(
        case.model,
        case.first,
        case.rest,
        "w1",
        transposed=True,
        size=(8,),
        loss="mse",
        targets=(3,),
    )
    assert_gradients(of_logits, load_trainer(tmp_path / "a"), initializers(model))
    with pytest.raises(UnsupportedTrainingError, match="none"):
        export_training(model, None, tmp_path / "b", output="none")


def test_layers_and_lambda(tmp_path: Path) -> None:
    model, case = mlp(), CASES["mlp"]
    export_training(model, None, tmp_path / "a", layers={"w1": 0.7})
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model), 0.7)
    export_training(model, None, tmp_path / "b", lambda_=0.02)
    assert_gradients(case, load_trainer(tmp_path / "b"), initializers(model), 0.02)
    with pytest.raises(TractError, match="nowhere"):
        export_training(model, None, tmp_path / "c", layers=["nowhere"])


def test_plain(tmp_path: Path) -> None:
    model = mlp()
    export_training(model, None, tmp_path / "a", plain=True)
    trainer = load_trainer(tmp_path / "a")
    assert trainer.manifest.layers == ()
    assert_gradients(CASES["mlp"], trainer, initializers(model), None)


def test_scikit_learn_pipeline(tmp_path: Path) -> None:
    """A Scaler in front, for which onnx infers no shape."""
    model = scikit_learn("pipeline")
    scaler = next(node for node in model.graph.node if node.op_type == "Scaler")
    offset, scale = (
        torch.tensor(next(a for a in scaler.attribute if a.name == name).floats).double()
        for name in ("offset", "scale")
    )
    case = Foreign(
        lambda: model,
        dense,
        dense_tail,
        "coefficient",
        transposed=True,
        size=(4,),
        classes=3,
        before=lambda x: (x - offset) * scale,
    )
    export_training(model, None, tmp_path / "a")
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model), count=12)


def test_scores_of_scikit_learn_stay_predictions(exports: Exports) -> None:
    """skl2onnx gives them as dictionaries by default, the trainer as an array beside the labels."""
    trainer = load_trainer(exports.directory("classifier"))
    labels, scores = trainer.predict(CASES["classifier"].batch(7)[0])
    assert scores.shape == (7, 3)
    assert np.array_equal(labels, scores.argmax(axis=1))


@pytest.mark.parametrize(
    ("model", "loss", "reason"),
    [
        (lambda: scikit_learn("binary"), "cross_entropy", "bce_with_logits"),
        (lambda: mlp(), None, "return its loss"),
        (lambda: mlp(), "bce_with_logits", "cross_entropy"),
    ],
    ids=["binary", "no-loss", "softmax"],
)
def test_losses_that_do_not_fit(
    model: Callable[[], onnx.ModelProto], loss: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTrainingError, match=reason):
        export_training(model(), None, tmp_path / "a", loss=loss)


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
    dynamic: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    if exporter == "script":
        dynamic = {"dynamic_axes": {"x": {0: "n"}}}
    if exporter == "fixed":
        dynamic = {}
    torch.onnx.export(
        net,
        (x,),
        str(file),
        dynamo=exporter != "script",
        input_names=["x"],
        verbose=False,
        **({} if exporter == "script" else {"optimize": True}),
        **dynamic,
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


def test_somebody_elses_artifacts(tmp_path: Path) -> None:
    """`generate_artifacts`, its training graph rewritten, and its own checkpoint and optimizer."""
    from onnxruntime.training import artifacts
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    model, case = mlp(ending="y = Identity (l)"), CASES["mlp"]
    model.ir_version = 10
    artifacts.generate_artifacts(
        model,
        requires_grad=["w1", "b1", "w2", "b2"],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.AdamW,
        artifact_directory=str(tmp_path),
    )
    others = ("checkpoint", "optimizer_model.onnx", "eval_model.onnx")
    optimizer_model = onnx.load(tmp_path / "optimizer_model.onnx")
    optimizer_model.ir_version = 10  # ORT writes one that it does not read
    onnx.save(optimizer_model, tmp_path / "optimizer_model.onnx")
    content = {name: (tmp_path / name).read_bytes() for name in others}
    rewritten = tract_onnx_pass(tmp_path / "training_model.onnx", lambda_=0.25)
    onnx.checker.check_model(rewritten)
    onnx.save(rewritten, tmp_path / "tract.onnx")
    assert {name: (tmp_path / name).read_bytes() for name in others} == content

    state = CheckpointState.load_checkpoint(str(tmp_path / "checkpoint"))
    module = Module(
        str(tmp_path / "tract.onnx"), state, str(tmp_path / "eval_model.onnx"), device="cpu"
    )
    optimizer = Optimizer(str(tmp_path / "optimizer_model.onnx"), module)
    x, target = case.batch(16)
    losses = []
    for _ in range(4):
        values = {name: np.array(state.parameters[name].data) for name in ("w1", "b1", "w2", "b2")}
        loss, expected = case.reference(values, x, target, 0.25)
        module.train()
        found = module(x.numpy(), target.numpy())
        assert float(found) == pytest.approx(loss, rel=FLOAT32)
        for name, gradient in expected.items():
            assert relative_error(state.parameters[name].grad, gradient) < FLOAT32, name
        optimizer.step()
        module.lazy_reset_grad()
        losses.append(float(found))
    assert losses[-1] < losses[0]
    layers = find_onnx_input_layers(tmp_path / "tract.onnx").layers
    assert [record.weight for record in layers] == [("w1",)]
    removed = remove_tract_onnx(tmp_path / "tract.onnx")
    assert not any(node.name.startswith("tract/") for node in removed.graph.node)


def test_a_training_graph_is_not_exported_again(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="tract-fx rewrite"):
        export_training(exports.directory("mlp") / "training_model.onnx", None, tmp_path / "a")


def test_adamw_of_a_foreign_model_is_torchs(tmp_path: Path) -> None:
    """Plain gradients: the whole step is torch's, with weight decay and clipping."""
    model, case = mlp(), CASES["mlp"]
    optimizer = AdamW(lr=0.02, weight_decay=0.1, max_grad_norm=0.5)
    export_training(model, None, tmp_path / "a", optimizer=optimizer, plain=True)
    trainer = load_trainer(tmp_path / "a")
    p = {k: torch.tensor(v, requires_grad=True) for k, v in initializers(model).items()}
    reference = torch.optim.AdamW(p.values(), lr=0.02, weight_decay=0.1)
    for step in range(3):
        x, target = case.batch(6, seed=step)
        reference.zero_grad()
        functional.cross_entropy(case.rest(p, case.first(p, x)), target).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 0.5)
        reference.step()
        trainer.train_step(x, target)
    for name, value in trainer.state_dict().items():
        assert relative_error(value, p[name]) < FLOAT32
