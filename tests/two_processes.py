"""Two processes that train a rewritten model in parallel; run by test_distributed.py.

    python two_processes.py FOLDER

Writes to FOLDER/RANK.json how far each way of training in parallel is from the oracle: the average
over both processes of each one's own TrAct gradient, with each one's own Gram.
"""

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from forked_group import run_together
from oracle import relative_error
from rewritten import (
    CONV_CASES,
    LINEAR_ABOVE,
    Case,
    Net,
    expected,
    gradient,
    loss,
    of_rounded,
    weight_of,
)
from tract_fx import tract_module, tract_pass

PROCESSES = 2


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def sharded_root(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def sharded_layer_and_root(model: nn.Module) -> nn.Module:
    fully_shard(model.get_submodule("first"))
    fully_shard(model)
    return model


def sharded_layer(model: nn.Module) -> nn.Module:
    """The first layer alone: the head is a replica that nobody synchronises, and needs no more."""
    fully_shard(model.get_submodule("first"))
    return model


# What a user does to the rewritten model, by name.
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp-static": lambda model: DistributedDataParallel(model, static_graph=True),
    "ddp-of-compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled-ddp": lambda model: compiled(DistributedDataParallel(model)),
    "fsdp-root": sharded_root,
    "fsdp-layer-and-root": sharded_layer_and_root,
    "fsdp-layer": sharded_layer,
    "fsdp-compiled": lambda model: compiled(sharded_root(model)),
}
# A layer that is sharded by itself gathers its weight in its own forward pass: a graph node that
# reads the weight from outside has nothing to read.
NEEDS_MODULE = {"fsdp-layer-and-root", "fsdp-layer"}
SLOW = {"compiled-ddp", "ddp-of-compiled", "fsdp-compiled", "ddp-static"}


def possible(case: Case, wrapper: str) -> bool:
    if wrapper in NEEDS_MODULE:
        return case.way in ("call_module", "tract_module")
    return wrapper not in SLOW or str(case) in SOME


SOME = {"conv-above-call_module", "conv-below-exported_node", "conv-below-tract_module"}


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def error(wrapper: Callable[[nn.Module], nn.Module], case: Case, rank: int) -> float:
    net = case.net()
    batches = [case.batch(seed=process) for process in range(PROCESSES)]
    wanted = numpy.mean([expected(net, x) for x in batches], axis=0)
    model = wrapper(case.rewrite(net))
    for _ in range(2):  # a second step meets what the first has left behind
        model.zero_grad()
        loss(model(batches[rank])).backward()
    return relative_error(whole(weight_of(model).grad), wanted)


def mixed_precision(case: Case, rank: int) -> float:
    """FSDP's own bfloat16 weights and inputs; the reduction is in float32."""
    net = case.net(torch.float32)
    short = copy.deepcopy(net).bfloat16()
    batches = [case.batch(torch.float32, seed=process) for process in range(PROCESSES)]
    wanted = torch.zeros_like(net.first.weight, dtype=torch.float64)
    for x in batches:
        rounded = x.bfloat16()
        wanted += of_rounded(short, gradient(short, rounded), rounded) / PROCESSES
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = case.rewrite(net)
    fully_shard(model, mp_policy=policy)
    loss(model(batches[rank])).backward()
    return relative_error(whole(weight_of(model).grad), wanted)


def sharded_before_the_pass(case: Case, rank: int) -> str:
    """What happens to a user who has it the wrong way round: a message, or nothing."""
    net = case.net()
    fully_shard(net.first)
    fully_shard(net)
    try:
        model: nn.Module
        if case.way == "tract_module":
            model = tract_module(net, layers=["first"])
        else:
            model = tract_pass(fx.symbolic_trace(net))
        loss(model(case.batch(seed=rank))).backward()
    except Exception as exception:
        return str(exception)
    return ""


def tensor_parallel(plan: ParallelStyle) -> float:
    """A linear layer whose weight is split over the processes; each has all of the input."""
    case = Case(LINEAR_ABOVE, "tract_module")
    net, x = case.net(), case.batch()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = parallelize_module(case.rewrite(net), mesh, {"first": plan})
    before = whole(weight_of(model)).clone()
    loss(model(x)).backward()
    found = whole(weight_of(model).grad)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = before - whole(weight_of(model))
    wanted = expected(case.net(), x)  # built again: the first's parameters are split by now
    return max(relative_error(found, wanted), relative_error(moved, wanted))


def global_gram_is_another(net: Net, case: Case) -> float:
    """How far the oracle with one Gram over both processes is: it has to show."""
    batches = [case.batch(seed=process) for process in range(PROCESSES)]
    together = expected(net, torch.cat(batches)) / PROCESSES
    return relative_error(together, numpy.mean([expected(net, x) for x in batches], axis=0))


def main(folder: Path) -> None:
    rank = dist.get_rank()
    results: dict[str, float | str] = {}
    for case in CONV_CASES:
        for name, wrapper in WRAPPERS.items():
            if possible(case, name):
                results[f"{name} {case}"] = error(wrapper, case, rank)
                torch.compiler.reset()
        if case.way in ("call_module", "tract_module"):
            results[f"mixed-precision {case}"] = mixed_precision(case, rank)
            results[f"sharded-before {case}"] = sharded_before_the_pass(case, rank)
        results[f"global-gram {case}"] = global_gram_is_another(case.net(), case)
    results["tensor-parallel rows"] = tensor_parallel(ColwiseParallel(output_layouts=Replicate()))
    results["tensor-parallel columns"] = tensor_parallel(
        RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    )
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_together(PROCESSES, functools.partial(main, Path(sys.argv[1])))
