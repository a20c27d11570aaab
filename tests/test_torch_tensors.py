"""Tensors of PyTorch that a step for any ONNX Runtime reads and shows in place.

Tests run on the CPU, and again on a GPU where PyTorch and ONNX Runtime both have CUDA.
"""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ort_reference import seeded
from tract_fx import SGD, AdamW, export_training, load_trainer, tract_module
from tract_fx.artifacts.batches import check_batch
from tract_fx.artifacts.manifest import TensorSpec
from tract_fx.errors import InvalidBatchError, MissingRuntimeError, StateMismatchError
from tract_fx.ort_training import CPU, Device
from tract_fx.trainers import OrtTrainer, dlpack, predictor, stock_run
from tract_fx.trainers.dlpack import ort_value_of, own_value, shared_tensors

CLASSES = 5
NO_CUDA = (
    not torch.cuda.is_available()
    or "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
)
ON_CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(NO_CUDA, reason="no CUDA in PyTorch, or none in ONNX Runtime"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=ON_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Net(nn.Module):
    """An image, a mask, a number without dimensions; running statistics, dropout, tied weights."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.mid, self.again = nn.Linear(96, 96), nn.Linear(96, 96)
        self.again.weight = self.mid.weight
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(96, CLASSES)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 96), requires_grad=False)
        self.register_buffer("mean", torch.tensor(0.3))

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x.float() - self.mean))).flatten(1)
        hidden = self.again(torch.tanh(self.mid(hidden * mask * scale))) * self.frozen
        return self.head(self.drop(hidden))  # type: ignore[no-any-return]


def batch(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator).half()
    mask = torch.rand(count, 96, generator=generator) > 0.3
    return x, mask, torch.tensor(1.0 + seed / 8), torch.arange(count) % CLASSES


def batches(count: int) -> list[tuple[Tensor, ...]]:
    return [batch((6, 4)[i % 2], i) for i in range(count)]


def arrays(tensors: Any) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories: adamw; every, with three batches to an update; images, for images alone."""
    folder = tmp_path_factory.mktemp("steps")
    model = tract_module(seeded(Net), batch(2)[:3], layers=["first"])
    options: dict[str, Any] = {"target": "onnxruntime", "optimizer": AdamW(lr=1e-2)}
    export_training(model, batch(4)[:3], folder / "adamw", **options)
    options["optimizer"] = SGD(lr=0.1, accumulate=3)
    export_training(model, batch(4)[:3], folder / "every", **options, verify=False)
    options["optimizer"] = SGD(lr=0.1, momentum=0.9)
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, CLASSES)))
    x = batch(4)[0].float()
    export_training(tract_module(net, x), x, folder / "images", **options, verify=False)
    return folder


def assert_equal(one: Any, other: Any, device: str) -> None:
    """On the CPU bit for bit; on a GPU, where sums may come in another order, closely."""
    rtol, atol = (0.0, 0.0) if device == "cpu" else (1e-4, 1e-6)
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "every"])
def test_a_step_of_tensors_is_that_of_arrays(
    name: str, device: str, folder: Path, tmp_path: Path
) -> None:
    """Losses, gradients, predictions and state; resumed with the other kind half way."""
    one, other = (load_trainer(folder / name, device=device) for _ in range(2))
    for i, given in enumerate(batches(6)):
        if i == 3:
            one.save(tmp_path / "half")
            one = load_trainer(tmp_path / "half", device=device)
        there = tuple(tensor.to(device) for tensor in given)
        kept = tuple(tensor.clone() for tensor in there)
        for call in ("compute_gradients", "evaluate", "train_step"):
            found = getattr(one, call)(*there)
            assert_equal(found, getattr(other, call)(*arrays(given)), device)
        predicted = one.predict(*there[:3])
        assert isinstance(predicted, np.ndarray)
        assert_equal(predicted, other.predict(*arrays(given[:3])), device)
        assert all(torch.equal(a, b) for a, b in zip(there, kept, strict=True))
        assert_equal(one.state_dict(), other.state_dict(), device)
    assert one.updates == other.updates > 1


@pytest.mark.parametrize("call", ["train_step", "evaluate", "compute_gradients", "predict"])
def test_nothing_is_copied(
    call: str, device: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(value: Any, device: Device) -> Any:
        made = ort_value_of(value, device)
        seen.append(made.data_ptr())
        return made

    for module in (stock_run, predictor):
        monkeypatch.setattr(module, "ort_value_of", spy)
    trainer = load_trainer(folder / "adamw", device=device)
    given = [tensor.to(device) for tensor in batch(6)[: 3 if call == "predict" else 4]]
    getattr(trainer, call)(*given)
    assert {tensor.data_ptr() for tensor in given} <= set(seen)


DTYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_shared_both_ways(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    numbers = torch.arange(6).reshape(2, 3).to(dtype)
    tensor = numbers[: shape[0], : shape[1]].contiguous() if shape else numbers[1, 1].clone()
    value = ort_value_of(tensor, CPU)
    assert (value.data_type(), list(value.shape())) == (f"tensor({DTYPES[dtype]})", list(shape))
    back = shared_tensors({"x": value}, CPU)["x"]
    assert value.data_ptr() == back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    copied = shared_tensors({"x": own_value(tensor, CPU)}, CPU)["x"]
    assert copied.dtype == dtype and torch.equal(copied, tensor)
    assert copied.data_ptr() != tensor.data_ptr()


def unaligned(tensor: Tensor) -> Tensor:
    size = tensor.element_size()
    raw = bytearray(1 + size * tensor.numel())
    raw[1:] = tensor.numpy().tobytes()
    return torch.frombuffer(raw, dtype=tensor.dtype, offset=1).reshape(tensor.shape)


def every_second(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


WAYS: dict[str, Any] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": every_second,
    "an offset": lambda x: torch.cat([x[:1], x])[1:],
    "unaligned": unaligned,
    "expanded": lambda x: x[:1].clone().expand_as(x),
    "negated": lambda x: torch.complex(torch.zeros_like(x).float(), -x.float()).conj().imag,
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": nn.Parameter,
    "of inference mode": lambda x: torch.inference_mode()(x.clone)(),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_lies(way: str, folder: Path) -> None:
    """The step is that of a contiguous copy, and the tensor stays as it was."""
    trainer, other = load_trainer(folder / "images"), load_trainer(folder / "images")
    x = batch(6)[0].float()
    given, labels = WAYS[way](x), torch.arange(6) % CLASSES
    before = given.detach().clone(), given.stride(), given.requires_grad, given.data_ptr()
    wanted = np.array(before[0].resolve_neg().numpy(), order="C")
    for _ in range(2):
        assert trainer.train_step(given, every_second(labels)) == other.train_step(
            wanted, labels.numpy()
        )
    assert_equal(trainer.state_dict(), other.state_dict(), "cpu")
    assert torch.equal(given.detach(), before[0])
    assert (given.stride(), given.requires_grad, given.data_ptr()) == before[1:]


SPECS = (
    TensorSpec("x", "float32", ("batch", 3)),
    TensorSpec("labels", "int64", ("batch",), 5, -100),
)
X, Y = torch.zeros(4, 3), torch.arange(4)


def test_numbers_that_are_yet_to_be_negated() -> None:
    """A view with the sign in a bit beside it, in one piece."""
    view = torch._neg_view(X + 3)
    assert view.is_neg() and view.is_contiguous()
    (value,) = check_batch(SPECS[:1], (view,), {}, "predict")
    assert bool((ort_value_of(value, CPU).numpy() == -3).all())


def test_what_is_not_aligned_is_copied() -> None:
    """Kernels load 16 bytes at once, on a GPU from such addresses alone."""
    (value,) = check_batch([TensorSpec("x", "int64", (None,))], (Y[1:],), {}, "predict")
    assert isinstance(value, Tensor) and torch.equal(value, Y[1:])
    assert value.data_ptr() % 16 == 0 != Y[1:].data_ptr() % 16


BAD_BATCHES: dict[str, tuple[Any, ...]] = {
    "labels is missing": (X,),
    "given 3 values: it takes 2": (X, Y, Y),
    "'labels' is of dtype int32": (X, Y.int()),
    "'x' is of dtype float64": (X.double(), Y),
    "'x' is of dtype bool": (X.bool(), Y),
    "'x' has shape (3,): the graph takes 2 dimensions": (X[0], Y),
    "'x' has shape (4, 2): the graph takes size 3 in dimension 1": (X[:, :2], Y),
    "its dimension 0, 'batch', is 3, and that of 'x' 4": (X, Y[:3]),
    "'x' has shape (0, 3): it is empty": (X[:0], Y[:0]),
    "the class index 5: the model has 5 classes": (X, Y + 2),
    "the class index -1: the model has 5 classes": (X, Y - 1),
}


@pytest.mark.parametrize("as_arrays", [False, True], ids=["tensors", "arrays"])
@pytest.mark.parametrize("message", BAD_BATCHES)
def test_tensors_are_checked_as_arrays_are(message: str, as_arrays: bool, device: str) -> None:
    values = BAD_BATCHES[message]
    given = arrays(values) if as_arrays else [value.to(device) for value in values]
    with pytest.raises(InvalidBatchError) as caught:
        check_batch(SPECS, given, {}, "train_step")
    assert message in str(caught.value)


def pretended(x: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(x.shape)


def emptied(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


NO_NUMBERS: dict[str, Any] = {
    "a torch.sparse_coo tensor on cpu": lambda x: x.to_sparse(),
    "a torch.strided tensor on meta": lambda x: x.to("meta"),
    "a torch._mkldnn tensor on cpu": lambda x: x.to_mkldnn(),
    "a torch.strided tensor on cpu, a FakeTensor": pretended,
    "a torch.strided tensor on cpu, a Tensor": emptied,
    "a torch.jagged tensor on cpu, a NestedTensor": lambda x: torch.nested.nested_tensor(
        list(x), layout=torch.jagged
    ),
}


@pytest.mark.parametrize("message", NO_NUMBERS)
def test_tensors_without_numbers_are_refused(message: str, folder: Path) -> None:
    """ONNX Runtime would read from address 0."""
    with pytest.raises(InvalidBatchError) as caught:
        check_batch(SPECS, (NO_NUMBERS[message](X), Y), {}, "predict")
    assert f"predict: 'x' is {message}" in str(caught.value)
    trainer = load_trainer(folder / "adamw")
    state = trainer.state_dict()
    with pytest.raises(StateMismatchError, match=r"'mid.bias' is a \w*Tensor"):
        trainer.load_state_dict({**state, "mid.bias": NO_NUMBERS[message](X)})
    assert_equal(trainer.state_dict(), state, "cpu")


def test_within_torch_func_a_batch_is_refused() -> None:
    def called(row: Tensor) -> Tensor:
        with pytest.raises(InvalidBatchError, match=r"outside of torch\.func"):
            check_batch(SPECS, (row, Y), {}, "predict")
        return row

    torch.func.vmap(called)(torch.stack([X, X]))


class Calls(TorchFunctionMode):
    """Names of what is called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_labels_are_looked_at_where_they_lie(device: str) -> None:
    labels = Y.to(device)
    with Calls() as calls:
        check_batch(SPECS, (X, labels), {}, "predict")
    assert "any" in calls.names
    assert not calls.names & {"cpu", "numpy", "to", "tolist", "__array__"}


def test_labels_of_bytes() -> None:
    """In their dtype the bounds would be others: -100 is 156 there, and 300 is 44."""
    (spec,) = specs = [TensorSpec("labels", "uint8", ("batch",), 150, -100)]
    with pytest.raises(InvalidBatchError, match="the class index 156: the model has 150"):
        check_batch(specs, (torch.tensor([3, 156], dtype=torch.uint8),), {}, "predict")
    many = [TensorSpec("labels", "uint8", spec.shape, 300)]
    check_batch(many, (torch.tensor([3, 156], dtype=torch.uint8),), {}, "predict")


# --- lifetimes ----------------------------------------------------------------------------------


def overwrite_what_is_free(*sizes: int) -> None:
    gc.collect()
    for size in sizes:
        made = [np.full(size, np.nan, np.float32) for _ in range(20)]
        made += [torch.full((size,), torch.nan).numpy() for _ in range(20)]
        del made


def test_memory_lives_as_long_as_it_is_read() -> None:
    array = np.arange(100_000, dtype=np.float32)
    wanted, memory = array.copy(), weakref.ref(array)
    value = ort_value_of(torch.from_numpy(array), CPU)
    del array
    overwrite_what_is_free(100_000)
    assert memory() is not None
    np.testing.assert_array_equal(value.numpy(), wanted)
    tensor = shared_tensors({"x": value}, CPU)["x"]
    del value
    overwrite_what_is_free(100_000)
    assert memory() is not None and torch.equal(tensor, torch.from_numpy(wanted))
    del tensor
    gc.collect()
    assert memory() is None


def test_memory_of_its_own_is_kept_by_those_who_look() -> None:
    """An OrtValue of an array itself keeps nothing."""
    sizes = (5, 100, 2_000, 20_000)
    arrays = [np.arange(size, dtype=np.float32) for size in sizes]
    for given in (arrays, [torch.from_numpy(array) for array in arrays]):
        tensors = [shared_tensors({"x": own_value(one, CPU)}, CPU)["x"] for one in given]
        overwrite_what_is_free(*sizes)
        for tensor, wanted in zip(tensors, arrays, strict=True):
            assert torch.equal(tensor, torch.from_numpy(wanted))


def test_a_step_keeps_no_batch(folder: Path) -> None:
    """It is free afterwards, and what becomes of it is nothing to the run."""
    trainer, other = load_trainer(folder / "every"), load_trainer(folder / "every")
    for number, given in enumerate(batches(4), start=1):
        copies = arrays(tensor.clone() for tensor in given)
        memories = [weakref.ref(array) for array in copies]
        tensors = [torch.from_numpy(array) for array in copies]
        assert trainer.train_step(*tensors) == other.train_step(*given)
        for tensor in tensors:
            tensor.zero_()
        del copies, tensors, tensor
        if number < 3:
            continue
        gc.collect()  # behind an update, and between two
        assert [memory() for memory in memories] == [None] * len(memories)
    assert_equal(trainer.state_dict(), other.state_dict(), "cpu")


# --- live tensors -------------------------------------------------------------------------------


def trained(trainer: OrtTrainer) -> dict[str, Tensor]:
    """What of the state_dict the trainer has memory for."""
    manifest = trainer.manifest
    names = {spec.name for spec in manifest.parameters} | set(manifest.aliases)
    return {name: value for name, value in trainer.state_dict().items() if name in names}


def test_live_tensors_are_the_trainer_s_memory(device: str, folder: Path) -> None:
    trainer = load_trainer(folder / "adamw", device=device)
    average: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for given in batches(5):
        trainer.train_step(*given)
        live, copied = trainer.live_tensors(), trained(trainer)
        assert {tensor.device for tensor in live.values()} == {torch.device(device)}
        assert {n: t.cpu() for n, t in live.items()}.keys() == copied.keys()
        assert all(torch.equal(live[name].cpu(), copied[name]) for name in copied)
        for name, tensor in live.items():
            average[name] = tensor.clone().lerp_(average.get(name, tensor), 0.9)
            wanted[name] = copied[name].clone().lerp_(wanted.get(name, copied[name]), 0.9)
    assert live["again.weight"] is live["mid.weight"]
    assert {"norm.running_var", "frozen"} < live.keys()
    assert "norm.num_batches_tracked" not in live
    assert_equal({n: t.cpu() for n, t in average.items()}, wanted, device)
    again = trainer.live_tensors()
    assert all(again[name].data_ptr() == tensor.data_ptr() for name, tensor in live.items())
    live["head.bias"].fill_(7)
    assert bool((trainer.state_dict()["head.bias"] == 7).all())
    assert bool((copied["head.bias"] != 7).all())  # state_dict copies
    trainer.state_dict()["head.bias"].zero_()
    assert bool((again["head.bias"] == 7).all())


def test_live_tensors_outlive_the_trainer(device: str, folder: Path) -> None:
    trainer = load_trainer(folder / "adamw", device=device)
    trainer.train_step(*batch(6))
    trainer.load_state_dict({**trainer.state_dict(), "head.bias": np.full(5, 2, np.float32)})
    live, copied = trainer.live_tensors(), trained(trainer)
    trainer.load_state_dict(trainer.state_dict())
    del trainer
    overwrite_what_is_free(*(tensor.numel() for tensor in copied.values()))
    assert all(torch.equal(live[name].cpu(), copied[name]) for name in copied)


def test_a_state_of_tensors_is_copied(device: str, folder: Path) -> None:
    """Also one's own live tensors, strided ones and those that need gradients."""
    trainer, other = (load_trainer(folder / "adamw", device=device) for _ in range(2))
    trainer.train_step(*batch(6))
    other.load_state_dict(trainer.state_dict() | trainer.live_tensors())
    state = {name: value.to(device) for name, value in trainer.state_dict().items()}
    state["head.weight"] = state["head.weight"].t().contiguous().t().requires_grad_()
    trainer.load_state_dict(state | trainer.live_tensors())
    assert_equal(trainer.state_dict(), other.state_dict(), "cpu")
    trainer.load_state_dict(state)
    for name in trained(trainer):
        state[name].detach().fill_(1)
    assert_equal(trainer.state_dict(), other.state_dict(), "cpu")
    assert_equal(trainer.evaluate(*batch(4)), other.evaluate(*batch(4)), device)


# --- what can't be shared -----------------------------------------------------------------------


def test_without_dlpack_batches_go_over_the_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in stock ONNX Runtime 1.19 and 1.20."""
    with_it = load_trainer(folder / "adamw")
    losses = [with_it.train_step(*given) for given in batches(3)]
    monkeypatch.setattr(dlpack, "_native", lambda: types.SimpleNamespace(OrtValue=object))
    trainer = load_trainer(folder / "adamw")
    assert [trainer.train_step(*given) for given in batches(3)] == losses
    trainer.load_state_dict(with_it.state_dict())
    assert_equal(trainer.predict(*batch(4)[:3]), with_it.predict(*batch(4)[:3]), "cpu")
    with pytest.raises(MissingRuntimeError, match=r"DLPack came with 1\.21.*state_dict"):
        trainer.live_tensors()


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has CUDA")
def test_a_gpu_that_pytorch_does_not_see() -> None:
    with pytest.raises(MissingRuntimeError, match="a PyTorch without CUDA"):
        shared_tensors({}, Device("CUDAExecutionProvider", 1))


@pytest.mark.parametrize("call", ["train_step", "evaluate", "compute_gradients", "predict"])
def test_pytorch_s_queue_is_waited_for(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each run on CUDA, also one of arrays: live tensors may be in use."""
    trainer = load_trainer(folder / "adamw")
    waited: list[Any] = []

    def current_stream(index: int) -> Any:
        return types.SimpleNamespace(synchronize=lambda: waited.append(index))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    given = arrays(batch(4)[: 3 if call == "predict" else 4])
    getattr(trainer, call)(*given)
    assert not waited
    monkeypatch.setattr(trainer, "_device", Device("CUDAExecutionProvider", 1))
    with contextlib.suppress(Exception):  # there is no such GPU to run on
        getattr(trainer, call)(*given)
    assert waited == [1]


class TestOnCuda:
    """What has no counterpart on a CPU."""

    pytestmark = ON_CUDA

    def test_tensors_on_other_devices(self, folder: Path) -> None:
        on_cpu = load_trainer(folder / "adamw")
        on_gpu = load_trainer(folder / "adamw", device="cuda:0")
        for given in batches(3):
            loss = on_cpu.train_step(*(tensor.cuda() for tensor in given))
            assert loss == pytest.approx(on_gpu.train_step(*given), rel=1e-3)

    def test_a_batch_that_is_still_being_made(self, folder: Path) -> None:
        """On a stream of its own, behind work of half a second; read too early it is zero.

        A look at labels would wait too, so it is a batch without them.
        """
        trainer = load_trainer(folder / "adamw", device="cuda:0")
        given = [tensor.cuda() for tensor in batch(6)[:3]]
        wanted = trainer.predict(*given)
        late = [torch.zeros_like(tensor) for tensor in given]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**9)
            for tensor, value in zip(late, given, strict=True):
                tensor.copy_(value)
            assert_equal(trainer.predict(*late), wanted, "cuda:0")

    def test_live_tensors_that_are_still_being_read(self, folder: Path) -> None:
        trainer = load_trainer(folder / "adamw", device="cuda:0")
        trainer.train_step(*batch(6))
        copied = trained(trainer)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**9)
            read = {name: tensor.clone() for name, tensor in trainer.live_tensors().items()}
            for given in batches(3):
                trainer.train_step(*given)
        assert all(torch.equal(read[name].cpu(), copied[name]) for name in copied)
