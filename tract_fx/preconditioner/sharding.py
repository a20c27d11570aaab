"""How TrAct's operators run on DTensors: by rows of the weight, each with all of the input.

gW P is computed row by row of gW, so that a process with some rows of the weight (placement
`Shard(0)`, as `ColwiseParallel` has it) needs no other's. P needs all of the input: any other
placement is brought to one of these, exactly, by DTensor itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def register_sharding_rules() -> None:
    """Tell DTensor, once, in which placements the operators can run."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    operators = torch.ops.tract_fx

    @register_sharding([operators.precondition_grad.default, operators.precondition.default])  # type: ignore[untyped-decorator]
    def _(weight: Any, x: Any, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        others = [None] * len(arguments)
        groups = arguments[4]
        anywhere = [([Replicate()], [Replicate(), Replicate(), *others])]
        if groups > 1:  # rows of one group would be taken for those of another
            return anywhere
        return [*anywhere, ([Shard(0)], [Shard(0), Replicate(), *others])]
