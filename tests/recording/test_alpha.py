"""A new threshold needs no new program: recorded steps read it from a tensor, and give the bits of steps by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engm
from engm.optim.weights import ExampleNorms

pytestmark = pytest.mark.torch_insides

N, CLASSES = 5, 3


class Training:
    """A perceptron of which an attack-like step measures the input, so that every optimizer can be recorded."""

    def __init__(self, net, optimizer):
        self.model = engm.GradNormModule(net)
        self.opt = optimizer(self.model, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9))
        self.recorded = engm.record(self.opt, self.losses)

    def losses(self, x, y):
        x = x.detach().requires_grad_()
        measured = engm.measure(
            self.model, F.cross_entropy(self.model(x), y, reduction="none"), x, norms=self.opt.needs_norms
        )
        return F.cross_entropy(self.model(x.detach()), y, reduction="none"), measured

    def by_hand(self, x, y):
        losses, measurement = self.losses(x, y)
        return self.opt.backward(losses, measurement=measurement)

    def go(self, step, alphas):
        generator = torch.Generator().manual_seed(1)
        found = []
        for alpha in alphas:
            self.opt.alpha = alpha
            x = 3 * torch.randn(N, 4, generator=generator)
            stats = step(x, torch.randint(CLASSES, (N,), generator=generator))
            found.append([t.clone() for t in vars(stats).values() if isinstance(t, torch.Tensor)])
            self.opt.step()
            self.opt.zero_grad()
        return [*found, [p.detach().clone() for p in self.model.parameters()]]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def pair(optimizer):
    net = network()
    return Training(copy.deepcopy(net), optimizer), Training(net, optimizer)


def same(a, b):
    return all(torch.equal(s, t) for one, other in zip(a, b, strict=True) for s, t in zip(one, other, strict=True))


GROUPS = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model, sgd: engm.ENGM(model, sgd, 0.5),
        lambda model, sgd: engm.ENGM(model, sgd, 0.5, groups=GROUPS),
        lambda model, sgd: engm.FENGM(model, sgd),
        lambda model, sgd: engm.NENGM(model, sgd, 0.5),
        lambda model, sgd: engm.AENGM(model, sgd, 0.5, tau=100),
    ],
)
def test_a_new_alpha_at_every_step_is_the_same_program(optimizer):
    recorded, plain = pair(optimizer)
    alphas = [0.01 * 1.3**k for k in range(25)]
    assert same(recorded.go(recorded.recorded, alphas), plain.go(plain.by_hand, alphas)), recorded.recorded.report()
    report = recorded.recorded.report()
    assert report.recorded == 1, report
    assert report.replayed >= 22, report
    assert isinstance(recorded.opt.alpha, float), "what was traced leaves no tensor behind"


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model, sgd: engm.ENGM(model, sgd, 0.5, weigh=lambda norms, alpha: alpha / (alpha + norms)),
        lambda model, sgd: engm.ENGM(model, sgd, [0.5, 0.5], groups=GROUPS),
    ],
)
def test_where_alpha_is_a_constant_of_the_program_a_new_one_counts(optimizer):
    recorded, plain = pair(optimizer)
    several = isinstance(recorded.opt.alpha, list)
    alphas = [[a, 2 * a] if several else a for a in (0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.1)]
    assert same(recorded.go(recorded.recorded, alphas), plain.go(plain.by_hand, alphas)), recorded.recorded.report()
    assert recorded.recorded.report().recorded == 2
    assert recorded.recorded.report().replayed >= 2


def test_a_subclass_with_weights_of_its_own_reads_numbers():
    class Halved(engm.ENGM):
        def weights(self, norms):
            return engm.optim.Weighting(0.5 * norms.clipped(float(self.alpha))[1], norms.of_gradients)

    recorded, plain = pair(lambda model, sgd: Halved(model, sgd, 0.5))
    alphas = [0.1] * 4 + [0.2] * 4
    assert same(recorded.go(recorded.recorded, alphas), plain.go(plain.by_hand, alphas))
    assert (recorded.recorded.report().recorded, recorded.recorded.report().replayed) == (2, 4)


@pytest.mark.parametrize("optimizer", [engm.ENGM, engm.NENGM, engm.FENGM, engm.GNC])
def test_a_bad_number_is_refused_at_a_replay(optimizer):
    recorded, _ = pair(lambda model, sgd: optimizer(model, sgd, 0.5))
    recorded.go(recorded.recorded, [0.5] * 4)
    name = "max_norm" if optimizer is engm.GNC else "alpha"
    setattr(recorded.opt, name, -1.0)
    with pytest.raises(ValueError, match=f"{name} must be"):
        recorded.recorded(torch.ones(N, 4), torch.zeros(N, dtype=torch.long))
    assert all(p.grad is None for p in recorded.model.parameters())


def test_the_bound_of_the_global_norm_is_in_no_program():
    recorded, _ = pair(lambda model, sgd: engm.GNC(model, sgd, 0.5))
    for step in range(6):
        recorded.opt.max_norm = 0.5 + step
        recorded.recorded(torch.ones(N, 4), torch.zeros(N, dtype=torch.long))
    assert recorded.recorded.report().replayed == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_factors", [False, True])
def test_a_bound_in_a_tensor_gives_the_bits_of_a_number(dtype, with_factors):
    generator = torch.Generator().manual_seed(0)
    squared = (10 ** (8 * torch.rand(7, 40, generator=generator) - 4)).to(dtype)
    squared[:, 0] = 0
    squared[2, 1], squared[2, 2], squared[2, 3], squared[:, 4] = math.inf, math.nan, -math.inf, -1
    factors = 0.5 + torch.rand(7, generator=generator, dtype=torch.float64) if with_factors else None
    norms = ExampleNorms(torch.zeros(40), squared, factors)
    for alpha in (1e-3, 1.0, 0.1 + 0.2, 77.7, math.inf, *norms.of_gradients[5:8].tolist()):
        for rows in (None, torch.tensor([1, 4])):
            got = norms.clipped(torch.tensor(alpha, dtype=torch.float64), rows)
            for one, other in zip(got, norms.clipped(alpha, rows), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one.isnan(), other.isnan())
                assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), alpha
