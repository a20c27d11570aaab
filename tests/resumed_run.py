"""The second half of a training run, in a process of its own; run by test_trainer.py.

    python resumed_run.py NET DIRECTORY FIRST LAST OUT

Trains from DIRECTORY on the batches FIRST to LAST of the net's list, and saves to OUT.
"""

import sys

import ort_artifacts
from tract_fx.trainers import load_trainer


def main(net: str, directory: str, first: int, last: int, out: str) -> None:
    trainer = load_trainer(directory)
    batches = ort_artifacts.batches(getattr(ort_artifacts, net)(), last)
    for batch in batches[first:]:
        trainer.train_step(*batch)
    trainer.save(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
