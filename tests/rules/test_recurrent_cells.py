"""Recurrent cells that are called once a step."""

import pytest
import torch
from engine_checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_losses, tensor
from torch import nn

from engm.rules import find_rule

X = tensor(4, 5, 3)
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


class Loop(nn.Module):
    """A cell called once a step."""

    def __init__(self, cell, size, start):
        super().__init__()
        self.cell, self.start = cell, nn.Linear(size, cell.hidden_size) if start else None

    def forward(self, x):
        state = None
        if self.start is not None:
            state = self.start(x[..., 0, :])
            state = (state, torch.tanh(state)) if isinstance(self.cell, nn.LSTMCell) else state
        seen = []
        for t in range(x.shape[-2]):
            state = self.cell(x[..., t, :], state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen, -2)


class TestCells:
    @settings(max_examples=12, deadline=None)
    @given(
        kind=st.sampled_from(sorted(CELLS)),
        sizes=st.tuples(*[st.integers(1, 4)] * 4),
        bias=st.booleans(),
        start=st.booleans(),
    )
    def test_called_in_a_loop(self, kind, sizes, bias, start):
        n, length, size, hidden = sizes
        net = Loop(CELLS[kind](size, hidden, bias=bias), size, start).double()
        check(net, lambda m: random_losses(m(tensor(n, length, size))))

    def test_relu(self):
        check(Loop(nn.RNNCell(3, 4, nonlinearity="relu"), 3, True).double(), lambda m: random_losses(m(X)))

    @pytest.mark.parametrize("kind", sorted(CELLS))
    def test_single_example_without_a_batch(self, kind):
        class Single(Loop):
            def forward(self, x):
                return super().forward(x[0]).unsqueeze(0)

        check(Single(CELLS[kind](3, 4), 3, False).double(), lambda m: random_losses(m(X[:1])))

    def test_cost(self):
        cell = nn.GRUCell(3, 4)
        assert find_rule(cell).cost(cell, (2, 3), (2, 4)).bytes > 0
