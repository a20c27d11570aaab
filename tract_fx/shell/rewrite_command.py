"""`tract-fx rewrite`: TrAct into, or out of, a training graph that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tract_fx.atomic import write_file
from tract_fx.errors import ArtifactsExistError, UnsupportedModelError
from tract_fx.preconditioner import DEFAULT_LAMBDA
from tract_fx.shell.arguments import Lambda, Layers, layer_choice, refuse_existing
from tract_fx.shell.reporting import Debug, Overwrite, output, reporting, status, wrong_usage

if TYPE_CHECKING:
    import onnx


@reporting
def rewrite(
    training_model: Annotated[
        Path,
        typer.Argument(
            metavar="TRAINING_MODEL",
            help="training_model.onnx, as onnxruntime.training.artifacts.generate_artifacts "
            "writes it.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the file itself.")] = False,
    lambda_: Lambda = None,
    layer: Layers = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take TrAct out.")] = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Put TrAct into somebody's own training_model.onnx, or take it out.

    Checkpoint, optimizer and evaluation graph stay as they are. Rewritten again, λ is replaced.

    \b
    Examples:
      tract-fx rewrite training_model.onnx -o tract/training_model.onnx --lambda 0.1
      tract-fx rewrite training_model.onnx --in-place --remove
    """  # noqa: D301 (click keeps the lines of a paragraph that begins with \b)
    if (out is None) != in_place:
        wrong_usage("say where to write: either --out FILE or --in-place")
    if remove and (layer or lambda_ is not None):
        wrong_usage("--remove takes TrAct out of all layers: without --lambda and --layer")
    chosen = layer_choice(layer, lambda_)
    from tract_fx.passes import remove_tract_onnx, tract_onnx_pass

    place = training_model if out is None else out
    _check_place(place, overwrite=overwrite or in_place)
    with status(f"Rewriting {training_model}"):
        before = _treated(training_model)
        if remove:
            result = remove_tract_onnx(training_model)
        else:
            value = DEFAULT_LAMBDA if lambda_ is None else lambda_
            result = tract_onnx_pass(training_model, lambda_=value, layers=chosen)
        after = _treated(result)
        _write(result, training_model, place, overwrite=overwrite or in_place)
    console = output()
    for line in before:
        if line not in after:
            console.print(f"was on: {line}", markup=False, soft_wrap=True)
    for line in after:
        console.print(f"TrAct is on: {line}", markup=False, soft_wrap=True)
    if not after:
        there = "" if before else ", there was none"
        console.print(f"No TrAct{there}", markup=False)
    console.print(f"Written: {place}", markup=False, soft_wrap=True)


def _treated(model: Path | onnx.ModelProto) -> list[str]:
    """Name the calls of a training graph that have TrAct, one in a line."""
    from tract_fx.passes.onnx_graph.find import locate
    from tract_fx.passes.onnx_graph.models import as_ir_model
    from tract_fx.passes.onnx_graph.parameters import training_parameters
    from tract_fx.passes.onnx_graph.provenance import present_lambdas

    graph = as_ir_model(model)
    given = training_parameters(graph)
    located = locate(graph, given.trainable, given.frozen, present_lambdas(graph))
    records = [record for record, _ in located.eligible if record.lambda_ is not None]
    return [f"{record}, λ = {record.lambda_:g}" for record in records]


def _check_place(place: Path, *, overwrite: bool) -> None:
    """Refuse to write over a file, or into artifacts whose checksums it would break."""
    from tract_fx.artifacts.manifest import MANIFEST_FILE

    refuse_existing(place, overwrite)
    if place.is_dir():
        raise ArtifactsExistError(str(place), "it is a directory", "Choose a file")
    if (place.parent / MANIFEST_FILE).exists() and place.suffix == ".onnx":
        raise ArtifactsExistError(
            str(place),
            "the directory holds artifacts of tract_fx, whose manifest has the graph's checksum "
            "and λ",
            "Export the model again with the λ that you want, or write to another directory",
        )


def _write(model: onnx.ModelProto, source: Path, place: Path, *, overwrite: bool) -> None:
    """Write a model, whole or not at all."""
    import onnx

    try:
        if place.parent.resolve() != source.parent.resolve():
            # What lies in files beside the source would not be found from there.
            onnx.load_external_data_for_model(model, str(source.parent))
        data = model.SerializeToString()
    except ValueError as error:  # protobuf's limit of 2 GiB
        raise UnsupportedModelError(
            str(source),
            f"its rewritten form can't be one file ({error})",
            "Write it into the directory where its weights lie",
        ) from error
    # Checked again: something may have come in the meantime.
    write_file(place, data, lambda: _check_place(place, overwrite=overwrite))
