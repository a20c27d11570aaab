"""What training with gram="global" gives in several processes; run by global_gram_steps.py."""

# No `from __future__ import annotations`: fx can't pickle a graph whose types are strings.

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import oracle
from tract_fx import (
    Inspection,
    ProcessGroupError,
    inspect_graph,
    remove_tract,
    tract_module,
    tract_pass,
)
from tract_fx.preconditioner import precondition_weight_gradient, process_groups

Case = Callable[[], float]
LAMBDA = 0.1
DDP = DistributedDataParallel


class Net(nn.Module):
    """A first layer and a head of what is left of it, smooth."""

    def __init__(self, first: nn.Module, dims: int) -> None:
        super().__init__()
        self.first, self.dims = first, dims
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        return self.head(z.flatten(2).mean(2) if self.dims else z)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Form:
    """A first layer and its input.

    Attributes:
        build: Makes the layer.
        shape: Of one example.
        dims: The layer's spatial dimensions.
        batch: Examples of each process.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dims: int = 2
    batch: int = 4

    def net(self, dtype: torch.dtype = torch.float64) -> Net:
        torch.manual_seed(0)
        return Net(self.build(), self.dims).to(dtype)

    def input(self, seed: int, batch: int | None = None) -> Tensor:
        """Far from zero mean: a lost mean or padding shows."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch if batch is None else batch, *self.shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5


# By rows of one process, of two, and columns: 256, 512, 27.
CONV = Form(lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 8, 8))
FORMS = {
    "conv": CONV,
    "rows-together-enough": Form(lambda: nn.Conv2d(3, 8, 4, 4), (3, 8, 8), batch=8),  # 32, 64, 48
    "rows-too-few": Form(lambda: nn.Conv2d(3, 8, 8, 8), (3, 16, 16), batch=3),  # 12, 24, 192
    "linear": Form(lambda: nn.Linear(6, 8), (6,), 0, 9),
    "linear-too-few": Form(lambda: nn.Linear(70, 8), (70,), 0, 5),
    "groups": Form(lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6)),
    "groups-too-few": Form(lambda: nn.Conv2d(4, 8, 6, groups=2), (4, 6, 6)),
    "conv1d": Form(lambda: nn.Conv1d(3, 8, 5, stride=2, padding=1), (3, 20), 1),
    "conv3d": Form(lambda: nn.Conv3d(1, 8, 2, dilation=2), (1, 4, 4, 4), 3),
    "same-reflect": Form(
        lambda: nn.Conv2d(3, 8, 2, padding="same", padding_mode="reflect"), (3, 6, 6)
    ),
}


def given(model: nn.Module, x: Tensor, **options: Any) -> fx.GraphModule:
    return tract_pass(fx.symbolic_trace(model), gram="global", **options)


def eager(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    return tract_module(model, layers=["first"], gram="global", **options)


def exported(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    return tract_pass(program, gram="global", **options)


WAYS = {"pass": given, "module": eager, "exported": exported}


def weight_of(model: nn.Module) -> nn.Parameter:
    (weight,) = (p for name, p in model.named_parameters() if name.endswith("first.weight"))
    return weight


def whole(tensor: Any) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def inputs(form: Form, sizes: Sequence[int] | None = None, seed: int = 0) -> list[Tensor]:
    """Every process's input."""
    sizes = sizes or [form.batch] * dist.get_world_size()
    return [form.input(100 * seed + rank, size) for rank, size in enumerate(sizes)]


def loss(model: nn.Module, x: Tensor, examples: int) -> Tensor:
    """A sum over examples, divided by those of all processes."""
    output: Tensor = model(x)
    return (output.square().sum() + output.sum()) / examples


def plain_gradient(net: Net, batches: Sequence[Tensor]) -> Tensor:
    """The mean gradient of the one large batch."""
    x = torch.cat([*batches])
    return torch.autograd.grad(loss(net, x, len(x)), [weight_of(net)])[0]


def wanted(net: Net, batches: Sequence[Tensor]) -> oracle.Array:
    """TrAct's of the one large batch."""
    x = torch.cat([*batches])
    return oracle.precondition(net.first, plain_gradient(net, batches), x, LAMBDA)


def step(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The averaged gradient after one backward pass in each process."""
    world = dist.get_world_size()
    x = batches[dist.get_rank()].to(weight_of(model).dtype)
    model.zero_grad()
    # A process without examples has a gradient of zeros all the same.
    (loss(model, x, sum(map(len, batches))) * world).backward()
    return whole(weight_of(model).grad)


def error(model: nn.Module, net: Net, batches: Sequence[Tensor], steps: int = 2) -> float:
    for _ in range(steps):  # a second step meets what the first has left behind
        found = step(model, batches)
    return oracle.relative_error(found, wanted(net, batches))


CASES: dict[str, Case] = {}
SMALL: dict[str, Case] = {}
"""Those that four processes go through too."""


def case(name: str, small: bool = False) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[name] = function
        if small:
            SMALL[name] = function
        return function

    return add


def wrapped(
    name: str,
    wrap: Callable[[nn.Module], nn.Module],
    form: Form = CONV,
    way: str = "pass",
    small: bool = False,
    **options: Any,
) -> None:
    """Add a case: a net with TrAct put in one way, and wrapped."""

    @case(name, small)
    def _() -> float:
        net = form.net()
        chosen = {k: make() for k, make in options.items()}
        model = WAYS[way](copy.deepcopy(net), form.input(0), **chosen)
        return error(wrap(model), net, inputs(form))


for form_name, one_form in FORMS.items():
    for way_name in WAYS if form_name in ("conv", "rows-too-few") else ("module",):
        wrapped(f"{form_name} {way_name}", DDP, one_form, way_name, small=way_name != "exported")


def sharded(*names: str) -> Callable[[nn.Module], nn.Module]:
    def shard(model: nn.Module) -> nn.Module:
        for name in names:
            fully_shard(model.get_submodule(name))
        fully_shard(model)
        return model

    return shard


def hooked(model: nn.Module) -> nn.Module:
    model = DDP(model)
    model.register_comm_hook(None, allreduce_hook)
    return model


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Any:
        x = x.requires_grad_(self.reentrant)
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, backend="aot_eager", **options)  # type: ignore[return-value]


def channels_last(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(
        lambda _, args: (args[0].contiguous(memory_format=torch.channels_last),)
    )
    return model


def exported_again(model: nn.Module) -> nn.Module:
    """Exported with TrAct in it, written to a file and read."""
    file, x = io.BytesIO(), CONV.input(0)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=dynamic), file)
    file.seek(0)
    return torch.export.load(file).module()


wrapped("ddp static graph", lambda m: DDP(m, static_graph=True))
wrapped("ddp unused", lambda m: DDP(m, find_unused_parameters=True))
wrapped("ddp bucket view", lambda m: DDP(m, gradient_as_bucket_view=True))
wrapped("ddp hook", hooked)
wrapped("channels last", lambda m: DDP(channels_last(m)))
wrapped("deepcopy", lambda m: DDP(copy.deepcopy(m)))
wrapped("pickle", lambda m: DDP(pickle.loads(pickle.dumps(m))))
wrapped("save and load", lambda m: DDP(saved(m)))
wrapped("checkpoint", lambda m: DDP(Checkpointed(m, False)))
wrapped("checkpoint reentrant", lambda m: DDP(Checkpointed(m, True), static_graph=True))
for one_form, rows in ((CONV, ""), (FORMS["rows-too-few"], " too few")):
    for way_name in ("pass", "module"):
        wrapped(f"fsdp root {way_name}{rows}", sharded(), one_form, way_name, small=True)
        wrapped(f"fsdp layer {way_name}{rows}", sharded("first"), one_form, way_name)
wrapped("ddp of compiled", lambda m: DDP(compiled(m, fullgraph=True)))
wrapped("ddp of compiled module", lambda m: DDP(compiled(m, fullgraph=True)), way="module")
wrapped("compiled ddp", lambda m: compiled(DDP(m)))
wrapped("compiled fsdp", lambda m: compiled(sharded()(m)), way="module")
wrapped("exported after the pass", lambda m: DDP(exported_again(m)))
wrapped("own group", DDP, process_group=dist.new_group, small=True)
wrapped(
    "own group pickled", lambda m: DDP(pickle.loads(pickle.dumps(m))), process_group=dist.new_group
)
wrapped("mesh", DDP, way="module", process_group=lambda: init_device_mesh("cpu", (size(),)))


def size() -> int:
    return dist.get_world_size()


@case("uneven batches", small=True)
def uneven() -> float:
    net, batches = CONV.net(), inputs(CONV, [2 + 3 * rank for rank in range(size())])
    return error(DDP(given(net, batches[0])), copy.deepcopy(net), batches)


@case("uneven batches of few rows", small=True)
def uneven_rows() -> float:
    form = FORMS["rows-too-few"]
    net, batches = form.net(), inputs(form, [1 + rank for rank in range(size())])
    return error(DDP(eager(net, batches[0])), copy.deepcopy(net), batches)


@case("an empty batch", small=True)
def empty() -> float:
    net, batches = CONV.net(), inputs(CONV, [4] * (size() - 1) + [0])
    return error(DDP(given(net, batches[0])), copy.deepcopy(net), batches)


@case("an empty batch among few rows")
def empty_row() -> float:
    form = FORMS["rows-too-few"]
    net, batches = form.net(), inputs(form, [3] * (size() - 1) + [0])
    return error(DDP(given(net, batches[0])), copy.deepcopy(net), batches)


@case("rows become enough, and few again")
def changing_rows() -> float:
    form = FORMS["rows-together-enough"]
    net = form.net()
    worst = 0.0
    for first, later in ((1, 16), (16, 1)):
        model = DDP(given(copy.deepcopy(net), form.input(0)))
        for count in (first, later):
            batches = inputs(form, [count] * size())
            worst = max(worst, error(model, net, batches))
    return worst


@case("no_sync: each micro-batch has a Gram over all processes")
def no_sync() -> float:
    net, micro = CONV.net(), [inputs(CONV, seed=seed) for seed in range(3)]
    model = DDP(given(copy.deepcopy(net), micro[0][0]))
    for number, batches in enumerate(micro):
        x = batches[dist.get_rank()]
        with model.no_sync() if number < 2 else nullcontext():
            (loss(model, x, sum(map(len, batches))) * size()).backward()
    total = numpy.sum([wanted(net, batches) for batches in micro], axis=0)
    return oracle.relative_error(whole(weight_of(model).grad), total)


@case("join that ends all with the first")
def ending_join() -> float:
    net, batches = CONV.net(), inputs(CONV)
    model = DDP(given(copy.deepcopy(net), batches[0]))
    with suppress(RuntimeError), model.join(throw_on_early_termination=True):
        for _ in range(2 - dist.get_rank()):
            found = step(model, batches)
        return 1.0  # the process that has ended raises, too
    return oracle.relative_error(found, wanted(net, batches))


@case("forward passes of one process alone")
def alone() -> float:
    net, batches = CONV.net(), inputs(CONV)
    model = DDP(given(copy.deepcopy(net), batches[0]))
    if dist.get_rank() == 0:
        with torch.no_grad():
            model.module(batches[0])
        model.module(batches[0])
        x = batches[0].clone().requires_grad_()
        torch.autograd.grad(model.module(x).sum(), [x])
    return error(model, net, batches)


@case("frozen")
def frozen() -> float:
    net, batches = CONV.net(), inputs(CONV)
    net.first.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DDP(given(net, batches[0]))
    loss(model, batches[dist.get_rank()], 1).backward()
    return 0.0 if weight_of(model).grad is None else 1.0


@case("frozen in one process alone, and of it no gradient asked")
def frozen_once() -> float:
    net, batches = CONV.net(), inputs(CONV)
    model = given(copy.deepcopy(net), batches[0])
    if dist.get_rank() == 0:
        head = [*model.get_submodule("head").parameters()]
        torch.autograd.grad(loss(model, batches[0], 1), head)
    return error(DDP(model), net, batches)


@case("a parameter that one process does not use")
def unused() -> float:
    """DDP's buckets and the Gram in another order in each process."""

    class Branch(Net):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 8, 3, padding=1), 2)
            self.other = nn.Linear(3, 8)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            added = 0.0 if other is None else self.other(other)  # its backward comes last
            z = torch.tanh(self.first(x)).flatten(2).mean(2)
            return self.head(z + added)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, batches = Branch().double(), inputs(CONV)
    others = [torch.ones(4, 3).double() if rank == 0 else None for rank in range(size())]
    options: dict[str, Any] = {"find_unused_parameters": True, "bucket_cap_mb": 1e-5}
    model = DDP(eager(copy.deepcopy(net), batches[0]), **options)
    for _ in range(3):
        model.zero_grad()
        model(batches[dist.get_rank()], others[dist.get_rank()]).square().sum().backward()
    gradients = [
        torch.autograd.grad(net(x, other).square().sum(), [weight_of(net)])[0]
        for x, other in zip(batches, others, strict=True)
    ]
    total = torch.stack(gradients).mean(0)
    want = oracle.precondition(net.first, total, torch.cat(batches), LAMBDA)
    return oracle.relative_error(whole(weight_of(model).grad), want)


@case("tensor parallel", small=True)
def tensor_parallel() -> float:
    """Each process has all of the input, and a part of the weight's rows."""
    form = FORMS["linear"]
    net, x = form.net(), form.input(0)
    mesh = init_device_mesh("cpu", (size(),))
    plan: dict[str, Any] = {"first": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(eager(copy.deepcopy(net), x), mesh, plan)
    loss(model, x, len(x)).backward()
    return oracle.relative_error(whole(weight_of(model).grad), wanted(net, [x]))


@case("not a number in one process", small=True)
def not_a_number() -> float:
    """All processes get NaN for that group of channels, and for no other."""
    form = FORMS["groups"]
    net, batches = form.net(), inputs(form)
    batches[0][0, 0, 0, 0] = torch.nan
    model = eager(net, batches[0])  # no DDP: each process's own
    x = batches[dist.get_rank()]
    z = model.get_submodule("first")(x)
    out = torch.autograd.grad(z, [weight_of(model)], torch.ones_like(z))[0]
    return float(not (out[:4].isnan().all() and out[4:].isfinite().all()))


@case("float32", small=True)
def single() -> float:
    """In units of what float32 is held to."""
    worst = 0.0
    for name in ("conv", "rows-together-enough", "rows-too-few"):
        form = FORMS[name]
        batches = [x.float().double() for x in inputs(form)]
        net = form.net(torch.float32)
        model = DDP(eager(copy.deepcopy(net), batches[0].float()))
        worst = max(worst, error(model, net.double(), batches) * 1e-10 / 1e-5)
    return worst


@case("autocast")
def autocast() -> float:
    """The Gram is of the rounded rows, and the gradient is that of autocast's own products."""
    net, batches = CONV.net(torch.float32), [x.float() for x in inputs(CONV)]
    model = DDP(given(copy.deepcopy(net), batches[0]))
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, batches)
        plain = step(DDP(copy.deepcopy(net)), batches)
    rounded = torch.cat(batches).bfloat16().double()
    want = oracle.precondition(net.first, plain, rounded, LAMBDA)
    return oracle.relative_error(found, want) * 1e-10 / 2e-2


@case("local again")
def local_again() -> float:
    net, batches = CONV.net(), inputs(CONV)
    x = batches[dist.get_rank()]
    model: nn.Module = tract_pass(given(copy.deepcopy(net), x))
    loss(model, x, len(x)).backward()
    once = oracle.relative_error(whole(weight_of(model).grad), wanted(net, [x]))
    plain = remove_tract(given(copy.deepcopy(net), x))
    loss(plain, x, len(x)).backward()
    return max(once, oracle.relative_error(weight_of(plain).grad, plain_gradient(net, [x])))  # type: ignore[arg-type]


@case("sync batch norm, converted after TrAct")
def sync_batch_norm() -> float:
    """With running statistics, in FSDP2: on a CPU it averages none, and DDP refuses it."""
    net, batches, worst = CONV.net(), inputs(CONV), 0.0
    net.head = nn.Sequential(nn.BatchNorm1d(8), net.head).double()  # type: ignore[assignment]
    net.eval()
    for way in ("pass", "module"):
        model = WAYS[way](copy.deepcopy(net), batches[0])
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        worst = max(worst, error(sharded()(model), net, batches))
    return worst


@case("batched gradients")
def batched() -> float:
    net, batches = CONV.net(), inputs(CONV)
    x, weight = batches[dist.get_rank()], weight_of(net)
    model = eager(net, x)
    losses = torch.stack([loss(model, x, 1), 2 * loss(model, x, 1)])
    found = torch.autograd.grad(losses, [weight], torch.eye(2).double(), is_grads_batched=True)[0]
    own = torch.autograd.grad(loss(remove_tract(model), x, 1), [weight])[0]
    want = oracle.precondition(net.first, own, torch.cat(batches), LAMBDA)
    return max(oracle.relative_error(g, k * want) for k, g in enumerate(found, start=1))


def inspected(form: Form, dtype: torch.dtype, gram: Literal["local", "global"]) -> Inspection:
    net, x = form.net(dtype), form.input(dist.get_rank()).to(dtype)
    model = tract_pass(fx.symbolic_trace(net), gram=gram)
    return inspect_graph(model, x, backward="expanded")


@case("inspected")
def inspection() -> float:
    """Verified against all rows, in both forms and where they tell another Gram from it."""
    worst = 0.0
    for name in ("conv", "rows-together-enough", "rows-too-few", "groups-too-few"):
        form = FORMS[name]
        seen = inspected(form, torch.float64, "global")
        assert seen.verification is not None and seen.verification.passed, seen.verification
        (check,) = seen.verification.weights
        worst = max(worst, check.operator.error)
        (layer,) = [layer for layer in seen.layers if layer.taken]
        rows = (layer.rows or 0) * size()
        assert f"is of {rows:,} rows, those of all processes (gram='global')" in layer.note
        assert seen.statistics is not None and seen.statistics.layers[0].eigenvalues
        single = inspected(form, torch.float32, "global")
        assert single.verification is not None and single.verification.passed
    return worst


@case("inspected, and wrong")
def inspection_of_a_mistake() -> float:
    """The Gram of each process's own rows is told from that of all."""

    def own(grad: Tensor, x: Tensor, settings: Any, scope: object) -> Tensor:
        return precondition_weight_gradient(grad, x, settings.lambda_, settings.geometry)

    with mock.patch("tract_fx.preconditioner.operators.precondition_over_group", own):
        found = inspected(CONV, torch.float64, "global").verification
    assert found is not None
    return float(found.passed)


@case("inspected, local")
def inspection_of_a_local_gram() -> float:
    notes = [inspected(FORMS[n], torch.float64, "local").layers[0].note for n in ("conv", "linear")]
    few = inspected(FORMS["rows-too-few"], torch.float64, "local").layers[0].note
    said = "this one of 2 processes' own rows (gram='local')"
    right = all(said in note and "fewer" not in note for note in notes)
    return float(not (right and f"{said}, 12, fewer than its 192 columns" in few))


# What has to end in an error, in all processes and soon: its text, by name.
ERRORS: dict[str, Callable[[], object]] = {}


def refused(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    return lambda function: ERRORS.setdefault(name, function)


def one_step(lambda_: float = LAMBDA, form: Form = CONV, name: str = "first") -> None:
    """A step in a group of its own: what has failed in one stays there."""
    net = form.net()
    setattr(net, name, net.first)
    x = form.input(dist.get_rank())
    model = tract_module(
        net, layers=[name], lambda_=lambda_, gram="global", process_group=dist.new_group()
    )
    model.get_submodule(name)(x).sum().backward()


@refused("another λ")
def another_lambda() -> None:
    one_step(lambda_=0.1 if dist.get_rank() else 0.2)


@refused("another shape")
def another_shape() -> None:
    one_step(form=FORMS["groups"] if dist.get_rank() else CONV)


@refused("another layer")
def another_layer() -> None:
    one_step(name="first" if dist.get_rank() else "stem")


@refused("a process that does not come")
def missing() -> None:
    group = dist.new_group()
    if dist.get_rank() == 0:
        net = CONV.net()
        model = tract_module(net, layers=["first"], gram="global", process_group=group)
        with mock.patch.object(process_groups, "TIME_LIMIT", timedelta(seconds=1)):
            model(CONV.input(0)).sum().backward()
    else:
        raise ProcessGroupError("", "", "")


@refused("a process that stays away later")
def missing_later() -> None:
    group = dist.new_group(timeout=timedelta(seconds=5))
    net = CONV.net()
    model = tract_module(net, layers=["first"], gram="global", process_group=group)
    for _ in range(2 if dist.get_rank() == 0 else 1):
        model(CONV.input(0)).sum().backward()
    if dist.get_rank():
        raise ProcessGroupError("", "", "")


@refused("a group of other ranks")
def other_ranks() -> None:
    net = CONV.net()
    model = tract_module(net, layers=["first"], gram="global", process_group=dist.new_group())
    held = vars(model.first)
    held["tract_scope"] = held["tract_scope"].replace(f"-{size() - 1}|", "-7|")
    model(CONV.input(0)).sum().backward()


@refused("join")
def join() -> None:
    x = CONV.input(0)
    model = DDP(given(CONV.net(), x))
    with model.join():
        model(x)
