"""One Gram over micro-batches and processes; runs these cases and those of global_gram.py.

    python global_gram_steps.py FOLDER [PART OF A CASE'S NAME …]

Writes to FOLDER/COUNT-RANK.json, for two processes and for four, by name of the case, how far the
gradient is from the oracle: of one process with the batches of all, each in one Gram. Started by
test_global_gram.py.
"""

# No `from __future__ import annotations`: fx can't pickle a graph whose types are strings.

import copy
import functools
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import oracle
from forked_group import run_together
from global_gram import (
    CASES,
    CONV,
    DDP,
    ERRORS,
    FORMS,
    LAMBDA,
    SMALL,
    WAYS,
    Checkpointed,
    Form,
    Net,
    case,
    compiled,
    eager,
    given,
    hooked,
    inputs,
    loss,
    plain_gradient,
    refused,
    sharded,
    size,
    wanted,
    weight_of,
    whole,
)
from tract_fx import TractError, tract_module, tract_step, tract_steps
from trainer_loops import TRAINERS, by_hand, examples, load_trainers, moved

COUNTS = (2, 4)
"""Of processes."""


def accumulated(
    model: nn.Module,
    net: Net,
    micro: Sequence[Sequence[Tensor]],
    synced: Callable[[bool], Any],
    span: Callable[[nn.Module], Any] = tract_step,
) -> float:
    """The worst step's error; `synced` says whether gradients are to be averaged now."""
    worst = 0.0
    for first in (1, 0):
        everything = [x for batches in micro[first:] for x in batches]
        examples = sum(map(len, everything))
        model.zero_grad()
        with span(model):
            for number, batches in enumerate(micro[first:], start=first):
                with synced(number == len(micro) - 1):
                    (loss(model, batches[dist.get_rank()], examples) * size()).backward()
        found = whole(weight_of(model).grad)
        worst = max(worst, oracle.relative_error(found, wanted(net, everything)))
    return worst


def with_no_sync(model: DistributedDataParallel) -> Callable[[bool], Any]:
    return lambda last: nullcontext() if last else model.no_sync()


def synced(model: Any) -> Callable[[bool], Any]:
    """Average gradients in the last backward pass alone."""
    if isinstance(model, DistributedDataParallel):
        return with_no_sync(model)

    def at(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return at


def micro_batches(form: Form) -> list[list[Tensor]]:
    return [inputs(form, seed=seed) for seed in range(3)]


def step_of(form: Form, way: str, wrap: Callable[[nn.Module], nn.Module]) -> float:
    net = form.net()
    model = wrap(WAYS[way](copy.deepcopy(net), form.input(0)))
    return accumulated(model, net, micro_batches(form), synced(model))


def steps_of(
    form: Form, way: str, wrap: Callable[[nn.Module], nn.Module], always: bool = False
) -> float:
    net = form.net()
    model = WAYS[way](copy.deepcopy(net), form.input(0))
    if always:  # which says nothing about the order
        tract_steps(model)
    model = wrap(model)
    if not always:
        tract_steps(model)
    at = synced(model)
    average = (lambda last: at(True)) if always else at
    return accumulated(model, net, micro_batches(form), average, nullcontext)


for form_name in ("conv", "rows-together-enough", "rows-too-few", "groups"):
    for one_step_of, word in ((step_of, "step"), (steps_of, "steps")):
        case(f"{word} ddp {form_name}", small=True)(
            functools.partial(one_step_of, FORMS[form_name], "pass", DDP)
        )
for form_name in ("conv", "rows-too-few"):
    for wrapper, names in (("root", ()), ("layer", ("first",))):
        for one_step_of, word in ((step_of, "step"), (steps_of, "steps")):
            case(f"{word} fsdp {wrapper} {form_name}", small=wrapper == "root")(
                functools.partial(one_step_of, FORMS[form_name], "module", sharded(*names))
            )
case("step ddp of compiled")(
    functools.partial(step_of, CONV, "module", lambda m: DDP(compiled(m, fullgraph=True)))
)
case("step checkpoint")(
    functools.partial(step_of, CONV, "pass", lambda m: DDP(Checkpointed(m, False)))
)
for name, one_wrap in {
    "ddp averaged each time": DDP,
    "ddp bucket view": lambda m: DDP(m, gradient_as_bucket_view=True),
    "ddp static graph": lambda m: DDP(m, static_graph=True),
    "ddp hook": hooked,
    "ddp of compiled": lambda m: DDP(compiled(m, fullgraph=True)),
    "checkpoint": lambda m: DDP(Checkpointed(m, False)),
    "checkpoint reentrant": lambda m: DDP(Checkpointed(m, True), static_graph=True),
    "fsdp averaged each time": sharded(),
    "compiled fsdp": lambda m: compiled(sharded()(m)),
}.items():
    case(f"steps {name}")(functools.partial(steps_of, CONV, "module", one_wrap, True))


@case("steps with a Gram of each process's own rows")
def local_steps() -> float:
    """The average of the processes' gradients, each with the P of its micro-batches."""
    net, micro = CONV.net(), micro_batches(CONV)
    model = DDP(tract_module(copy.deepcopy(net), layers=["first"]))
    tract_steps(model)
    for _ in range(2):
        model.zero_grad()
        for batches in micro:
            loss(model, batches[dist.get_rank()], CONV.batch * len(micro)).backward()
    each = [wanted(net, [batches[rank] for batches in micro]) for rank in range(size())]
    return oracle.relative_error(whole(weight_of(model).grad), numpy.mean(each, axis=0))


@case("steps of a micro-batch without gradient")
def steps_of_zeros() -> float:
    """Its rows count, though DDP writes averages of zeros over zeros."""
    worst = 0.0
    for view in (False, True):
        net, (first, second) = CONV.net(), micro_batches(CONV)[:2]
        model = DDP(given(copy.deepcopy(net), first[0]), gradient_as_bucket_view=view)
        tract_steps(model)
        (0 * loss(model, first[dist.get_rank()], 1)).backward()
        loss(model, second[dist.get_rank()], CONV.batch).backward()
        plain = plain_gradient(net, second)
        want = oracle.precondition(net.first, plain, torch.cat(first + second), LAMBDA)
        worst = max(worst, oracle.relative_error(whole(weight_of(model).grad), want))
    return worst


@case("steps with not a number in a micro-batch")
def steps_of_nan() -> float:
    """Which ends with `zero_grad` too, and until then is no change of the gradient."""
    net, micro = CONV.net(), micro_batches(CONV)
    model = DDP(given(copy.deepcopy(net), CONV.input(0)), gradient_as_bucket_view=True)
    tract_steps(model)
    for batches in micro:
        x = batches[dist.get_rank()]
        loss(model, x * torch.nan if batches is micro[0] else x, 1).backward()
    assert whole(weight_of(model).grad).isnan().all()
    return accumulated(model, net, micro, with_no_sync(model), nullcontext)


@case("step of uneven batches, with a Gram that was local")
def uneven_step() -> float:
    net, rank = CONV.net(), dist.get_rank()
    micro = [inputs(CONV, [1 + (seed + r) % 3 for r in range(size())], seed) for seed in range(2)]
    model = DDP(tract_module(copy.deepcopy(net), micro[0][rank]))
    return accumulated(model, net, micro, with_no_sync(model))


@case("steps of uneven and empty batches")
def uneven_steps() -> float:
    form = FORMS["rows-too-few"]
    net, rank = form.net(), dist.get_rank()
    micro = [inputs(form, [(seed + r) % 3 for r in range(size())], seed) for seed in range(3)]
    model = DDP(eager(copy.deepcopy(net), form.input(rank)))
    tract_steps(model)
    return accumulated(model, net, micro, with_no_sync(model), nullcontext)


@case("step tensor parallel")
def parallel_step() -> float:
    return tensor_parallel_of(tract_step)


def tensor_parallel_of(span: Callable[[nn.Module], Any]) -> float:
    form = FORMS["linear"]
    net, micro = form.net(), [form.input(seed) for seed in range(3)]
    mesh = init_device_mesh("cpu", (size(),))
    plan: dict[str, Any] = {"first": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(eager(copy.deepcopy(net), micro[0]), mesh, plan)
    with span(model):
        for x in micro:
            loss(model, x, sum(map(len, micro))).backward()
    return oracle.relative_error(whole(weight_of(model).grad), wanted(net, micro))


@case("steps tensor parallel")
def parallel_steps() -> float:
    return tensor_parallel_of(lambda model: nullcontext(tract_steps(model)))


def trained(trainer: str, count: int) -> float:
    """How far the trainer comes from steps on one large batch, each of so many micro-batches."""
    net, batch = CONV.net(), 2
    data = examples(batch * count * size(), CONV.shape)
    model = eager(copy.deepcopy(net), CONV.input(0))
    if count > 1:
        tract_steps(model)
    with tempfile.TemporaryDirectory() as folder:
        TRAINERS[trainer](model, data, batch, count, Path(folder))
    return oracle.relative_error(moved(net, model), moved(net, by_hand(net, data, LAMBDA)))


for trainer_name in filter(importlib.util.find_spec, TRAINERS):
    for micro_count, word in ((1, "alone"), (2, "with tract_steps")):
        case(f"trainer {trainer_name} {word}")(
            functools.partial(trained, trainer_name, micro_count)
        )


@refused("FSDP2 that keeps gradients elsewhere")
def elsewhere() -> None:
    """In the dtype that they are to be averaged in."""
    model = eager(CONV.net(torch.bfloat16), CONV.input(0))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    tract_steps(model)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    loss(model, CONV.input(0).bfloat16(), 1).backward()


@refused("clipped micro-batches")
def clipped() -> None:
    """In DDP's buckets, where a gradient's version tells nothing."""
    x = CONV.input(dist.get_rank())
    model = DDP(given(CONV.net(), x), gradient_as_bucket_view=True)
    tract_steps(model)
    for _ in range(3):
        loss(model, x, len(x)).backward()
    clip_grad_norm_(model.parameters(), 1e-3)
    loss(model, x, len(x)).backward()


def main(folder: Path) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of torch, for itself
    results: dict[str, float | str] = {}
    chosen = CASES if size() == 2 else SMALL
    for name, run in chosen.items():
        if not any(word in name for word in sys.argv[2:] or [""]):
            continue
        print(dist.get_rank(), name, flush=True)  # the last one is where it hangs or fails
        results[name] = run()
        print(dist.get_rank(), results[name], flush=True)
        torch.compiler.reset()
    for name, fail in (ERRORS if size() == 2 and not sys.argv[2:] else {}).items():
        try:
            fail()
            results[name] = "no error"
        except TractError as found:
            results[name] = str(found)
        dist.barrier()
    (folder / f"{size()}-{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    load_trainers()
    for process_count in COUNTS:
        run_together(process_count, functools.partial(main, Path(sys.argv[1])))
