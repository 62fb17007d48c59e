"""Gradients that are pulled back in factors, against autograd's pull-back of one example's gradient at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import relative, tensor
from term_kinds import convolution
from torch import nn
from torch.nn.utils import parametrizations

import engm
from engm.rules.in_factors import FactoredPull
from engm.rules.pulled_back import pull_back_to_all
from engm.terms import LinearFactors, LocalCorrection, PerExampleGradient
from engm.terms.parts import Product, dense_of, outer_of, squared_norm_of, squared_norm_of_outer

N = 17  # so many that products of matrices of all of them are taken for a sum of four parts


class Made:
    """A tensor on its way from a parameter, and all parameters that it is computed from."""

    def __init__(self, *shape):
        self.leaves = []
        self.w = self.new(*shape)

    def new(self, *shape):
        self.leaves.append(tensor(*shape, seed=len(self.leaves)).add_(0.5).requires_grad_())
        return self.leaves[-1]

    @property
    def rest(self):
        return tuple(range(1, self.w.dim()))

    def rows(self):
        return (len(self.w), *(1 for _ in self.rest))


def weight_norm(m):
    return torch._weight_norm_interface(m.w.contiguous(), m.new(*m.rows()), 0)[0]


def spectral_norm(m):
    flat = m.w.flatten(1)
    u, v = F.normalize(tensor(flat.shape[0], seed=3), dim=0), F.normalize(tensor(flat.shape[1], seed=4), dim=0)
    return m.w / torch.dot(u, torch.mv(flat, v))


def standardised(m):
    return (m.w - m.w.mean(m.rest, keepdim=True)) / (m.w.std(m.rest, keepdim=True) + 1e-2)


class Rounded(torch.autograd.Function):
    """To the nearest of a few numbers; the gradient goes through where nothing was cut off."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.clamp(-1, 1).mul(4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return gradient * (w.abs() <= 1)


def less_singular(w):
    return w + (1 + w.detach().norm()) * torch.eye(len(w), dtype=w.dtype)


def reflections(m):
    """A matrix with orthonormal columns (rows, where there are fewer of them), as torch's parametrization makes it."""
    wide = m.w.shape[0] < m.w.shape[1]
    vectors = (m.w.mT if wide else m.w).tril(-1)
    found = torch.linalg.householder_product(vectors, 2 / (1 + (vectors * vectors).sum(0)))
    return found.mT if wide else found


def fewer_reflections(m):
    """Than columns, each with a factor of its own."""
    wide = m.w.shape[0] < m.w.shape[1]
    vectors = m.w.mT if wide else m.w
    found = torch.linalg.householder_product(vectors, m.new(max(1, vectors.shape[1] - 2)))
    return found.mT if wide else found


def rows_some_twice(m):
    rows = len(m.w)
    picked = m.w[torch.tensor([0, -1, 0, *range(rows)])]
    return (m.new(*m.rows()) * picked[:rows]).repeat(2, *(1 for _ in m.rest))[1 : rows + 1] + picked[3:]


def columns_some_twice(m):
    columns = m.w.shape[1]
    picked = m.w.index_select(1, torch.tensor([0, 0, *range(columns)]))
    return picked.repeat(1, 2, *(1 for _ in m.rest[1:]))[:, 1 : columns + 1]


STEPS = {
    "number": lambda m: 2.0 * m.w / 3,
    "mask": lambda m: m.w * (tensor(*m.w.shape, seed=7) > 0),
    "tanh": lambda m: torch.tanh(m.w),
    "clamp": lambda m: m.w.clamp(-1, 1),
    "square": lambda m: m.w * m.w,
    "negative": lambda m: 1 - m.w,
    "quantised": lambda m: m.w + (m.w.round() - m.w).detach(),
    "where": lambda m: torch.where(m.w > 0, m.w, 0.1 * m.w),
    "added": lambda m: torch.add(m.w, m.new(*m.w.shape), alpha=0.5),
    "subtracted": lambda m: torch.sub(m.new(*m.w.shape), m.w, alpha=0.5),
    "gate": lambda m: m.w * m.new(),
    "gate of rows": lambda m: m.new(*m.rows()) * m.w,
    "expanded rows": lambda m: m.w + m.new(*m.rows()).expand_as(m.w),
    "divided by rows": lambda m: m.w / m.new(*m.rows()),
    "weight norm": weight_norm,
    "weight norm by hand": lambda m: m.new(*m.rows()) * m.w / torch.linalg.vector_norm(m.w, dim=m.rest, keepdim=True),
    "direction": lambda m: m.w / torch.linalg.vector_norm(m.w, dim=m.rest, keepdim=True).detach(),
    "spectral norm": spectral_norm,
    "whole norm": lambda m: m.w / m.w.norm(),
    "largest": lambda m: m.w / m.w.abs().max(),
    "centred": lambda m: m.w - m.w.mean(m.rest, keepdim=True),
    "standardised": standardised,
    "sum of rows": lambda m: m.w * m.w.sum(m.rest, keepdim=True),
    "rounded": lambda m: Rounded.apply(m.w),
    "cube": lambda m: m.w * m.w * m.w,
    "sine": lambda m: m.w.sin() * m.w.cos(),
    "rows of two": lambda m: torch.cat([m.new(len(m.w), *m.w.shape[1:]), m.w])[::2],
    "columns of two": lambda m: torch.cat([m.new(len(m.w), 1, *m.w.shape[2:]), m.w], 1)[:, :-1],
    "rows of constants": lambda m: torch.cat([torch.ones(3, *m.w.shape[1:]), m.w, m.w])[3 : 3 + len(m.w)],
    "rows before constants": lambda m: torch.cat([m.w, m.w, torch.ones(3, *m.w.shape[1:])])[len(m.w) : -3],
    "layer norm": lambda m: F.layer_norm(m.w, m.w.shape[1:]),
    "copied": lambda m: m.w.clone(),
    "rows moved": lambda m: m.w.roll((1, -2), (0, 1)),
    "turned round": lambda m: m.w.flip(1, 0),
    "rows, some twice": rows_some_twice,
    "columns, some twice": columns_some_twice,
    "flattened": lambda m: F.normalize(m.w.flatten(1), dim=1).view_as(m.w),
}
OF_MATRICES = {
    "low rank": lambda m: m.w + m.new(m.w.shape[0], 2) @ m.new(2, m.w.shape[1]),
    "left": lambda m: m.new(m.w.shape[0], m.w.shape[0]) @ m.w,
    "right": lambda m: m.w @ tensor(m.w.shape[1], m.w.shape[1], seed=8),
    "normalised": lambda m: F.normalize(m.w, dim=1),
    "transposed": lambda m: (m.new(*m.w.shape[::-1]) + m.w.t()).transpose(0, 1),
    "columns": lambda m: m.w * tensor(m.w.shape[1], seed=9),
    "gate of columns": lambda m: m.w * m.new(m.w.shape[1]) + m.new(m.w.shape[1]),
    "normalised columns": lambda m: F.normalize(m.w, dim=0),
    "centred columns": lambda m: m.w - m.w.mean(0),
    "distribution": lambda m: m.w.softmax(1),
    "distribution of columns": lambda m: m.w.log_softmax(0) + m.w.softmax(0),
    "layer norm of its own": lambda m: F.layer_norm(m.w, m.w.shape[1:], m.new(m.w.shape[1]), m.new(m.w.shape[1])),
    "added product": lambda m: torch.addmm(m.w, m.new(len(m.w), 2), m.new(2, m.w.shape[1]), beta=0.5, alpha=2),
    "bias": lambda m: torch.addmm(m.new(m.w.shape[1]), m.w, tensor(m.w.shape[1], m.w.shape[1], seed=8)),
    "from one row": lambda m: F.linear(m.new(1, 3), m.new(m.w.numel(), 3), m.new(m.w.numel())).view_as(m.w) + m.w,
    "sums so far": lambda m: m.w.cumsum(0) + m.new(*m.w.shape).cumsum(-1),
    "reflections": reflections,
    "fewer reflections": fewer_reflections,
    "product of low ranks": lambda m: (
        (m.new(len(m.w), 1) @ m.new(1, m.w.shape[1])) * (m.w @ tensor(m.w.shape[1], m.w.shape[1], seed=8))
    ),
    "scaled by a diagonal": lambda m: torch.diag(m.new(len(m.w))) @ m.w @ torch.diag_embed(m.new(m.w.shape[1])),
    "rounded for later": lambda m: torch.fake_quantize_per_tensor_affine(m.w, 0.01, 0, -100, 100),
    "rounded rows": lambda m: torch.fake_quantize_per_channel_affine(
        m.w, torch.full((len(m.w),), 0.01), torch.zeros(len(m.w), dtype=torch.int32), 0, -100, 100
    ),
    "permuted": lambda m: (m.w.permute(1, 0) * m.new(*m.w.shape[::-1])).T,
}
OF_SQUARES = {
    "symmetric": lambda m: m.w + m.w.T,
    "skew": lambda m: m.w.triu(1) - m.w.triu(1).T,
    "a diagonal": lambda m: torch.diag(m.w.diagonal()) + m.w.diagonal().diag_embed() @ m.w,
    "positive": lambda m: m.w.tril() @ m.w.tril().mT,
    "power": lambda m: m.w @ m.w,
    "inverse": lambda m: torch.linalg.inv(less_singular(m.w)),
    "solution": lambda m: torch.linalg.solve(less_singular(m.w), m.w),
    "exponential": lambda m: torch.linalg.matrix_exp(m.w / (1 + m.w.detach().norm())),
    "rotation": lambda m: torch.linalg.matrix_exp(m.w.tril() - m.w.tril().mT),
}


def linear(positions, shape):
    a, b = tensor(N, positions, shape[1], seed=5), tensor(N, positions, shape[0], seed=6)
    return LinearFactors(a, b), torch.einsum("ntd,ntp->ndp", b, a)


def whole(shape):
    g = tensor(N, *shape, seed=5)
    return PerExampleGradient(g), g


def assert_pulled(made, w, term, gradients, known=False):
    """What is pulled back is right, and known if that is asked for."""
    pull = FactoredPull([((w.grad_fn, w.output_nr), term)])
    wanted = [
        torch.stack([torch.autograd.grad(w, leaf, g, retain_graph=True)[0] for g in gradients]) for leaf in made.leaves
    ]
    if not all(bool(of_leaf.isfinite().all()) for of_leaf in wanted):
        return  # rows of zeros have no direction
    size = max(float(of_leaf.abs().max()) for of_leaf in wanted) + 100  # what rounding is measured by where all cancels
    for leaf, of_leaf in zip(made.leaves, wanted, strict=True):
        parts = pull.parts_of(leaf)
        if parts is None:
            assert not known
            continue
        torch.testing.assert_close(dense_of(parts, slice(0, N)), of_leaf, rtol=1e-9, atol=1e-12 * size)
        found = squared_norm_of(parts, tuple(leaf.shape))
        squares = of_leaf.reshape(N, -1).square().sum(1)
        torch.testing.assert_close(found, squares, rtol=1e-9, atol=1e-12 * size**2)
        outer = outer_of(parts, tuple(leaf.shape)) if leaf.dim() > 1 else []
        if outer:
            torch.testing.assert_close(squared_norm_of_outer(outer), squares, rtol=1e-9, atol=1e-12 * size**2)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("step", [*STEPS, *OF_MATRICES, *OF_SQUARES])
def test_what_is_known(step, positions):
    shape = (4, 4) if step in OF_SQUARES else (4, 6)
    made = Made(*shape)
    made.w = {**STEPS, **OF_MATRICES, **OF_SQUARES}[step](made)
    assert_pulled(made, made.w, *linear(positions, shape), known=True)


@given(
    steps=st.lists(st.sampled_from([*STEPS, *OF_MATRICES]), min_size=1, max_size=4),
    positions=st.sampled_from([0, 1, 3, 40]),
    rows=st.integers(1, 6),
    columns=st.integers(2, 7),  # of one number there is no standard deviation
)
def test_of_a_matrix(steps, positions, rows, columns):
    """No positions: the gradients themselves are given."""
    made = Made(rows, columns)
    for step in steps:
        made.w = {**STEPS, **OF_MATRICES}[step](made)
    term, gradients = linear(positions, (rows, columns)) if positions else whole((rows, columns))
    assert_pulled(made, made.w, term, gradients)


@given(
    steps=st.lists(st.sampled_from([*STEPS, *OF_MATRICES, *OF_SQUARES]), min_size=1, max_size=4),
    positions=st.sampled_from([0, 1, 3]),
    size=st.integers(2, 6),
)
def test_of_a_square_matrix(steps, positions, size):
    made = Made(size, size)
    for step in steps:
        made.w = {**STEPS, **OF_MATRICES, **OF_SQUARES}[step](made)
    term, gradients = linear(positions, (size, size)) if positions else whole((size, size))
    assert_pulled(made, made.w, term, gradients)


@given(
    steps=st.lists(st.sampled_from([*STEPS]), min_size=1, max_size=3),
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
)
def test_of_a_kernel(steps, dims, groups, transposed):
    term, gradients = convolution(N, dims, groups=groups, transposed=transposed)
    made = Made(*gradients.shape[1:])
    for step in steps:
        made.w = STEPS[step](made)
    assert_pulled(made, made.w, term, gradients, known=True)


def test_of_a_tensor_that_several_layers_read():
    made = Made(4, 6)
    first, second = weight_norm(made), made.w * 2
    (a, of_first), (b, of_second) = linear(3, (4, 6)), whole((4, 6))
    pull = FactoredPull([((first.grad_fn, 0), a), ((second.grad_fn, 0), b)])
    for leaf in made.leaves:
        wanted = torch.stack(
            [
                sum(
                    torch.autograd.grad(t, leaf, g, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                    for t, g in ((first, g1), (second, g2))
                )
                for g1, g2 in zip(of_first, of_second, strict=True)
            ]
        )
        parts = pull.parts_of(leaf)
        torch.testing.assert_close(dense_of(parts, slice(1, 4)), wanted[1:4])
        torch.testing.assert_close(squared_norm_of(parts, tuple(leaf.shape)), wanted.flatten(1).square().sum(1))


def with_backward(backward):
    """The identity, with another backward pass."""

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, gradient):
            return backward(gradient)

    return Odd.apply


@pytest.mark.parametrize(
    "step",
    [
        lambda w: w.roll(1),
        lambda w: w.unbind(0)[1] * w.cumsum(1),
        with_backward(lambda g: g + 1e-6 * g.flip(0)),
        with_backward(lambda g: g.clamp(-0.1, 0.1)),
        with_backward(lambda g: g.clamp(-2e6, 2e6)),
        with_backward(lambda g: torch.where(g.abs() > 1e-7, g, 0)),
        with_backward(lambda g: g / g.norm()),
        with_backward(torch.sign),
        with_backward(lambda g: torch.where(g.abs() > 100, torch.nan, g)),
    ],
    ids=[
        "elements moved",
        "two outputs",
        "mixes",
        "clips",
        "clips late",
        "drops",
        "normalises",
        "takes signs",
        "breaks",
    ],
)
def test_what_is_not_known_is_left_to_autograd(step):
    made, term = Made(4, 4), linear(2, (4, 4))[0]
    made.w = step(made.w) + made.new(4, 4)
    pull = FactoredPull([((made.w.grad_fn, 0), term)])
    assert pull.parts_of(made.leaves[0]) is None
    assert pull.parts_of(made.leaves[1]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 60.0])
def test_an_exponential_is_exact_but_for_rounding_or_left_to_autograd(size, dtype):
    """Of matrices that are large, small, and far from normal."""
    for seed in range(3):
        w = tensor(6, 6, seed=seed)
        w = ((w.triu() if seed == 1 else w - w.t() if seed == 2 else w) / w.norm() * size).to(dtype).requires_grad_()
        made = torch.linalg.matrix_exp(w)
        b, a = tensor(N, 1, 6, seed=8).to(dtype), tensor(N, 1, 6, seed=9).to(dtype)
        parts = FactoredPull([((made.grad_fn, 0), LinearFactors(a, b))]).parts_of(w)
        assert parts is not None or size > 10
        if parts is None:
            continue
        exact = w.detach().double().requires_grad_()
        whole = torch.linalg.matrix_exp(exact)
        for i, found in enumerate(dense_of(parts, slice(0, N))):
            g = b[i].t() @ a[i]
            (own,) = torch.autograd.grad(made, w, g, retain_graph=True)
            (wanted,) = torch.autograd.grad(whole, exact, g.double(), retain_graph=True)
            allowed = 10 * (own - wanted).norm() + 300 * torch.finfo(dtype).eps * wanted.norm()
            assert (found - wanted).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_what_cancels(dtype):
    """A softmax of which one number takes all hardly hands anything on, a layer norm of two numbers nothing."""
    for step in (lambda w: (30 * w).softmax(1), lambda w: F.layer_norm(w, (2,))):
        w = tensor(5, 2, seed=1).to(dtype).requires_grad_()
        made = step(w)
        (term, gradients) = linear(1, (5, 2))
        term = LinearFactors(term.activations.to(dtype), term.backprops.to(dtype))
        found = squared_norm_of(FactoredPull([((made.grad_fn, 0), term)]).parts_of(w), (5, 2)).double()
        exact = w.detach().double().requires_grad_()
        made = step(exact)
        wanted = torch.stack([torch.autograd.grad(made, exact, g, retain_graph=True)[0] for g in gradients])
        rounding = 100 * torch.finfo(dtype).eps * gradients.flatten(1).norm(dim=1)
        assert ((found.sqrt() - wanted.flatten(1).norm(dim=1)).abs() <= 30 * rounding).all()


def test_what_is_corrected_is_left_to_autograd():
    term = linear(2, (4, 4))[0]
    term.correction = LocalCorrection(tensor(N, 4), tensor(4), tensor(N, 4), tensor(4, 4))
    w = tensor(4, 4).requires_grad_()
    assert FactoredPull([(((2 * w).grad_fn, 0), term)]).parts_of(w) is None


class Mapped(nn.Module):
    """A layer's weight, computed by a function."""

    def __init__(self, step):
        super().__init__()
        self.step, self.weight = step, nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return F.linear(x, self.step(self.weight))


@pytest.mark.parametrize("hook", [False, True], ids=["no hook", "a hook"])
def test_norms_never_need_gradients_of_all_examples_but_for_hooks(monkeypatch, hook):
    """A hook on the computed weight changes the gradients, and only autograd runs it."""

    def halved(w):
        w = 3 * w
        if hook:
            w.register_hook(lambda gradient: gradient * torch.linspace(0.1, 1, 8))
        return w

    if not hook:

        def of_sums(edges, parameters, gradients):
            assert {len(gradient) for gradient in gradients} == {1}
            return pull_back_to_all(edges, parameters, gradients)

        monkeypatch.setattr("engm.rules.pulled_back.pull_back_to_all", of_sums)
    net = nn.Sequential(Mapped(halved), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    model = engm.GradNormModule(net)
    found = engm.per_example_grad_norms(model, model(x).square().sum(1))
    wanted = []
    for row in x:
        net.zero_grad()
        net(row[None]).square().sum().backward()
        wanted.append(torch.cat([p.grad.flatten() for p in net.parameters()]).norm())
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight", "spectral"]
)
def test_narrow_types(wrap, dtype):
    """Within rounding of the type of what float64 gives, where a factor of 16 bits would have to be scaled."""
    net = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(8 * 16, 5))).eval()
    x = torch.randn(6, 3, 6, 6)
    narrow = engm.GradNormModule(net)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = narrow(x).float().square().sum(1)
    found = engm.per_example_grad_norms(narrow, losses)
    model = engm.GradNormModule(narrow.unwrap().double())
    wanted = engm.per_example_grad_norms(model, model(x.double()).square().sum(1))
    assert relative(found.double(), wanted) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_parametrization_runs_as_often_as_without_the_wrapper():
    """A spectral norm goes on with its power iteration whenever its weight is computed."""
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    calls = []
    net[0].parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), 1.0)
    assert not calls
    for _ in range(3):
        opt.backward(model(torch.randn(4, 6, dtype=torch.float64)).square().sum(1))
        opt.step()
    assert len(calls) == 3


SELECTED = {
    "relu": lambda w, m: w.relu().sqrt(),
    "clamped": lambda w, m: w.clamp(min=0).sqrt(),
    "a power": lambda w, m: w.relu() ** 0.5,
    "where": lambda w, m: torch.where(m, w.abs(), 0.0).sqrt(),
    "filled": lambda w, m: w.abs().masked_fill(m, 0).sqrt(),
    "a triangle": lambda w, m: w.abs().tril().sqrt(),
    "a logarithm": lambda w, m: torch.where(m, w.relu().log(), 0.0).clamp(min=-9),
    "a reciprocal": lambda w, m: torch.where(m, w * m, 1.0).reciprocal(),
}


@pytest.mark.parametrize("name", SELECTED)
def test_an_infinite_derivative_that_nothing_passes_on_is_none(name):
    """Autograd leaves out what a maximum, a mask or a triangle does not pass on, also where it would be infinite."""
    torch.manual_seed(0)
    mask = torch.rand(5, 6) > 0.5

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(tensor(5, 6, seed=3))

        def forward(self, x):
            return F.linear(x, SELECTED[name](self.w, mask)).square().sum(1)

    net, x = Net(), tensor(4, 6)
    wanted = torch.stack([torch.autograd.grad(loss, net.w, retain_graph=True)[0] for loss in net(x)])
    assert wanted.isfinite().all()
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    for _ in range(3):
        opt.zero_grad()
        stats = opt.backward(model(x))
        assert relative(stats.norms, wanted.flatten(1).norm(dim=1)) <= 1e-9
        assert relative(net.w.grad, torch.tensordot(stats.weights, wanted, 1) / 4) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-20, -13, 13, 20])
def test_factors_of_very_different_sizes(dtype, power):
    """Each is squared by itself, which must not overflow where the square of their product does not."""
    fixed = 10.0**power * (1 if dtype == torch.float32 else 10.0 ** (7 * power))
    for of_rows in (True, False):
        left, right = (torch.randn(4, 5, dtype=dtype), torch.randn(4, 6, dtype=dtype) / fixed)
        left, right = (left, right) if of_rows else (right[:, :5], left @ torch.randn(5, 6, dtype=dtype))
        term = LinearFactors(right.unsqueeze(1), left.unsqueeze(1))
        mask = fixed * torch.randn(5, 6, dtype=dtype)
        (outer,) = outer_of([Product(term, mask)], (5, 6))
        exact = left.double().unsqueeze(2) * right.double().unsqueeze(1) * mask.double()
        found = squared_norm_of_outer([outer])
        assert found.dtype == dtype
        assert relative(found.double(), exact.square().sum((1, 2))) <= (1e-5 if dtype == torch.float32 else 1e-12)
