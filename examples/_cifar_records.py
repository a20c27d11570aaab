"""Going through the runs of `cifar.py`: what is kept of each, when to stop, where to go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from _cifar_data import Images, load
from _cifar_files import write_json, write_tensors
from _cifar_runs import Progress, Run, Training
from _demo_data import DataError


class OtherRunError(Exception):
    """The folder has a run of that name that was made otherwise; the message says what to do."""


class Budget:
    """Until when this process may train."""

    def __init__(self, end: float | None) -> None:
        """Take the end by `time.monotonic`'s clock, None for none."""
        self._end = end
        self._longest: dict[tuple[str, ...], float] = {}

    def allows(self, *works: tuple[str, ...]) -> bool:
        """Tell whether works, each as long as the longest of its kind so far, fit in."""
        expected = sum(self._longest.get(work, 0.0) for work in works)
        return self._end is None or time.monotonic() + 1.2 * expected < self._end

    @contextmanager
    def measured(self, work: tuple[str, ...]) -> Iterator[None]:
        """Measure a work."""
        start = time.monotonic()
        yield
        self._longest[work] = max(self._longest.get(work, 0.0), time.monotonic() - start)


def train(
    runs: Sequence[Run],
    data: Path | None,
    out: Path,
    device: torch.device,
    budget: Budget,
    console: Console,
) -> None:
    """Train one run after the other, from where it was left, until all are complete or time is up.

    Args:
        runs: In their order.
        data: Folder of the images, for the first time.
        out: Where images, records and states are kept.
        device: Where to train.
        budget: The time.
        console: Is told of each epoch.

    Raises:
        DataError: The images can't be read, or are too few.
        OtherRunError: `out` has a run of that name that was made otherwise.
    """
    images: Images | None = None
    for run in runs:
        found = read_progress(run, out)
        if found is not None and found.weights:
            _state(run, out).unlink(missing_ok=True)  # what is complete is not gone on with
            continue
        if not budget.allows(("start", run.name), ("epoch", run.name)):
            return
        if images is None:
            settings = run.settings
            images = load(
                data,
                out / "images.pt",
                image_size=settings.image_size,
                train_limit=settings.train_limit,
                test_limit=settings.test_limit,
            ).to(device)
            if len(images.train) < settings.batch_size:
                raise DataError(
                    f"{len(images.train)} training images make no batch of {settings.batch_size}: "
                    "give a smaller --batch-size"
                )
        if not _train(run, images, out, device, budget, console):
            return


def _train(
    run: Run, images: Images, out: Path, device: torch.device, budget: Budget, console: Console
) -> bool:
    """Train a run as far as time allows; tell whether it is complete."""
    record, state = _record(run, out), _state(run, out)
    with budget.measured(("start", run.name)):
        training = Training(run, images, device)
        if state.is_file():
            kept = torch.load(state, map_location=device)
            _check(run, kept["run"], state)
            training.load_state(kept)
            # It may have ended between the two.
            write_json(record, {"run": described(run), "progress": kept["progress"]})
    progress = training.progress
    while len(progress.accuracies) < run.epochs:
        if not budget.allows(("epoch", run.name)):
            return False
        with budget.measured(("epoch", run.name)):
            training.train_epoch()
            # The state first: it has the record in it, and is what the run goes on from.
            write_tensors(state, {"run": described(run), **training.state()})
            write_json(record, {"run": described(run), "progress": asdict(progress)})
        console.print(
            f"{run.file_name}: epoch {len(progress.accuracies)} of {run.epochs}, "
            f"{100 * progress.accuracies[-1]:.2f} %, {progress.seconds[-1]:.1f} s",
            highlight=False,
        )
    state.unlink()
    return True


def read_progress(run: Run, out: Path) -> Progress | None:
    """Read what a run has come to, None before its first epoch.

    Args:
        run: Which.
        out: The folder of the records.

    Returns:
        What its record says.

    Raises:
        OtherRunError: The record is of a run that was made otherwise.
    """
    path = _record(run, out)
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    _check(run, record["run"], path)
    return Progress(**record["progress"])


def described(run: Run) -> dict[str, Any]:
    """Give all that makes a run, as JSON has it."""
    return asdict(run)


def _record(run: Run, out: Path) -> Path:
    return out / f"{run.file_name}.json"


def _state(run: Run, out: Path) -> Path:
    return out / f"{run.file_name}.pt"


def _check(run: Run, found: dict[str, Any], path: Path) -> None:
    asked = described(run)
    for part in (asked, found):  # one level, so that a message can name what differs
        part.update({**part.pop("recipe"), **part.pop("settings")})
    other = [
        f"{name} {found.get(name)}, not {asked[name]}"
        for name in asked
        if asked[name] != found.get(name)
    ]
    if other:
        raise OtherRunError(
            f"{path} is of a run with {', '.join(other)}: give another --out, or what it was "
            "made with"
        )
