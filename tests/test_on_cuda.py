"""What differs on a GPU: other kernels, TF32, no synchronisation, no float64 retry, CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel

from oracle import relative_error
from rewritten import (
    CASES,
    CONV_CASES,
    CUDA,
    FEW_CASES,
    FLOAT64,
    WEIGHT,
    Case,
    Net,
    assert_tract,
    each,
    expected,
    gradient,
    loss,
    of_rounded,
    weight_of,
)
from tract_fx import tract_pass, tract_step, tract_steps

pytestmark = [*CUDA.marks]
# cuBLAS and cuSOLVER in float32, magnified by 1/λ.
FLOAT32 = 1e-4


def on_device(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Net, Tensor]:
    return case.net(dtype).cuda(), case.batch(dtype).cuda()


@each()
def test_float64(case: Case) -> None:
    net, x = on_device(case)
    assert_tract(gradient(case.rewrite(net), x), net, x)


@each()
def test_float32_at_the_operator(case: Case) -> None:
    net, x = on_device(case, torch.float32)
    found, gw = gradient(case.rewrite(net), x), gradient(net, x)
    assert relative_error(found, of_rounded(net, gw, x)) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each(*CONV_CASES)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    net, x = on_device(case, torch.float32)
    model = case.rewrite(net)
    with torch.autocast("cuda", dtype=dtype):
        output, plain = model(x), net(x)
    loss(output.float()).backward()
    (gw,) = torch.autograd.grad(loss(plain.float()), [net.first.weight])
    found = weight_of(model).grad
    assert found is not None
    assert relative_error(found, of_rounded(net, gw, x.to(dtype))) < FLOAT32


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@each(*CONV_CASES)
def test_not_a_number_without_synchronisation(
    case: Case, dtype: torch.dtype, no_synchronisation: None
) -> None:
    net, x = on_device(case, dtype)
    model = case.rewrite(net)
    right = gradient(model, x)  # also lets the libraries make their handles
    broken = x.clone()
    broken[0] = torch.nan
    torch.cuda.set_sync_debug_mode("error")
    again, spoilt = gradient(model, x), gradient(model, broken)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, right)
    assert not spoilt.isfinite().any()


@each(*(case for case in CONV_CASES if case.form.name == "conv-above"))
def test_failed_factorisation_is_not_a_number(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.cholesky_ex

    def fail(matrix: Tensor, **options: Any) -> Any:
        factor, info = original(matrix, **options)
        return factor, info + 1

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail)
    net, x = on_device(case, torch.float32)
    assert not gradient(case.rewrite(net), x).isfinite().any()


@each(*CONV_CASES)
def test_tf32_does_not_reach_the_preconditioner(case: Case) -> None:
    """The layer's own gradient may be in TF32, as the user wants it; what it is times is not."""
    net, x = on_device(case, torch.float32)
    model = case.rewrite(net)
    output, plain = model(x), net(x)
    dz = torch.ones_like(output)
    (wanted,) = torch.autograd.grad(output, [weight_of(model)], dz, retain_graph=True)
    (gw,) = torch.autograd.grad(plain, [net.first.weight], dz, retain_graph=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        (found,) = torch.autograd.grad(output, [weight_of(model)], dz)
        (other,) = torch.autograd.grad(plain, [net.first.weight], dz)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(wanted, of_rounded(net, gw, x)) < FLOAT32
    assert relative_error(found, of_rounded(net, other, x)) < FLOAT32


# torch.export keeps a batch size of one apart from all others.
@each(*(case for case in CONV_CASES if case.way != "exported_node"))
def test_gradient_per_image(case: Case) -> None:
    net, x = on_device(case)
    model = case.rewrite(net)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    one = grad(lambda p, image: loss(functional_call(model, p, (image[None],))))
    found = vmap(one, in_dims=(None, 0))(parameters, x)[WEIGHT]
    for image, gradient_of_one in zip(x, found, strict=True):
        assert relative_error(gradient_of_one, expected(net, image[None])) < FLOAT64


@each(*FEW_CASES[:2])
def test_inductor(case: Case) -> None:
    torch.compiler.reset()
    net, x = on_device(case)
    assert_tract(gradient(torch.compile(case.rewrite(net), fullgraph=True), x), net, x)  # type: ignore[arg-type]


@each(*CASES[:2])
def test_moved_after_the_pass(case: Case) -> None:
    net = case.net()
    model = case.rewrite(net).cuda()
    x = case.batch().cuda()
    assert_tract(gradient(model, x), net, x)


@each(*CONV_CASES)
def test_channels_last(case: Case) -> None:
    net, x = on_device(case)
    in_nhwc: Any = {"memory_format": torch.channels_last}
    net, x = net.to(**in_nhwc), x.to(**in_nhwc)
    assert_tract(gradient(case.rewrite(net), x), net, x)


@each(*FEW_CASES)
def test_compiled_into_cuda_graphs(case: Case) -> None:
    """They are warmed up, recorded and replayed on other images."""
    torch.compiler.reset()
    net, _ = on_device(case)
    model: Any = torch.compile(case.rewrite(net), mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = case.batch(seed=seed).cuda()
        assert_tract(gradient(model, x), net, x)


@each(*CONV_CASES)
def test_a_step_in_a_cuda_graph_of_the_user_s(case: Case) -> None:
    net, x = on_device(case)
    model, beside = case.rewrite(net), torch.cuda.Stream()
    with torch.cuda.stream(beside):  # the libraries make their handles, in no graph
        for _ in range(3):
            gradient(model, x)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with torch.cuda.graph(graph):
        loss(model(x)).backward()
    found = weight_of(model).grad
    assert found is not None
    for seed in (1, 2):
        x.copy_(case.batch(seed=seed))
        graph.replay()
        assert_tract(found.clone(), copy.deepcopy(net), x)


@each(*FEW_CASES)
def test_scaled_steps_in_float16(case: Case) -> None:
    """GradScaler's: an update is by TrAct's gradient, and an overflow leaves the weights."""
    net, x = on_device(case, torch.float32)
    plain, model = copy.deepcopy(net), case.rewrite(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    with torch.autocast("cuda", dtype=torch.float16):
        output = plain(x)
    (scaled,) = torch.autograd.grad(8.0 * loss(output.float()), [plain.first.weight])
    for factor, moves in ((1.0, True), (torch.inf, False)):
        before = weight_of(model).detach().clone()
        with torch.autocast("cuda", dtype=torch.float16):
            output = model(x)
        scaler.scale(loss(output.float()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        change = before - weight_of(model).detach()
        if moves:
            wanted = of_rounded(plain, scaled / 8.0, x.to(torch.float16))
            assert relative_error(change, wanted) < FLOAT32
        else:
            assert not change.any()


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch._C._distributed_c10d.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@each(*(case for case in CONV_CASES if case.way in ("call_module", "tract_module")))
def test_sharded(case: Case, one_process: None) -> None:
    net, x = on_device(case)
    model = case.rewrite(copy.deepcopy(net))
    fully_shard(model)
    found: Any = gradient(model, x)
    assert_tract(found.full_tensor(), net, x)


@each(*(case for case in CONV_CASES if case.way == "call_module"))
def test_one_gram_of_all_processes(case: Case, one_process: None) -> None:
    net, x = on_device(case)
    model = tract_pass(fx.symbolic_trace(copy.deepcopy(net)), gram="global")
    assert_tract(gradient(DistributedDataParallel(model), x), net, x)


@each(*(case for case in CONV_CASES if case.way in ("call_module", "tract_module")))
def test_one_gram_of_micro_batches(case: Case) -> None:
    net, x = on_device(case)
    model = case.rewrite(copy.deepcopy(net))
    with tract_step(model):
        _in_micro_batches(model, x)
    assert_tract(weight_of(model).grad, net, x)
    model.zero_grad()
    tract_steps(model)
    for _ in range(2):
        _in_micro_batches(model, x)
        assert_tract(weight_of(model).grad, net, x)
        model.zero_grad()


def _in_micro_batches(model: nn.Module, x: Tensor) -> None:
    for part in x.split(len(x) // 2):
        loss(model(part)).backward()
