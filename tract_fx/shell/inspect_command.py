"""`tract-fx inspect`: what the pass does to a model, and whether it is right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import nn
from torch.export import ExportedProgram
from typer.core import TyperCommand

from tract_fx.errors import MissingRuntimeError, UnsupportedFormatError, UnsupportedModelError
from tract_fx.shell.arguments import (
    InputShapes,
    Lambda,
    Layers,
    example_inputs,
    layer_choice,
    refuse_existing,
)
from tract_fx.shell.example_batch import read_example_batch
from tract_fx.shell.reporting import (
    Debug,
    Overwrite,
    messages,
    output,
    printing,
    reporting,
    status,
    users_code,
    wrong_usage,
)
from tract_fx.shell.targets import (
    DIRECTORY_HELP,
    TARGET_HELP,
    Target,
    graph_in,
    is_factory,
    put_tract,
    read_target,
)

NOT_VERIFIED = 3
EXIT_CODES = (
    "Exit codes: 0, done. 1, not possible, for a reason given in one line on the standard error. "
    f"2, wrong usage. {NOT_VERIFIED}, not verified as right: the gradient is wrong, or there was "
    "none to compare."
)


class InspectCommand(TyperCommand):
    """A command whose `--backward` may stand without a value, which typer has no word for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--backward` its value."""
        end = args.index("--") if "--" in args else len(args)
        options = ["--backward=short" if a == "--backward" else a for a in args[:end]]
        return super().parse_args(ctx, options + args[end:])


@reporting
def inspect(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help=f"{TARGET_HELP} {DIRECTORY_HELP}"),
    ],
    backward: Annotated[
        Literal["short", "expanded"] | None,
        typer.Option(
            help="Show the backward pass: --backward alone for TrAct as one node, "
            "--backward=expanded for its Gram, factorisation and solve too.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare gradients and outputs with float64 and the plain model."
        ),
    ] = False,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics", help="Show the Gram's spectrum and each image's share in the update."
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that works offline.")
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the records, - for standard output."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the backward graph as .svg or .dot."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Show whole graphs, not TrAct's neighbourhood.")
    ] = False,
    input_shape: InputShapes = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="The batch to verify and measure on: one array per input (and target, for a "
            "training graph), by name or in order.",
        ),
    ] = None,
    lambda_: Lambda = None,
    layer: Layers = None,
    as_is: Annotated[
        bool,
        typer.Option("--as-is", help="Don't put TrAct on a model that has none."),
    ] = False,
    netron: Annotated[
        bool, typer.Option("--netron", help="Open an ONNX model in Netron too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the noise and of a factory's weights.")] = 0,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Show which layer has TrAct, what changed, how the backward looks, and whether it is right.

    TrAct is put on a PyTorch model that has none, for this inspection alone. Layers and the change
    of the forward pass are always shown; a file gets everything unless some parts are asked for.

    \b
    Examples:
      tract-fx inspect nets.resnet:resnet18 --input-shape 8,3,224,224 --verify --backward
      tract-fx inspect artifacts/training_model.onnx --verify
      tract-fx inspect model.pt2 --data batch.npz --html report.html
    """  # noqa: D301 (the text of --help: click keeps the lines behind a \b)
    if data is not None and input_shape:
        wrong_usage("--data has the batch: without --input-shape")
    if as_is and (layer or lambda_ is not None):
        wrong_usage("--as-is leaves the model alone: without --lambda and --layer")
    _check_suffixes(html, json_, picture)
    printed = json_ == Path("-")
    files = [file for file in (html, None if printed else json_, picture) if file is not None]
    for file in files:
        refuse_existing(file, overwrite)
    if netron:
        _check_netron(target)
    everything = (printed or bool(files)) and not (backward or verify or statistics)
    chosen = layer_choice(layer, lambda_)
    inputs = example_inputs(input_shape, seed) if data is None else read_example_batch(data)
    options: dict[str, Any] = {
        "backward": "expanded" if everything else backward,
        "verify": everything or verify,
        "statistics": everything or statistics,
        "whole": whole,
    }
    from tract_fx import inspect_graph

    with status(f"Inspecting {target}"), users_code():
        model, inputs = _model(target, inputs, seed, lambda_, chosen, as_is)
        inspection = inspect_graph(model, inputs, **options)
        for file in files:
            inspection.save(file)
    with printing():
        if printed:
            typer.echo(json.dumps(inspection.to_dict(), indent=2))
        else:
            inspection.print(output())
    for file in files:
        messages().print(f"Written: {file}", markup=False, soft_wrap=True)
    if netron:
        _open_in_netron(Path(target))
    checked = inspection.verification
    # A report on a model without TrAct says what the pass would take; no gradient was asked about.
    asked = verify or any(layer.taken for layer in inspection.layers)
    if checked is not None and (checked.verdict == "wrong" or (asked and not checked.passed)):
        raise typer.Exit(NOT_VERIFIED)


def _check_suffixes(html: Path | None, json_: Path | None, picture: Path | None) -> None:
    """Refuse a file whose suffix means another kind, before the work."""
    for option, file, suffixes in (
        ("--html", html, {".html"}),
        ("--json", json_, {".json"}),
        ("--picture", picture, {".svg", ".dot"}),
    ):
        if file == Path("-") and option != "--json":
            wrong_usage(f"{option} -: only --json goes to the standard output. Give a file")
        if file is not None and file != Path("-") and file.suffix not in suffixes:
            raise UnsupportedFormatError(
                f"{option} {file}", "the suffix says the kind", f"End it in {' or '.join(suffixes)}"
            )


def _model(
    text: str,
    inputs: Any,
    seed: int,
    lambda_: float | None,
    layers: dict[str, float] | None,
    as_is: bool,
) -> tuple[nn.Module | ExportedProgram | Path, Any]:
    """Read the model and put TrAct on it, where it is one of PyTorch without."""
    path = Path(text)
    target = Target(path, inputs) if path.is_dir() else read_target(text, inputs, seed)
    if isinstance(target.model, Path):
        if layers or lambda_ is not None:
            wrong_usage("an ONNX model is inspected as it is: without --lambda and --layer")
        return target.model, target.inputs
    if target.inputs is None:
        raise UnsupportedModelError(
            f"{text} without example inputs",
            "a PyTorch model is inspected on a batch",
            "Give --input-shape, for example --input-shape 8,3,224,224, or --data batch.npz",
        )
    model = target.model if as_is else put_tract(target, lambda_, layers)
    return model, target.inputs


def _check_netron(target: str) -> None:
    """Refuse what Netron can't open, before the work."""
    path = Path(target)
    if is_factory(target) or not (path.is_dir() or path.suffix == ".onnx"):
        wrong_usage("--netron: Netron shows ONNX files")
    if importlib.util.find_spec("netron") is None:
        raise MissingRuntimeError(
            "--netron", "the package netron is not installed", "pip install netron"
        )


def _open_in_netron(path: Path) -> None:
    """Start Netron on an ONNX file, in a process of its own that goes on."""
    file = graph_in(path) if path.is_dir() else path
    subprocess.Popen([sys.executable, "-m", "netron", "--browse", str(file)])
