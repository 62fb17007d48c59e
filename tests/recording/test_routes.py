"""Numbers that decide whose rows are whose, and are no constants of the code: recorded steps notice new ones."""

import copy

import pytest
import torch
from graph_double import Double
from oracle import per_example_gradients, trained
from recorded_training import TRACES_ALL, same
from torch import nn

import engm
from engm.recording import step as recording
from engm.recording.cuda_graph import CudaGraphs
from engm.recording.program import Replay, hang_on_data, hang_on_what_was_there, recorded
from engm.recording.step import NO_LONGER_HOLDS, RecordedStep

pytestmark = pytest.mark.torch_insides

N, D = 4, torch.float64
ORDER = torch.arange(N)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(N))


class Net(nn.Module):
    """A network that reorders the examples by what it finds in one of many places, for good or for one layer."""

    def __init__(self, order, for_good):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.drop = nn.Dropout(0.5)
        for name, buffer in {
            "integers": torch.arange(N),
            "floats": torch.arange(N, dtype=D),
            "start": torch.zeros((), dtype=torch.int64),
        }.items():
            self.register_buffer(name, buffer)
        self.parameter = nn.Parameter(torch.arange(N, dtype=D))
        self.attribute, self.in_a_list, self.in_a_dict = torch.arange(N), [torch.arange(N)], {"order": torch.arange(N)}
        self.others = (Other(),)  # none of the network's modules
        self.order, self.for_good = order, for_good

    def forward(self, x):
        h = torch.tanh(self.norm(self.a(x)))
        order = self.order(self)
        h = self.drop(h[order])
        return self.b(h if self.for_good else h[order.argsort()]) * (1 + 0 * self.parameter.sum())


ORDERS = {  # how the network finds its order, and what is written into
    "a global": (lambda net: ORDER, lambda net: ORDER),
    "an attribute": (lambda net: net.attribute, lambda net: net.attribute),
    "in a list": (lambda net: net.in_a_list[0], lambda net: net.in_a_list[0]),
    "in a dictionary": (lambda net: net.in_a_dict["order"], lambda net: net.in_a_dict["order"]),
    "another network's buffer": (lambda net: net.others[0].order, lambda net: net.others[0].order),
    "a buffer": (lambda net: net.integers, lambda net: net.integers),
    "a buffer's data": (lambda net: net.integers, lambda net: net.integers.data),
    "a buffer's array": (lambda net: net.integers, lambda net: torch.from_numpy(net.integers.numpy())),
    "a buffer that is sorted": (lambda net: net.floats.argsort(), lambda net: net.floats),
    "a buffer that is rounded": (lambda net: net.floats.long(), lambda net: net.floats),
    "a number": (lambda net: (torch.arange(N) + net.start) % N, lambda net: net.start),
    "a parameter": (lambda net: net.parameter.detach().argsort(), lambda net: net.parameter.data),
}


def losses_of(model, x):
    return (model(x) * torch.tensor([1.0, 2.0], dtype=D)).square().sum(1)


def write(into, value):
    with torch.no_grad():
        into.copy_(torch.tensor(value) if into.dim() == 0 else torch.arange(N).roll(-value))


def steps(record, order, into, values, train=False, for_good=False, backend=None):
    """What steps leave before each of which an order is written, and the report of the recorded ones."""
    torch.manual_seed(3)
    net = Net(order, for_good).double()
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD([*net.a.parameters(), *net.b.parameters()], 0.1), 0.5)
    recorded_step = RecordedStep(opt, lambda x: losses_of(model, x), backend or Replay())
    step = recorded_step if record else lambda x: opt.backward(losses_of(model, x))
    model.train(train)
    left = []
    for value in values:
        write(into(net), value)
        x = torch.randn(N, 3, dtype=D)
        if not train:
            truth = per_example_gradients(losses_of(model, x), trained(net)).norms
        stats = step(x)
        if not train:
            torch.testing.assert_close(stats.norms, truth, rtol=1e-9, atol=0)
        left.append(dict(vars(stats)))
        opt.step()
        opt.zero_grad()
    write(into(net), 0)
    return (left, copy.deepcopy(net.state_dict()), torch.get_rng_state()), step


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_is_written_into(name, train):
    """Rows are other examples' from then on: the program is given up, and all that it wrote and drew is put back."""
    values = [0, 0, 0, 0, 1, 1]
    found, expected = (steps(record, *ORDERS[name], values, train, for_good=True) for record in (True, False))
    report = found[1].report()
    assert same(found[0], expected[0]), report
    assert report.replayed == (1 if train else 2), report  # a batch norm's calibration comes first
    assert report.eager[NO_LONGER_HOLDS] == 1, report


@pytest.mark.parametrize("backend", [Replay(), CudaGraphs(Double, "cpu")], ids=["replay", "a double of CUDA graphs"])
def test_a_program_for_another_order(backend):
    """It is made anew where it lasts a while."""
    values = [0, 0, 0, 0, 1, 1, 1, 1]
    found, expected = (steps(record, *ORDERS["a global"], values, backend=backend) for record in (True, False))
    report = found[1].report()
    assert same(found[0], expected[0]), report
    assert (report.recorded, report.replayed) == (2, 4), report


def test_orders_that_change_all_the_time_are_not_recorded(monkeypatch):
    monkeypatch.setattr(recording, "MOST_GIVEN_UP", 3)
    values = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found, expected = (steps(record, *ORDERS["a global"], values) for record in (True, False))
    report = found[1].report()
    assert same(found[0], expected[0]), report
    assert (report.recorded, report.replayed) == (3, 3), report
    assert report.refused == [NO_LONGER_HOLDS]


def test_what_is_constant_is_not_watched():
    constant = torch.tensor
    _, step = steps(True, lambda net: constant([1, 0, 3, 2])[torch.arange(N)], lambda net: net.start, 3 * [0])
    (recording,) = step._recordings.values()
    assert not recording.watches
    assert step.report().replayed == 1


def test_a_generator_of_the_users_is_put_back():
    found = []
    for record in (True, False):
        torch.manual_seed(3)
        net, order = Net(lambda net: net.integers, False).double(), torch.arange(N)
        generator = torch.Generator().manual_seed(1)
        model = engm.GradNormModule(net.eval())
        opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), 0.5)

        def losses(x, model=model, generator=generator, order=order):
            out = model(x + torch.randn(x.shape, generator=generator, dtype=D))
            return out[order].square().sum(1)[order.argsort()]

        step = engm.record(opt, losses) if record else lambda x, opt=opt, losses=losses: opt.backward(losses(x))
        norms = []
        for k in range(9):
            order.copy_(torch.arange(N).roll(k // 5))
            norms.append(step(torch.randn(N, 3, dtype=D)).norms)
            opt.zero_grad()
        found.append([norms, generator.get_state()])
        if record and TRACES_ALL:
            assert step.report().eager[NO_LONGER_HOLDS] == 1, step.report()
    assert same(*found)


class Queue(nn.Module):
    """A network with a queue of its outputs, into which every step writes at another place."""

    def __init__(self, in_python):
        super().__init__()
        self.layer, self.in_python = nn.Linear(3, 2), in_python
        self.register_buffer("queue", torch.ones(3 * N, 2))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        out = self.layer(x)
        losses = (out @ self.queue.clone().T).logsumexp(1)
        with torch.no_grad():
            if self.in_python:
                start = int(self.place)
                self.queue[start : start + N] = out.detach()
            else:
                self.queue.index_copy_(0, torch.arange(N) + self.place, out.detach())
            self.place.add_(N).remainder_(3 * N)
        return losses


@pytest.mark.parametrize("in_python", [False, True])
def test_a_place_that_every_step_moves_on(monkeypatch, in_python):
    """The program is the same whatever the place, unless Python is given it: then the report names the buffer."""
    monkeypatch.setattr(recording, "MOST_GIVEN_UP", 3)
    found = []
    for record in (True, False):
        torch.manual_seed(3)
        model = engm.GradNormModule(Queue(in_python).double())
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
        step = engm.record(opt, model) if record else lambda x, o=opt, m=model: o.backward(m(x))
        norms = []
        for _ in range(10):
            norms.append(step(torch.randn(N, 3, dtype=D)).norms)
            opt.step()
            opt.zero_grad()
        found.append([norms, model.state_dict()])
        if record:
            report = step.report()
            assert report.replayed == (0 if in_python else 8), report
            assert report.refused == in_python * ["Python is given numbers of place, and they became others"]
    assert same(*found)


def test_what_outputs_come_of():
    """Memory counts, and not by which tensor it is reached; tensors that the code makes of numbers are constants."""
    there = torch.zeros(4)
    alias = there.detach()

    def step(x, y):
        alias[:2].add_(x)
        return [there + 1, torch.tensor([1.0, 2.0]) + torch.arange(2), x + 1, y + 1]

    module, _ = recorded(step, [torch.ones(2), torch.ones(2)])
    assert [hang_on_data(module, k, 1) for k in range(4)] == [True, True, True, False]
    assert hang_on_what_was_there(module, 1) == [True, False, False, True]
