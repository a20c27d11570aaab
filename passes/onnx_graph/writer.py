"""Write new nodes with names, provenance and constants of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from tract_fx.passes.onnx_graph.provenance import PROVENANCE, Provenance


class NodeWriter:
    """Collects nodes whose names begin with a prefix and that carry a provenance record.

    Constants are registered in the graph, as initializers.
    """

    def __init__(self, graph: ir.Graph, prefix: str, provenance: Provenance) -> None:
        self.prefix = prefix
        self._graph = graph
        self._provenance = provenance
        self._tape = Tape()
        self._taken: set[str] = set()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes, in the order in which they were written."""
        return self._tape.nodes

    def branch(self, name: str) -> NodeWriter:
        """Start writing a subgraph of this one."""
        return NodeWriter(self._graph, f"{self.prefix}{name}/", self._provenance)

    def noting(self, **said: str) -> NodeWriter:
        """Write on in the same place with another record."""
        other = copy.copy(self)
        other._provenance = replace(self._provenance, **said)
        return other

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        attributes: Mapping[str, int | float | str | Sequence[int] | ir.Attr] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Write a node of one output."""
        full = self._fresh(name)
        value = self._tape.op(
            op_type,
            inputs,
            attributes=attributes,
            domain=domain,
            name=full,
            metadata_props={PROVENANCE: self._provenance.to_json()},
        )
        value.name = full
        return value

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """Register a constant as an initializer of the graph."""
        full = self._fresh(name)
        value = ir.val(full, const_value=ir.Tensor(array, name=full))
        self._graph.register_initializer(value)
        return value

    def integers(self, values: Sequence[int], name: str) -> ir.Value:
        """Register a vector of int64, for shapes, axes and the like."""
        return self.constant(np.asarray(values, np.int64), name)

    def _fresh(self, name: str) -> str:
        full, count = f"{self.prefix}{name}", 1
        while full in self._taken or full in self._graph.initializers:
            count += 1
            full = f"{self.prefix}{name}_{count}"
        self._taken.add(full)
        return full
