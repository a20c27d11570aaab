"""Why an operation on the input can't be treated: what both graphs say, and what to do instead."""

from __future__ import annotations

from tract_fx.modules import Why

OR_ANOTHER = ", or name another layer with layers=[…]"
OR_BEHIND = ", or name the layer behind it with layers=[…]"

INPUT_IS_WEIGHT = Why("the input is its weight or bias")
WEIGHT_FROM_INPUT = Why("its weight is computed from the input, not from parameters alone")
TRANSPOSED = Why(
    "a transposed convolution spreads its input over the output, so that its weight gradient has "
    "no rows of patches"
)
LOOKUP = Why(
    "it looks rows of a table up and multiplies the input with nothing",
    "TrAct has nothing to do here; if another layer should be treated, name it with layers=[…]",
    competes=False,
)
UNKNOWN = Why("it has parameters and is neither a linear layer nor a convolution")

# Reasons whose way out is another one in each graph.
BIASED_FILTER = (
    "its weight is a constant, and its bias is trained before a linear layer reads the input"
)
VECTOR = "its weight is a vector, not a matrix"
AFFINE = "it scales or shifts the input by trained parameters before any linear layer reads it"
RECURRENT = "a recurrent layer reads the input at every step together with its own state"
ATTENTION = "it holds several projections of the input in one operation"
ARITHMETIC = "it combines the input with a trained parameter before any linear layer reads it"
