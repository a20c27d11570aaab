"""Trace a small model, apply the pass, train one step, and check the gradients by hand.

Needs no extra.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tract_fx import tract_pass

torch.manual_seed(0)
plain = nn.Sequential(
    nn.Conv2d(3, 8, kernel_size=3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10)
).double()
images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])

# The model stays as it was written; what comes back has the same parameters under the same names.
model = tract_pass(torch.fx.symbolic_trace(copy.deepcopy(plain)), lambda_=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

loss = F.cross_entropy(model(images), labels)
loss.backward()
plain_loss = F.cross_entropy(plain(images), labels)
first, *others = torch.autograd.grad(plain_loss, list(plain.parameters()))

# The first layer's gradient is gW (XᵀX/R + λI)⁻¹, where the rows of X are the image's patches.
patches = F.unfold(images, kernel_size=3, padding=1).transpose(1, 2).flatten(0, 1)
damped_gram = patches.T @ patches / len(patches) + 0.1 * torch.eye(patches.shape[1]).double()
expected = torch.linalg.solve(damped_gram, first.flatten(1), left=False).view_as(first)

# All other gradients are those of the plain model.
for parameter, gradient in zip(model.parameters(), [expected, *others], strict=True):
    torch.testing.assert_close(parameter.grad, gradient)
optimizer.step()
print(f"loss {loss:.3f}; every gradient is what the formula says")
