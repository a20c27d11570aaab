"""Models that PyTorch never saw, and what they compute: written by hand, and from scikit-learn.

The reference of each is written out in torch from the operators' meaning, and TrAct's gradient of
the first layer comes from the numpy oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
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
from oracle import Spec, tract_gradient
from tract_fx.trainers.ort_trainer import OrtTrainer

# Float32 on noise, through one layer's system of condition ~10 and a few layers behind it.
FLOAT32 = 1e-5
# A bias in front of a BatchNorm has the gradient zero, of which rounding is all that is left: its
# error is relative to the largest gradient.
VANISHING = {"cb"}

Parameters = dict[str, Tensor]
Function = Callable[[Parameters, Tensor], Tensor]


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
