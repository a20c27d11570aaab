"""Small graphs, and runs of graphs in whatever ONNX Runtime is installed, and in its last release.

The two share an import name. `LAST_RELEASE` names a Python that has the latter, which runs each
graph once more in a process of its own.
"""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import parser

from sessions_of import Arrays, results

# Of an array's largest value, and of the largest of all: float32, over some layers.
AGREEMENT, ZERO = 1e-5, 1e-6


def graph(text: str, weights: Mapping[str, np.ndarray[Any, Any]], opset: int = 18) -> ir.Model:
    """Parse a graph, and give it initializers."""
    proto = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}, "ai.onnx.ml" : 3]>\n{text}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    for output in proto.graph.output:  # the parser has no way to leave a shape open
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def run(
    graph: ir.Model, feeds: Mapping[str, np.ndarray[Any, Any]], names: tuple[str, ...]
) -> Arrays:
    """Run a graph; both releases have to give the same."""
    sent = (ir.to_proto(graph).SerializeToString(), dict(feeds), names)
    found = results(*sent)
    if python := os.environ.get("LAST_RELEASE"):
        last = _in(python, sent)
        largest = max(map(_size, found.values()), default=0.0)
        for name, value in found.items():
            bound = AGREEMENT * _size(value) + ZERO * largest
            np.testing.assert_allclose(last[name], value, 0, bound, err_msg=name, strict=True)
    return found


def _size(value: np.ndarray[Any, Any]) -> float:
    return float(np.abs(np.nan_to_num(value.astype(np.float64))).max(initial=0.0))


def _in(python: str, sent: tuple[Any, ...]) -> Arrays:
    process = _process(python)
    assert process.stdin is not None and process.stdout is not None
    pickle.dump(sent, process.stdin)
    process.stdin.flush()
    answer = pickle.load(process.stdout)
    assert isinstance(answer, dict), answer
    return answer


@functools.cache
def _process(python: str) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("sessions_of.py")
    return subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
