"""What looks like something else: functions with an operator's name, options that change, replaced methods."""

import types

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, tensor
from torch import nn

import engm


def assert_exact(model, losses):
    wanted = per_example_gradients(losses, dict(model.unwrap().named_parameters())).norms
    torch.testing.assert_close(engm.per_example_grad_norms(model, losses), wanted, rtol=1e-9, atol=1e-12)


def function_named(name, forward, backward):
    """A ``torch.autograd.Function`` of that name; the forward pass saves what the backward pass gets."""
    return type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )


def sine_of(ctx, w):
    ctx.save_for_backward(w)
    return w.sin()


def cosine_times(ctx, gradient):
    return gradient * ctx.saved_tensors[0].cos()


class Bent(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return F.linear(x, self.function.apply(self.weight)).square().sum(1)


@pytest.mark.parametrize(
    "name", ["Clone", "View", "T", "Permute", "ToCopy", "Tap", "Pow", "Expand", "WeightNormInterface"]
)
def test_a_users_function_on_a_parameter_is_no_operator(name):
    model = engm.GradNormModule(Bent(function_named(name, sine_of, cosine_times)).double())
    assert_exact(model, model(tensor(3, 3)))


def moved(ctx, x, order):
    ctx.back = torch.argsort(order).tolist()
    return x[order]


def moved_back(ctx, gradient):
    return gradient[ctx.back], None


class Moved(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, order):
        return self.last(self.function.apply(torch.tanh(self.first(x)), order)).square().sum(1)


@pytest.mark.parametrize(
    "name", ["Tap", "RegisterPostBackwardFunction", "BackwardHookFunction", "SyncBatchNorm", "Relu"]
)
def test_a_users_function_on_rows_is_watched(name):
    model = engm.GradNormModule(Moved(function_named(name, moved, moved_back)).double())
    for order in ([0, 1, 2], [1, 2, 0], [2, 1, 0]):
        assert_exact(model, model(tensor(3, 3), torch.tensor(order)))


class Options(nn.Module):
    """A layer that is called with several values of an option, and then has another one."""

    def __init__(self, layer, option, *shape):
        super().__init__()
        self.layer, self.option, self.shape = layer, option, shape

    def forward(self, x, values):
        total = 0
        for number, value in enumerate(values):
            setattr(self.layer, self.option, value)
            total = total + torch.tanh(self.layer(x)).flatten(1).sum(1) * (number + 1)
        setattr(self.layer, self.option, values[0])
        return total.sin()


LAYERS = {
    "dilation": (nn.Conv1d(2, 3, 2), "dilation", [(1,), (2,), (3,)], lambda: tensor(3, 2, 7)),
    "stride": (nn.Conv2d(2, 3, 2), "stride", [(1, 1), (2, 1), (1, 2)], lambda: tensor(3, 2, 5, 6)),
    "padding": (nn.Conv1d(2, 3, 2), "padding", [(0,), (1,), (2,)], lambda: tensor(3, 2, 7)),
    "transposed": (nn.ConvTranspose1d(2, 3, 2), "stride", [(1,), (2,), (3,)], lambda: tensor(3, 2, 4)),
    "padding index": (nn.Embedding(5, 3), "padding_idx", [None, 1, 2], lambda: torch.tensor([[1, 2], [2, 2], [0, 1]])),
    "groups": (nn.GroupNorm(2, 12), "num_groups", [2, 3, 4], lambda: tensor(3, 12, 2)),
    "mode": (nn.EmbeddingBag(5, 3), "mode", ["sum", "mean", "max"], lambda: torch.tensor([[1, 2], [2, 2], [0, 1]])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_options_are_those_of_each_call(name):
    layer, option, values, batch = LAYERS[name]
    model = engm.GradNormModule(Options(layer.double(), option).double())
    a, b, c = values
    for now in ((a, a, a), (a, b, c), (c, a, b), (b, b, c)):
        assert_exact(model, model(batch(), now))


def test_a_convolution_whose_inner_method_was_replaced():
    """As pictures are made that tile. It is noticed although the graph has the same nodes."""
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 1)
    )
    model = engm.GradNormModule(net.double())
    for step in range(3):
        if step == 1:
            wider = lambda self, x, weight, bias: F.conv1d(x, weight, bias, padding=2, dilation=2)  # noqa: E731
            net[0]._conv_forward = types.MethodType(wider, net[0])
        assert_exact(model, model(tensor(3, 2, 7, seed=step)).square().sum(1))


class Shifted(nn.Module):
    """A parameter between zeros, at places of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(3)), nn.Linear(5, 5)

    def forward(self, x, shifts):
        h = torch.tanh(self.layer(x))
        at = [torch.cat([x.new_zeros(s), self.weight, x.new_zeros(2 - s)]) for s in shifts]
        return sum((h * k).sum(1).sin() * (i + 1) for i, k in enumerate(at))


def test_parameters_among_constants_are_not_taken_for_one_tensor():
    model = engm.GradNormModule(Shifted().double())
    for shifts in ((1, 1), (0, 2), (2, 1)):
        assert_exact(model, model(tensor(3, 5), shifts))


class Hooked(nn.Module):
    """A weight that is computed in some way and has a hook."""

    def __init__(self, computed):
        super().__init__()
        self.computed, self.weight = computed, nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        weight = self.computed(self.weight)
        weight.register_hook(lambda gradient: gradient * torch.linspace(0.5, 2, 4).unsqueeze(1))
        return torch.tanh(F.linear(x, weight)).square().sum(1)


@pytest.mark.parametrize(
    "computed",
    [
        torch.clone,
        lambda w: w.t().clone().t(),
        lambda w: w.view(12).view(4, 3),
        lambda w: 2 * w,
        lambda w: torch._weight_norm(w, w.norm(dim=1, keepdim=True).sqrt(), 0),
    ],
    ids=["a copy", "a transpose", "a view", "a multiple", "weight norm"],
)
def test_hooks_on_what_was_computed_from_a_parameter(computed):
    model = engm.GradNormModule(Hooked(computed).double())
    assert_exact(model, model(tensor(3, 3)))


def test_a_length_that_is_computed_from_the_direction():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.s = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.rand(4, 1))

        def forward(self, x):
            weight = torch._weight_norm(self.v, self.v.norm(dim=1, keepdim=True) * self.s, 0)
            return torch.tanh(F.linear(x, weight)).square().sum(1)

    model = engm.GradNormModule(Net().double(), strict=False)
    assert_exact(model, model(tensor(3, 3)))


@pytest.mark.parametrize("strict", [False, True])
def test_two_wrappers_that_share_an_encoder(strict):
    encoder = nn.Linear(3, 4)
    nets = [nn.Sequential(encoder, nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)]
    models = [engm.GradNormModule(net, strict=strict) for net in nets]
    x = tensor(3, 3)
    losses = models[0](x).square().sum(1) + models[1](x).square().sum(1)
    for model in models:
        assert_exact(model, losses)


@pytest.mark.parametrize("rest", [1, 1e-2, 1e-4, 1e-6])
def test_a_tied_table_whose_two_gradients_nearly_cancel(rest):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
            self.out.weight = self.table.weight

        def forward(self, indices, h, up):
            return (self.table(indices) * h).sum((1, 2)) + (self.out(h) * up).sum((1, 2))

    model = engm.GradNormModule(Tied().double())
    indices, h, up = torch.tensor([[1, 7], [2, 2], [3, 1]]), tensor(3, 2, 64), torch.zeros(3, 2, 500).double()
    for position in range(2):
        up[torch.arange(3), position, indices[:, position]] = rest - 1
    losses = model(indices, h, up)
    wanted = per_example_gradients(losses, dict(model.unwrap().named_parameters())).norms
    torch.testing.assert_close(engm.per_example_grad_norms(model, losses), wanted, rtol=1e-9, atol=0)


def test_examples_along_the_last_dimension_where_a_channel_is_left_to_one_of_them():
    """A row of one example beside rows of several is no sign of a coupling: the examples lie within the rows."""

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 1)

        def forward(self, x):
            return self.last(torch.relu(self.first(x.t()[None]))).square().sum((0, 1))

    for seed in range(12):
        torch.manual_seed(seed)
        model = engm.GradNormModule(Points().double())
        assert_exact(model, model(tensor(3, 3, seed=seed)))


def test_a_linear_layer_on_a_sparse_matrix():
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = engm.GradNormModule(net)
    x = tensor(3, 6)
    x[x < 0] = 0
    assert_exact(model, model(x.to_sparse()).square().sum(1))
