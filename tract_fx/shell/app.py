"""The `tract-fx` command: its parts and its exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from tract_fx import __version__
from tract_fx.shell.doctor_command import doctor
from tract_fx.shell.export_command import export
from tract_fx.shell.inspect_command import EXIT_CODES as INSPECT_EXIT_CODES
from tract_fx.shell.inspect_command import NOT_VERIFIED, InspectCommand, inspect
from tract_fx.shell.locate_command import locate
from tract_fx.shell.rewrite_command import rewrite
from tract_fx.shell.train_command import train

EXIT_CODES = (
    "Exit codes: 0, done. 1, not possible, for a reason given in one line on the standard error. "
    "2, wrong usage."
)

app = typer.Typer(
    name="tract-fx",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=f"{EXIT_CODES} {NOT_VERIFIED}, of inspect: the gradient is wrong, or none was compared.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tract-fx {__version__}")
        raise typer.Exit


@app.callback()
def tract_fx(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """TrAct as a compiler pass: train the pre-activations of a vision model's first layer.

    \b
    Example:
      tract-fx inspect nets.resnet:resnet18 --input-shape 8,3,224,224 --verify
      tract-fx export classifier.onnx artifacts
      tract-fx train artifacts --data train.npz --epochs 5 --save trained
    """  # noqa: D301 (click keeps the lines of a paragraph that begins with \b)


app.command(epilog=EXIT_CODES, short_help="Which layer the pass would take, and why.")(locate)
app.command(
    cls=InspectCommand,
    epilog=INSPECT_EXIT_CODES,
    short_help="What the pass did, and whether it is right.",
)(inspect)
app.command(epilog=EXIT_CODES, short_help="A model to artifacts to train from.")(export)
app.command(epilog=EXIT_CODES, short_help="TrAct into a training graph, or out of it.")(rewrite)
app.command(epilog=EXIT_CODES, short_help="Train from artifacts and data.")(train)
app.command(epilog=EXIT_CODES, short_help="What is installed, and whether gradients are right.")(
    doctor
)
