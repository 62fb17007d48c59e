"""Layers that are called without a dimension of examples: on one example at a time, or on what all examples share.

Of what all share, an example may read an element of its own, so that one seen alone does not tell of the others.
"""

import pytest
import torch
from oracle import per_example_gradients, relative, tensor, trained
from torch import nn

import engm
from engm.backward import prepare
from engm.graph.planning import make_plan

pytestmark = pytest.mark.torch_insides
N = 4


class Hidden(nn.Module):
    """The hidden state of a cell that has another one."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x)[0]


# Layers, and what all examples share.
LAYERS = {
    "linear": lambda: (nn.Linear(3, N), (3,)),
    "convolution": lambda: (nn.Conv1d(3, N, 1), (3, 2)),
    "convolution over images": lambda: (nn.Conv2d(3, N, 2), (3, 4, 3)),
    "transposed convolution": lambda: (nn.ConvTranspose2d(3, N, 2), (3, 2, 2)),
    "layer norm": lambda: (nn.LayerNorm(N), (N,)),
    "instance norm": lambda: (nn.InstanceNorm1d(N, affine=True), (N, 5)),
    "gru cell": lambda: (nn.GRUCell(3, N), (3,)),
    "lstm cell": lambda: (Hidden(nn.LSTMCell(3, N)), (3,)),
}


class Net(nn.Module):
    """A layer on something that all examples share, of which each reads its own part, and a layer on the examples."""

    def __init__(self, name):
        super().__init__()
        self.layer, shape = LAYERS[name]()
        self.register_buffer("given", tensor(*shape))
        self.of_examples = nn.Linear(5, 1)
        self.double()

    def forward(self, x, shown):
        y = self.layer(self.given).sin()
        return (y.flatten(1).sum(1) if y.dim() > 1 else y) * shown + self.of_examples(x)[:, 0]


@pytest.mark.parametrize("coupled", ["refuse", "exact"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [(4, 4, 15, 4, 3), (15, 4, 15), (1, 2, 4, 8, 15), (8, 3, 12, 15)], ids=str)
def test_an_element_an_example(name, steps, coupled):
    torch.manual_seed(0)
    model = engm.GradNormModule(Net(name), coupled=coupled)
    for seed, bits in enumerate(steps):
        shown = torch.tensor([(bits >> k) & 1 for k in range(N)]).double()
        losses = model(tensor(N, 5, seed=seed), shown)
        truth = per_example_gradients(losses, trained(model)).norms
        assert relative(engm.per_example_grad_norms(model, losses), truth) <= 1e-9


def test_one_example_at_a_time_is_measured_once(monkeypatch):
    """Elements that a ReLU closes are told by those that come out of it."""
    made = []
    monkeypatch.setattr(prepare, "make_plan", lambda *args: made.append(make_plan(*args)) or made[-1])
    torch.manual_seed(0)
    layers = (
        nn.Linear(5, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Dropout(0.3),
        nn.LeakyReLU(),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    model = engm.GradNormModule(nn.Sequential(*layers).double())
    for seed in range(8):
        losses = torch.stack([model(row).square().sum() for row in tensor(N, 5, seed=seed)])
        truth = per_example_gradients(losses, trained(model)).norms
        assert relative(engm.per_example_grad_norms(model, losses), truth) <= 1e-9
    assert len(made) == 1
