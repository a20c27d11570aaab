"""What every node that the pass made says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

import numpy as np
import onnx_ir as ir

PROVENANCE = "tract_fx"
"""Key in `metadata_props` of every node that the pass made."""

PREFIX = "tract/"
"""What the names of every node, value and constant that the pass made begin with."""


@dataclass(frozen=True)
class Provenance:
    """What a node is for. Graphs written before a field came in have it empty.

    Attributes:
        call: Name of the call's node.
        term: Name of the call's own term of the weight's gradient, which TrAct's result has now.
        output_gradient: Name of the gradient of the call's output.
        form: `"row space"` or `"column space"`, of what the matrix is whose inverse is taken; empty
            for what chooses between them.
        stage: The part of TrAct: `"Gram"`, `"factorisation"`, `"solve"`.
        gram: How the Gram is computed, as far as the node takes part in it, in words.
    """

    call: str
    term: str
    output_gradient: str = ""
    form: str = ""
    stage: str = ""
    gram: str = ""

    def to_json(self) -> str:
        """Write it as it stands in the node's metadata."""
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Read what `to_json` wrote, in this version or in another."""
        known = json.loads(text)
        return cls(**{field.name: known.get(field.name, "") for field in fields(cls)})


def provenance_of(node: ir.Node) -> Provenance | None:
    """Read what a node says of itself."""
    text = node.metadata_props.get(PROVENANCE)
    return None if text is None else Provenance.from_json(text)


def present_lambdas(model: ir.Model) -> dict[str, float]:
    """Read which calls of a training graph have TrAct, and with which λ."""
    names = dict.fromkeys(record.call for record in made_nodes(model).values())
    lambdas = {}
    for name in names:
        constant = model.graph.initializers[f"{PREFIX}{name}/lambda"].const_value
        assert constant is not None
        lambdas[name] = float(str(np.float32(constant.numpy())))  # 0.1, not 0.10000000149
    return lambdas


def made_nodes(model: ir.Model) -> dict[ir.Node, Provenance]:
    """The nodes that the pass made in the main graph, in its order, with their records."""
    records = ((node, provenance_of(node)) for node in model.graph)
    return {node: record for node, record in records if record is not None}
