"""``engm.measure``: its arguments, results and modes, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import TOLERANCE, assert_measured
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm

X = tensor(5, 3, 6, 6)
Y = torch.tensor([0, 1, 2, 1, 0])


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def cross_entropy(model, x=X):
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), Y[: len(x)], reduction="none")


def plain():
    return engm.GradNormModule(network().eval())


# -- results -----------------------------------------------------------------------------------------------------


def test_fields():
    model = plain()
    losses = cross_entropy(model)
    measured = engm.measure(model, losses)
    names = [name for name, _ in model.named_parameters()]
    assert list(measured.names) == names == list(measured.squared_norms)
    assert measured.stacked.shape == (len(names), 5)
    assert measured.n == 5
    assert measured.mode == "plain"
    assert torch.equal(measured.losses, losses.detach())
    assert not measured.losses.requires_grad
    assert not measured.stacked.requires_grad
    assert torch.equal(measured.norms, measured.stacked.sum(0).sqrt())
    assert measured.input_grads is None
    assert measured.input_norms is None
    assert_measured(measured, truth(model.unwrap(), cross_entropy))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtype_of_the_norms(dtype, expected):
    model = engm.GradNormModule(network().to(dtype).eval())
    losses = cross_entropy(model)
    assert engm.measure(model, losses).stacked.dtype == expected
    norms = engm.per_example_grad_norms(model, losses)
    assert norms.dtype == expected
    exact = engm.naive_grad_norms(model, losses)
    assert exact.dtype == expected
    name = str(dtype).removeprefix("torch.")
    assert relative(norms, exact) <= TOLERANCE[f"norm, {name}"]


@pytest.mark.parametrize("batch_norm", ["calibrated", "frozen", "exact"])
def test_modes(batch_norm):
    model = engm.GradNormModule(network(), batch_norm=batch_norm)
    measured = engm.measure(model, cross_entropy(model))
    exact = batch_norm == "exact"
    assert measured.mode == ("exact" if exact else "frozen")
    assert_measured(measured, truth(model.unwrap().train(), cross_entropy, frozen=not exact))
    model.eval()
    assert engm.measure(model, cross_entropy(model)).mode == "plain"


def test_norms_by_mode():
    """Frozen norms raw, exact ones to the letter, calibrated ones exact where every example is in the probe's fit."""
    losses_of, expected = cross_entropy, {}
    for batch_norm in ("calibrated", "frozen", "exact"):
        model = engm.GradNormModule(network(), batch_norm=batch_norm)
        expected[batch_norm] = engm.per_example_grad_norms(model, losses_of(model))
    exact, frozen = (truth(network(), losses_of, frozen=frozen).norms for frozen in (False, True))
    assert relative(expected["exact"], exact) <= 1e-9
    assert relative(expected["frozen"], frozen) <= 1e-9
    assert relative(exact, frozen) > 0.01, "this batch would not tell the modes apart"
    assert relative((expected["calibrated"] / exact).square().mean(), torch.ones(())) <= 1e-9


def test_per_example_grad_norms_does_not_age_the_calibration():
    model = engm.GradNormModule(network(), calibrate_every=2)
    losses = cross_entropy(model)
    first = engm.per_example_grad_norms(model, losses)
    for _ in range(5):
        assert torch.equal(engm.per_example_grad_norms(model, losses), first)
    assert model.calibration.sample.draws == 1


# -- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["calibrated", "exact"])
@pytest.mark.parametrize("training", [False, True])
def test_input_gradients(training, batch_norm):
    model = engm.GradNormModule(network().train(training), batch_norm=batch_norm)
    x = X.clone().requires_grad_()
    losses = cross_entropy(model, x)
    measured = engm.measure(model, losses, x)
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    assert measured.input_grads.shape == x.shape
    assert relative(measured.input_norms, measured.input_grads.flatten(1).norm(dim=1)) <= 1e-12
    assert torch.equal(measured.input_grads, expected)
    assert_measured(measured, truth(model.unwrap(), cross_entropy, frozen=measured.mode == "frozen"))
    assert x.grad is None


def test_several_inputs_and_one_that_is_not_reached():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.layer(a * b)

    model = engm.GradNormModule(Sum().double())
    a, b, c = (tensor(5, 4, seed=k).requires_grad_() for k in range(3))
    losses = random_losses(model(a, b))
    expected = torch.autograd.grad(losses.sum(), (a, b), retain_graph=True)
    measured = engm.measure(model, losses, (a, b, c))
    assert isinstance(measured.input_grads, tuple)
    for got, wanted in zip(measured.input_grads, (*expected, torch.zeros_like(c)), strict=True):
        torch.testing.assert_close(got, wanted)
    wanted = (expected[0].square().sum(1) + expected[1].square().sum(1)).sqrt()
    assert relative(measured.input_norms, wanted) <= 1e-12


def test_inputs_that_are_not_leaves():
    model = plain()
    delta = torch.zeros_like(X).requires_grad_()
    x = X + delta
    losses = cross_entropy(model, x)
    (expected,) = torch.autograd.grad(losses.sum(), delta, retain_graph=True)
    torch.testing.assert_close(engm.measure(model, losses, x).input_grads, expected)
    torch.testing.assert_close(engm.measure(model, losses, delta).input_grads, expected)


def test_inputs_that_do_not_require_grad_are_one_clear_error():
    model = plain()
    losses = cross_entropy(model)
    with pytest.raises(ValueError, match="requires_grad_"):
        engm.measure(model, losses, X)
    with pytest.raises((TypeError, ValueError), match="tensor"):
        engm.measure(model, losses, ["x"])


def test_inside_an_attack():
    """The attack's last step measures instead of calling ``autograd.grad``; the step is the same to the bit."""
    model = plain()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = {"grad": X.clone(), "measure": X.clone()}
    for _ in range(3):
        for way in x:
            adversarial = x[way].detach().requires_grad_()
            losses = cross_entropy(model, adversarial)
            if way == "grad":
                (gradient,) = torch.autograd.grad(losses.sum(), adversarial)
            else:
                gradient = engm.measure(model, losses, adversarial).input_grads
            x[way] = adversarial + 0.05 * gradient.sign()
    assert torch.equal(x["grad"], x["measure"])
    assert all(bool((parameter.grad == 0).all()) for parameter in model.parameters())


# -- loss scale and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 65536.0])
@pytest.mark.parametrize("batch_norm", ["frozen", "exact", "calibrated"])
def test_loss_scale_is_divided_out(scale, batch_norm):
    model = engm.GradNormModule(network(), batch_norm=batch_norm)
    x = X.clone().requires_grad_()
    losses = cross_entropy(model, x)
    one, scaled = (engm.measure(model, losses, x, loss_scale=s) for s in (1.0, scale))
    assert relative(scaled.stacked.sum(0), one.stacked.sum(0)) <= 1e-12
    torch.testing.assert_close(scaled.input_grads, one.input_grads)
    norms = [engm.per_example_grad_norms(model, losses, loss_scale=s) for s in (1.0, scale)]
    assert relative(norms[1], norms[0]) <= 1e-9


def test_loss_scale_saves_what_half_precision_would_lose():
    """Losses of 1e-3 on an average of 4096 positions: float16 gradients of 2e-7, below its smallest normal number."""
    model = engm.GradNormModule(nn.Sequential(nn.Linear(4, 4)).half())
    x = tensor(3, 64, 4).half()

    def losses(m):
        return 3e-8 * m(x).float().sum((1, 2))

    expected = truth(model.unwrap(), lambda m: 3e-8 * m(x.double()).sum((1, 2))).norms
    assert relative(engm.measure(model, losses(model)).norms, expected) > 0.1
    assert relative(engm.measure(model, losses(model), loss_scale=2.0**20).norms, expected) <= 1e-2


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_loss_scale_must_be_positive_and_finite(scale):
    model = plain()
    with pytest.raises(ValueError, match="loss_scale"):
        engm.measure(model, cross_entropy(model), loss_scale=scale)


@pytest.mark.parametrize("norm", [lambda c: nn.BatchNorm2d(c).eval(), lambda c: nn.GroupNorm(2, c)])
def test_autocast(norm):
    model = engm.GradNormModule(network(norm).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(X.float())
    losses = F.cross_entropy(out.float(), Y, reduction="none")
    measured = engm.measure(model, losses)
    assert measured.stacked.dtype == torch.float32
    assert relative(measured.norms, engm.naive_grad_norms(model, losses)) <= TOLERANCE["norm, bfloat16"]


# -- several models ------------------------------------------------------------------------------------------------


def test_two_wrapped_models_in_one_loss():
    a = engm.GradNormModule(network().eval())
    b = engm.GradNormModule(network(lambda c: nn.GroupNorm(2, c)))

    def losses(first, second):
        return F.kl_div(F.log_softmax(first(X), 1), F.log_softmax(second(X), 1), reduction="none", log_target=True).sum(
            1
        )

    found = losses(a, b)
    assert_measured(engm.measure(a, found), truth(a.unwrap(), lambda m: losses(m, b.unwrap())))
    assert_measured(engm.measure(b, found), truth(b.unwrap(), lambda m: losses(a.unwrap(), m)))


def test_the_other_model_may_have_another_batch():
    """The other model's examples are its own affair; each loss has a gradient there that is of all of them."""
    model, other, rows = plain(), engm.GradNormModule(nn.Sequential(nn.Linear(4, 3)).double()), tensor(7, 4)

    def losses(m):
        return random_losses(m(X) - other(rows).mean(0))

    found = losses(model)
    assert_measured(engm.measure(model, found), truth(model.unwrap(), losses))
    expected = truth(other.unwrap(), lambda m: random_losses(model(X) - m(rows).mean(0)))
    assert_measured(engm.measure(other, found), expected)


def test_a_model_that_feeds_another():
    first = engm.GradNormModule(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)).double())
    second = engm.GradNormModule(network().eval())

    def losses(f, s):
        return F.cross_entropy(s(f(X)), Y, reduction="none")

    found = losses(first, second)
    assert_measured(engm.measure(first, found), truth(first.unwrap(), lambda m: losses(m, second.unwrap())))
    assert_measured(engm.measure(second, found), truth(second.unwrap(), lambda m: losses(first.unwrap(), m)))


def test_frozen_teacher_in_the_loss():
    teacher = network().eval().requires_grad_(False)

    def losses(m):
        return F.kl_div(F.log_softmax(m(X), 1), F.softmax(teacher(X), 1), reduction="none").sum(1)

    model = plain()
    assert_measured(engm.measure(model, losses(model)), truth(model.unwrap(), losses))


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [engm.measure, engm.per_example_grad_norms])
class TestErrors:
    def test_unwrapped_model(self, call):
        net = network()
        with pytest.raises(TypeError, match=r"GradNormModule\(net\), got Sequential"):
            call(net, cross_entropy(net))

    def test_losses_of_another_model(self, call):
        with pytest.raises(RuntimeError, match="another GradNormModule"):
            call(plain(), cross_entropy(plain()))

    def test_losses_of_the_bare_network(self, call):
        model = plain()
        with pytest.raises(RuntimeError, match="captured forward pass"):
            call(model, cross_entropy(model.unwrap()))

    def test_scalar(self, call):
        model = plain()
        with pytest.raises(ValueError, match="reduction='none'"):
            call(model, cross_entropy(model).mean())

    def test_matrix(self, call):
        model = plain()
        with pytest.raises(ValueError, match=r"\(5, 3\)"):
            call(model, model(X))

    def test_empty(self, call):
        model = plain()
        with pytest.raises(ValueError, match="empty"):
            call(model, cross_entropy(model)[:0])

    def test_no_graph(self, call):
        model = plain()
        with pytest.raises(ValueError, match="no graph"):
            call(model, cross_entropy(model).detach())

    def test_not_a_tensor(self, call):
        with pytest.raises(TypeError, match="list"):
            call(plain(), [0.5, 0.5])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, call, value):
        model = plain()
        x = X.clone()
        x[3] = value
        losses = cross_entropy(model, x)
        with pytest.raises(ValueError, match=r"\[3\] are not finite"):
            call(model, losses)
        found = call(model, losses, check=False)
        norms = found if isinstance(found, torch.Tensor) else found.norms
        assert torch.isfinite(norms).tolist() == [True, True, True, False, True]

    def test_subset_of_the_losses(self, call):
        model = plain()
        found = call(model, cross_entropy(model)[:3])
        norms = found if isinstance(found, torch.Tensor) else found.norms
        assert relative(norms, truth(model.unwrap(), cross_entropy).norms[:3]) <= 1e-9


def test_nothing_trained():
    net = network().eval().requires_grad_(False)
    model = engm.GradNormModule(net)
    with pytest.raises((ValueError, RuntimeError), match=r"require|captured"):
        engm.measure(model, cross_entropy(model, X.clone().requires_grad_()))


def test_measuring_inside_a_backward_pass_of_the_same_graph():
    model = plain()
    errors = []

    class Meddles(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            try:
                engm.measure(model, losses)
            except RuntimeError as error:
                errors.append(str(error))
            return gradient

    model.strict = False
    losses = Meddles.apply(cross_entropy(model))
    measured = engm.measure(model, losses)
    assert set(errors) == {"engm: this graph is being measured already (a measurement inside a backward hook?)."}
    assert_measured(measured, truth(model.unwrap(), cross_entropy))
