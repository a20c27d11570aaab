"""The rewritten layer under torch.compile, against itself run eagerly."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from stems import Stem, arms
from timing import interleaved
from training_steps import layer_step


def measure_compiled(stem: Stem, repeats: int) -> dict[str, Any]:
    """Time forward and backward, compiled by inductor as one graph with a dynamic batch, and eager.

    Args:
        stem: The layer.
        repeats: Rounds of the measurement.

    Returns:
        Milliseconds by arm without the time of compiling, plain ones beside ours; compiled ÷ eager
        of both; and whether ours was compiled again for half the batch.
    """
    torch.manual_seed(0)
    models = arms(nn.Sequential(stem.build()))
    x = torch.randn(stem.shape)
    half = x[: len(x) // 2].clone()  # a view of another tensor would be compiled for itself
    steps, again = {}, False
    torch.compiler.reset()
    for name in ("plain", "tract_fx"):
        inductor = CompileCounterWithBackend("inductor")
        compiled = cast(
            nn.Module,
            torch.compile(models[name], backend=inductor, fullgraph=True, dynamic=True),
        )
        steps[f"{name}, eager"] = layer_step(models[name], [x])
        steps[f"{name}, compiled"] = layer_step(compiled, [x])
        before = inductor.frame_count
        layer_step(compiled, [half])()
        again = inductor.frame_count != before
    times = interleaved(steps, repeats)
    return {
        "layer": stem.name,
        "milliseconds": times,
        "compiled_over_eager": times["tract_fx, compiled"] / times["tract_fx, eager"],
        "plain_compiled_over_eager": times["plain, compiled"] / times["plain, eager"],
        "compiled_again_for_another_batch": again,
    }
