"""`tract-fx export`: from a model to a directory of training artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tract_fx.artifacts.loss_kinds import LOSSES, LossKind
from tract_fx.errors import TractError, UnsupportedTrainingError, did_you_mean
from tract_fx.passes.records import Findings
from tract_fx.shell.arguments import (
    InputShapes,
    Lambda,
    Layers,
    Trainable,
    example_inputs,
    layer_choice,
    refuse_existing,
)
from tract_fx.shell.reporting import Debug, Overwrite, output, reporting, status, wrong_usage
from tract_fx.shell.tables import export_table
from tract_fx.shell.targets import Target, find_layers, put_tract, read_target

if TYPE_CHECKING:
    from tract_fx.artifacts.optimizers import OptimizerConfig


def _described(loss: LossKind) -> str:
    return f"{loss.name} (class indices)" if loss.classes else str(loss.name)


def _known_loss(name: str) -> str:
    """Refuse a name that is no loss's; other losses than those with a name are Python's."""
    names = [*LOSSES, "none"]
    if name not in names:
        wrong_usage(
            f"{name!r} is no loss's name. {did_you_mean(name, names)}A shell can take "
            f"{', '.join(names)}; export_training in Python takes any loss"
        )
    return name


@reporting
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx forward model of any framework, a .pt2 exported program, or "
            "package.module:factory, a function without arguments that returns a torch.nn.Module.",
        ),
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where to write: complete or not at all.")
    ],
    loss: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            callback=_known_loss,
            help=f"{', '.join(map(_described, LOSSES.values()))}; none where the model returns "
            "its loss.",
        ),
    ] = "cross_entropy",
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option()] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.001")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(show_default="0.01 for adamw, 0 for sgd")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="sgd only.", show_default="0")] = None,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="sgd only.")] = False,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the norm over all gradients to this.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches per update.")] = None,
    lambda_: Lambda = None,
    layer: Layers = None,
    trainable: Trainable = None,
    output_name: Annotated[
        str | None,
        typer.Option("--output", metavar="NAME", help="The output that the loss reads."),
    ] = None,
    target: Annotated[
        Literal["ort-training", "onnxruntime"],
        typer.Option(
            help="ONNX Runtime Training, or any ONNX Runtime with the update in the graph."
        ),
    ] = "ort-training",
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="Of products, with --target onnxruntime; float16 scales the loss."),
    ] = "float32",
    input_shape: InputShapes = None,
    fixed_batch: Annotated[
        bool,
        typer.Option("--fixed-batch", help="Take batches of the example's size alone."),
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Without TrAct, to compare.")] = False,
    seed: Annotated[
        int, typer.Option(help="Of dropout, of the example inputs and of a factory's weights.")
    ] = 0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Compare loss and gradients on the example inputs."
        ),
    ] = True,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Export a model to artifacts that ONNX Runtime trains, with TrAct in the graph.

    A factory's model is traced by torch.fx; where that fails, TrAct goes on the model itself. One
    that has TrAct already keeps its λ unless --lambda or --layer is given.

    \b
    Examples:
      tract-fx export classifier.onnx artifacts --lr 3e-4
      tract-fx export nets.resnet:resnet18 artifacts --input-shape 8,3,224,224 --optimizer sgd
    """  # noqa: D301 (click keeps the lines of a paragraph that begins with \b)
    config = _optimizer(
        optimizer,
        {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov or None,
            "max_grad_norm": max_grad_norm,
            "accumulate": accumulate,
        },
    )
    if plain and (layer or lambda_ is not None):
        wrong_usage("--plain leaves TrAct out: without --lambda and --layer")
    chosen = layer_choice(layer, lambda_)
    inputs = example_inputs(input_shape, seed)
    refuse_existing(directory, overwrite)
    options: dict[str, Any] = {
        "loss": None if loss == "none" else loss,
        "optimizer": config,
        "target": target,
        "precision": precision,
        "output": output_name,
        "plain": plain,
        "trainable": trainable or None,
        "seed": seed,
        "overwrite": overwrite,
        "verify": verify,
        "dynamic_batch": not fixed_batch,
    }
    from tract_fx import export_training

    with status(f"Exporting {model}") as tell:
        options["progress"] = lambda stage: tell(f"Exporting {model}: {stage}")
        subject = read_target(model, inputs, seed)
        exported = subject.model
        if isinstance(exported, Path):
            options |= {"lambda_": lambda_, "layers": chosen}
        else:
            _require_inputs(subject, model)
            exported = exported if plain else put_tract(subject, lambda_, chosen)
        artifacts = export_training(exported, subject.inputs, directory, **options)
        findings = _findings(subject, trainable)
    output().print(export_table(artifacts, findings))


def _optimizer(name: str, settings: dict[str, Any]) -> OptimizerConfig:
    from tract_fx import SGD, AdamW

    given = {key: value for key, value in settings.items() if value is not None}
    if name == "sgd":
        return SGD(**given)
    wrong = [f"--{key}" for key in ("momentum", "nesterov") if key in given]
    if wrong:
        wrong_usage(f"{', '.join(wrong)}: with --optimizer sgd only")
    return AdamW(**given)


def _require_inputs(target: Target, name: str) -> None:
    if target.inputs is None:
        raise UnsupportedTrainingError(
            f"{name} without example inputs",
            "a PyTorch model is exported on a batch",
            "Give --input-shape, for example --input-shape 8,3,224,224",
        )


def _findings(target: Target, trainable: list[str] | None) -> Findings | None:
    """Locate the layers again, for the report: what is exported is exported."""
    try:
        return find_layers(target, trainable)
    except TractError:
        return None
