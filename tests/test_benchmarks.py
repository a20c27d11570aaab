"""What the benchmarks measure with is right: torch-tract's Gram, peak memory, floors, records."""

from __future__ import annotations

import ast
import copy
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_tract
from rich.console import Console
from torch import Tensor, nn

import oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import accelerator
import bench_accuracy
import bench_cuda
import bench_cuda_gram
import bench_gram
import bench_processes
import bench_processes_training
import bench_shapes
import device_checks
import growth
import stems
import whole_nets
from aims import Aim, as_error, as_ratio
from image_folder import digits
from layer_figures import Bench, measure_layer
from memory import peak_bytes
from peaks import Peaks, measure_peaks
from precision import PRECISIONS, Precision
from stems import LAMBDA, STEMS, Layer, Stem, arms, weight_gradient
from timing import interleaved
from torch_tract_gram import torch_tract_gram
from tract_fx import tract_module
from tract_fx.preconditioner import GramWork, PatchGeometry, gram, gram_work

CPU = torch.device("cpu")
SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("bench_*.py"))
MEBIBYTE = 1 << 20
ONCE = partial(interleaved, warm_ups=1)
SMALL: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "conv-overlapping": (lambda: nn.Conv2d(3, 5, 3, 1, 1), (4, 3, 9, 8)),
    "conv-strided": (lambda: nn.Conv2d(2, 4, (5, 3), (2, 3), (2, 0)), (6, 2, 13, 12)),
    "conv-patches": (lambda: nn.Conv2d(3, 4, 4, 4, bias=False), (9, 3, 16, 12)),
    "linear": (lambda: nn.Linear(7, 5), (40, 7)),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The scripts take all cores; other tests compare runs bit for bit."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(name: str) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    build, shape = SMALL[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_torch_tract_gram_is_torch_tracts(name: str) -> None:
    """A solve with that Gram gives the gradient of a torch-tract layer."""
    layer, x = small(name)
    dz = torch.randn_like(layer(x))
    peer = arms(nn.Sequential(layer))["torch-tract"]
    assert isinstance(peer.get_submodule("0"), torch_tract.TrActLinear | torch_tract.TrActConv2d)
    found = weight_gradient(peer, x, dz).flatten(1)
    gw = weight_gradient(layer, x, dz).flatten(1)
    damped = torch_tract_gram(x, layer) + LAMBDA * torch.eye(gw.shape[1], dtype=gw.dtype)
    assert oracle.relative_error(found, torch.linalg.solve(damped, gw, left=False)) < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_grams_are_of_the_same_patches(name: str) -> None:
    layer, x = small(name)
    exact = oracle.gram(layer, x)[0]
    ours = gram(x, PatchGeometry.of_module(layer), torch.float64)[0]
    for found in (torch_tract_gram(x, layer), ours, device_checks.float64_gram(x, layer)):
        assert oracle.relative_error(found, exact) < 1e-12


def test_peak_memory_of_what_can_be_counted() -> None:
    """Two tensors of 1 MiB at a time beside the first: the third replaces the second."""

    def call() -> Tensor:
        x = torch.empty(MEBIBYTE // 4)
        y = torch.empty(2 * MEBIBYTE // 4)
        del y
        z = torch.empty(MEBIBYTE // 4)
        return torch.cat((x, z))

    assert peak_bytes(call, CPU) == 4 * MEBIBYTE


def test_peak_memory_beside_what_was_there() -> None:
    before = torch.ones(MEBIBYTE // 4)
    assert peak_bytes(lambda: before.add_(before), CPU) == 0
    assert peak_bytes(lambda: before + before, CPU) == MEBIBYTE


def test_peak_memory_of_torch_tracts_gram_holds_the_patches_twice() -> None:
    layer, x = nn.Conv2d(3, 8, 4, 2), torch.randn(16, 3, 32, 32)
    geometry = PatchGeometry.of_module(layer)
    patches = 4 * geometry.rows(x) * geometry.columns(x)
    found = peak_bytes(lambda: torch_tract_gram(x, layer), CPU)
    assert found == pytest.approx(2 * patches, rel=0.05)


def test_floor_is_the_slower_of_products_and_copies() -> None:
    peaks = Peaks(flops=2e9, bandwidth=8e9)
    assert peaks.floor(GramWork("", 1e9, 0.0)) == pytest.approx(1e3)
    assert peaks.floor(GramWork("", 1e9, 3e9)) == pytest.approx(3e3)


def test_peaks_are_what_the_clock_says() -> None:
    def clock(calls: Any, repeats: int) -> dict[str, float]:
        for call in calls.values():
            call()
        return {"copy": 1e3, "1024": 1e3, "2048": 2e3}

    peaks = measure_peaks(clock, CPU, 1)
    assert peaks.flops == 2048**3  # 2 · 2048³ in two seconds
    assert peaks.bandwidth == 2 * 4 * 2**26


def test_aims() -> None:
    assert str(Aim(8, at_least=True)) == "≥ 8"
    assert str(Aim(1 / 30)) == "≤ 1/30"
    assert str(Aim(2e-5, write=as_error)) == "≤ 2.0e-5"
    assert Aim(8, at_least=True).reached(8.0) and not Aim(8, at_least=True).reached(7.9)
    assert Aim(1.35).reached(1.35) and not Aim(1.35).reached(1.36)
    assert not Aim(1.35).reached(float("nan"))
    assert [as_ratio(value) for value in (0.25, 0.62, 1.0, 12.345)] == ["1/4", "0.62", "1", "12.3"]


def test_every_first_layer_of_the_aims_is_measured() -> None:
    aims = {stem.kind: stem.aims for stem in STEMS}
    assert len(aims) == 8
    found = {k: (a.gram.bound, a.layer.bound, 1 / a.memory.bound) for k, a in aims.items() if a}
    assert found == {
        "ImageNet 7x7/2": (8, 1.35, 30),
        "CIFAR 3x3": (6, 1.2, 4),
        "ViT 16x16/16": (1.9, 1.55, 4),
        "4x4/4": (2.2, 1.4, 4),
        "MNIST 5x5": (4.5, 1.5, 4),
        "MobileNet 3x3/2": (2, 1.8, 6),
        "Linear 784": (1.5, 2, 1),
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_can_be_quick(script: Path) -> None:
    """`make bench ARGS="--quick --out …"` gives all of them the same arguments."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    options = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "add_argument"
        and isinstance(call.args[0], ast.Constant)
    }
    shared = any(ast.unparse(call.func) == "add_device_options" for call in calls)
    assert {"--quick", "--out"} <= options | ({"--out"} if shared else set())


@pytest.mark.parametrize("script", [bench_processes, bench_processes_training])
def test_scripts_on_processes(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run whole, and simulated processes with one Gram are one large batch."""
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--out", str(tmp_path)])
    script.main()
    (record,) = (json.loads(file.read_text()) for file in tmp_path.iterdir())
    if script is bench_processes:
        assert all(0 < row["share"] < 0.01 for row in record["on_paper"])
        few = {row["layer"]: row for row in record["simulated"]}
        assert few["3×3"]["difference"] < few["4×4/4"]["difference"] < 1
        one = bench_processes.LAYERS[1]
        found = bench_processes.simulate(one, bench_processes.photographs(8, 32), 1)
        assert found["difference"] < 1e-6 and found["rows"] == one.batch * 64
    else:
        assert {*record["accuracy"]} == {"convolutions", "transformer"}
        for by_arm in record["accuracy"].values():
            assert all(len(values) == 2 for values in by_arm.values())


def test_simulated_processes_with_one_gram_are_one_large_batch() -> None:
    data = digits()
    net = bench_processes_training.transformer(data, 0).double()
    images, labels = data.train.images[:64].double(), data.train.labels[:64]
    moved = {}
    for arm in ("one batch", "8 global", "8 local"):
        model = tract_module(copy.deepcopy(net), layers=["patches"])
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        bench_processes_training.train(model, optimizer, images, labels, arm)
        moved[arm] = model.get_parameter("patches.weight") - net.get_parameter("patches.weight")
    assert oracle.relative_error(moved["8 global"], moved["one batch"]) < 1e-10
    assert oracle.relative_error(moved["8 local"], moved["one batch"]) > 1e-2


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm that has the layer is timed, and the gradient is TrAct's."""
    monkeypatch.setattr(bench_shapes, "measure_peaks", lambda *_, **__: Peaks(1e11, 1e10))
    names = ["tabular 64 to 32, batch 8", "M5"]
    options = bench_shapes.parser().parse_args([*names, "--seconds", "0.01"])
    linear, audio = bench_shapes.run(options, Console(file=io.StringIO()))["layers"]
    assert (linear["rows"], linear["columns"]) == (8, 64)
    assert set(linear["milliseconds"]) == {"plain", "torch-tract", "tract_fx"}
    assert set(audio["milliseconds"]) == {"plain", "tract_fx"}
    assert linear["error"] < 1e-6 and audio["error"] < 1e-5
    extra = linear["floor"] - linear["milliseconds"]["plain"]
    assert extra == pytest.approx(2e3 * (8 * 8 * 64 / 2 + 8**3 / 6 + 8 * 8 * 32) / 1e11)


SMALL_STEMS = (
    Stem("conv", lambda: nn.Conv2d(3, 4, 3, 1, 1), (4, 3, 8, 8), STEMS[0].aims),
    Stem("patches", lambda: nn.Conv2d(3, 4, 4, 4), (16, 3, 16, 16)),
    Stem("few rows", lambda: nn.Linear(12, 3), (5, 12)),
)


@pytest.fixture
def small_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts on layers and nets that take no time, with the errors' photographs small too."""
    nets = (
        replace(whole_nets.PYTORCH_NETS[1], shape=(2, 1, 28, 28)),
        replace(whole_nets.PYTORCH_NETS[2], shape=(2, 784)),
    )
    torch.manual_seed(0)
    for module in (bench_gram, bench_accuracy, accelerator):
        monkeypatch.setattr(module, "STEMS", SMALL_STEMS)
    monkeypatch.setattr(bench_accuracy, "QUICK", SMALL_STEMS)
    monkeypatch.setattr(bench_gram, "PYTORCH_NETS", nets)
    monkeypatch.setattr(accelerator, "ACCELERATOR_NETS", nets)
    monkeypatch.setattr(bench_gram, "COMPILED_STEMS", ())  # compiling takes seconds
    monkeypatch.setattr(bench_gram, "batch", lambda stem, standardised: torch.randn(stem.shape))
    monkeypatch.setattr(bench_accuracy, "batch", lambda stem, standardised: torch.randn(stem.shape))
    monkeypatch.setattr(device_checks, "images", torch.randn)
    peaks = Peaks(1e11, 1e10)
    for module in (bench_gram, accelerator):
        monkeypatch.setattr(module, "measure_peaks", lambda *_, **__: peaks)
    monkeypatch.setattr(growth, "CIFAR", replace(stems.CIFAR, shape=(1, 3, 8, 8)))
    monkeypatch.setattr(growth, "IMAGENET", replace(stems.IMAGENET, shape=(1, 3, 16, 16)))
    tries_out = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = tries_out


def run(main: Callable[[], int | None], *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    for name in ("bench_gram", "bench_cuda", "bench_cuda_gram"):
        monkeypatch.setattr(sys.modules[name], "pin_allocator", lambda: None)
    monkeypatch.setattr(sys, "argv", ["script", "--quick", *arguments])
    return main() or 0


@pytest.mark.usefixtures("small_benchmarks")
def test_record_of_the_gram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "_REPEATS", 1)
    run(bench_gram.main, "--repeats", "1", "--out", str(tmp_path), monkeypatch=monkeypatch)
    record = json.loads((tmp_path / "gram.json").read_text())
    assert [row["layer"] for row in record["layers"]] == [s.name for s in SMALL_STEMS]
    conv, _, few = record["layers"]
    assert set(conv["layer_ms"]) == {"plain", "torch-tract", "tract_fx"}
    assert conv["layer_ours_over_plain"] == pytest.approx(
        conv["layer_ms"]["tract_fx"] / conv["layer_ms"]["plain"]
    )
    assert conv["gram_torch_tract_over_ours"] == pytest.approx(
        conv["gram_ms"]["torch-tract"] / conv["gram_ms"]["tract_fx"]
    )
    assert conv["gram_memory_ours_over_torch_tract"] == pytest.approx(
        conv["gram_peak_bytes"]["tract_fx"] / conv["gram_peak_bytes"]["torch-tract"]
    )
    layer = SMALL_STEMS[0].build()
    work = gram_work(torch.empty(4, 3, 8, 8), PatchGeometry.of_module(layer))
    assert conv["multiply_adds"] == work.multiply_adds
    assert conv["gram_floor_ms"] == pytest.approx(Peaks(1e11, 1e10).floor(work))
    assert conv["aims"] == {
        "gram_torch_tract_over_ours": 8,
        "layer_ours_over_plain": 1.35,
        "gram_memory_ours_over_torch_tract": 1 / 30,
    }
    assert conv["operator_error"]["tract_fx"] < 2e-5
    assert few["gram_ms"] == {} and few["gram_floor_ms"] is None and few["aims"] is None
    names = [row["net"].partition(",")[0] for row in record["steps"]]
    assert names == ["LeNet", "MLP 784-400-400-10"]
    assert len(record["growth"]) == 3
    for series in record["growth"]:
        sizes = [point["size"] for point in series["figures"]["tract_fx"]]
        assert sizes == sorted(sizes) and len(sizes) == 3
    assert {"cpu", "threads", "python", "versions", "peaks"} <= set(record)
    assert (tmp_path / "layers.png").stat().st_size > 0
    assert (tmp_path / "growth.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert all(stem.kind in printed for stem in SMALL_STEMS) and "≤ 1.35" in printed


@pytest.mark.usefixtures("small_benchmarks")
def test_record_of_the_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bench_accuracy.main, "--out", str(tmp_path), monkeypatch=monkeypatch)
    record = json.loads((tmp_path / "accuracy.json").read_text())
    for key, bound in (("standardised", 2e-5), ("range_255", 1e-2)):
        conv, *_ = record[key]
        assert [row["layer"] for row in record[key]] == [s.name for s in SMALL_STEMS]
        assert conv["aim"] == bound and conv["aim_reached"] is True
        assert set(conv["operator"]) == set(conv["end_to_end"]) == {"tract_fx", "torch-tract"}
    assert len(record["bfloat16_autocast"]) == len(SMALL_STEMS)
    (conv, _), (conv_255, _) = record["arithmetic"].values()  # the third has R < n
    assert conv["TF32"][1] > 3 * conv["float32"][1] > 0 and conv["3 × TF32"][1] < 1e-5
    assert conv_255["TF32"] == conv_255["float32"]  # whole numbers up to 255 are TF32


def test_ways_to_compute_a_gram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time is of a device; that they compute the same is seen here."""
    arguments = ("--device", "cpu", "--out", str(tmp_path))
    assert run(bench_cuda_gram.main, *arguments, monkeypatch=monkeypatch) == 0
    record = json.loads((tmp_path / "cuda_gram.json").read_text())
    (ways,) = (layer["ways"] for layer in record["grams"].values())
    assert not any("failure" in way for way in ways)
    for words, bound in (("float64", 1e-14), ("float32", 1e-6), ("8 bits", 1e-8)):
        of_kind = [way["error"] for way in ways if words in way["way"]]
        assert len(of_kind) > 4 and max(of_kind) < bound
    assert len(record["solves"]) == 2


@pytest.mark.usefixtures("small_benchmarks")
def test_accelerators_script_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes half a minute
    arguments = ("--device", "cpu", "--compile", "--repeats", "1", "--out", str(tmp_path))
    status = run(bench_cuda.main, *arguments, monkeypatch=monkeypatch)
    record = json.loads((tmp_path / "cuda.json").read_text())
    assert status == 0 and record["wrong"] == []
    assert list(record["precisions"]) == [precision.name for precision in PRECISIONS.values()]
    for part in record["precisions"].values():
        assert [row["name"] for row in part["layers"]] == [s.name for s in SMALL_STEMS]
        assert all(row["operator_error"]["tract_fx"] < 1e-4 for row in part["layers"])
        assert len(part["nets"]) == 2
        for row in part["nets"]:
            assert {"tract_fx", "plain, compiled", "tract_fx, compiled"} <= set(row["milliseconds"])


@pytest.mark.usefixtures("small_benchmarks")
def test_wrong_result_makes_the_accelerators_script_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_checks, "LAMBDA", 2 * LAMBDA)
    arguments = "--device cpu --precision float32 --repeats 1 --out".split()
    assert run(bench_cuda.main, *arguments, str(tmp_path), monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == len(SMALL_STEMS)


def test_without_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(bench_cuda.main, "--out", str(tmp_path), monkeypatch=monkeypatch) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_precision_puts_the_flags_back(precision: Precision) -> None:
    def flags() -> list[str]:
        convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (mypy does not see it)
        return [torch.backends.cuda.matmul.fp32_precision, convolutions.fp32_precision]

    before = flags()
    with precision.flags():
        assert flags() == ["tf32" if precision.tf32 else "ieee"] * 2
    assert flags() == before
    # PyTorch's older names for the same flags still answer.
    assert torch.get_float32_matmul_precision() == "highest"
    assert isinstance(torch.backends.cudnn.allow_tf32, bool)


def test_arms_that_fail_are_named() -> None:
    """torch-tract can't run a convolution under autocast: the others are measured all the same."""
    bench = Bench(ONCE, CPU, 1, Peaks(1e11, 1e10), PRECISIONS["bfloat16"])
    row = measure_layer(SMALL_STEMS[0], bench)
    assert set(row.layer) == {"plain", "tract_fx"}
    assert set(row.failures) == {"torch-tract"} and row.peer_over_plain is None


def test_inputs_are_as_large_as_the_nets() -> None:
    with torch.device("meta"):
        resnet, vit = whole_nets.resnet50(), whole_nets.vit_base()
        assert resnet(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        assert vit(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    # The published numbers of parameters.
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032
    assert sum(p.numel() for p in vit.parameters()) == 86_567_656


def test_growth_leaves_torch_tract_out_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_PEER_BYTES", 2 * 4 * (4 * 64) * 27)
    sizes, shapes = [1, 4, 16], [(n, 3, 8, 8) for n in (1, 4, 16)]
    series = growth.Series("", "batch", stems.CIFAR, sizes, shapes)
    figures = growth.measured(series, range(3)).figures
    assert [size for size, *_ in figures["tract_fx"]] == sizes
    assert [size for size, *_ in figures["torch-tract"]] == [1, 4]
