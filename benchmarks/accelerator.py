"""What `bench_cuda.py` runs where there is a device: layers and whole nets in three precisions."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from device_checks import check_layer, synchronises
from layer_figures import Bench, gram_dtype, measure_layer, ratio
from layer_table import print_layers
from memory import peak_bytes
from peaks import measure_peaks
from precision import FLOAT32, PRECISIONS
from report import MISSING, against, machine, save, table
from stems import IMAGENET, MOBILENET, PATCHES_4, STEMS, VIT, Stem, arms
from timing import device_interleaved, interleaved
from training_steps import training_step
from whole_nets import ACCELERATOR_NETS, Net

LARGE_BATCH = 256
COMPILED = {"plain": "plain, compiled", "tract_fx": "tract_fx, compiled"}


def layers(quick: bool) -> list[Stem]:
    """The layers, with large batches of ImageNet's images; the aims are for a CPU."""
    large = [
        dataclasses.replace(stem, shape=(LARGE_BATCH, *stem.shape[1:]))
        for stem in (IMAGENET, VIT, PATCHES_4, MOBILENET)
    ]
    return [dataclasses.replace(s, aims=None) for s in (*STEMS, *([] if quick else large))]


def run(options: argparse.Namespace) -> int:
    """Measure, check, print, write.

    Args:
        options: `bench_cuda.py`'s.

    Returns:
        The exit status: 1 where a check failed.
    """
    console, device = Console(), torch.device(options.device)
    on_device = device.type == "cuda"
    # What trains a fixed shape for long lets cuDNN choose by trying out.
    torch.backends.cudnn.benchmark = True
    repeats = options.repeats or (2 if options.quick else 20)
    clock = device_interleaved if on_device else functools.partial(interleaved, warm_ups=1)
    dtype = gram_dtype(device)
    with FLOAT32.flags():
        peaks = measure_peaks(clock, device, 5, dtype)
    console.print(f"measured peaks in {dtype}: {peaks}")
    record: dict[str, Any] = {
        **machine(device),
        "quick": options.quick,
        "repeats": repeats,
        "peaks": dataclasses.asdict(peaks),
        "precisions": {},
    }
    failures: list[str] = []
    chosen = [PRECISIONS[options.precision]] if options.precision else PRECISIONS.values()
    for precision in chosen:
        bench = Bench(clock, device, repeats, peaks, precision)
        rows = layer_rows(layers(options.quick), bench, console)
        net_rows = [
            net_row(net, bench, options.compile)
            for net in track(nets(options.quick), "whole steps", console=console)
        ]
        print_nets(f"Whole training steps, {precision.name}", net_rows, console)
        record["precisions"][precision.name] = {"layers": rows, "nets": net_rows}
        for row in (*rows, *net_rows):
            failures += [f"{precision.name}, {row['name']}: {text}" for text in row["wrong"]]
    record["wrong"] = failures
    save(console, options.out / "cuda.json", record)
    for failure in failures:
        console.print(f"WRONG: {failure}", style="bold red")
    return 1 if failures else 0


def layer_rows(stems: Sequence[Stem], bench: Bench, console: Console) -> list[dict[str, Any]]:
    """Measure, check and print the layers in one precision; what is written of them."""
    title = f"First layers, {bench.precision.name}"
    rows, records, errors = [], [], {}
    for stem in track(stems, title, console=console):
        row, check = measure_layer(stem, bench), check_layer(stem, bench.precision, bench.device)
        errors[stem.name] = check.gradient
        rows.append(row)
        records.append(
            {
                "name": stem.name,
                **row.record(),
                "gram_error": check.gram,
                "operator_error": check.gradient,
                "wrong": check.failures,
            }
        )
    print_layers(title, rows, errors, console)
    return records


def net_row(net: Net, bench: Bench, compiled: bool) -> dict[str, Any]:
    """Measure the steps of a whole net, and check that ours does not synchronise.

    Args:
        net: The net.
        bench: How.
        compiled: Whether plain and ours are measured compiled, too.

    Returns:
        Milliseconds, ratios, the share of TrAct in a step of ours, peak memory beside the model;
        what arms raise that can't run: torch-tract's under autocast, or all for want of memory.

    Raises:
        RuntimeError: Another arm than torch-tract's fails, and not for want of memory.
    """
    torch.manual_seed(0)
    device, steps = bench.device, {}
    failures: dict[str, str] = {}
    batches = [(x.to(device), y.to(device)) for x, y in (net.example(), net.example())]
    with bench.precision.flags():
        models: dict[str, Any] = dict(arms(net.build(), net.input_layer))
        if compiled:
            torch.compiler.reset()
            models |= {c: torch.compile(copy.deepcopy(models[arm])) for arm, c in COMPILED.items()}
        for name, model in models.items():
            step = training_step(model.to(device), net.optimizer, batches, bench.precision)
            try:
                step()
            except RuntimeError as error:
                if name != "torch-tract" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                failures[name] = str(error).splitlines()[0]
            else:
                steps[name] = step
        times = bench.clock(steps, max(1, bench.repeats // 2))
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
        wrong = synchronises(steps["tract_fx"], device) if "tract_fx" in steps else None
    over = ratio(times, "tract_fx", "plain")
    return {
        "name": str(net),
        "milliseconds": times,
        "ours_over_plain": over,
        "compiled_ours_over_plain": ratio(times, *reversed(COMPILED.values())),
        "torch_tract_over_plain": ratio(times, "torch-tract", "plain"),
        "share_of_ours": None if over is None else 1 - 1 / over,
        "peak_bytes": peaks,
        "failures": failures,
        "wrong": [wrong] if wrong else [],
    }


def nets(quick: bool) -> list[Net]:
    """The whole nets; on two images where it has to be quick."""
    if not quick:
        return list(ACCELERATOR_NETS)
    return [dataclasses.replace(net, shape=(2, *net.shape[1:])) for net in ACCELERATOR_NETS]


def print_nets(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a line a net, with a second one of what was compiled."""
    heads = ("plain,\nms", "ours\n÷ plain", "TrAct's\nshare", "peer\n÷ plain", "peak GiB")
    printed = table(title, "", *heads)
    printed.caption = "peer: torch-tract; peak GiB: plain's and ours"
    for row in rows:
        times, share, peaks = row["milliseconds"], row["share_of_ours"], row["peak_bytes"]
        printed.add_row(
            row["name"],
            _milliseconds(times.get("plain")),
            against(row["ours_over_plain"]),
            MISSING if share is None else f"{share:.1%}",
            against(row["torch_tract_over_plain"]),
            ", ".join(f"{peaks[arm] / 2**30:.1f}" for arm in ("plain", "tract_fx") if arm in peaks),
        )
        if (over := row["compiled_ours_over_plain"]) is not None:
            compiled = (
                _milliseconds(times[COMPILED["plain"]]),
                against(over),
                f"{1 - 1 / over:.1%}",
            )
            printed.add_row("  compiled", *compiled)
    console.print(printed)


def _milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
