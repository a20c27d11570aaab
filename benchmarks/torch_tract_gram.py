"""The Gram as torch-tract computes it: the part of its backward passes that the benchmarks compare.

The operators, in their order, are those of `TrActConv2DFunction.backward` and
`TrActLinearFunction.backward` in torch_tract/tract.py, version 1.0.0.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def torch_tract_gram(x: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Unfold all patches, copy them as rows, multiply them with themselves.

    Args:
        x: The layer's input, (N, C, height, width) or (N, C).
        layer: The layer; what torch-tract supports: no dilation, no groups, padding with zeros.

    Returns:
        XᵀX / R, (n, n), which torch-tract forms where R ≥ n.
    """
    rows = x
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str), layer.padding
        columns = functional.unfold(
            x, layer.kernel_size, padding=layer.padding, stride=layer.stride
        )
        images, n, positions = columns.shape
        rows = columns.transpose(1, 2).reshape(images * positions, n)
    return rows.T @ rows / rows.shape[0]
