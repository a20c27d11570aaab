"""Small ONNX models for tests: written by hand, and exported from torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import torch
from onnx import numpy_helper
from torch import nn
from torch.utils import _pytree as pytree

from reference import Inputs, arguments
from tract_fx.passes.choose import choose, read_choice
from tract_fx.passes.onnx_graph.find import LocatedOnnx

Initializers = Mapping[str, Sequence[int] | np.ndarray[Any, Any]]


def by_hand(
    body: str,
    initializers: Initializers,
    inputs: str = "float[N,8] x",
    outputs: str = "y",
    opset: int = 17,
) -> onnx.ModelProto:
    """Write a model in ONNX's text form.

    Args:
        body: The nodes, one `outputs = Operator <attributes> (inputs)` after the other.
        initializers: Values, or the shapes of random float32 ones, by name.
        inputs: Types and names of the inputs.
        outputs: Names of the outputs, with types or without.
        opset: The version of ONNX's operators.

    Returns:
        The model, with operators of ONNX Runtime's own allowed.
    """
    graph = onnx.parser.parse_graph(f"g ({inputs}) => ({outputs}) {{ {body} }}")
    generator = np.random.default_rng(0)
    for name, value in initializers.items():
        if not isinstance(value, np.ndarray):
            value = np.asarray(generator.normal(size=tuple(value)), np.float32)
        graph.initializer.append(numpy_helper.from_array(value, name))
    versions = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=versions, ir_version=8)


def exported_to_onnx(
    model: nn.Module, inputs: Inputs, *, optimize: bool = False
) -> tuple[torch.export.ExportedProgram, onnx.ModelProto]:
    """Export a model from torch.

    Args:
        model: The model, exported as it is, training or not.
        inputs: Its inputs.
        optimize: Whether torch's exporter folds and merges.

    Returns:
        The exported program, and the ONNX model made of it.
    """
    args, kwargs = arguments(inputs)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, optimize=optimize, opset_version=20, verbose=False
            )
        finally:
            logging.disable(logging.NOTSET)
    assert exported is not None
    return program, exported.model_proto


def in_float32(inputs: Inputs) -> Inputs:
    """Inputs of a float64 model for the same model in float32."""
    result: Inputs = pytree.tree_map(
        lambda x: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs
    )
    return result


def as_ir(model: onnx.ModelProto) -> ir.Model:
    return ir.serde.deserialize_model(model)


def without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model as from an exporter that records nothing."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    for item in [*graph.node, *graph.initializer, *values]:
        del item.metadata_props[:]
    return result


def training_graph(
    model: onnx.ModelProto,
    directory: Path,
    trainable: Sequence[str],
    frozen: Sequence[str] = (),
    loss: Any = None,
) -> Path:
    """Make a training graph with ONNX Runtime's own builder.

    Args:
        model: The forward model.
        directory: Where the artifacts are written.
        trainable: Names of the parameters that are trained.
        frozen: Names of those that are not.
        loss: A LossType or an onnxblock; mean squared error by default.

    Returns:
        The path of `training_model.onnx`.
    """
    import onnxruntime
    from onnxruntime.training import artifacts

    onnxruntime.set_default_logger_severity(3)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, 10)
    artifacts.generate_artifacts(
        copy,
        requires_grad=list(trainable),
        frozen_params=list(frozen),
        loss=artifacts.LossType.MSELoss if loss is None else loss,
        artifact_directory=str(directory),
    )
    return directory / "training_model.onnx"


def as_chosen(located: LocatedOnnx, layers: tuple[str, ...] | None = None) -> set[str]:
    """Names of the layers that the pass would take, or its error."""
    records = [record for record, _ in located.eligible]
    chosen = choose(located.findings, records, read_choice(0.1, layers))
    return {record.name for record in records if record.node in chosen}
