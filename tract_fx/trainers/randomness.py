"""Dropout's random numbers: a function of the run's seed and the batch's number.

ONNX Runtime draws them from generators of the whole process, one on the CPU and one for CUDA, which
nothing saves. So they are set before every run of a graph that draws: runs repeat, a resumed one
goes on with the same numbers, and several trainers in one process don't disturb each other.

`RandomNormalLike`, `RandomUniformLike` and their kin keep a generator of their own per node, which
can only be set when the session is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from tract_fx.ort_training import any_runtime
from tract_fx.passes.onnx_graph.calls import RANDOM

# Operators that draw from the process's generators, and those that each have one of their own.
SHARED_GENERATOR = frozenset({"BiasDropout", "BitmaskBiasDropout", "BitmaskDropout", "Dropout"})
OWN_GENERATOR = frozenset(RANDOM)

_ONE_AT_A_TIME = threading.Lock()


def seed_of(seed: int, batch: int) -> int:
    """Derive the seed of one batch.

    Neighbouring numbers would not do: ONNX Runtime itself counts up from the seed, one for each
    dropout of a graph, so that the second one's mask would be the first one's of the next batch.
    """
    digest = hashlib.sha256(f"tract_fx dropout {seed} {batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a graph with the generators set, and without another thread's run in between."""
    if seed is None:
        yield
        return
    with _ONE_AT_A_TIME:
        any_runtime().set_seed(seed)
        yield


def operators(model: bytes) -> set[str]:
    """List the operators of a model, those in branches, loops and local functions included."""
    whole = ir.from_proto(onnx.ModelProto.FromString(model))
    parts = (whole.graph, *whole.functions.values())
    return {node.op_type for part in parts for node in part.all_nodes()}
