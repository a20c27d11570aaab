"""The Gram, the first layer and whole steps: plain, torch-tract's, ours, with aims and floors.

python benchmarks/bench_gram.py [--repeats 15] [--quick] [--out FOLDER]

Needs the extra `test`.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from aims import COMPILED, OPERATOR_ERROR
from compiled import measure_compiled
from growth import measure_growth
from layer_figures import Bench, measure_layer, ratio
from layer_table import print_layers
from operator_errors import batch, errors
from peaks import measure_peaks
from plots import save_growth, save_ratios
from report import OUT, against, machine, save, table
from stems import CIFAR, IMAGENET, LINEAR, STEMS, arms
from timing import interleaved, pin_allocator
from training_steps import training_step
from whole_nets import PYTORCH_NETS, Net

CPU = torch.device("cpu")
THREADS = 2  # what the aims are for
COMPILED_STEMS = (LINEAR, CIFAR, IMAGENET)


def step_rows(nets: Sequence[Net], repeats: int, console: Console) -> list[dict[str, Any]]:
    """Times of whole steps, by net."""
    rows = []
    for net in track(nets, "whole steps", console=console):
        torch.manual_seed(0)
        models, example = arms(net.build(), net.input_layer), net.example()
        steps = {
            arm: training_step(model, net.optimizer, [example]) for arm, model in models.items()
        }
        times = interleaved(steps, repeats, warm_ups=1)
        rows.append(
            {
                "net": str(net),
                "milliseconds": times,
                "ours_over_plain": ratio(times, "tract_fx", "plain"),
                "torch_tract_over_plain": ratio(times, "torch-tract", "plain"),
                "aim": net.aim and net.aim.bound,
            }
        )
    return rows


def print_steps(rows: Sequence[dict[str, Any]], nets: Sequence[Net], console: Console) -> None:
    printed = table(
        "Whole training steps", "", "plain,\nms", "ours\n÷ plain", "torch-tract\n÷ plain"
    )
    for row, net in zip(rows, nets, strict=True):
        ours = against(row["ours_over_plain"], net.aim)
        peer = against(row["torch_tract_over_plain"])
        printed.add_row(row["net"], f"{row['milliseconds']['plain']:.1f}", ours, peer)
    console.print(printed)


def print_compiled(rows: Sequence[dict[str, Any]], console: Console) -> None:
    printed = table(
        "The rewritten layer, torch.compile(fullgraph=True, dynamic=True)",
        "",
        "eager,\nms",
        "compiled\n÷ eager",
        "plain layer:\ncompiled\n÷ eager",
        "compiled again\nfor another batch",
    )
    for row in rows:
        eager, over = row["milliseconds"]["tract_fx, eager"], row["compiled_over_eager"]
        again = "yes" if row["compiled_again_for_another_batch"] else "no"
        plain = against(row["plain_compiled_over_eager"])
        printed.add_row(row["layer"], f"{eager:.1f}", against(over, COMPILED), plain, again)
    console.print(printed)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--repeats", type=int, help="rounds, each arm once (15, or 2 if quick)")
    made.add_argument(
        "--quick", action="store_true", help="few rounds, small inputs where the large take long"
    )
    made.add_argument(
        "--out", type=Path, default=OUT, help="folder for JSON and plots (%(default)s)"
    )
    return made


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure and print everything, and draw the plots.

    Args:
        options: The parser's.
        console: Where to.

    Returns:
        The record.
    """
    torch.set_num_threads(THREADS)
    repeats = options.repeats or (2 if options.quick else 15)
    clock = functools.partial(interleaved, threads=THREADS, warm_ups=1 if options.quick else 2)
    peaks = measure_peaks(clock, CPU, repeats=3 if options.quick else 9)
    console.print(f"measured peaks: {peaks}")
    bench = Bench(clock, CPU, repeats, peaks)

    layers = [measure_layer(s, bench) for s in track(STEMS, "first layers", console=console)]
    found = {
        stem.name: errors(stem, batch(stem, standardised=True))["operator"]
        for stem in track(STEMS, "errors", console=console)
    }
    print_layers(f"First layers, float32, {THREADS} threads", layers, found, console)
    save_ratios(layers, options.out / "layers.png")

    nets = PYTORCH_NETS
    if options.quick:
        nets = (dataclasses.replace(nets[0], shape=(4, *nets[0].shape[1:])), *nets[1:])
    steps = step_rows(nets, max(1, repeats // 2), console)
    print_steps(steps, nets, console)

    stems = COMPILED_STEMS[:1] if options.quick else COMPILED_STEMS
    compiled = [
        measure_compiled(stem, repeats) for stem in track(stems, "compiled", console=console)
    ]
    print_compiled(compiled, console)

    growth = measure_growth(options.quick, console)
    save_growth(growth, options.out / "growth.png")
    return {
        **machine(),
        "quick": options.quick,
        "repeats": repeats,
        "peaks": dataclasses.asdict(peaks),
        "layers": [
            {
                **row.record(),
                "operator_error": found[row.stem.name],
                "operator_error_aim": row.stem.aims and OPERATOR_ERROR.bound,
            }
            for row in layers
        ],
        "steps": steps,
        "compiled": compiled,
        "compiled_aim": COMPILED.bound,
        "growth": [series.record() for series in growth],
    }


def main() -> None:
    options = parser().parse_args()
    pin_allocator()
    console = Console()
    record = run(options, console)
    save(console, options.out / "gram.json", record)
    console.print(f"plots: {options.out / 'layers.png'}, {options.out / 'growth.png'}")


if __name__ == "__main__":
    main()
