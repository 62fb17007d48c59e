"""What several examples have a share in may pass on rows of one example each: it couples nothing then."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, relative, tensor, trained
from torch import Tensor, nn

import engm

Between = Callable[["Ragged", Tensor, Tensor, Tensor], Tensor]


class Ragged(nn.Module):
    """Rows of examples of any lengths, and what makes one row an example of them."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.extra = nn.Parameter(torch.randn(5))
        self.between = between
        self.double()

    def forward(self, x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        return self.last(torch.tanh(self.between(self, torch.tanh(self.first(x)), starts, ends)))


def prefixes(h: Tensor) -> Tensor:
    return torch.cat([h.new_zeros(1, h.shape[1]), h.cumsum(0)])


def differences(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    sums = prefixes(h)
    return sums[ends] - sums[starts]


def differences_of_products(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    sums = torch.tril(h.new_ones(len(h) + 1, len(h)), -1) @ net.middle(h)
    return sums[ends] - sums[starts]


def table(starts: Tensor, ends: Tensor, padding: int, first: int = 0) -> Tensor:
    """The numbers of every example's rows, and that of a row of padding."""
    width = int((ends - starts).max()) + 1
    found = starts[:, None] + torch.arange(width)
    return torch.where(found < ends[:, None], found + first, padding)


def padded_behind(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([h, h.new_zeros(1, 5)])[table(starts, ends, len(h))].amax(1)


def padded_in_front(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 1, 0))[table(starts, ends, 0, 1)].sum(1)


def padded_by_a_write(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    rows = h.new_zeros(len(h) + 1, 5)
    rows[1:] = h
    return rows[table(starts, ends, 0, 1)].sum(1)


def padded_by_a_parameter(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([net.extra[None], h])[table(starts, ends, 0, 1)].sum(1)


def padded_by_a_parameter_of_the_rows(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([net.extra[None], h * net.extra])[table(starts, ends, 0, 1)].sum(1)


def padded_before_a_layer(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return torch.tanh(net.middle(F.pad(h, (0, 0, 1, 0))))[table(starts, ends, 0, 1)].sum(1)


def rolled_by_fourier(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    phases = torch.exp(-2j * torch.pi * torch.arange(len(h), dtype=h.dtype) / len(h))
    rolled = torch.fft.ifft(torch.fft.fft(h, dim=0) * phases[:, None], dim=0).real
    return torch.stack([rolled.roll(-1, 0)[a:b].sum(0) for a, b in zip(starts, ends, strict=True)])


def shifted_by_the_maximum(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    e = (h - h.max()).exp()
    return torch.stack([(e[a:b] / e[a:b].sum()).sum(0) for a, b in zip(starts, ends, strict=True)])


APART = [
    *(differences, differences_of_products, padded_behind, padded_in_front, padded_by_a_write),
    *(padded_by_a_parameter, padded_by_a_parameter_of_the_rows, padded_before_a_layer),
    *(rolled_by_fourier, shifted_by_the_maximum),
]


def losses_at(step: int, model: nn.Module, factors: Tensor | None = None) -> Tensor:
    """Those of three to six examples of one to four rows each, and some rows of nobody, in all a multiple of n."""
    generator = torch.Generator().manual_seed(step)
    n = 3 + step % 4
    lengths = torch.randint(1, 5, (n,), generator=generator)
    ends = (lengths + step % 2).cumsum(0)
    logits = model(tensor(6 * n, 4, seed=step), ends - lengths, ends)
    losses = F.cross_entropy(logits, torch.arange(n) % 3, reduction="none")
    return losses if factors is None else losses * factors[:n]


def assert_right(model: engm.GradNormModule, losses: Tensor, tolerance: float = 1e-9) -> None:
    net = model.unwrap()
    expected = per_example_gradients(losses, trained(net))
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), alpha=float(expected.norms.median()))
    opt.zero_grad()
    stats = opt.backward(losses)
    assert bool(((stats.norms - expected.norms).abs() <= tolerance * expected.norms).all())
    for name, wanted in expected.update(stats.weights).items():
        got = trained(net)[name].grad
        assert relative(torch.zeros_like(wanted) if got is None else got, wanted) < tolerance, name


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("between", APART)
def test_each_step_is_right(between, strict):
    model = engm.GradNormModule(Ragged(between), strict=strict, check_every=1)
    for step in range(6):  # three to six examples, and two numbers of them again
        assert_right(model, losses_at(step, model))


@pytest.mark.parametrize("between", [differences, padded_in_front])
def test_more_examples_than_a_digit_tells(between):
    model = engm.GradNormModule(Ragged(between))
    ends = torch.arange(1, 71) * 2
    for step in range(2):
        assert_right(model, model(tensor(140, 4, seed=step), ends - 2, ends).square().sum(1))


def of_the_batch(share: float) -> Between:
    def between(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        return differences(net, h, starts, ends) + share * prefixes(h)[ends]

    return between


def one_row_too_many(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return differences(net, h, (starts - 1).clamp_min(0), ends)


@pytest.mark.parametrize("between", [*map(of_the_batch, (1, 1e-3, 1e-8, 1e-12)), one_row_too_many])
def test_what_does_not_cancel_is_refused(between):
    """However small it is: rounding is smaller."""
    ends = torch.arange(1, 5) * 2

    def losses(model: nn.Module) -> Tensor:
        return model(tensor(8, 4), ends - 2, ends).square().sum(1)

    model = engm.GradNormModule(Ragged(between), strict=False)
    with pytest.raises(RuntimeError, match=r"'first' \(Linear\).*influences the losses of other examples"):
        engm.measure(model, losses(model))
    exact = engm.GradNormModule(Ragged(between), coupled="exact")
    assert_right(exact, losses(exact))


def test_what_cancels_no_more_is_refused_at_that_step():
    """The rows of padding are another example's at last."""
    leaks = [False]

    def between(net: Ragged, h: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        numbers = table(starts, ends, 0, 1)
        return F.pad(h, (0, 0, 1, 0))[numbers.flip(0) * (numbers == 0) + numbers if leaks[0] else numbers].sum(1)

    model = engm.GradNormModule(Ragged(between), check_every=10**9)
    for step in range(6):
        assert_right(model, losses_at(4 * step, model))
    leaks[0] = True
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        engm.measure(model, losses_at(4, model))


@pytest.mark.parametrize("largest", [1e7, 1e15])
def test_examples_that_drown_in_rounding_are_backpropagated_one_by_one(largest):
    """What is left of the largest example's share is too much beside the others."""
    model = engm.GradNormModule(Ragged(differences))
    for step in range(4):
        assert_right(model, losses_at(step, model, factors=torch.tensor([1, 1, largest, 1, 1, 1])))
    assert not any(model.engm_plans.values())


def test_float32():
    model = engm.GradNormModule(Ragged(differences).float())
    ends = torch.arange(1, 41) * 3
    for step in range(2):
        losses = model(tensor(120, 4, seed=step).float(), ends - 3, ends).square().sum(1)
        assert_right(model, losses, 2e-5)


class Packed(nn.Module):
    """Linear attention in sequences side by side, its sums by differences of sums over all of them."""

    def __init__(self, couples: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(5, width) for width in (5, 5, 5, 4))
        self.couples = couples

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        k = k + self.couples * k.mean(0)
        start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        sums, scales = prefixes((k.unsqueeze(2) * v.unsqueeze(1)).flatten(1)), prefixes(k)
        sums = (sums[1:] - sums[start]).unflatten(1, (5, 5))
        rows = torch.einsum("td,tde->te", q, sums) / (q * (scales[1:] - scales[start])).sum(1, keepdim=True)
        return torch.stack([self.out(part.mean(0)) for part in rows.split(lengths.tolist())])


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [1, 1, 2, 1], [3, 1, 2]])
def test_gradients_that_are_rounding_alone(lengths):
    """With one key to attend to the gradients of queries and keys are 0, and every number of them is rounding."""
    for seed in range(4):
        torch.manual_seed(seed)
        net = Packed(0).double()
        model, losses = measured_losses(engm.GradNormModule(net), lengths, seed)
        norms = engm.per_example_grad_norms(model, losses)
        assert relative(norms, per_example_gradients(losses, trained(net)).norms) < 1e-9


def test_small_influences_beside_rounding_are_refused():
    torch.manual_seed(0)
    model = engm.GradNormModule(Packed(1e-3).double())
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        engm.per_example_grad_norms(*measured_losses(model, [3, 1, 2], 0))


def measured_losses(model, lengths, seed):
    x = tensor(sum(lengths), 5, seed=seed)
    labels = torch.arange(len(lengths)) % 4
    return model, F.cross_entropy(model(x, torch.tensor(lengths)), labels, reduction="none")
