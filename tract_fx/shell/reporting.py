"""How commands report: errors in one line, warnings, a spinner, tables on the terminal."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, NoReturn, TextIO, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from tract_fx import torch_private
from tract_fx.errors import (
    ArtifactsWriteError,
    TractError,
    TractWarning,
    UnsupportedModelError,
)

Command = TypeVar("Command", bound=Callable[..., None])

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error, and all warnings.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def output() -> Console:
    """Make a console for results."""
    return Console(highlight=False)


def messages() -> Console:
    """Make a console for what is no result."""
    return Console(stderr=True, highlight=False)


def wrong_usage(message: str) -> NoReturn:
    """End with exit code 2: arguments don't go together."""
    raise typer.BadParameter(message)


def reporting(command: Command) -> Command:
    """Let a command end with one line on the standard error and exit code 1 where it fails."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        if options.get("debug"):
            command(*args, **options)
            return
        try:
            with _quiet(), torch_private.no_printed_graphs():
                command(*args, **options)
        except TractError as error:
            _print_line("error", str(error), "red")
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


def _print_line(kind: str, message: str, colour: str) -> None:
    line = escape(" ".join(message.split()))
    messages().print(f"[{colour}]{kind}:[/] {line}", soft_wrap=True)


@contextmanager
def users_code() -> Iterator[None]:
    """Keep what the user's model prints out of a command's results, and the command going."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise UnsupportedModelError(
            f"the model's own code (SystemExit: {error})",
            "it ends the process",
            "Take sys.exit out of it; --debug shows where it is",
        ) from error


@contextmanager
def printing() -> Iterator[None]:
    """Say in one line where the standard output takes no more."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArtifactsWriteError(
            "the standard output",
            f"the system does not take what is printed ({error.strerror or error})",
            "Print to a place with room, or write a file with --html or --json",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Print our warnings in one line each, and none of other packages."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _print_line("warning", str(message), "yellow")

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", TractWarning)
            warnings.showwarning = show
            yield
    finally:
        logging.disable(before)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner and the time while something takes long, on a terminal.

    Yields:
        What changes the text.
    """
    text_column = TextColumn("{task.description}", markup=False)
    with progress(SpinnerColumn(), text_column, TimeElapsedColumn()) as shown:
        task = shown.add_task(text, total=None)
        yield lambda text: shown.update(task, description=text)


def progress(*columns: ProgressColumn) -> Progress:
    """Make a line of columns that goes when it is done, on a terminal alone."""
    console = messages()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
