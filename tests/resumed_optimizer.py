"""Goes on from a checkpoint in a process of its own; run by test_ort_optimizers.py.

    python resumed_optimizer.py DIRECTORY MIDDLE OPTIMIZER RESULT

OPTIMIZER is the settings as JSON; the parameters' values go to RESULT, an .npz file.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from test_ort_optimizers import STEPS, Session, gradients_for
from tract_fx.artifacts.optimizers import SGD, AdamW, OptimizerConfig
from tract_fx.artifacts.record_json import decode

RECORDS: dict[str, type[OptimizerConfig]] = {"SGD": SGD, "AdamW": AdamW}

if __name__ == "__main__":
    folder, middle, settings, result = sys.argv[1:]
    fields = json.loads(settings)
    config = decode(RECORDS[fields["type"]], fields, "optimizer")
    session = Session(Path(folder), config, Path(folder) / "middle")
    trained = session.train(config, gradients_for(config), range(int(middle), STEPS))
    arrays: dict[str, Any] = dict(trained.values())
    np.savez(result, **arrays)
