"""A process that ends while it writes, in a way that no code of its own can tidy up after.

python killed_writer.py PLACE MOMENT [overwrite]; MOMENT is one of

- writing: it is killed with half a directory written;
- swapping: it is killed when what was at the place is away, and the new directory not yet there;
- file: it is killed with a file written, and not yet there;
- waiting: it says that half a directory is written, and waits to be killed.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from tract_fx.artifacts.directory import write_directory
from tract_fx.artifacts.manifest import Manifest
from tract_fx.artifacts.optimizers import SGD
from tract_fx.atomic import write_file

EMPTY = Manifest(
    target="ort-training",
    versions={},
    layers=(),
    loss="mse",
    optimizer=SGD(),
    inputs=(),
    targets=(),
    outputs=(),
    parameters=(),
)


def end() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def main(place: Path, moment: str, overwrite: bool) -> None:
    if moment == "file":
        write_file(place, b"half", end)
    rename = os.rename

    def swap(source: Path, goal: Path) -> None:
        if goal == place:
            end()
        rename(source, goal)

    with write_directory(place, overwrite) as new:
        (new.path / "training_model.onnx").write_bytes(b"half")
        if moment == "writing":
            end()
        if moment == "waiting":
            print("ready", flush=True)
            time.sleep(600)
        new.manifest = EMPTY
        vars(os)["rename"] = swap


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["overwrite"])
