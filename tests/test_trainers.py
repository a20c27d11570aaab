"""tract_steps where somebody else writes the loop: one step of two micro-batches as one large one.

Several processes: the cases named "trainer …" of test_global_gram.py.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from global_gram import FORMS, LAMBDA
from oracle import relative_error
from rewritten import FLOAT64
from tract_fx import tract_module, tract_steps
from trainer_loops import TRAINERS, by_hand, examples, moved


@pytest.mark.parametrize("steps", [True, False], ids=["steps", "micro-batches"])
@pytest.mark.parametrize("form", ["conv", "rows-too-few"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_is_that_on_large_batches(
    trainer: str, form: str, steps: bool, tmp_path: Path
) -> None:
    """Clipped, so that a gradient that comes late shows; by themselves micro-batches are others."""
    pytest.importorskip(trainer)
    net, data = FORMS[form].net(), examples(8, FORMS[form].shape)
    model = tract_module(copy.deepcopy(net), layers=["first"])
    if steps:
        tract_steps(model)
    TRAINERS[trainer](model, data, 4, 2, tmp_path)
    error = relative_error(moved(net, model), moved(net, by_hand(net, data, LAMBDA)))
    assert (error < FLOAT64) if steps else (error > 1e3 * FLOAT64)
