"""Recorded steps of networks in which few rows get a gradient, or rows lie in an order of their own at every step."""

import copy

import pytest
import torch
from recorded_training import CLASSES, N, Training, batches, same
from torch import nn

pytestmark = pytest.mark.torch_insides

ORDER = torch.tensor([7, 2, 9, 0, 4, 1, 8, 3, 6, 5])  # of two rows an example


class OfPositions(nn.Module):
    """A layer over the rows of an image, of which the head reads one."""

    def __init__(self, layer, position=-1, token=False):
        super().__init__()
        self.layer, self.head, self.position = layer, nn.Linear(12, CLASSES), position
        self.token = nn.Parameter(torch.randn(1, 1, 12)) if token else None

    def forward(self, x):
        rows = x.transpose(1, 2).flatten(2)
        if self.token is not None:
            rows = torch.cat([self.token.expand(len(x), -1, -1), rows], 1)
        found = self.layer(rows)
        return self.head((found[0] if isinstance(found, tuple) else found)[:, self.position])


class InOrder(nn.Module):
    """Two rows an example, put into another order, which a buffer holds, for one layer or for both."""

    def __init__(self, both):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.both = both
        self.register_buffer("order", ORDER)

    def forward(self, x):
        rows = self.first(x.flatten(1).view(2 * len(x), -1)[self.order]).tanh()
        rows = self.second(rows)
        if self.both:
            rows = rows + self.second(rows.roll(3, 0)).roll(-3, 0)
        return self.head(rows.tanh()[self.order.argsort()].view(len(x), 2, -1).sum(1))


class Tied(nn.Module):
    """A table of which rows are looked up in one order, and that projects what lies in another."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(CLASSES, 6), nn.Linear(36, 6)
        self.register_buffer("order", ORDER)

    def forward(self, x):
        rows = x.flatten(1).view(2 * len(x), -1)[self.order]
        looked_up = self.table((rows[:, 0] > 0).long())
        found = (self.layer(rows) + looked_up).tanh() @ self.table.weight.T
        return found[self.order.argsort()].view(len(x), 2, -1).sum(1)


NETWORKS = {
    "last position": lambda: OfPositions(nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
    "last state": lambda: OfPositions(nn.LSTM(12, 12, batch_first=True)),
    "class token": lambda: OfPositions(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 0, token=True),
    "two layers of a transformer": lambda: OfPositions(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2), 0
    ),
    "pixels": lambda: OfPositions(nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.Tanh()), 2),
    "an order": lambda: InOrder(both=False),
    "two orders of a layer": lambda: InOrder(both=True),
    "a tied table": Tied,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_step_by_hand(name):
    torch.manual_seed(3)
    net, data = NETWORKS[name](), batches(10, (N,))
    recorded, plain = Training(copy.deepcopy(net)), Training(net)
    assert same(recorded.go(recorded.recorded, data), plain.go(plain.by_hand, data)), recorded.recorded.report()
    report = recorded.recorded.report()
    assert report.replayed >= 6, report
