"""Layers of torchvision's operators, which torch cannot cut into examples."""

import pytest
import torch
from oracle import per_example_gradients, trained
from torch import nn
from torchvision.ops import DeformConv2d

import engm
from engm.rules import find_rule


class Deformed(nn.Module):
    """A deformable convolution that reads where the network tells it to, by weights if it is ``modulated``."""

    def __init__(self, groups, modulated, bias):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), nn.Linear(6, 3)
        self.offsets, self.masks = nn.Conv2d(4, 18, 3, padding=1), nn.Conv2d(4, 9, 3, padding=1) if modulated else None
        self.deformed = DeformConv2d(4, 6, 3, padding=1, groups=groups, bias=bias)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        mask = None if self.masks is None else self.masks(h).sigmoid()
        return self.last(torch.tanh(self.deformed(h, self.offsets(h), mask)).mean((2, 3)))


@pytest.mark.parametrize(("groups", "modulated", "bias"), [(1, False, True), (2, True, True), (1, True, False)])
def test_a_deformable_convolution(groups, modulated, bias):
    torch.manual_seed(0)
    net = Deformed(groups, modulated, bias).double()
    assert not isinstance(find_rule(net.deformed), str)
    model = engm.GradNormModule(net)
    for n in (5, 1):
        x = torch.randn(n, 2, 7, 7, dtype=torch.float64)
        found = engm.per_example_grad_norms(model, model(x).square().sum(1))
        wanted = per_example_gradients(net(x).square().sum(1), trained(net)).norms
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_its_backward_pass_runs_on_one_example_at_a_time():
    """And not once an example on all of them; there are a few passes in which owners are told."""
    n, net = 12, Deformed(1, False, True)
    model = engm.GradNormModule(net)
    engm.per_example_grad_norms(model, model(torch.randn(n, 2, 7, 7)).square().sum(1))
    with torch.profiler.profile(record_shapes=True) as profile:
        engm.per_example_grad_norms(model, model(torch.randn(n, 2, 7, 7)).square().sum(1))
    sizes = [e.input_shapes[0][0] for e in profile.events() if e.name == "torchvision::_deform_conv2d_backward"]
    assert sizes.count(1) == n
    assert sizes.count(n) == len(sizes) - n < 6
