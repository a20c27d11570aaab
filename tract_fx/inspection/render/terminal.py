"""An inspection on a terminal: the verdict first, then what was taken, changed and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.records import (
    ForwardDiff,
    GraphView,
    LayerReport,
    LayerStatistics,
    Statistics,
    Verification,
)
from tract_fx.inspection.render.text import TRACT_MARK, GraphLine, graph_lines
from tract_fx.inspection.render.words import (
    KINDS,
    join_path,
    measured,
    number,
    operation,
    place,
    plural,
    printable,
    rows_and_columns,
    sentence,
    shape,
    verdict,
    worst,
)
from tract_fx.passes.records import Refusal

_COLORS = {"right": "green", "wrong": "red", "open": "yellow"}
_TRACT, _DIM = "bold dark_orange", "dim"
_MOST_ITEMS, _MOST_DIFF_LINES, _WORST = 8, 60, 4
_BARS = "▁▂▃▄▅▆▇█"
_SPECTRUM_WIDTH = 48

# For terminals and pipes that take no Unicode.
_ASCII = str.maketrans(
    {
        **{"✔": "+", "✘": "x", "○": "o", "λ": "lambda", "×": "x", "→": "->", "←": "<-"},
        **{"…": "...", "▸": ">", "–": "-", "≤": "<=", "▲": "^", "·": ".", "−": "-", "│": "|"},
        **{"ᵀ": "'", "⁻": "^-", "¹": "1", "─": "-"},
        **dict.fromkeys("╭╮╰╯", "+"),
        **{bar: str(i) for i, bar in enumerate(_BARS, 1)},
    }
)


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print an inspection."""
    console = Console() if console is None else console
    if console.encoding.lower().startswith("utf"):
        console.print(_everything(inspection))
        return
    with console.capture() as capture:
        console.print(_everything(inspection))
    text = capture.get().translate(_ASCII)
    encoding = console.encoding
    console.file.write(text.encode(encoding, "replace").decode(encoding))


def _everything(inspection: Inspection) -> Group:
    parts: list[RenderableType] = [_header(inspection)]
    sections = [
        ("Layers", _layers(inspection)),
        ("What changed", _changes(inspection.forward)),
        ("Backward pass", _backward(inspection)),
        ("Verification", _verification(inspection.verification)),
        ("Statistics", _statistics(inspection.statistics)),
        ("Notes", _notes(inspection)),
    ]
    for title, body in sections:
        if body:
            parts += [Text(), Rule(Text(title, "bold"), align="left", style=_DIM)]
            parts += [Padding(item, (0, 0, 0, 1)) for item in body]
    return Group(*parts)


def _text(text: str, style: str = "") -> Text:
    """Text that rich takes no markup in and a terminal no commands."""
    return Text(printable(text), style, overflow="fold")


def _header(inspection: Inspection) -> Panel:
    answer = verdict(inspection)
    color = _COLORS[answer.state]
    lines: list[RenderableType] = [_text(f"{answer.symbol} {answer.headline}", f"bold {color}")]
    lines += _items(answer.reasons, mark=" ")
    if inspection.batch:
        lines.append(_text(f"batch {inspection.batch}", _DIM))
    title = _text(f"TrAct · {inspection.subject} ({KINDS[inspection.kind]})", "bold")
    title.no_wrap = False
    return Panel(Group(*lines), title=title, title_align="left", box=ROUNDED, border_style=color)


def _items(texts: Iterable[str], mark: str, style: str = "") -> list[RenderableType]:
    """Texts, a paragraph each, behind a mark; the first few and how many more."""
    texts = list(texts)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=len(mark))
    grid.add_column(overflow="fold")
    for text in texts[:_MOST_ITEMS]:
        grid.add_row(Text(mark, style), _text(text))
    if len(texts) > _MOST_ITEMS:
        grid.add_row("", _text(f"… {len(texts) - _MOST_ITEMS:,} more", _DIM))
    return [grid] if texts else []


def _layers(inspection: Inspection) -> list[RenderableType]:
    taken = [layer for layer in inspection.layers if layer.taken]
    left = [layer for layer in inspection.layers if not layer.taken]
    body: list[RenderableType] = [_layer(layer) for layer in taken[:_MOST_ITEMS]]
    if len(taken) > _MOST_ITEMS:
        body.append(_text(f"… {len(taken) - _MOST_ITEMS:,} more layers with TrAct", _DIM))
    untaken = [*map(_not_taken, left), *map(_refused, inspection.refusals)]
    if untaken:
        body.append(_text("Without TrAct, on the input:", "bold"))
        body += _items(untaken, mark="–")
    if inspection.others:
        calls = plural(inspection.others, "further call", "further calls")
        body.append(_text(f"{calls} of layers that do not read the input", _DIM))
    return body or [_text("No call of a layer was found.", _DIM)]


def _layer(layer: LayerReport) -> Table:
    record, grid = layer.record, _labelled()
    name = _text(f"{TRACT_MARK} {record.name}", _TRACT)
    grid.add_row("layer", name + _text(f"  λ = {record.lambda_:g}", "bold"))
    grid.add_row("operation", _text(operation(record)))
    read = "" if layer.input_dtype is None else f"  {layer.input_dtype} {shape(layer.input_shape)}"
    grid.add_row("input path", _text(join_path(record.path)) + _text(read, _DIM))
    grid.add_row("X", _text(rows_and_columns(layer)))
    if layer.form:
        grid.add_row("solved by", _text(layer.form))
    if layer.gram:
        grid.add_row("Gram", _text(layer.gram))
    sizes = "" if record.weight_shape is None else f"  {shape(record.weight_shape)}"
    grid.add_row("weight", _text(", ".join(record.weight)) + _text(sizes, _DIM))
    if layer.source is not None:
        code = _text(f"  {layer.source.text}", _DIM)
        grid.add_row("source", _text(place(layer.source)) + code)
    if layer.note:
        grid.add_row("note", _text(sentence(layer.note), "yellow"))
    return grid


def _labelled() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=_DIM, no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _not_taken(layer: LayerReport) -> str:
    record = layer.record
    note = f": {layer.note}" if layer.note else ""
    return f"{record.name} ({operation(record)}; {join_path(record.path)}){note}"


def _refused(refusal: Refusal) -> str:
    return (
        f"{refusal.op} ({join_path(refusal.path)}) can't be treated: {refusal.reason}. "
        f"{refusal.remedy}"
    )


def _changes(diff: ForwardDiff) -> list[RenderableType]:
    lines = diff.lines()
    if not lines:
        return [_text("Nothing was changed in the forward pass.", _DIM)]
    styles = {"+": "green", "-": "red", "@": "cyan"}
    body: list[RenderableType] = [
        _text(line, styles.get(line[:1], "")) for line in lines[:_MOST_DIFF_LINES]
    ]
    if len(lines) > _MOST_DIFF_LINES:
        body.append(_text(f"… {len(lines) - _MOST_DIFF_LINES:,} more lines", _DIM))
    return body


def _backward(inspection: Inspection) -> list[RenderableType]:
    if inspection.backward is None:
        return []
    view = inspection.backward.expanded or inspection.backward.short
    note = [_text(sentence(view.note), _DIM)] if view.note else []
    return [_text(view.title, _DIM), _graph(view), *note]


def _graph(view: GraphView) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=1)
    for _ in range(3):
        grid.add_column(overflow="fold")
    for line in graph_lines(view):
        grid.add_row(*_cells(line))
    return grid


def _cells(line: GraphLine) -> Sequence[RenderableType]:
    if line.heading:
        return Text(), _text(line.code, _TRACT if line.tract else "bold"), Text(), Text()
    style = _TRACT if line.tract else ""
    source = f"← {line.source}" if line.source else ""
    mark = Text(TRACT_MARK if line.tract else " ", style)
    code = Padding(_text(line.code, style), (0, 0, 0, 2))
    return mark, code, _text(line.detail, _DIM), _text(source, _DIM)


def _verification(verification: Verification | None) -> list[RenderableType]:
    if verification is None:
        return []
    wrong = verification.verdict == "wrong"
    mark, style = ("✘", "red") if wrong else ("○", "yellow")
    body = _items(map(sentence, verification.problems), mark=mark, style=style)
    if verification.weights:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("", width=1)
        table.add_column("weight gradient", overflow="fold")
        for name in ("operator", "tolerance", "end to end", "floor", "plain"):
            table.add_column(name, justify="right", no_wrap=True)
        for weight in verification.weights:
            check = weight.operator
            numbers = (check.error, check.tolerance, weight.end_to_end, weight.floor, weight.plain)
            table.add_row(
                _mark(check.passed), _text(weight.parameter), *(number(n) for n in numbers)
            )
        body.append(table)
        body.append(
            _text(
                "relative errors against float64. operator: the preconditioner alone; end to end: "
                "with gW's own error, of which the floor is what an exact one would leave; plain: "
                "how far the gradient without TrAct is away",
                _DIM,
            )
        )
    body += _others(verification)
    if verification.note:
        body.append(_text(sentence(verification.note), _DIM))
    return body


def _mark(passed: bool) -> Text:
    return Text("✔", "green") if passed else Text("✘", "bold red")


def _others(verification: Verification) -> list[RenderableType]:
    checks = worst(verification.others)
    if not checks:
        return []
    failed = sum(not check.passed for check in checks)
    things = plural(len(checks), "output or gradient", "outputs and other gradients")
    if not failed and checks[0].error == 0:
        return [Text(), _text(f"All {things} are exactly the plain model's.")]
    shown = checks[: max(_WORST, min(failed, 2 * _MOST_ITEMS))]
    count = f"{len(checks) - failed:,} of {things}" if failed else f"All {things}"
    agree = f"{count} agree with the plain model's" + (", the worst:" if len(checks) > 1 else ":")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style=_DIM)
    for check in shown:
        error, limit = number(check.error), f"≤ {number(check.tolerance)}"
        table.add_row(_mark(check.passed), _text(check.name), error, limit)
    return [Text(), _text(agree, "red" if failed else ""), table]


def _statistics(statistics: Statistics | None) -> list[RenderableType]:
    if statistics is None:
        return []
    body: list[RenderableType] = [_layer_statistics(layer) for layer in statistics.layers]
    return [*body, *_items(map(sentence, statistics.warnings), mark="!", style="bold yellow")]


def _layer_statistics(layer: LayerStatistics) -> Table:
    grid = _labelled()
    grid.add_row("layer", _text(layer.name, "bold"))
    for label, value, note in measured(layer):
        grid.add_row(label.lower(), f"{value} ({note})")
        if label == "Eigenvalues":
            for part, text in _spectrum(layer):
                grid.add_row(part, text)
    return grid


def _spectrum(layer: LayerStatistics) -> list[tuple[str, Text]]:
    """A histogram of the eigenvalues on a logarithmic axis, with λ marked below."""
    logarithms = [math.log10(v) for v in layer.eigenvalues if 0 < v < math.inf]
    if not logarithms:
        return []
    mark = math.log10(layer.lambda_)
    low, high = min(*logarithms, mark), max(*logarithms, mark)
    scale = (_SPECTRUM_WIDTH - 1) / (high - low or 1.0)
    counts = [0] * _SPECTRUM_WIDTH
    for value in logarithms:
        counts[round((value - low) * scale)] += 1
    top = max(counts)
    bars = "".join(_BARS[math.ceil(c / top * 8) - 1] if c else " " for c in counts)
    column = round((mark - low) * scale)
    pointer = f"▲ λ = {layer.lambda_:g}"
    if column > _SPECTRUM_WIDTH // 2:
        pointer = f"λ = {layer.lambda_:g} ▲"
        column = max(0, column - len(pointer) + 1)
    pointer = " " * column + pointer
    return [("spectrum", Text(bars, no_wrap=True)), ("(log)", Text(pointer, _TRACT, no_wrap=True))]


def _notes(inspection: Inspection) -> list[RenderableType]:
    body = _items(map(sentence, inspection.notes), mark="–")
    if inspection.versions:
        versions = ", ".join(f"{name} {version}" for name, version in inspection.versions.items())
        body.append(_text(versions, _DIM))
    return body
