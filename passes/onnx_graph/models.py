"""What the ONNX passes take as models, and what to give instead of the others."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from tract_fx.errors import UnsupportedModelError
from tract_fx.passes.onnx_graph.validity import require_consistent_names


def as_ir_model(model: onnx.ModelProto | ir.Model | str | Path) -> ir.Model:
    """Bring a model to the form that the passes work on: own, inlined, with shapes."""
    if isinstance(model, ir.Model):
        result = model.clone()
    elif isinstance(model, onnx.ModelProto):
        result = _deserialized(model)
    elif isinstance(model, (str, Path)):
        result = _read(Path(model))
    else:
        raise UnsupportedModelError(
            f"a model of class {type(model).__name__}",
            "the pass works on an ONNX graph",
            "Give an onnx.ModelProto, an onnx_ir.Model or the path of an .onnx file",
        )
    if result.functions:
        InlinePass()(result)
    ShapeInferencePass(check_type=False, strict_mode=False)(result)
    return result


_OF_OTHERS = {
    ".py": "it is Python's source, no model",
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "it holds PyTorch's tensors, not an ONNX graph"),
    ".safetensors": "it holds tensors, and no graph",
}
"""What files are that people take for models, by suffix."""


def _read(path: Path) -> ir.Model:
    if not path.exists():
        raise UnsupportedModelError(
            f"the file {str(path)!r}",
            "there is no such file",
            f"Look at its name; relative paths start at {str(Path.cwd())!r}",
        )
    try:
        proto = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UnsupportedModelError(
            f"the file {str(path)!r}",
            _OF_OTHERS.get(path.suffix, f"it can't be read as ONNX ({error})"),
            "Give an .onnx file, or the PyTorch model itself in Python",
        ) from error
    if not proto.HasField("graph"):  # an empty file is a message with nothing in it
        raise UnsupportedModelError(
            f"the file {str(path)!r}", "it holds no graph", "Give an .onnx file"
        )
    model = _deserialized(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            _require_file(name, value.const_value, str(path))
    return model


def load_values(model: ir.Model) -> None:
    """Read what lies in other files into the model.

    Raises:
        UnsupportedModelError: A file is not there, not whole, or not in the model's folder.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.raw is not None:
            continue
        _require_file(name, tensor)
        file, found = Path(tensor.path), f"the initializer {name!r}"
        if not file.resolve().is_relative_to(Path(tensor.base_dir).resolve()):
            raise UnsupportedModelError(
                found,
                f"its values lie in {str(file.resolve())!r}, and a model may read its own folder "
                "alone",
                "Copy the file itself, and no link, beside the model (from Hugging Face's hub: "
                "download with local_dir=…)",
            )
        ends, size = (tensor.offset or 0) + (tensor.length or tensor.nbytes), file.stat().st_size
        if size < ends:
            raise UnsupportedModelError(
                found,
                f"its values lie in {str(file)!r} up to byte {ends}, and that has {size} bytes",
                "Copy or download that file again",
            )
    ir.external_data.load_to_model(model)


def _require_file(name: str, tensor: ir.ExternalTensor, path: str = "") -> None:
    """Make sure that the file which an initializer's values lie in is there."""
    if Path(tensor.path).is_file():
        return
    remedy = "Put that file beside the model, where the exporter wrote it"
    if not tensor.base_dir:
        remedy = "Give the path of the .onnx file, or onnx.load(path) with all its values"
    raise UnsupportedModelError(
        f"the initializer {name!r}" + (f" of {path!r}" if path else ""),
        f"its values lie in {str(tensor.path)!r}, which is not there",
        remedy,
    )


def _deserialized(proto: onnx.ModelProto) -> ir.Model:
    _refuse_sparse(proto)
    require_consistent_names(proto)
    return ir.serde.deserialize_model(_without_maps(proto))


def _without_maps(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Leave out outputs that are dictionaries, as scikit-learn's classifiers have them.

    onnx-ir has no type for these, and no gradient goes through them.
    """
    maps = {v.name for v in (*proto.graph.output, *proto.graph.value_info) if _is_map(v.type)}
    given = [v.name for v in proto.graph.input if _is_map(v.type)]
    if given:
        raise UnsupportedModelError(
            f"the input {given[0]!r}, a dictionary",
            "training takes batches as arrays",
            "Export the model without the step that reads dictionaries",
        )
    if not maps:
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    for field in (graph.output, graph.value_info):
        kept = [v for v in field if v.name not in maps]
        del field[:]
        field.extend(kept)
    nodes = [node for node in graph.node if maps.isdisjoint(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _is_map(kind: onnx.TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return _is_map(kind.sequence_type.elem_type)
    return bool(kind.HasField("map_type"))


def _refuse_sparse(proto: onnx.ModelProto) -> None:
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise UnsupportedModelError(
            f"the sparse initializer {name!r}",
            "training changes all entries of a tensor, also those that a sparse one leaves out",
            "Store it as an ordinary initializer",
        )
