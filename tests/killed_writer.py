"""A process that is killed while it writes a directory; run by test_artifacts_on_disk.py.

python killed_writer.py DIRECTORY OVERWRITE
"""

import os
import signal
import sys

from tract_fx.export.directory import write_directory


def main(directory: str, overwrite: bool) -> None:
    with write_directory(directory, overwrite) as new:
        (new.path / "training_model.onnx").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "overwrite")
