"""Operators that onnx does not know: a translation writes only what has a schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx

from tract_fx.passes.onnx_graph.calls import MICROSOFT

MARKER_DOMAIN, MARKER, WEIGHT_MARKER = "tract_fx.step", "Precondition", "TreatedWeight"

_Operator = tuple[str, str, str, dict[str, str]]
_KERNELS: tuple[_Operator, ...] = (
    (
        "ConvGrad",
        "dY X W",
        "dX? dW? dB?",
        {
            **dict.fromkeys(("strides", "pads", "dilations", "kernel_shape"), "INTS"),
            "group": "INT",
            "auto_pad": "STRING",
        },
    ),
    ("ReluGrad", "dY X", "dX", {}),
    (
        "BatchNormInternal",
        "X scale B input_mean input_var",
        "Y running_mean? running_var? saved_mean? saved_inv_std?",
        {"epsilon": "FLOAT", "momentum": "FLOAT", "training_mode": "INT"},
    ),
    (
        "BatchNormalizationGrad",
        "dY X scale mean variance",
        "X_grad scale_grad bias_grad",
        {"epsilon": "FLOAT"},
    ),
    (
        "LayerNormalizationGrad",
        "Y_grad X scale mean inv_std_dev",
        "X_grad scale_grad bias_grad",
        {"axis": "INT"},
    ),
    ("SoftmaxGrad_13", "dY Y", "dX", {"axis": "INT"}),
    ("LogSoftmaxGrad_13", "dY Y", "dX", {"axis": "INT"}),
)
"""Name, inputs, outputs and attributes; optional ones with a question mark."""

_MARKERS: tuple[_Operator, ...] = (
    (WEIGHT_MARKER, "weight", "output", {"call": "STRING"}),
    (
        MARKER,
        "gradient input output_gradient?",
        "output",
        {
            "lambda_": "FLOAT",
            "group": "INT",
            "call": "STRING",
            **dict.fromkeys(("strides", "pads", "dilations"), "INTS"),
        },
    ),
)


@contextmanager
def known_operators() -> Iterator[None]:
    """Make the operators known to onnx; others that read its list do not get to see them."""
    added = []
    for domain, operators in ((MICROSOFT, _KERNELS), (MARKER_DOMAIN, _MARKERS)):
        for operator in operators:
            if not onnx.defs.has(operator[0], domain):
                onnx.defs.register_schema(_schema(domain, operator))
                added.append((operator[0], domain))
    try:
        yield
    finally:
        for name, domain in added:
            onnx.defs.deregister_schema(name, 1, domain)


def _schema(domain: str, operator: _Operator) -> onnx.defs.OpSchema:
    name, inputs, outputs, attributes = operator
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption

    def formal(name: str) -> Any:
        kind = option.Optional if name.endswith("?") else option.Single
        return schema.FormalParameter(name.removesuffix("?"), "T", param_option=kind)

    return schema(
        name,
        domain,
        1,
        inputs=[formal(each) for each in inputs.split()],
        outputs=[formal(each) for each in outputs.split()],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(double)", "tensor(float16)"], "Any float.")
        ],
        attributes=[
            schema.Attribute(key, getattr(schema.AttrType, kind), "", required=False)
            for key, kind in attributes.items()
        ],
    )
