"""`tract-fx train`: from a directory of artifacts and a file of data to trained artifacts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.shell.arguments import refuse_existing
from tract_fx.shell.batches import Arrays, batches_of, read_arrays, row_count
from tract_fx.shell.reporting import Debug, Overwrite, output, progress, reporting, status

if TYPE_CHECKING:
    from tract_fx.trainers.ort_trainer import OrtTrainer


@reporting
def train(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="What `tract-fx export` wrote.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.npz", help="Arrays by the names of the graph's inputs and targets."
        ),
    ],
    save: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="Where the trained artifacts go.")
    ],
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Evaluated after each epoch.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, where not the saved one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the rows.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train from a directory of artifacts, print the loss of each epoch, and save.

    The rows are shuffled in each epoch, the last batch is as short as it comes. What is saved can
    be trained further. For schedules, augmentation or data of another kind, write the loop yourself
    with tract_fx.load_trainer.

    \b
    Example:
      tract-fx train artifacts --data train.npz --eval-data test.npz --epochs 5 --save trained
    """  # noqa: D301 (click keeps the lines of a paragraph that begins with \b)
    from tract_fx import load_trainer

    refuse_existing(save, overwrite)
    with status(f"Reading {directory}"):
        trainer = load_trainer(directory, device=device)
        specs = (*trainer.manifest.inputs, *trainer.manifest.targets)
        arrays = read_arrays(data, specs, batch_size)
        held_out = None if eval_data is None else read_arrays(eval_data, specs, batch_size)
    if lr is not None:
        trainer.learning_rate = lr
    console = output()
    left = _steps(trainer, arrays, batch_size, epochs)
    for epoch in range(1, epochs + 1):
        title = f"epoch {epoch}/{epochs}"
        loss, steps = _train_epoch(trainer, arrays, batch_size, seed, left, title)
        left -= steps
        line = f"epoch {epoch}: loss {loss:.6g}"
        if held_out is not None:
            line += _evaluation(trainer, held_out, batch_size)
        console.print(line)
    trainer.save(save, overwrite=overwrite)
    console.print(f"Saved: {save} ({trainer.updates} updates)", markup=False, soft_wrap=True)


def _steps(trainer: OrtTrainer, arrays: Arrays, batch_size: int, epochs: int) -> int:
    """Count the batches to train on.

    Where the optimizer accumulates, the last ones that don't fill an update of their own are left
    out: gathered gradients can't be saved.
    """
    every = trainer.manifest.optimizer.accumulate
    given = epochs * math.ceil(row_count(arrays) / batch_size)
    if given < every:
        raise UnsupportedTrainingError(
            f"{given} batches in {epochs} epochs",
            f"an update takes {every} micro-batches",
            "Give smaller batches or more epochs",
        )
    return given - given % every


def _train_epoch(
    trainer: OrtTrainer, arrays: Arrays, batch_size: int, seed: int, limit: int, title: str
) -> tuple[float, int]:
    """Train on all rows once, or on what a number of batches reaches."""
    steps = min(math.ceil(row_count(arrays) / batch_size), limit)
    # Of where the run is: going on after a save is what going on without one would be.
    seeds = [seed, trainer.batches]
    total, rows = 0.0, 0
    text = TextColumn("{task.description}")
    with progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as shown:
        task = shown.add_task(title, total=steps)
        for _, batch in zip(range(steps), batches_of(arrays, batch_size, seeds), strict=False):
            size = row_count(batch)
            total += trainer.train_step(**batch) * size
            rows += size
            shown.advance(task)
    return (total / rows if rows else math.nan), steps


def _evaluation(trainer: OrtTrainer, arrays: Arrays, batch_size: int) -> str:
    """The loss on other data, and for class indices the accuracy."""
    total, right, counted, rows = 0.0, 0, 0, 0
    for batch in batches_of(arrays, batch_size):
        size = row_count(batch)
        total += trainer.evaluate(**batch) * size
        rows += size
        scored = _right_classes(trainer, batch)
        right, counted = right + scored[0], counted + scored[1]
    accuracy = f", accuracy {right / counted:.2%}" if counted else ""
    return f", eval loss {total / rows:.6g}{accuracy}"


def _right_classes(trainer: OrtTrainer, batch: Arrays) -> tuple[int, int]:
    """Count the labels that have the highest score, and all labels; none for other targets."""
    targets = trainer.manifest.targets
    if len(targets) != 1 or targets[0].classes is None:
        return 0, 0
    labels, ignored = batch[targets[0].name], targets[0].ignore_index
    inputs = {spec.name: batch[spec.name] for spec in trainer.manifest.inputs}
    outputs = trainer.predict(**inputs)
    for scores in outputs if isinstance(outputs, tuple) else (outputs,):
        is_scores = scores.dtype.kind == "f" and scores.ndim == labels.ndim + 1
        if is_scores and (scores.shape[0], *scores.shape[2:]) == labels.shape:
            known = labels != (-1 if ignored is None else ignored)
            found = scores.argmax(axis=1) == labels
            return int((found & known).sum()), int(known.sum())
    return 0, 0
