"""Scripts in processes of their own that need not wait for torch: forks of a server that has it.

The server has imported other projects' packages and nothing else: neither tract_fx nor a test's
module, and no value of the test's process is in it. What an import of these packages is like by
itself is no question for a fork; `subprocess` asks that.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

__all__ = ["run_group", "run_script"]

# What takes long to import; one that is missing is skipped.
IMPORTED = (
    *("torch", "torch.export", "onnx", "onnx_ir", "onnxscript"),
    *("PIL.Image", "matplotlib.pyplot", "sklearn.datasets", "sklearn.model_selection", "typer"),
)
SECONDS, GROUP_SECONDS = 300.0, 900.0
"""Within which a script has to end, and one that starts others; on a busy machine it takes long."""


def run_script(
    script: Path,
    *arguments: str,
    cwd: Path | None = None,
    seconds: float = SECONDS,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script as ``python SCRIPT ARGUMENTS``.

    Args:
        script: The script.
        *arguments: Its arguments.
        cwd: Its working directory, the caller's if not given.
        seconds: Within which it has to end.
        **environment: Variables besides the caller's.

    Returns:
        The exit code, minus the signal that killed it, and all that was written.

    Raises:
        subprocess.TimeoutExpired: It has not ended in time, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        for path in outputs:
            path.touch()
        variables = {**os.environ, **environment}
        process = _server().Process(
            target=_run, args=(script, arguments, cwd or Path.cwd(), variables, *outputs)
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(str(script), seconds)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in outputs)
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, stdout, stderr)


def run_group(script: Path, folder: Path) -> None:
    """Run a script whose processes train together, and write what they find to a folder."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"  # gloo would look for a network
    run = run_script(
        *(script, str(folder)),
        seconds=GROUP_SECONDS,
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME=loopback,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    return context


def _run(
    script: Path,
    arguments: tuple[str, ...],
    cwd: Path,
    variables: Mapping[str, str],
    stdout: Path,
    stderr: Path,
) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
