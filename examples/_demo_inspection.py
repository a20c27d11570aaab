"""The demo's last part: a report on its model, inspected on a batch of the training images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.nn import functional as F

from _demo_data import Dataset
from _demo_training import Histories, Settings, initial_model, with_tract
from tract_fx import inspect_graph

SEED = 0
IMAGES = 256


def save_report(dataset: Dataset, settings: Settings, histories: Histories, path: Path) -> str:
    """Inspect the net that the demo starts from, and save the page.

    Args:
        dataset: The images.
        settings: For λ.
        histories: Of training, whose accuracies are on the page too.
        path: Where the page goes.

    Returns:
        The verdict, in a sentence.
    """
    images, labels = dataset.train.images[:IMAGES], dataset.train.labels[:IMAGES]
    model = with_tract(initial_model(dataset, SEED), settings)
    inspection = inspect_graph(
        model,
        images,
        loss=lambda scores: F.cross_entropy(scores, labels),
        backward="expanded",
        name="The demo's net",
    )
    arms = {"plain": histories["plain"], "TrAct": histories["tract"]}
    after = {arm: [run.accuracies[1:] for run in runs] for arm, runs in arms.items()}
    # What was done to the images is part of what the statistics say.
    replace(inspection, notes=(*filter(None, [dataset.note]), *inspection.notes)).save(
        path, curves={"Test accuracy": after}
    )
    verification = inspection.verification
    assert verification is not None
    error = max(weight.operator.error for weight in verification.weights)
    verdict = "is TrAct's" if verification.passed else "is NOT TrAct's"
    return (
        f"The first layer's gradient {verdict}: {error:.1e} off float64's on {len(images)} images."
    )
