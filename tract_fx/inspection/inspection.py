"""An inspection: the records, and the ways to look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tract_fx import extras
from tract_fx.inspection.records import (
    Backward,
    ForwardDiff,
    LayerReport,
    Statistics,
    Verification,
)
from tract_fx.passes.records import Refusal

if TYPE_CHECKING:
    from rich.console import Console

Runs: TypeAlias = Sequence[float] | Sequence[Sequence[float]]
"""A number per epoch, or of each of several runs one."""

Curves: TypeAlias = Mapping[str, Mapping[str, Runs]]
"""What training gave, by what was measured and then by arm."""


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect_graph` found.

    Attributes:
        subject: What was inspected, such as `"ResNet"`, or a file's name.
        kind: `"graph"` for a torch.fx graph, `"module"` for an eager model, `"onnx"`.
        batch: The example batch in words, empty where there was none.
        layers: Calls with TrAct, and calls on the input without it, in graph order.
        refusals: What meets the input and can't be treated, with the reason.
        others: How many further calls of layers there are, which do not read the input.
        forward: What the rewrite changed.
        backward: The backward pass, None where it was not asked for or can't be shown.
        verification: Whether it is right, None where it was not asked for.
        statistics: What TrAct has to do on the batch, None where it was not asked for.
        notes: What could not be shown, and why.
        versions: Versions of the packages that took part, by name.
    """

    subject: str
    kind: Literal["graph", "module", "onnx"]
    batch: str
    layers: tuple[LayerReport, ...]
    refusals: tuple[Refusal, ...]
    others: int
    forward: ForwardDiff
    backward: Backward | None
    verification: Verification | None
    statistics: Statistics | None
    notes: tuple[str, ...]
    versions: dict[str, str]

    def __repr__(self) -> str:
        """Say the verdict, the layers and how to see more: a few lines."""
        lines: str = extras.load("tract_fx.inspection.render.words", "summary")(self)
        return lines

    def print(self, console: Console | None = None) -> None:
        """Print all of it on a terminal.

        Args:
            console: Where to; the standard output by default.

        Raises:
            MissingRuntimeError: The extra `inspect` is not installed.
        """
        extras.load("tract_fx.inspection.render.terminal", "print_inspection")(self, console)

    def save(self, path: str | Path, *, curves: Curves | None = None) -> Path:
        """Write it to a file: a page, a picture or the records.

        Args:
            path: Where to: `.html`, one file that needs no network; `.svg` or `.dot`, the picture
                of the backward pass (of the forward pass where there is none); `.json`.
            curves: For a page, what training gave by epoch: `{"Test accuracy": {"plain": [0.4,
                0.5], "TrAct": [0.5, 0.6]}}`. In place of an arm's numbers may stand runs with as
                many each, one of every seed: they are drawn with their mean.

        Returns:
            The path.

        Raises:
            MissingRuntimeError: The extra `inspect`, or Graphviz, is not installed.
            UnsupportedFormatError: The suffix is another one, or none that shows curves; or they
                are of another form.
            ArtifactsWriteError: The file can't be written.
        """
        saved: Path = extras.load("tract_fx.inspection.render.files", "save")(
            self, Path(path), curves
        )
        return saved

    def to_dict(self) -> dict[str, Any]:
        """Give the records as plain data, as `save("….json")` writes them.

        Returns:
            Dictionaries, lists, strings, numbers, booleans and None. Numbers that are not finite
            are strings: `"nan"`, `"inf"`, `"-inf"`.
        """
        data: dict[str, Any] = extras.load("tract_fx.inspection.render.files", "to_data")(self)
        return data

    def _repr_html_(self) -> str:
        """Show it in a notebook.

        Returns:
            HTML that does not change the look of the page around it.
        """
        html: str = extras.load("tract_fx.inspection.render.html", "notebook_html")(self)
        return html
