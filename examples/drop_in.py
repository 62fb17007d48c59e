"""Into an existing training script: keep its backward pass, its scaler, its clipping; reweight the losses.

python examples/drop_in.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import engm

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
model = engm.GradNormModule(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engm_opt = engm.ENGM(model, optimizer, alpha=1.0)

for step in range(20):
    x, y = torch.rand(32, 3, 8, 8), torch.randint(10, (32,))
    losses = F.cross_entropy(model(x), y, reduction="none")
    losses = engm_opt.reweight(losses)  # <-- the one new line: w_i L_i, the graph is kept
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2d}  mean weight {engm_opt.stats.weights.mean():.3f}")
