"""Runs a graph in the ONNX Runtime at hand; as a script, one after the other that it is sent."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

Arrays = dict[str, "np.ndarray[Any, Any]"]


def results(graph: bytes, feeds: Mapping[str, Any], names: tuple[str, ...]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.set_seed(0)  # of dropout
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(list(names), given), strict=True))


if __name__ == "__main__":
    while True:
        try:
            sent = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer: Any = results(*sent)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()
