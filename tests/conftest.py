"""What holds for all tests of a process: ONNX Runtime Training comes first, and little is redone.

Tests that import ONNX Runtime Training themselves, not the way the library does, would leave
another `torch.utils.checkpoint.checkpoint` to the tests after them.
"""

import gc
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from tract_fx import torch_private
from tract_fx.errors import MissingRuntimeError
from tract_fx.ort_training import runtime
from tract_fx.preconditioner import direct

# The tests' layers are small, and would all be called the short way. So they are where there are
# fewer rows than columns; the others are to try the way of large layers.
FEW, direct._FEW = direct._FEW, 0.0


# `torch.manual_seed` would write down the call stack, for each kind of device that is not there.
for kind in (torch.cuda, torch.xpu, torch.mtia):
    if not kind.is_available():
        setattr(kind, "manual_seed_all", lambda seed: None)  # noqa: B010 (mypy refuses the other)


@pytest.fixture(scope="module")
def small_layers_too() -> Iterator[None]:
    """Let a file's small layers be called the short way, as users' are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "_FEW", FEW)
        direct.is_quicker.cache_clear()
        yield
    direct.is_quicker.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def kept_translations() -> Iterator[None]:
    """PyTorch's exporter reads its table of translations once: half of a small model's export."""
    with torch_private.kept_translations():
        yield


gc.disable()  # until all tests are collected
MISSING = ""
try:
    runtime()
except MissingRuntimeError as error:  # there is none for every Python
    MISSING = error.found


def is_for_want_of_it(error: BaseException | None) -> bool:
    """Whether a test failed for want of ONNX Runtime Training, itself or a process of its own."""
    if error is None:
        return False
    missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
    said = MISSING.partition(" (")[0]
    return missing or said in str(error) or is_for_want_of_it(error.__cause__ or error.__context__)


def skipped_for_want_of_it() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if MISSING and is_for_want_of_it(error):
            pytest.skip(MISSING)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from skipped_for_want_of_it())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from skipped_for_want_of_it())


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Leave out a file that imports ONNX Runtime itself."""
    report = yield
    if MISSING and report.failed and "No module named 'onnxruntime'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, MISSING)
    return report


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collector's sight, and let it look more rarely.

    It is a million objects that stay, and each full collection would go through them all: a fifth
    of an export's time. What tests make themselves is collected, but not at every 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)
    gc.enable()
