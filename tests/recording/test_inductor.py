"""Steps compiled by Inductor against steps by hand: the same draws, and the same numbers but for rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded_training import CLASSES, NETWORKS, OPTIMIZERS, TRACES_ALL, Training, batches, same
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import engm
from engm.recording import fused
from engm.recording.program import Program, cleaned, is_random

pytestmark = pytest.mark.torch_insides


class Compiled(Training):
    backend = "inductor"


def pair(name, dtype=torch.float64, **options):
    torch.manual_seed(3)
    net = NETWORKS[name]().to(dtype)
    return Compiled(copy.deepcopy(net), **options), Training(net, **options)


def both(a, b, data):
    """What compiled steps and steps by hand leave."""
    dtype = next(a.model.parameters()).dtype
    data = [(x.to(dtype), y) for x, y in data]
    return [[t.go(step, data), torch.get_rng_state()] for t, step in ((a, a.recorded), (b, b.by_hand))]


def assert_close(a, b, **tolerances):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerances)
    elif isinstance(a, dict | list | tuple):
        assert len(a) == len(b)
        for x, y in zip(*(v.values() if isinstance(v, dict) else v for v in (a, b)), strict=True):
            assert_close(x, y, **tolerances)
    else:
        assert a == b


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "name", "attacked"),
    [
        ("ENGM", "batch norm", True),  # running statistics, calibrations, dropout, draws within the attack
        ("ENGM", "transformer", False),
        ("A-ENGM", "group norm", True),
        ("MSGD", "LSTM", False),
    ],
)
def test_is_the_step_by_hand_but_for_rounding(optimizer, name, attacked):
    a, b = pair(name, optimizer=OPTIMIZERS[optimizer], attacked=attacked, calibrate_every=8)
    compiled, by_hand = both(a, b, batches(10))
    assert_close(compiled, by_hand, rtol=1e-9, atol=1e-12)
    assert a.recorded.report().replayed >= 5, a.recorded.report()


@pytest.mark.slow
def test_in_float32():
    a, b = pair("batch norm", torch.float32)
    ((figures, model, _), draws), ((figures_by_hand, model_by_hand, _), draws_by_hand) = both(a, b, batches(8))
    assert_close([figures, model, draws], [figures_by_hand, model_by_hand, draws_by_hand], rtol=1e-3, atol=1e-4)
    assert a.recorded.report().replayed >= 3, a.recorded.report()


@pytest.mark.slow
def test_an_attack_in_float32():
    """Signs may flip, and the program is accepted nevertheless; what it draws is the same."""
    a, b = pair("group norm", torch.float32, attacked=True)
    ((figures, *_), draws), ((figures_by_hand, *_), draws_by_hand) = both(a, b, batches(6))
    assert torch.equal(draws, draws_by_hand)
    assert_close(figures, figures_by_hand, rtol=0.1, atol=0.01)
    assert a.recorded.report().replayed == 4, a.recorded.report()


def as_it_is(module, inputs):
    """In Inductor's place: the graph, called by Python."""
    return torch.no_grad()(module)


@pytest.mark.parametrize("name", ["batch norm", "LSTM"])
def test_all_but_the_compiler(name, monkeypatch):
    """Constants and draws become inputs, with which the graph does the step to the bit."""
    monkeypatch.setattr(fused, "compiled_by_inductor", as_it_is)
    a, b = pair(name, attacked=True)
    assert same(*both(a, b, batches(8)))
    assert a.recorded.report().replayed >= 3, a.recorded.report()


@pytest.mark.parametrize("wrong", [1e-12, 1e-14])
def test_what_differs_by_more_than_rounding_is_refused(wrong, monkeypatch):
    def wrongly(module, inputs):
        return lambda *given: [t * (1 + wrong) if t.is_floating_point() else t for t in module(*given)]

    monkeypatch.setattr(fused, "compiled_by_inductor", wrongly)
    a, b = pair("group norm")
    results = both(a, b, batches(5))
    report = a.recorded.report()
    if wrong > 5e-13:
        assert report.refused == ["run by inductor, the recorded step gives other numbers than the step itself"]
        assert same(*results)
    else:
        assert report.replayed == 3


def test_what_draws_otherwise_is_refused(monkeypatch):
    def drawing(module, inputs):
        def run(*given):
            torch.rand(1)
            return module(*given)

        return run

    monkeypatch.setattr(fused, "compiled_by_inductor", drawing)
    a, b = pair("group norm")
    assert same(*both(a, b, batches(5)))
    assert "gives other numbers" in a.recorded.report().refused[0]


def test_draws_are_those_of_the_step(monkeypatch):
    monkeypatch.setattr(fused, "compiled_by_inductor", as_it_is)
    x = torch.ones(3, 4)

    def step(x):
        torch.rand_like(x)
        drawn = torch.zeros(5, 4).t()
        drawn[:, 1].bernoulli_(0.5)
        return [
            2 * x,
            drawn,
            torch.randint(9, (3,)),
            torch.empty_like(drawn).normal_(),
            *torch.native_dropout(x, 0.4, True),
        ]

    module = cleaned(make_fx(step, tracing_mode="real")(x))
    compiled = fused.Inductor().made(Program(module), module, [x])
    found = []
    for way in (lambda: compiled([x]), lambda: step(x)):
        torch.manual_seed(0)
        found.append([*way(), torch.get_rng_state()])
    assert same(*found)


def test_without_a_compiler_steps_run_as_they_are():
    import torch._inductor.config as config

    torch.manual_seed(0)
    t = Compiled(nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES)))
    data = batches(5)
    t.recorded(*data[0])
    with (
        config.patch({"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}),
        pytest.warns(RuntimeWarning, match="Inductor cannot compile the step: .*It runs without being compiled"),
    ):
        t.recorded(*data[1])
    for x, y in data[2:]:
        losses = t.recorded(x, y).losses
    assert torch.equal(losses, F.cross_entropy(t.model(x), y, reduction="none"))
    report = t.recorded.report()
    assert report.replayed == 0
    assert report.eager[report.refused[0]] == 4
    assert "ompiler" in report.refused[0], report.refused


def test_generators_of_the_users(monkeypatch):
    monkeypatch.setattr(fused, "compiled_by_inductor", as_it_is)
    found = []
    for t, recorded in zip(pair("group norm"), (True, False), strict=True):
        generator = torch.Generator().manual_seed(1)

        def losses(x, y, t=t, generator=generator):
            return t.losses(x + torch.randn(x.shape, generator=generator, dtype=x.dtype), y)

        step = engm.record(t.opt, losses, backend="inductor") if recorded else t.opt.backward
        data = [(x.double(), y) for x, y in batches(6)]
        found.append(t.go(step if recorded else lambda x, y, f=losses, t=t: t.opt.backward(f(x, y)), data))
        if recorded:
            assert step.report().replayed == (3 if TRACES_ALL else 0), step.report()
    assert same(*found)


def test_draws_whose_chances_are_computed_are_refused():
    t = Compiled(NETWORKS["group norm"]())
    step = engm.record(
        t.opt, lambda x, y: t.losses(x, y) * torch.bernoulli(x.mean((1, 2, 3)).sigmoid()), backend="inductor"
    )
    for x, y in batches(4):
        step(x, y)
    assert "by 'aten.bernoulli.default' for numbers that it computes" in step.report().refused[0]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_recurrent_layers_of_onednn_are_refused():
    a, b = pair("LSTM", torch.float32)
    assert same(*both(a, b, batches(4)))
    (reason,) = a.recorded.report().refused
    assert "oneDNN's recurrent layers" in reason


@pytest.mark.parametrize(("p", "draws"), [(0.0, False), (0.5, True)])
def test_attention_draws_where_it_drops_out(p, draws):
    query = torch.randn(2, 2, 4, 8)

    def attended(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attention = torch.ops.aten._scaled_dot_product_attention_math
        return list(flash(q, q, q)) if p == 0 else [attention(q, q, q, dropout_p=p)[0]]

    module = make_fx(attended, tracing_mode="real")(query)
    assert any(is_random(node) for node in module.graph.nodes if node.op == "call_function") == draws
