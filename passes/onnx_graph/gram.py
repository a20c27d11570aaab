"""The Gram XᵀX of a call, in a given form."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.gram_blocks import write_unfolded_gram
from tract_fx.passes.onnx_graph.gram_forms import GramForm, Tiles
from tract_fx.passes.onnx_graph.gram_tiles import write_tiled_gram
from tract_fx.passes.onnx_graph.row_matrix import row_matrix
from tract_fx.passes.onnx_graph.writer import NodeWriter

__all__ = ["write_gram"]


def write_gram(write: NodeWriter, sizes: CallSizes, form: GramForm) -> ir.Value:
    """Write XᵀX.

    Args:
        write: Where the nodes go.
        sizes: The call.
        form: One of the call's possible forms.

    Returns:
        (n, n), or (groups, n, n) for a grouped convolution.
    """
    if isinstance(form, Tiles):
        rows = row_matrix(write, sizes, grouped=False)
        return write_tiled_gram(write, rows, sizes.columns, form.count)
    return write_unfolded_gram(write, sizes, form)
