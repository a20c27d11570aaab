"""What commands print of a result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from tract_fx.passes.records import Findings

if TYPE_CHECKING:
    from tract_fx.artifacts.manifest import Manifest, TensorSpec
    from tract_fx.export import TrainingArtifacts


def export_table(artifacts: TrainingArtifacts, findings: Findings | None) -> Table:
    """Describe what an export wrote."""
    manifest = artifacts.manifest
    table = Table(title=escape(str(artifacts.directory)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for line in _taken(manifest) or ["on no layer: plain gradients"]:
        table.add_row("TrAct", escape(line))
    for line in [] if findings is None else _left(findings, manifest):
        table.add_row("not on", escape(line))
    trained = [spec for spec in manifest.parameters if spec.trainable]
    kept = [spec.name for spec in manifest.parameters if not spec.trainable]
    count = sum(math.prod(spec.shape) for spec in trained)
    table.add_row("trained", escape(f"{len(trained)} tensors, {count:,} numbers"))
    if kept:
        table.add_row("not trained", escape(", ".join(kept)))
    table.add_row("loss", escape(manifest.loss))
    table.add_row("optimizer", escape(str(manifest.optimizer)))
    table.add_row("batch", escape(", ".join(map(_spec, (*manifest.inputs, *manifest.targets)))))
    table.add_row("predictions", escape(", ".join(manifest.outputs) or "none"))
    files = [f"{f.name} ({_size(f.stat().st_size)})" for f in sorted(artifacts.directory.iterdir())]
    table.add_row("files", escape(", ".join(files)))
    return table


def findings_tables(findings: Findings) -> list[Table]:
    """Describe what locating found."""
    tables = []
    if findings.layers:
        table = Table(title="Layers that consume the input", title_justify="left")
        for heading in ("layer", "operation", "weight", "path from the input", "TrAct"):
            table.add_column(heading, overflow="fold")
        for r in findings.layers:
            tract = "no" if r.lambda_ is None else f"λ = {r.lambda_:g}"
            weight = f"{', '.join(r.weight)} ({_shape(r.weight_shape)})"
            row = (r.name, r.op, weight, " → ".join(r.path), tract)
            table.add_row(*map(escape, row))
        tables.append(table)
    if findings.refusals:
        table = Table(title="What TrAct can't go on", title_justify="left")
        for heading in ("operation", "node", "why", "what to do"):
            table.add_column(heading, overflow="fold")
        for refusal in findings.refusals:
            why = (refusal.op, refusal.node, refusal.reason, refusal.remedy)
            table.add_row(*map(escape, why))
        tables.append(table)
    return tables


def _taken(manifest: Manifest) -> list[str]:
    return [
        f"{r.name} ({r.op}, node {r.node!r}, weight {_shape(r.weight_shape)}), λ = {r.lambda_:g}"
        for r in manifest.layers
    ]


def _left(findings: Findings, manifest: Manifest) -> list[str]:
    """What else the input meets, with the reason."""
    taken = {layer.name for layer in manifest.layers} | {r.node for r in manifest.layers}
    plain = "TrAct was left out" if not manifest.layers else "another layer was named"
    layers = [
        f"{r}: {plain}"
        for r in findings.layers
        if r.name not in taken and r.node not in taken and taken.isdisjoint(r.weight)
    ]
    return [*layers, *(str(refusal) for refusal in findings.refusals)]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "of open shape" if shape is None else "×".join(map(str, shape))


def _spec(spec: TensorSpec) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return f"{spec.name}: {spec.dtype} ({sizes})"


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
