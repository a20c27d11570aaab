"""`tract-fx locate`: which layer the pass would take, and why not the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tract_fx.passes.choose import choose, read_choice
from tract_fx.shell.arguments import InputShapes, Trainable, example_inputs
from tract_fx.shell.reporting import Debug, output, printing, reporting, status, users_code
from tract_fx.shell.tables import findings_tables
from tract_fx.shell.targets import (
    DIRECTORY_HELP,
    TARGET_HELP,
    Target,
    find_layers,
    graph_in,
    read_target,
)


@reporting
def locate(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help=f"{TARGET_HELP} {DIRECTORY_HELP}")
    ],
    input_shape: InputShapes = None,
    trainable: Trainable = None,
    debug: Debug = False,
) -> None:
    """Show which layer consumes a model's input, and why TrAct can't go on what else meets it.

    Ends with 1 where the pass would not take a layer without being told which.

    \b
    Examples:
      tract-fx locate classifier.onnx
      tract-fx locate nets.vit:vit_small --input-shape 8,3,224,224
    """  # noqa: D301 (click keeps the lines of a paragraph that begins with \b)
    inputs = example_inputs(input_shape, seed=0)
    path = Path(target)
    with status(f"Locating the input layer of {target}"), users_code():
        if path.is_dir():
            read = Target(graph_in(path), inputs)
        else:
            read = read_target(target, inputs, seed=0)
        findings = find_layers(read, trainable)
    with printing():
        for table in findings_tables(findings):
            output().print(table)
    choose(findings, findings.layers, read_choice())  # the error that the pass would end with
