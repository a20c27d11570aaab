"""Export a model with TrAct, train it in ONNX Runtime, and bring the weights back to PyTorch.

Needs the extra `ort-training`.
"""

import _named_extra  # noqa: F401  # isort: skip

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tract_fx import SGD, export_training, load_trainer, tract_pass

torch.manual_seed(0)
labels = torch.arange(32) % 10
images = torch.randn(10, 3, 16, 16)[labels] + 0.5 * torch.randn(32, 3, 16, 16)
net = nn.Sequential(
    *(nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 4 * 4, 10)),
)
model = tract_pass(torch.fx.symbolic_trace(net), lambda_=0.1)
scratch = tempfile.TemporaryDirectory()
directory = Path(scratch.name)

# Graphs with TrAct and the optimizer in them, and a checkpoint; the batch's size is left open.
optimizer = SGD(lr=0.1, momentum=0.9, weight_decay=5e-4)
artifacts = export_training(
    model, images, directory / "start", loss="cross_entropy", optimizer=optimizer
)
print(artifacts)

trainer = load_trainer(directory / "start")
in_runtime = trainer.compute_gradients(images, labels)  # changes nothing
F.cross_entropy(model(images), labels).backward()
for name, parameter in model.named_parameters():
    torch.testing.assert_close(torch.tensor(in_runtime[name]), parameter.grad, rtol=1e-4, atol=1e-6)

losses = [trainer.train_step(images, labels) for _ in range(20)]
assert losses[-1] < losses[0] / 2

# A saved run goes on bit for bit, in another process if need be.
trainer.save(directory / "half")
resumed = load_trainer(directory / "half")
assert trainer.train_step(images, labels) == resumed.train_step(images, labels)

# The weights and BatchNorm's statistics go back into the model, or into the one without TrAct.
net.load_state_dict(trainer.state_dict())
scores = net.eval()(images).detach()
torch.testing.assert_close(torch.tensor(trainer.predict(images)), scores, rtol=1e-4, atol=1e-5)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; gradients and predictions are PyTorch's")
