"""The backend and the network of the tests of torch.compile."""

import torch
from torch import nn

BACKEND = "aot_eager"


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), part, nn.Linear(8, 3)).double()


def whole(net):
    net.compile(backend=BACKEND, fullgraph=True)
    return net
