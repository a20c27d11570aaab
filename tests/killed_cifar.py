"""examples/cifar.py, killed with half of a file written; run by test_cifar.py.

    python killed_cifar.py COUNT SCRIPT ARGUMENTS

It is killed in the COUNTth file that it writes.
"""

import os
import runpy
import signal
import sys
from itertools import count

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)  # as the test that goes on: sums are made in another order by more
    last, script, *arguments = sys.argv[1:]
    written = count(1)

    def fsync(descriptor: int) -> None:
        if next(written) == int(last):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    vars(os)["fsync"] = fsync
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
