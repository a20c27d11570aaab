"""Operators that onnx does not know: a translation writes only what has a schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx

from tract_fx.passes.onnx_graph.calls import MICROSOFT

MARKER_DOMAIN, MARKER, WEIGHT_MARKER = "tract_fx.step", "Precondition", "TreatedWeight"

# Names, inputs and outputs, optional ones with a question mark, and attributes.
_NORM_GRADIENTS = "X_grad scale_grad bias_grad"
_OPERATORS = {
    MICROSOFT: (
        ("ConvGrad", "dY X W", "dX? dW? dB?", "strides pads dilations kernel_shape group auto_pad"),
        ("ReluGrad", "dY X", "dX", ""),
        (
            "BatchNormInternal",
            "X scale B input_mean input_var",
            "Y running_mean? running_var? saved_mean? saved_inv_std?",
            "epsilon momentum training_mode",
        ),
        ("BatchNormalizationGrad", "dY X scale mean variance", _NORM_GRADIENTS, "epsilon"),
        ("LayerNormalizationGrad", "Y_grad X scale mean inv_std_dev", _NORM_GRADIENTS, "axis"),
        ("SoftmaxGrad_13", "dY Y", "dX", "axis"),
        ("LogSoftmaxGrad_13", "dY Y", "dX", "axis"),
    ),
    MARKER_DOMAIN: (
        (WEIGHT_MARKER, "weight", "output", "call"),
        (
            MARKER,
            "gradient input output_gradient?",
            "output",
            "lambda_ group call strides pads dilations",
        ),
    ),
}
_ATTRIBUTES = {
    **dict.fromkeys(("strides", "pads", "dilations", "kernel_shape"), "INTS"),
    **dict.fromkeys(("group", "axis", "training_mode"), "INT"),
    **dict.fromkeys(("epsilon", "momentum", "lambda_"), "FLOAT"),
    **dict.fromkeys(("call", "auto_pad"), "STRING"),
}


@contextmanager
def known_operators() -> Iterator[None]:
    """Make the operators known to onnx; others that read its list do not get to see them."""
    added = []
    for domain, operators in _OPERATORS.items():
        for name, *formals in operators:
            if not onnx.defs.has(name, domain):
                onnx.defs.register_schema(_schema(domain, name, *formals))
                added.append((name, domain))
    try:
        yield
    finally:
        for name, domain in added:
            onnx.defs.deregister_schema(name, 1, domain)


def _schema(
    domain: str, name: str, inputs: str, outputs: str, attributes: str
) -> onnx.defs.OpSchema:
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
            schema.Attribute(key, getattr(schema.AttrType, _ATTRIBUTES[key]), "", required=False)
            for key in attributes.split()
        ],
    )
