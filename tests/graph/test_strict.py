"""Whatever mixes the examples is refused by name, and what only looks as if it mixed them is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_checks import assert_measured, check
from little_network import Around
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm
from engm.rules.linear import LinearRule

pytestmark = pytest.mark.torch_insides

X = tensor(6, 5)


def refused(net, match, losses=None, **wrap):
    model = engm.GradNormModule(net.double(), **wrap)
    found = random_losses(model(X)) if losses is None else losses(model)
    with pytest.raises(RuntimeError, match=match):
        engm.measure(model, found)
    found.sum().backward()  # the graph is whole
    return model


MIXING = "influences the losses of other examples"


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x - x.mean(0),
        lambda x: torch.softmax(x, 0),
        lambda x: x + x.flip(0),
        lambda x: x / x.std(),
        lambda x: x + 1e-12 * x.sum(),
    ],
)
def test_mixing_before_a_layer(between):
    model = refused(Around(between), rf"'first' \(Linear\).*{MIXING}")
    with pytest.raises(RuntimeError, match=MIXING):  # and again: a refusal is not remembered as a pass
        engm.measure(model, random_losses(model(X)))


@pytest.mark.parametrize(("shift", "share"), [(2, 1 / 2), (3, 1 / 6)])
def test_mixing_that_adds_up_to_a_power_of_two(shift, share):
    """Linear losses give all examples one gradient. If factors doubled, ``v + 4 v / 2`` would be ``2 (3/2 v)``."""

    def delayed(x: torch.Tensor) -> torch.Tensor:
        return x + share * torch.cat([x.new_zeros(shift, x.shape[1]), x[:-shift]])

    def losses(model: nn.Module) -> torch.Tensor:
        return model(X).sum(1)

    refused(Around(delayed), rf"'first' \(Linear\).*{MIXING}", losses, strict=False)
    check(Around(delayed).double(), losses, coupled="exact")


def test_mixing_that_masks_keep_in_pairs():
    """Counted from 1, every bit keeps as many of examples 0 and 5 as of 1 and 4, whose shares are minus theirs."""
    shares = tensor(7, 7) * 0
    shares[[0, 5, 1, 4], 2] = torch.tensor([0.5, 0.5, -0.5, -0.5]).double()
    x = tensor(7, 5)

    def losses(model: nn.Module) -> torch.Tensor:
        return model(x).sum(1)

    refused(Around(lambda h: h + shares @ h), rf"'first' \(Linear\).*{MIXING}", losses, strict=False)


@pytest.mark.parametrize("given", [lambda x: x / 2, lambda x: x.flip(1), lambda x: (x + 1).T.reshape(-1, 5)])
def test_mixing_of_what_the_network_makes_of_its_inputs(given):
    """As many rows as examples, or as many numbers as in their rows, are the examples'."""

    class Scaled(Around):
        def forward(self, x):
            h = self.first(given(x))
            return self.second(torch.tanh(h - h.mean(0)).view(6, -1, 5).sum(1))

    refused(Scaled(), rf"'first' \(Linear\).*{MIXING}")


class Prompts(nn.Module):
    """Attends to prompts that all examples share, given as an input or held as a buffer."""

    def __init__(self, prompts: torch.Tensor | None = None) -> None:
        super().__init__()
        self.first, self.keys = nn.Linear(5, 4), nn.Linear(5, 4)
        self.register_buffer("prompts", prompts)
        self.double()

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        keys = self.keys(self.prompts if given is None else given)
        return (torch.tanh(self.first(x)) @ keys.T).softmax(-1) @ keys


@pytest.mark.parametrize("rows", [6, 12])
def test_as_many_prompts_as_examples(rows):
    """Texts that the images of a batch are compared with look the same; a buffer is nobody's data."""
    prompts = tensor(rows, 5, seed=1)
    refused(Prompts(), rf"'keys' \(Linear\).*{MIXING}.*a buffer of the network", lambda m: random_losses(m(X, prompts)))
    check(Prompts(prompts), lambda m: random_losses(m(X)))


def test_a_shift_that_cancels():
    """The maximum over the batch cancels in a softmax but for rounding, which looks like an influence at first."""

    def shifted(x: torch.Tensor, detach: bool) -> torch.Tensor:
        largest = x.detach().max() if detach else x.max()
        return (x - largest).exp() / (x - largest).exp().sum(-1, keepdim=True)

    check(Around(lambda x: shifted(5 * x, True)).double(), lambda m: random_losses(m(X)))
    check(Around(lambda x: shifted(5 * x, False)).double(), lambda m: random_losses(m(X)))
    check(Around(lambda x: shifted(5 * x, False)).double(), lambda m: random_losses(m(X)), coupled="exact")


def test_mixing_after_the_last_layer():
    refused(Around(after=lambda x: x - x.mean(0)), rf"'second' \(Linear\).*{MIXING}")


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_losses_in_another_order(n):
    x = tensor(n, 5)
    check(Around().double(), lambda m: random_losses(m(x)).flip(0).roll(n % 2))


def test_losses_normalised_over_the_batch():
    refused(Around(), MIXING, lambda m: random_losses(m(X)) / random_losses(m(X)).sum())


@pytest.mark.parametrize("steps", [6, 4, 12])
def test_time_major_layout_is_recognised(steps):
    """``[T, n, p]``, with as many steps as examples too: the shapes fit either way, the gradients tell."""
    check(Around().double(), lambda m: random_losses(m(tensor(steps, 6, 5)).transpose(0, 1)))


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass with a forward of its own that includes an activation, as some libraries have it.

    Args:
        activation: which may be none, so that the batch norm itself makes the output.
    """

    def __init__(self, activation, affine):
        super().__init__(5, affine=affine, track_running_stats=False)
        self.activation = activation

    def forward(self, input):
        return self.activation(F.batch_norm(input, None, None, self.weight, self.bias, training=True))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Identity()])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_that_a_subclass_computes_itself(affine, activation):
    """Such a batch norm couples the examples as any other does."""
    norm = nn.BatchNorm1d(5, affine=affine, track_running_stats=False)
    own = OwnBatchNorm(activation, affine)
    plain, other = Around(nn.Sequential(norm, activation)).double(), Around(own).double()
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        ours.data.copy_(nn.init.normal_(theirs))
    measured = [engm.measure(model, random_losses(model(X))) for model in map(engm.GradNormModule, (plain, other))]
    assert [m.mode for m in measured] == ["frozen", "frozen"]
    assert relative(measured[1].stacked, measured[0].stacked) <= 1e-9
    model = engm.GradNormModule(other, batch_norm="exact")
    losses = random_losses(model(X))
    assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9


def test_training_batch_norm_alone_is_no_mixing():
    check(Around(nn.BatchNorm1d(5)).double(), lambda m: random_losses(m(X)), frozen=True)


@pytest.mark.parametrize("strict", [True, False])
def test_detached_statistics_do_not_mix(strict):
    """The gradients of ``x - x.mean(0).detach()`` are those of each example."""
    check(Around(lambda x: x - x.detach().mean(0)).double(), lambda m: random_losses(m(X)), strict=strict)


def test_not_strict_refuses_too():
    model = engm.GradNormModule(Around(lambda x: x - x.mean(0)).double(), strict=False)
    with pytest.raises(RuntimeError, match=MIXING):
        engm.measure(model, random_losses(model(X)))


def test_each_mode_is_checked_on_its_first_call():
    class Mode(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            h = self.norm(self.layer(x))
            return h - h.mean(0) if self.training else h

    net = Mode().double().eval()
    model = engm.GradNormModule(net)
    engm.measure(model, random_losses(model(X)))
    net.train()
    with pytest.raises(RuntimeError, match=MIXING):
        engm.measure(model, random_losses(model(X)))


def test_a_structure_is_checked_once(monkeypatch):
    from engm.backward import prepare

    checked = []
    original = prepare.make_plan
    monkeypatch.setattr(prepare, "make_plan", lambda *args: checked.append(1) or original(*args))
    model = engm.GradNormModule(Around().double())
    for _ in range(3):
        engm.measure(model, random_losses(model(X)))
    assert len(checked) == 1
    engm.measure(model, random_losses(model(X)) + random_losses(model(X + 1)))
    assert len(checked) == 2


def test_single_examples_do_not_count_as_checked():
    """One example cannot leak into another; the first real batch is checked all the same."""
    model = engm.GradNormModule(Around(lambda x: x - x.mean(0)).double())
    engm.measure(model, random_losses(model(X[:1])))
    with pytest.raises(RuntimeError, match=MIXING):
        engm.measure(model, random_losses(model(X)))


@pytest.mark.parametrize("bad", range(6))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_mixing(bad, value):
    """0 times NaN is NaN, which says nothing about who influences whom."""
    model = engm.GradNormModule(Around().double())
    x = X.clone()
    x[bad] = value
    losses = F.cross_entropy(model(x), torch.zeros(6, dtype=int), reduction="none")
    norms = engm.measure(model, losses, check=False).norms
    assert torch.isfinite(norms).tolist() == [k != bad for k in range(6)]


def test_a_batch_of_nans_does_not_count_as_checked():
    model = engm.GradNormModule(Around(lambda x: x - x.mean(0)).double())
    engm.measure(model, random_losses(model(X * float("nan"))), check=False)
    with pytest.raises(RuntimeError, match=MIXING):
        engm.measure(model, random_losses(model(X)))


# -- several rows an example -------------------------------------------------------------------------------------


def both_halves(model):
    clean, attacked = model(torch.cat([X, X + 0.3])).chunk(2)
    kl = F.kl_div(F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="none", log_target=True)
    return kl.sum(1) + random_losses(clean)


def test_views():
    check(Around().double(), both_halves, views=2)
    check(Around(nn.BatchNorm1d(5)).double(), both_halves, views=2, frozen=True)
    check(Around(nn.BatchNorm1d(5)).double().eval(), both_halves, views=2)


@pytest.mark.parametrize("views", [1, 3])
def test_views_need_not_be_announced(views):
    check(Around().double(), both_halves, views=views)


def test_interleaved_views():
    def losses(model):
        return random_losses(model(X.repeat_interleave(2, 0))).view(6, 2).sum(1)

    check(Around().double(), losses, views=2)


def test_losses_of_two_forward_passes():
    """TRADES has the clean and the attacked pass in one loss."""

    def losses(model):
        clean, attacked = model(X), model(X + 0.2)
        kl = F.kl_div(F.log_softmax(attacked, 1), F.softmax(clean, 1), reduction="none").sum(1)
        return F.cross_entropy(clean, torch.arange(6) % 3, reduction="none") + 6 * kl

    check(Around().double(), losses)
    check(Around(nn.BatchNorm1d(5)).double(), losses, frozen=True)


def test_refusal_leaves_everything_unchanged():
    net = Around(lambda x: x - x.mean(0)).double()
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 1.0)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=MIXING):
        opt.backward(random_losses(model(X)))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not opt.state


class BiasFromTable(nn.Module):
    """A bias computed from a fixed table of ``side**2`` rows by layers of its own, behind a gain (Swin v2)."""

    def __init__(self, side, between=None):
        super().__init__()
        self.first, self.last = nn.Linear(5, side * side), nn.Linear(side * side, 3)
        self.mlp = nn.Sequential(
            nn.Linear(2, 12), nn.ReLU(inplace=True), *([between] if between else []), nn.Linear(12, 1)
        )
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer("table", tensor(1, side, side, 2))
        self.register_buffer("picked", torch.arange(side * side).flip(0))

    def forward(self, x):
        bias = 3 * torch.sigmoid(self.mlp(self.table).view(-1, 1)[self.picked].view(-1))
        return self.last(self.first(x) + self.gain * torch.tanh(self.first(x) + bias))


@pytest.mark.parametrize("between", [None, nn.LayerNorm(12), nn.Linear(12, 12, bias=False)])
@pytest.mark.parametrize(("n", "side"), [(2, 3), (3, 3), (4, 4), (9, 3), (12, 5), (16, 4), (25, 5)])
def test_a_branch_behind_a_gain_of_zero(n, side, between):
    """No gradient tells where examples lie in the branch, and what is taken for true there must not be remembered."""
    net, x = BiasFromTable(side, copy.deepcopy(between)).double(), tensor(n, 5)
    model = engm.GradNormModule(net)
    for gain in (0.0, 0.5, 0.7):
        net.gain.data.fill_(gain)
        expected = truth(net, lambda net: random_losses(net(x)))
        assert_measured(engm.measure(model, random_losses(model(x))), expected)
    assert model.engm_plans


@pytest.mark.parametrize(("n", "heads"), [(2, 2), (3, 2), (4, 3)])
def test_copies_of_what_a_layer_computed_for_all(n, heads):
    """Relative positions go through a projection and are copied for every example and head, as in DeBERTa."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, heads * 4), nn.Linear(heads * 8, 3)
            self.relative, self.key = nn.Embedding(8, 6), nn.Linear(6, heads * 4)

        def forward(self, x):
            query = self.first(x).view(*x.shape[:2], heads, 4).transpose(1, 2).flatten(0, 1)
            key = self.key(self.relative.weight.unsqueeze(0)).view(8, heads, 4).transpose(0, 1)
            scores = query @ key.repeat(n, 1, 1).transpose(1, 2)
            return self.last(scores.view(n, heads, -1, 8).transpose(1, 2).flatten(2))

    x = tensor(n, 4, 5)
    check(Attention().double(), lambda model: random_losses(model(x)))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_parameter_that_nobody_reads_in_a_time_major_module(n):
    """The module holds a parameter that this pass does not use, as XLNet's segments."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.segments = nn.Parameter(tensor(4)), nn.Parameter(tensor(2, 4))
            self.mix = nn.Parameter(tensor(5, 4))

        def forward(self, steps, segments=None):
            query = torch.einsum("tni,ij->tnj", steps, self.mix) + self.bias
            return query if segments is None else query + self.segments[segments]

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = Attention(), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.attention(x.transpose(0, 1)).tanh().transpose(0, 1))

    x = tensor(n, 5, 5)
    check(Network().double(), lambda model: random_losses(model(x)))


class Attention(nn.Module):
    """Every query is added the same by a bias of the keys, which the softmax takes away: its gradient is rounding."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = (nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(3))
        self.last = nn.Linear(16, 8)

    def forward(self, x):
        scores = (self.queries(x) @ self.keys(x).mT / 4).softmax(-1)
        return self.last(scores @ self.values(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_is_nothing_but_rounding(dtype, seed):
    torch.manual_seed(seed)
    model = engm.GradNormModule(Attention())
    with torch.autocast("cpu", dtype):
        losses = model(torch.randn(4, 49, 16)).square().mean((1, 2)).float()
    engm.measure(model, losses)


def make_the_rule_of_linear_layers_wrong(monkeypatch):
    right = LinearRule.terms
    monkeypatch.setattr(LinearRule, "terms", lambda rule, module, a, *rest: right(rule, module, 2 * a, *rest))


def test_a_wrong_rule_is_found_where_sums_are_rounded(monkeypatch):
    make_the_rule_of_linear_layers_wrong(monkeypatch)
    model = engm.GradNormModule(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(torch.randn(6, 5)).square().mean(1).float()
    with pytest.raises(RuntimeError, match="do not add up"):
        engm.measure(model, losses)


def test_what_was_found_wrong_once_is_found_wrong_again(monkeypatch):
    """Neither a comparison that failed nor a batch of NaNs, which is not compared, counts as one that held."""
    make_the_rule_of_linear_layers_wrong(monkeypatch)
    model = engm.GradNormModule(Around().double())
    engm.measure(model, random_losses(model(X * float("nan"))), check=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="do not add up"):
            engm.measure(model, random_losses(model(X)))


class Passing(torch.autograd.Function):
    """Hands on something else than its gradient, row by row."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.how(gradient), None


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", [torch.sign, lambda g: F.normalize(g, dim=-1), lambda g: g.clamp(-0.05, 0.05)])
def test_gradients_that_are_no_multiples_of_the_losses(how, strict):
    """Signs of gradients, say, are the same whatever the losses are multiplied by: they tell nothing of the owner."""
    check(Around(lambda x: Passing.apply(x, how)).double(), lambda m: random_losses(m(X)), strict=strict)


class WithAnother(torch.autograd.Function):
    """Hands on its input, and to another loss a gradient that is the same whatever the losses are multiplied by."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.shape = loss.shape
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_ones(ctx.shape)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("strict", [True, False])
def test_a_loss_that_is_added_in_the_backward_pass_alone(n, shape, strict):
    """As mixtures of experts add the loss that balances them, in which all examples have a share."""

    def between(h):
        return WithAnother.apply(h, h.softmax(1).mean(0).square().sum().view(shape))

    x = tensor(n, 5)
    model = engm.GradNormModule(Around(between).double(), strict=strict)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=MIXING):
            engm.measure(model, random_losses(model(x)))
    check(Around(between).double(), lambda m: random_losses(m(x)), step=False, coupled="exact", strict=False)
