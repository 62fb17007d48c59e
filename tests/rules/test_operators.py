"""Parameters that enter the batch's computation by an operator: exact norms and updates, whatever the operator is."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import nn

import engm
from engm.backward.prepare import planned_losses

pytestmark = pytest.mark.torch_insides


class Held(nn.Module):
    """A network of two linear layers with parameters of its own in between, used as the test says."""

    def __init__(self, how, *shapes, features=4):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(features, features), nn.Linear(features, 3), how
        self.held = nn.ParameterList(tensor(*shape, seed=k + 1) for k, shape in enumerate(shapes))

    def forward(self, x):
        return self.second(self.how(self.first(x), x, *self.held))


def entries(model, losses):
    return planned_losses(model, losses).plan.entries


sizes = st.integers(1, 5)


@settings(max_examples=25)
@given(n=sizes, steps=sizes, kept=st.lists(st.booleans(), min_size=2, max_size=2), operator=st.sampled_from("+-*/"))
def test_arithmetic_with_broadcasting(n, steps, kept, operator):
    """``[T or 1, p or 1]`` against ``[n, T, p]``, without the leading dimensions, and without any."""
    shape = tuple(size if keep else 1 for size, keep in zip((steps, 4), kept, strict=True))
    how = {
        "+": lambda h, x, p: p + h,
        "-": lambda h, x, p: h.sub(p, alpha=2),
        "*": lambda h, x, p: h * p,
        "/": lambda h, x, p: p / (h.square() + 1) + h / (p.square() + 1),
    }[operator]
    x = tensor(n, steps, 4)
    check(Held(how, shape).double(), lambda m: random_losses(m(x)))
    check(Held(how, shape[1:]).double(), lambda m: random_losses(m(x)))
    check(Held(how, (1, *shape)).double(), lambda m: random_losses(m(x)))
    check(Held(how, ()).double(), lambda m: random_losses(m(x)))
    check(Held(lambda h, x, p: how(h, x, p.exp()), ()).double(), lambda m: random_losses(m(x)))  # a temperature


@settings(max_examples=25)
@given(n=sizes, steps=sizes, tokens=sizes)
def test_tokens_and_positions(n, steps, tokens):
    """With as many positions as examples too, and as many tokens."""

    def how(h, x, token, position):
        h = torch.cat([token.expand(len(h), -1, -1), h], 1)
        return h + position[:, : h.shape[1]]

    net = Held(how, (1, tokens, 4), (1, steps + tokens + 1, 4)).double()
    x = tensor(n, steps, 4)
    check(net, lambda m: random_losses(m(x)))
    check(net, lambda m: random_losses(m(x)), strict=False)


@settings(max_examples=25)
@given(n=st.integers(2, 5), steps=sizes, wide=sizes)
def test_tables_of_positions(n, steps, wide):
    """An embedding or a layer called on what all examples share, with ``n`` rows too."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(steps, 4), nn.Linear(4, wide)
            self.layer, self.head = nn.Linear(4, wide), nn.Linear(wide, 2)
            self.register_buffer("grid", tensor(steps, 4))

        def forward(self, x):
            positions = self.mix(self.table(torch.arange(steps)).tanh()) + self.layer(self.grid)
            return self.head(torch.tanh(self.layer(x) + positions))

    check(Positions().double(), lambda m: random_losses(m(tensor(n, steps, 4))))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (lambda h, x, p: h.abs() ** p.abs(), (4,)),
        (lambda h, x, p: torch.where(x > 0, h, p), (4,)),
        (lambda h, x, p: torch.where(x > 0, p, p * 2), (4,)),
        (lambda h, x, p: torch.atan2(h, p), (4,)),
        (lambda h, x, p: torch.addcmul(h, x, p, value=0.5), (4,)),
        (lambda h, x, p: torch.lerp(h, p, 0.3), (4,)),
        (lambda h, x, p: h + p[x.argmax(1)], (4, 4)),
        (lambda h, x, p: h + p.gather(0, x.argmax(1, keepdim=True).expand(-1, 4)), (4, 4)),
        (lambda h, x, p: h + p.index_select(0, x.argmax(1)), (4, 4)),
        (lambda h, x, p: h * p[x.argmax(1) - 4], (4, 4)),
        (lambda h, x, p: torch.einsum("ni,nij->nj", h, p[x.argmax(1)]) + p[h.argmax(1), x.argmax(1)], (4, 4, 4)),
        (lambda h, x, p: h + p[x.argsort(1), h.argsort(1)[:1]], (4, 4)),
        (
            lambda h, x, p: h + p.index_select(0, h.argmax(1))[:, 0] + p.index_select(1, x.argmax(1))[0, :, :4],
            (4, 4, 4),
        ),
        (lambda h, x, p: h * p[:, x.argmax(1)].t() + p[torch.tensor([True, False, True, True])][:1], (4, 4)),
        (lambda h, x, p: h * (x @ p).unsqueeze(1) + F.linear(h, p).unsqueeze(1), (4,)),
        (lambda h, x, p: h + torch.addmv(p.sum() + x[:, 0], h, p, beta=2, alpha=3).unsqueeze(1), (4,)),
        (lambda h, x, p: h + (x @ p), (4, 4)),
        (lambda h, x, p: h @ p.T + h @ p, (4, 4)),
        (lambda h, x, p: torch.einsum("ni,ijk,nj->nk", h, p, x), (4, 4, 4)),
        (lambda h, x, p: F.bilinear(h, x, p), (4, 4, 4)),
        (lambda h, x, p: torch.cdist(h, p), (4, 4)),
        (lambda h, x, p: torch.cdist(h, torch.cat([p, x[:0]]))[:, 3:7], (30, 4)),
        (lambda h, x, p: torch.cdist(h, p, p=1), (4, 4)),
        (lambda h, x, p: torch.cdist(h, p, p=3), (4, 4)),
        (lambda h, x, p: torch.cdist(p, h).t(), (4, 4)),
        (lambda h, x, p: torch.cdist(h.detach(), h.detach()[:1] + 0 * p).repeat(1, 4) + h, (1, 4)),
        (lambda h, x, p: torch.linalg.solve(p + 3 * torch.eye(4, dtype=p.dtype), h.t()).t(), (4, 4)),
        (lambda h, x, p: torch.linalg.solve(p + 3 * torch.eye(4, dtype=p.dtype), h, left=False), (4, 4)),
        (lambda h, x, p: torch.linalg.solve(p + 3 * torch.eye(4, dtype=p.dtype), h.unsqueeze(2))[..., 0], (4, 4)),
        (lambda h, x, p: F.layer_norm(h, (4,), p), (4,)),
        (lambda h, x, p: F.rms_norm(h, (4,), p), (4,)),
        (lambda h, x, p: F.group_norm(h, 2, p), (4,)),
        (lambda h, x, p: F.prelu(h, p), (1,)),
        (lambda h, x, p: h + torch.div(p, x.abs() + 0.1, rounding_mode="floor"), (4,)),
        (lambda h, x, p: h + torch.div(p, x.abs() + 0.1, rounding_mode="trunc") + p, (4,)),
        (lambda h, x, p: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(p), n=4), (4,)),
        (lambda h, x, p: (h * torch.complex(p, p.square())).abs(), (4,)),
        (lambda h, x, p: torch.view_as_real(torch.view_as_complex(h.view(-1, 2, 2)) * p).flatten(1), (2,)),
        (lambda h, x, p: h + torch.baddbmm(p, h.unsqueeze(1), x.unsqueeze(2), beta=2, alpha=3)[:, 0], (1,)),
        (lambda h, x, p: torch.rsub(p, h, alpha=2), (4,)),
        (lambda h, x, p: (p @ h.t()).t(), (4, 4)),
        (lambda h, x, p: torch.bmm(h.view(-1, 2, 2).transpose(0, 1), p).transpose(0, 1).flatten(1), (2, 2, 2)),
        (lambda h, x, p: F.conv1d(h.unsqueeze(1), p, padding=1).sum(1), (2, 1, 3)),
        (lambda h, x, p: F.conv_transpose1d(h.unsqueeze(1), p, padding=1).sum(1), (1, 2, 3)),
        (lambda h, x, p: h * F.softplus(p).cumsum(0), (4,)),
        (lambda h, x, p: h * p[:4] + p[4:], (8,)),
        (lambda h, x, p: h * p.view(2, 4)[0] + p.view(2, 4)[1], (8,)),
        (lambda h, x, p: h * p.repeat(2) + p.repeat(len(h), 2), (2,)),
        (lambda h, x, p: h * p.chunk(2)[0] + h.tanh() * p.chunk(2)[0] + p.chunk(2)[1], (8,)),
    ],
)
def test_operators(how, shape, n):
    check(Held(how, shape).double(), lambda m: random_losses(m(tensor(n, 4))))


TURNED = {
    "t": (lambda p: p.t(), 1),
    "T": (lambda p: p.T, 1),
    "mT": (lambda p: p.mT, 1),
    "transpose": (lambda p: p.transpose(-1, 0), 1),
    "permute": (lambda p: p.permute(-1, 0), 1),
    "movedim": (lambda p: p.movedim(0, 1), 1),
    "three times": (lambda p: p.t().mT.T, 3),
    "in place": (lambda p: p.permute(0, 1), 0),
    "with itself": (lambda p: p.transpose(0, -2), 0),
}


@pytest.mark.parametrize("how", TURNED)
def test_a_transposed_matrix_is_read_as_it_is(how):
    """However it was transposed, the product has the term of a linear layer."""
    turn, turns = TURNED[how]
    net = Held(lambda h, x, p: h @ turn(p), (4, 4)).double()
    check(net, lambda m: random_losses(m(tensor(3, 4))))
    model = engm.GradNormModule(net)
    engm.measure(model, random_losses(model(tensor(3, 4))))
    ((plan,),) = model.engm_plans.values()
    assert [entry.turns for entry in plan.entries] == [turns]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("coupled", ["refuse", "exact"])
def test_products_with_sparse_matrices(layout, coupled):
    """An adjacency of the nodes of all examples, which meet in it or not."""
    adjacency = torch.eye(4) if coupled == "refuse" else torch.ones(4, 4)
    adjacency = adjacency.double().to_sparse(layout=layout)
    net = Held(lambda h, x: (adjacency @ h).tanh()).double()
    model = engm.GradNormModule(net, coupled=coupled)
    x = tensor(4, 4)
    expected = per_example_gradients(random_losses(net(x)), trained(net))
    assert relative(engm.measure(model, random_losses(model(x))).norms, expected.norms) < 1e-9


def test_a_users_own_function():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor, scale):
            ctx.save_for_backward(x, scale)
            ctx.factor = factor
            return factor * x * scale

        @staticmethod
        def backward(ctx, gradient):
            x, scale = ctx.saved_tensors
            return ctx.factor * gradient * scale, None, (ctx.factor * gradient * x).sum(0)

    check(Held(lambda h, x, p: Scaled.apply(h, 1.5, p), (4,)).double(), lambda m: random_losses(m(tensor(3, 4))))


def test_hooks_on_what_the_operator_returns_run_once():
    """A user's hook that changes the gradient changes the norm as autograd has it."""

    def how(h, x, p):
        out = h.abs() ** p.abs()
        out.register_hook(lambda gradient: gradient * 3)
        return out

    check(Held(how, (4,)).double(), lambda m: random_losses(m(tensor(3, 4))))


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_parametrizations(layer, parametrize):
    net = nn.Sequential(parametrize(nn.Linear(4, 4, bias=layer.bias is not None)), nn.Tanh(), nn.Linear(4, 2))
    check(net.double().eval(), lambda m: random_losses(m(tensor(3, 4))))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("reparametrize", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes(reparametrize):
    """The older way, deprecated and in use; such a network cannot be copied."""
    net = nn.Sequential(reparametrize(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    model = engm.GradNormModule(net)
    losses = random_losses(model(tensor(3, 4)))
    assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9


def test_parametrized_convolution_called_twice():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1))
    net = nn.Sequential(conv, nn.Tanh(), conv, nn.Flatten()).double()
    check(net, lambda m: random_losses(m(tensor(3, 2, 5, 5))))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", ["valid", "same", 1])
@pytest.mark.parametrize("size", [2, 3])
def test_parametrized_convolutions_of_any_padding(dims, padding, size):
    """What the operator saved of its options may be one number for all dimensions."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 4, size, padding=padding, dilation=2, groups=2)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(layer), nn.Tanh(), nn.Flatten()).double()
    check(net, lambda m: random_losses(m(tensor(3, 2, *[5, 6, 7][:dims]))))


@pytest.mark.parametrize("dims", [1, 2])
def test_parametrized_transposed_convolutions(dims):
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1](2, 4, 3, stride=3, output_padding=2, padding=1, groups=2)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(layer), nn.Tanh(), nn.Flatten()).double()
    check(net, lambda m: random_losses(m(tensor(3, 2, *[5, 6][:dims]))))


def test_low_rank_adapter_on_a_frozen_layer():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 6).requires_grad_(False)
            self.down, self.up = nn.Parameter(tensor(2, 4)), nn.Parameter(tensor(6, 2, seed=1))

        def forward(self, x):
            return self.base(x) + F.linear(F.linear(x, self.down), self.up)

    check(nn.Sequential(Adapted(), nn.Tanh(), Adapted_head()).double(), lambda m: random_losses(m(tensor(3, 5, 4))))
    merged = Held(lambda h, x, down, up: F.linear(x, up @ down) + h, (2, 4), (4, 2)).double()
    check(merged, lambda m: random_losses(m(tensor(3, 5, 4))))


def Adapted_head():  # noqa: N802
    return nn.Linear(6, 2)


def test_rows_in_blocks_and_over_time():
    """Windows ``[n * 2, ...]``, and time-major steps, through every kind of layer."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.layer = nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 3)
            self.scale, self.last = nn.Parameter(tensor(4)), nn.LayerNorm(3)

        def forward(self, x):
            h = self.norm(self.conv(x.view(-1, 2, 6)))  # [n * 2, 4, 6]
            h = h.view(len(x), -1, 4, 6).permute(1, 3, 0, 2)  # [2, 6, n, 4]
            h = self.last(self.layer(h.flatten(0, 1) * self.scale))  # [12, n, 3]
            return h.transpose(0, 1)

    for n in (1, 2, 4, 6, 12):
        check(Windows().double(), lambda m, n=n: random_losses(m(tensor(n, 4, 6))))


def test_class_token_pooling_does_not_mislead():
    """Gradients of the last block are zero but for one token: which rows are whose still has to come out right."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.attention = nn.Parameter(tensor(1, 1, 8)), nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 8)

        def forward(self, x):
            h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            h = self.attention(h, h, h)[0]
            return F.linear(h, self.last.weight, self.last.bias)[:, 0]

    for n in (2, 3, 4):
        check(Pooled().double(), lambda m, n=n: random_losses(m(tensor(n, 3, 8))))


def test_what_mixes_examples_is_refused_by_name():
    net = Held(lambda h, x, p: (h * p) - (h * p).mean(0), (4,)).double()
    model = engm.GradNormModule(net)
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        engm.measure(model, random_losses(model(tensor(4, 4))))


def test_parameters_behind_what_mixes_examples_are_exact_without_a_layer():
    """There is no row of an example to be wrong about: autograd pulls every loss back to the parameter."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(tensor(4, 4))

        def forward(self, x):
            h = x * self.scale
            return h - h.mean(0)

    check(Bare().double(), lambda m: random_losses(m(tensor(4, 4))))


def test_network_without_any_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(tensor(4)), nn.Parameter(tensor(4, 3))

        def forward(self, x):
            return (x * self.a).tanh() @ self.b

    for n in (1, 3, 4):
        check(Bare().double(), lambda m, n=n: random_losses(m(tensor(n, 4))))
    model = engm.GradNormModule(Bare().double())
    with pytest.raises(RuntimeError, match="captured forward pass"):
        engm.measure(model, random_losses(model.unwrap()(tensor(3, 4))))


def test_common_operators_are_not_run_once_an_example():
    net = Held(lambda h, x, p, q: F.linear(h * p + q, x[:, 0].mean() * torch.eye(4).double()), (4,), (1, 1, 4)).double()
    model = engm.GradNormModule(net)
    assert all(entry.ruled for entry in entries(model, random_losses(model(tensor(3, 5, 4)))))
    picked = engm.GradNormModule(Held(lambda h, x, p, q: h * p[x.argmax(1)] + (x @ q)[:, None], (4, 4), (4,)).double())
    assert all(entry.ruled for entry in entries(picked, random_losses(picked(tensor(3, 4)))))
    shift = 3 * torch.eye(4).double()
    solved = Held(lambda h, x, p, q: torch.cdist(h, p) + torch.linalg.solve(q + shift, h.t()).t(), (4, 4), (4, 4))
    prototypes = engm.GradNormModule(solved.double())
    assert all(entry.ruled for entry in entries(prototypes, random_losses(prototypes(tensor(3, 4)))))
    attention = engm.GradNormModule(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double())
    assert all(entry.ruled for entry in entries(attention, random_losses(attention(tensor(3, 5, 8)))))


OF_ELEMENTS = {
    "exponent": lambda h, x, p: h.sigmoid().pow(p),
    "upper bound": lambda h, x, p: h.clamp(max=p),
    "threshold": lambda h, x, p: torch.maximum(h, p),
    "interpolation": lambda h, x, p: torch.lerp(h, x, p),
    "slope": lambda h, x, p: F.prelu(h.movedim(-1, 1), p.expand(4).contiguous()).movedim(1, -1),
    "mask token": lambda h, x, p: torch.where(x > 0, p, h),
    "filled": lambda h, x, p: h.masked_fill(x > 0, p.sum()),
    "scaled product": lambda h, x, p: torch.addcmul(h, p, x, value=2),
    "angle": lambda h, x, p: torch.atan2(h, p),
}


@settings(max_examples=40)
@given(n=sizes, steps=sizes, kept=st.booleans(), moved=st.booleans(), how=st.sampled_from(sorted(OF_ELEMENTS)))
def test_operators_that_treat_elements_apart(n, steps, kept, moved, how):
    """Broadcast along examples and steps, with the examples first or second, and in no regular order."""
    inside = OF_ELEMENTS[how]
    order = torch.randperm(n * steps, generator=torch.Generator().manual_seed(n))

    def moving(h, x, p):
        h, x = (t.flatten(0, 1)[order] for t in (h, x))
        return inside(h, x, p)[order.argsort()].view(n, steps, 4)

    net = Held(moving if moved else inside, (4,) if kept else (1,)).double()
    x = tensor(n, steps, 4)
    check(net, lambda m: random_losses(m(x)))
    if not moved:
        check(net, lambda m: random_losses(m(x.transpose(0, 1)).transpose(0, 1)))


@pytest.mark.parametrize("how", sorted(OF_ELEMENTS))
def test_they_are_run_once_for_all_examples(how, monkeypatch):
    monkeypatch.setattr("engm.rules.any_operator.masked_gradients", None)
    check(Held(OF_ELEMENTS[how], (4,)).double(), lambda m: random_losses(m(tensor(5, 3, 4))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (lambda h, x, p: h + p.sum(), (4, 5)),
        (lambda h, x, p: h + 0 * p.sum(), (2,)),
        (lambda h, x, p: h * p.exp().sum(1), (4, 5)),
        (lambda h, x, p: h * (p * torch.linspace(0, 1, 5, dtype=p.dtype)).sum(1), (4, 5)),
        (lambda h, x, p: h @ (p * torch.linspace(0, 1, 4, dtype=p.dtype)), (4, 4)),
        (lambda h, x, p: h @ (p * p), (4, 4)),
        (lambda h, x, p: h @ (p - p.mean(0)), (4, 4)),
    ],
)
def test_parameters_of_16_bits(how, shape, dtype):
    """Products add up in float32, whatever the types of their factors."""
    torch.manual_seed(0)
    net = Held(how, shape).to(dtype)
    model = engm.GradNormModule(net)
    x = tensor(6, 4).to(dtype)
    losses = random_losses(model(x).double())
    found = engm.measure(model, losses).norms
    wide = Held(how, shape)
    wide.load_state_dict(net.state_dict())
    want = per_example_gradients(random_losses(wide.double()(x.double())), trained(wide)).norms
    torch.testing.assert_close(found.double(), want, rtol=3e-2, atol=1e-3)
