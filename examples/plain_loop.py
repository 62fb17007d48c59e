"""Exact per-example clipping in a plain training loop: the two lines that change are marked.

python examples/plain_loop.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import engm

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
y = torch.tensor(digits.target)

net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
    nn.Flatten(), nn.Linear(32 * 16, 10),
)  # fmt: skip
model = engm.GradNormModule(net)  # <-- wrap the network
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
opt = engm.ENGM(model, sgd, alpha=1.0)  # <-- and the optimizer

for step in range(100):
    rows = torch.randint(len(y), (64,))
    losses = F.cross_entropy(model(x[rows]), y[rows], reduction="none")  # one loss per example
    stats = opt.backward(losses)
    opt.step()
    opt.zero_grad()
    if step % 20 == 0:
        clipped = (stats.weights < 1).float().mean()
        print(
            f"step {step:3d}  loss {stats.losses.mean():.3f}  mean norm {stats.norms.mean():.3f}  clipped {clipped:.0%}"
        )
