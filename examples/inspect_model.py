"""Ask a rewritten model what was done to it, and make sure that nothing was lost on the way.

Needs the extra `inspect`.
"""

import _named_extra  # noqa: F401  # isort: skip

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tract_fx import inspect_graph, tract_pass

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 16, kernel_size=3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
)
net.extend([nn.Flatten(), nn.Linear(16 * 8 * 8, 10)])
images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10

model = tract_pass(torch.fx.symbolic_trace(net))
inspection = inspect_graph(model, images, loss=lambda scores: F.cross_entropy(scores, labels))
inspection.print()

# Right: the gradient is float64's, and nothing else has changed.
assert inspection.verification is not None and inspection.verification.passed
(layer,) = inspection.layers
assert (layer.record.name, layer.rows, layer.columns) == ("0", 32 * 16 * 16, 3 * 3 * 3)

# A page to look at or to send to somebody; and the records, for a program to read.
with tempfile.TemporaryDirectory() as folder:
    page = inspection.save(Path(folder) / "report.html")
    assert "TrAct" in page.read_text(encoding="utf-8")

# Wrong: a model that has lost the transform, here by somebody who puts the plain layer back.
broken = copy.deepcopy(model)
plain = nn.Conv2d(3, 16, kernel_size=3, padding=1)
plain.load_state_dict(net[0].state_dict())
setattr(broken, "0", plain)
lost = inspect_graph(broken, images, backward=None, statistics=False)
assert lost.verification is not None and not lost.verification.passed
print(f"Without the transform: {lost.verification.problems[0]}")
