"""Per-example gradient norms of any supported model, without an optimizer of ours: which examples are hard?

python examples/norms_only.py
"""

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

import engm

torch.manual_seed(0)
net = resnet18(num_classes=10).eval()  # evaluation mode: no example influences another, the norms are exact
model = engm.GradNormModule(net)
x, y = torch.rand(8, 3, 64, 64), torch.randint(10, (8,))

print(engm.explain(model, x))

losses = F.cross_entropy(model(x), y, reduction="none")
norms = engm.per_example_grad_norms(model, losses)
print("norms   ", [f"{norm:.3f}" for norm in norms.tolist()])
print("oracle  ", [f"{norm:.3f}" for norm in engm.naive_grad_norms(model, losses).tolist()])
losses.mean().backward()  # the graph is still there
