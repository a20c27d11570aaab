"""Initializers that an exporter has merged, since they were equal when it ran."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.layers import module_of
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.values import static_shape


def refuse_merged(value: ir.Value) -> None:
    """Refuse one tensor in the place of several parameters that were equal when exported.

    Exporters that optimise merge them: new biases and scales, all zeros or ones. Trained, they
    would stay equal. A tied weight is a matrix and no constant, and a shared module is one module.
    """
    readers = list(dict.fromkeys(value.consumers()))
    modules = {module[0] if (module := module_of(node)) else None for node in readers}
    is_vector = len(static_shape(value) or ()) < 2
    merged = any(
        use.idx in {3, 4} and is_standard(use.node, "BatchNormalization") for use in value.uses()
    )
    if len(readers) > 1 and None in modules:
        merged = merged or _is_filled(value)
    elif len(modules) > 1:
        merged = merged or is_vector or _is_filled(value)
    if merged:
        names = ", ".join(described(node) for node in readers[:4])
        raise UnsupportedTrainingError(
            f"the initializer {value.name!r}, read by {names}",
            "the exporter has merged what was equal when it ran, and it would stay equal",
            "Export without optimising (torch.onnx.export(…, optimize=False)), or say what is "
            "trained with trainable=[…]",
        )


def _is_filled(value: ir.Value) -> bool:
    """Tell a tensor of one number all over."""
    if value.const_value is None:
        return False
    entries = value.const_value.numpy().ravel()
    return bool((entries == entries[:1]).all())
