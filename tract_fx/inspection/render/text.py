"""Graphs as text: a line per node, for terminals and where there is no picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tract_fx.inspection.records import GraphView, ViewNode
from tract_fx.inspection.render.words import place, plural, printable

TRACT_MARK = "▸"
"""Begins every line of TrAct's, so that it shows without colour too."""

_MOST_INPUTS = 8
_WIDEST = 80
_OF_LAYER = re.compile(r"(\w+) \((.+)\)")


@dataclass(frozen=True)
class GraphLine:
    """A line of a graph's text.

    Attributes:
        code: What is computed, `"conv1 = conv2d(div, tract_conv1)"`; or a heading.
        detail: Shape and dtype of the value.
        source: File and line of the user's code.
        tract: Whether the node is TrAct's.
        heading: Whether the line begins a part or stage.
    """

    code: str
    detail: str = ""
    source: str = ""
    tract: bool = False
    heading: bool = False


def graph_lines(view: GraphView) -> list[GraphLine]:
    """Write a graph."""
    lines: list[GraphLine] = []
    part, stage = "", ""
    for node in view.nodes:
        if node.part != part:
            lines.append(GraphLine(node.part, heading=True))
        if node.stage and (node.part, node.stage) != (part, stage):
            lines.append(GraphLine(printable(f"TrAct: {node.stage}"), tract=True, heading=True))
        part, stage = node.part, node.stage
        detail, source = printable(node.detail), printable(place(node.source))
        lines.append(GraphLine(_code(node), detail, source, node.kind == "tract"))
    if view.hidden > 0:
        lines.append(GraphLine(f"… {plural(view.hidden, 'more node', 'more nodes')}"))
    return lines


def _code(node: ViewNode) -> str:
    inputs = [*node.inputs[:_MOST_INPUTS]]
    if len(node.inputs) > _MOST_INPUTS:
        inputs.append(f"… {len(node.inputs) - _MOST_INPUTS} more")
    if not inputs and node.kind in ("input", "parameter", "constant"):
        label = "" if node.label == node.name else f" {node.label}"
        return printable(f"{node.name}: {node.kind}{label}")
    called = _OF_LAYER.fullmatch(node.label)
    if called:  # "convolution (conv1)"
        return printable(f"{node.name} = {called[1]}({', '.join(inputs)}) of {called[2]}")
    space = " " if " " in node.label else ""
    return printable(f"{node.name} = {node.label}{space}({', '.join(inputs)})")


def aligned(lines: Sequence[GraphLine]) -> list[str]:
    """Put shapes and sources of lines below each other."""
    codes = [_indented(line) for line in lines]
    width = max((len(code) for code in codes if len(code) <= _WIDEST), default=0)
    details = [f"# {line.detail}" if line.detail else "" for line in lines]
    wide = max((len(detail) for detail in details), default=0)
    texts = []
    for line, code, detail in zip(lines, codes, details, strict=True):
        source = f"← {line.source}" if line.source else ""
        texts.append(f"{code:<{width}}  {detail:<{wide}}  {source}".rstrip())
    return texts


def _indented(line: GraphLine) -> str:
    if line.heading:
        return f"  {line.code}" if line.tract else line.code
    return f"{TRACT_MARK if line.tract else ' '}   {line.code}"
