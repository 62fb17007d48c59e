"""The little networks of the capture and graph tests."""

import torch
import torch.nn.functional as F
from oracle import random_losses, tensor
from torch import nn

import engm


class Net(nn.Module):
    """A little of everything that couples nothing: views, in-place operations, a residual."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.instance = nn.InstanceNorm2d(channels, affine=True)
        self.tokens = nn.Linear(channels, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        out = self.instance(self.conv(x))
        out += x
        out = F.relu_(out).flatten(2).transpose(1, 2)
        return self.head(F.relu_(self.tokens(out)).mean(1))


X = tensor(4, 3, 6, 6)


def losses_of(model, x=X):
    return random_losses(model(x))


def net_and_model(**options):
    net = Net().double()
    return net, engm.GradNormModule(net, **options)


class Around(nn.Module):
    """Two linear layers around something the test brings."""

    def __init__(self, between=None, after=None):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        self.between, self.after = between or torch.tanh, after or (lambda x: x)

    def forward(self, x):
        return self.after(self.second(self.between(self.first(x))))


COUPLED = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) - self.head(x.flatten(1)).mean(0)
"""
"""A user's file with a network for digits whose examples influence each other."""
