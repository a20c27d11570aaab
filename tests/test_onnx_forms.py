"""Forms of an ONNX model that ONNX Runtime's gradient builder fails on, end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from oracle import Spec, precondition, relative_error
from tract_fx import export_training, load_trainer
from tract_fx.passes import find_onnx_input_layers

LINEAR = """
<ir_version: 9, opset_import: ["" : 18]>
agraph (float[N,3,5] x) => (float[N,3,4] y) {
    wt = Transpose (w)
    z = MatMul (x, wt)
    y = Add (z, b)
}
"""


def model() -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    result = parser.parse_model(LINEAR)
    for name, shape in (("w", (4, 5)), ("b", (4,))):
        array = generator.standard_normal(shape).astype(np.float32)
        result.graph.initializer.append(numpy_helper.from_array(array, name))
    return result


def test_transpose_that_leaves_its_permutation_out(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    x, target = (generator.standard_normal((6, 3, n)).astype(np.float32) for n in (5, 4))
    gradients = {}
    for plain in (True, False):
        export_training(model(), None, tmp_path / str(plain), loss="mse", plain=plain)
        trainer = load_trainer(tmp_path / str(plain))
        gradients[plain] = trainer.compute_gradients(x, target)
    expected = precondition(
        Spec("linear"), gradients[True]["w"].astype(np.float64), x.astype(np.float64)
    )
    assert relative_error(gradients[False]["w"], expected) < 1e-6  # float32, well conditioned
    np.testing.assert_array_equal(gradients[False]["b"], gradients[True]["b"])


def test_a_training_graph_says_which_lambda_it_has(tmp_path: Path) -> None:
    export_training(model(), None, tmp_path / "run", loss="mse", lambda_=0.25)
    (layer,) = find_onnx_input_layers(tmp_path / "run" / "training_model.onnx").layers
    assert layer.lambda_ == 0.25
