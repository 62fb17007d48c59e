"""Trained complex parameters, whose norms are those of their real and imaginary parts together."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, tensor
from torch import nn

import engm

OPTIMIZERS = {
    engm.ENGM: {"alpha": 0.3},
    engm.AENGM: {"alpha": 0.3},
    engm.NENGM: {"alpha": 0.3},
    engm.FENGM: {"alpha": 0.3},
    engm.MSGD: {},
    engm.GNC: {"max_norm": 0.1},
    engm.SNGM: {},
}


class Fourier(nn.Module):
    """A Fourier neural operator: matrices for the lowest frequencies, as they are published."""

    def __init__(self, width=4, modes=3):
        super().__init__()
        shape, self.modes = (width, width, modes), modes
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=torch.cdouble) / 4) for _ in range(2))
        self.lift, self.read = nn.Linear(1, width), nn.Linear(width, 3)
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(2))

    def forward(self, x):
        h = self.lift(x[..., None]).mT
        for weight, skip in zip(self.weights, self.skips, strict=True):
            spectrum = torch.fft.rfft(h)
            out = torch.zeros_like(spectrum)
            out[..., : self.modes] = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], weight)
            h = F.gelu(torch.fft.irfft(out, n=h.shape[-1]) + skip(h))
        return self.read(h.mean(-1))


class Diagonal(nn.Module):
    """A state-space model with complex rates."""

    def __init__(self):
        super().__init__()
        self.rates, self.read = (nn.Parameter(torch.randn(*shape, dtype=torch.cdouble)) for shape in ((6,), (6, 4)))
        self.layer = nn.Linear(5, 6)

    def forward(self, x):
        h = self.layer(x) * torch.exp(self.rates * 1j)
        return (h @ self.read).abs()


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return torch.view_as_real(self.layers(torch.complex(x, x.flip(0)))).flatten(1)


NETWORKS = {
    "Fourier": (Fourier, (12,)),
    "diagonal": (Diagonal, (5,)),
    "linear": (lambda: Layers(nn.Linear(5, 4, dtype=torch.cdouble)), (5,)),
    "linear on sequences": (lambda: Layers(nn.Linear(5, 4, dtype=torch.cdouble)), (3, 5)),
    "convolution": (lambda: Layers(nn.Conv1d(2, 3, 2, dtype=torch.cdouble)), (2, 5)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [1, 4])
def test_norms_and_steps(name, n):
    make, shape = NETWORKS[name]
    net = make().double()
    parameters = dict(net.named_parameters())
    for optimizer in OPTIMIZERS if n > 1 else [engm.ENGM]:
        model = engm.GradNormModule(net)
        opt = optimizer(model, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), **OPTIMIZERS[optimizer])
        for step in range(2):
            x = tensor(n, *shape, seed=step).requires_grad_(optimizer in (engm.AENGM, engm.NENGM))
            losses = model(x).square().sum(1)
            wanted = per_example_gradients(losses, parameters)
            inputs = {"inputs": x} if x.requires_grad else {}
            stats = opt.backward(losses, **inputs)
            if optimizer is engm.ENGM:
                torch.testing.assert_close(stats.norms, wanted.norms, rtol=1e-9, atol=0)
            mean = wanted.mean(torch.ones(n) if stats.weights is None else stats.weights)
            for parameter, gradient in zip(parameters.values(), mean, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
            opt.step()
            if optimizer in (engm.GNC, engm.SNGM):  # which divide by the length of the whole gradient
                torch.testing.assert_close(opt.grad_norm, torch.cat([g.abs().flatten() for g in mean]).norm())
            opt.zero_grad()


@given(rows=st.integers(1, 4), n=st.integers(1, 5), moved=st.booleans(), left=st.booleans())
def test_matrix_products(rows, n, moved, left):
    """Rows in any order, of which the examples have several; the parameter on either side."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4).double()
            self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.cdouble))

        def forward(self, x, order):
            h = torch.polar(self.layer(x)[order], self.layer(x)[order].tanh())
            h = (self.weight @ h.t()).t() if left else h @ self.weight
            return h.abs()[order.argsort()].view(n, -1).sum(1).square()

    model = engm.GradNormModule(Product())
    order = torch.randperm(n * rows) if moved else torch.arange(n * rows)
    losses = model(tensor(n * rows, 3), order)
    wanted = per_example_gradients(losses, dict(model.unwrap().named_parameters())).norms
    torch.testing.assert_close(engm.per_example_grad_norms(model, losses), wanted, rtol=1e-9, atol=0)


MADE_COMPLEX = {
    "cast": lambda w: w.to(torch.cdouble),
    "cast, cut and transposed": lambda w: w.to(torch.cdouble)[:, :3].mT,
    "transposed and cast": lambda w: w.T.to(torch.cdouble),
    "of two parts": lambda w: torch.complex(w, w.sin()),
    "viewed as pairs": lambda w: torch.view_as_complex(torch.stack([w, w.sin()], -1)),
    "plus an imaginary number": lambda w: w + 0.5j,
    "times an imaginary number": lambda w: w * (1 + 2j),
    "on a circle": lambda w: torch.polar(w.exp(), w),
    "of a spectrum": lambda w: torch.fft.fft(w),
    "conjugate": lambda w: torch.complex(w, w).conj(),
    "real": lambda w: w.exp(),
}

USED = {
    "a product": lambda z, w: z[..., : w.shape[0]] @ w,
    "a product from the left": lambda z, w: (w @ z[..., : w.shape[1]].mT).mT,
    "an einsum": lambda z, w: torch.einsum("nti,io->nto", z[..., : w.shape[0]], w),
    "a linear layer": lambda z, w: F.linear(z[..., : w.shape[1]], w),
    "elements": lambda z, w: z[..., : w.shape[-1]] * w[0],
    "a sum": lambda z, w: z[..., : w.shape[-1]] + w[1],
    "by a quotient": lambda z, w: z[..., : w.shape[-1]] / (2 + w[0]),
    "rows": lambda z, w: z[:, :2, :1] * w[torch.tensor([1, 0])].sum(-1)[:, None],
}


class MadeComplex(nn.Module):
    def __init__(self, make, use):
        super().__init__()
        self.make, self.use, self.weight = make, use, nn.Parameter(torch.randn(4, 4, dtype=torch.double))
        self.layer = nn.Linear(4, 8).double()

    def forward(self, x):
        z = torch.view_as_complex(self.layer(x).view(*x.shape[:-1], 4, 2))
        return self.use(z, self.make(self.weight))


BY_ELEMENT = ("elements", "a sum", "by a quotient", "rows")  # torch multiplies no complex matrix with a real one


@pytest.mark.parametrize(
    ("make", "use"), [(make, use) for make in MADE_COMPLEX for use in USED if make != "real" or use in BY_ELEMENT]
)
@pytest.mark.parametrize("read", ["real", "imaginary", "absolute"])
def test_real_parameters_of_complex_tensors(make, use, read):
    torch.manual_seed(0)
    net = MadeComplex(MADE_COMPLEX[make], USED[use])
    model = engm.GradNormModule(net)
    for n in (1, 3):
        y = model(tensor(n, 3, 4))
        part = {"real": y.real, "imaginary": y.imag, "absolute": y.abs()}[read]
        losses = part.square().flatten(1).sum(1)
        expected = per_example_gradients(losses, dict(net.named_parameters()))
        measured = engm.measure(model, losses).squared_norms
        for name, squared in expected.squared_norms.items():
            torch.testing.assert_close(measured[name], squared, rtol=1e-9, atol=1e-12)
