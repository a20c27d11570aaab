"""Training in two processes (gloo): DDP, FSDP2 and their compiled forms."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed
from filelock import FileLock  # a requirement of torch's

from forked import run_group
from rewritten import CONV_CASES, FLOAT64, Case, each
from two_processes import PROCESSES, WRAPPERS, possible

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)

Results = list[dict[str, float | str]]
MODULE_CASES = tuple(c for c in CONV_CASES if c.way in ("call_module", "tract_module"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Errors by wrapper and case, as each process has found them; once for all of pytest's workers.

    They may well share this module's tests, and it takes long.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_group(Path(__file__).with_name("two_processes.py"), folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize(
    ("wrapper", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case}")
        for name in WRAPPERS
        for case in CONV_CASES
        if possible(case, name)
    ],
)
def test_average_of_each_process_own_gradient(results: Results, wrapper: str, case: Case) -> None:
    for found in results:
        error = found[f"{wrapper} {case}"]
        assert isinstance(error, float)
        assert error < FLOAT64


@each(*MODULE_CASES)
def test_mixed_precision(results: Results, case: Case) -> None:
    """Gradients of bfloat16 weights: rounded to that dtype before the reduction."""
    for found in results:
        error = found[f"mixed-precision {case}"]
        assert isinstance(error, float)
        assert error < 4e-3


@each(*MODULE_CASES)
def test_sharded_before_the_pass_is_an_error(results: Results, case: Case) -> None:
    assert all(found[f"sharded-before {case}"] for found in results)


@each(*CONV_CASES)
def test_one_gram_over_both_processes_would_be_another(results: Results, case: Case) -> None:
    """Else the oracle above could not tell whose Gram it was."""
    for found in results:
        difference = found[f"global-gram {case}"]
        assert isinstance(difference, float)
        assert difference > 1e3 * FLOAT64


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_tensor_parallel(results: Results, split: str) -> None:
    for found in results:
        error = found[f"tensor-parallel {split}"]
        assert isinstance(error, float)
        assert error < FLOAT64
