"""Parallel training in two gloo processes: each has its own Gram, gradients are averaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distributed_worker
import numpy as np
import pytest
import torch
from distributed_worker import ARRANGEMENTS, WORLD, batch_of
from torch import Tensor

from oracle import relative_error
from rewritten import FLOAT64, Case, expected, gradient

Gradients = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    """The gradients that each process ended with."""
    folder = tmp_path_factory.mktemp("distributed")
    script = Path(distributed_worker.__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(
    ("wrapper", "case"), ARRANGEMENTS, ids=[f"{w}-{c}" for w, c in ARRANGEMENTS]
)
def test_mean_of_each_process_s_gradient(wrapper: str, case: Case, gradients: Gradients) -> None:
    net = case.net()
    batches = [batch_of(case, rank) for rank in range(WORLD)]
    wanted = np.mean([expected(net, x) for x in batches], axis=0)
    plain = torch.stack([gradient(case.net(), x) for x in batches]).mean(0)
    assert relative_error(plain, wanted) > 0.1
    for found in gradients:
        assert relative_error(found[f"{wrapper}-{case}"], wanted) < FLOAT64
