"""Modules without a rule of their own: found by running the module again, or refused with a reason."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, check, random_losses, relative, tensor, truth
from torch import nn

import engm
from engm.graph import planning as strict
from engm.graph.trace import trace
from engm.rules import fallback, find_rule
from engm.rules.arguments import Arguments, Frame

X = tensor(4, 3, 5)


@pytest.fixture
def run_again(monkeypatch):
    """Names of the modules' types that are run again."""
    found = []
    terms = fallback.GenericRule.terms

    def noted(self, module, *rest):
        found.append(type(module).__name__)
        return terms(self, module, *rest)

    monkeypatch.setattr(fallback.GenericRule, "terms", noted)
    return found


@pytest.fixture
def preferred(monkeypatch):
    """The engine runs modules again rather than to look at the operators inside, which could do most of these."""
    monkeypatch.setattr(strict, "set_aside", lambda traced, choices: {})


def losses_of(x=X):
    return lambda net: random_losses(net(x))


class Form(nn.Module):
    """A quadratic form of every position: no rule knows it."""

    def __init__(self, features=5, out=3):
        super().__init__()
        self.form = nn.Parameter(tensor(out, features, features))
        self.shift = nn.Parameter(tensor(out, seed=1))

    def forward(self, x):
        return torch.einsum("...p,dpq,...q->...d", x, self.form, torch.tanh(x)) + self.shift


class Around(nn.Module):
    """A module between two layers."""

    def __init__(self, inner, features=5):
        super().__init__()
        self.before, self.inner = nn.Linear(features, features), inner

    def forward(self, x, *args, **kwargs):
        found = self.inner(self.before(x), *args, **kwargs)
        return found if isinstance(found, torch.Tensor) else found[0]


class Cache:
    """An object among the arguments."""

    scale = 2.0


class Bare:
    """One that cannot be referred to weakly."""

    __slots__ = ()
    scale = 2.0


@pytest.mark.usefixtures("preferred")
class TestRight:
    @settings(max_examples=12, deadline=None)
    @given(n=st.integers(1, 5), lead=st.lists(st.integers(1, 4), max_size=2), sizes=st.tuples(*[st.integers(1, 4)] * 2))
    def test_any_shape(self, n, lead, sizes):
        net = Around(Form(*sizes), sizes[0]).double()
        check(net, losses_of(tensor(n, *lead, sizes[0])))

    @pytest.mark.parametrize("chunk", [1, 10_000])
    def test_chunks(self, chunk, monkeypatch):
        monkeypatch.setattr(fallback, "CHUNK_BYTES", chunk)
        check(Around(Form()).double(), losses_of())

    def test_float32(self, run_again):
        check(Around(Form()).float(), lambda net: random_losses(net(X.to(next(net.parameters()).dtype))))
        assert "Form" in run_again

    def test_autocast(self):
        class Product(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(5, 5))

            def forward(self, x):
                return torch.tanh(x @ self.weight) @ self.weight

        model = engm.GradNormModule(Around(Product()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = random_losses(model(X.float()))
        norms = engm.measure(model, losses).norms
        assert relative(norms, engm.naive_grad_norms(model, losses)) <= TOLERANCE["norm, bfloat16"]

    def test_some_parameters_frozen(self):
        net = Around(Form()).double()
        net.inner.form.requires_grad_(False)
        check(net, losses_of())

    def test_children_are_constants_with_rules_of_their_own(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
                self.gate = nn.Parameter(torch.randn(5, 5))
                self.deep = Form(5, 5)

            def forward(self, x):
                return self.norm(self.deep(torch.tanh(self.fc(x) @ self.gate)) @ self.gate)

        check(Around(Block()).double(), losses_of())

    def test_parameter_shared_with_a_child(self):
        class Shares(nn.Module):
            def __init__(self):
                super().__init__()
                self.form = Form(5, 5)
                self.tied = self.form.form

            def forward(self, x):
                return torch.einsum("...p,dpq->...d", self.form(x), self.tied)

        net = Around(Shares()).double()
        assert "inner.tied" in dict(net.named_parameters())
        check(net, losses_of())

    def test_several_rows_an_example(self):
        class Rows(Form):
            def forward(self, x):
                return super().forward(x).flatten(0, 1)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.rows = Rows()

            def forward(self, x):
                return self.rows(x).reshape(4, -1)

        check(Net().double(), losses_of())

    def test_called_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.form = Form(5, 5)

            def forward(self, x):
                return self.form(torch.tanh(self.form(x)))

        check(Twice().double(), losses_of())

    def test_two_views_of_an_example(self):
        both = torch.cat([X, X + 1])
        check(Around(Form()).double(), lambda m: random_losses(m(both)).view(2, -1).sum(0), views=2)

    def test_subclass_with_its_own_forward(self):
        class Loud(nn.Linear):
            def forward(self, input):
                return torch.tanh(super().forward(input)) * self.weight.sum()

        assert isinstance(find_rule(Loud(5, 5)), str)
        check(Around(Loud(5, 5)).double(), losses_of())

    def test_forward_replaced_on_the_object(self):
        net = Around(nn.Linear(5, 5)).double()
        plain = net.inner.forward
        net.inner.forward = lambda x: torch.sin(plain(x))
        model = engm.GradNormModule(net)
        losses = losses_of()(model)
        assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9


@pytest.mark.usefixtures("preferred")
class TestArguments:
    """Masks, scalars, keywords and nests go in; nests come out."""

    class Rich(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x, mask, extra=None, *, scale=1.0, names=("a",), flag=None):
            y = torch.tanh(x @ self.weight) * mask * scale
            for other in extra or ():
                y = y + other[:, None]
            return {"y": y, "rest": [y.sum(1) if flag is None else None, names, 7]}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rich, self.make = TestArguments.Rich(), nn.Linear(5, 5)

        def forward(self, x):
            h = self.make(x)
            found = self.rich(h, torch.linspace(0, 1, 5, dtype=x.dtype), [h.mean(1)], scale=0.5, names=("b", "c"))
            return torch.cat([found["y"].flatten(1), found["rest"][0]], 1)

    def test_of_all_kinds(self):
        check(self.Net().double(), losses_of())

    def test_output_without_a_batch_that_no_loss_needs(self):
        class Aside(Form):
            def forward(self, x):
                y = super().forward(x)
                return y, y.square().mean()

        check(Around(Aside()).double(), losses_of())

    def test_output_without_a_batch_that_the_losses_need(self):
        class Aside(Form):
            def forward(self, x):
                y = super().forward(x)
                return y, y.square().mean()

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Aside()

            def forward(self, x):
                y, penalty = self.inner(x)
                return y + penalty

        model = engm.GradNormModule(Net().double(), strict=False)
        with pytest.raises(RuntimeError, match=r"output of shape \(\) of module 'inner' \(Aside\).*register_rule"):
            engm.measure(model, losses_of()(model))

    def test_no_tensor_argument_is_no_call_of_the_batch(self):
        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(3, 5))

            def forward(self):
                return self.table * 2

        table = Table()
        assert fallback.GENERIC.batch(table, Arguments((), {}), [table()]) == 0

    def test_an_object_is_not_kept_alive(self):
        """It may lead back to the graph, a circle that would never be freed."""

        class Cached(Form):
            def forward(self, x, cache):
                return super().forward(x) * cache.scale

        class Net(Around):
            def forward(self, x, cache):
                cache.output = super().forward(x, cache)
                return cache.output * 2

        model = engm.GradNormModule(Net(Cached()).double())
        gc.collect()
        gc.disable()
        try:
            cache = Cache()
            losses = random_losses(model(X, cache))
            calls = [weakref.ref(call) for call in trace(losses).calls]
            assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9
            del losses, cache
            assert [ref() for ref in calls] == [None] * len(calls)
        finally:
            gc.enable()

    @pytest.mark.parametrize(("make", "why"), [(Cache, "Cache does not exist"), (Bare, "Bare cannot be kept")])
    def test_an_object_that_is_gone(self, make, why):
        class Configured(Form):
            def forward(self, x, config):
                return super().forward(x) * config.scale

        model = engm.GradNormModule(Around(Configured()).double())
        losses = random_losses(model(X, make()))
        with pytest.raises(RuntimeError, match=rf"'inner' cannot be run again.*{why}"):
            engm.measure(model, losses)

    def test_frame_puts_arguments_together_again(self):
        a, b = tensor(2), tensor(3)
        given_arguments = Arguments((a, [None, (b, 1)], "text"), {"flag": True, "more": {"a": a}})
        frame, tensors = Frame.split(given_arguments)
        assert [t is e for t, e in zip(tensors, (a, b, a), strict=True)] == [True] * 3
        again = frame.filled([t + 1 for t in tensors])
        assert again.args[1][1][1] == 1
        assert again.kwargs["flag"] is True
        assert torch.equal(again.args[1][1][0], b + 1)
        assert given_arguments.get(2, "text") == "text"
        assert given_arguments.get(3, "flag") is True
        assert given_arguments.get(3, "other") is None


@pytest.mark.usefixtures("preferred")
class TestWhereVmapCannotGo:
    class Branches(Form):
        """Control flow that depends on the data, and on nothing but the example's own."""

        def forward(self, x):
            rows = [super(TestWhereVmapCannotGo.Branches, self).forward(row) for row in x]
            return torch.stack([row if row[0, 0].item() > 0 else row.square() for row in rows])

    def test_examples_are_looped_over(self, monkeypatch):
        looped, batched = [], []
        plain, by_vmap = fallback._Run.looped, fallback._Run.batched
        monkeypatch.setattr(fallback._Run, "looped", lambda self, g: looped.append(1) or plain(self, g))
        monkeypatch.setattr(fallback._Run, "batched", lambda self, g: batched.append(1) or by_vmap(self, g))
        net = Around(self.Branches()).double()
        check(net, losses_of())
        assert len(looped) == 2  # a measurement and a step
        assert len(batched) == 1  # tried once

    def test_parameter_not_reached_for_some_examples(self):
        class Rarely(Form):
            def forward(self, x):
                y = x.sum(-1, keepdim=True).expand(*x.shape[:-1], 3)
                return torch.stack([r + self.shift if r.sum().item() > 0 else r for r in y])

        expected = truth(net := Around(Rarely()).double(), losses_of()).squared_norms["inner.shift"]
        assert 0 < int((expected == 0).sum()) < 4
        check(net, losses_of())


@pytest.mark.usefixtures("preferred")
class TestRefused:
    @staticmethod
    def refused(inner, train=True):
        model = engm.GradNormModule(Around(inner).double().train(train), strict=False)
        with pytest.raises(RuntimeError, match=rf"module 'inner' \({type(inner).__name__}\).*another output than the"):
            engm.measure(model, losses_of()(model))

    def test_random(self):
        class Drops(Form):
            def forward(self, x):
                return F.dropout(super().forward(x), 0.1, self.training)

        self.refused(Drops())
        check(Around(Drops()).double().eval(), losses_of())

    def test_batch_norm_in_training_mode(self):
        class Normalised(Form):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(3, affine=False)

            def forward(self, x):
                return self.norm(super().forward(x))

        self.refused(Normalised())
        check(Around(Normalised()).double().eval(), losses_of())

    def test_keeps_state(self):
        class Counts(Form):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return super().forward(x) * self.calls

        self.refused(Counts())

    def test_changes_its_input(self):
        class Changes(Form):
            def forward(self, x):
                return super().forward(x.mul_(2))

        self.refused(Changes())

    def test_mixes_examples(self):
        class Mixes(Form):
            def forward(self, x):
                return super().forward(x - x.mean(0))

        self.refused(Mixes())

    def test_output_of_zeros_is_no_excuse(self):
        class Zero(Form):
            def forward(self, x):
                return super().forward(x) * 0 + (x.shape[0] > 1) * 0.0

        check(Around(Zero()).double(), lambda net: random_losses(net(X) + 0 * X[..., :3]))

    def test_an_error_of_the_module_is_its_own(self):
        class Picky(Form):
            def forward(self, x):
                if x.shape[0] == 1:
                    raise KeyError("only in company")
                return super().forward(x)

        model = engm.GradNormModule(Around(Picky()).double())
        losses = losses_of()(model)
        with pytest.raises(KeyError, match="only in company"):
            engm.measure(model, losses)


@pytest.mark.usefixtures("preferred")
class TestNothingIsLeft:
    class Busy(Form):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.map = None

        def forward(self, x):
            y = super().forward(x)
            self.map = y
            self.extra = 1
            if self.training:
                with torch.no_grad():
                    self.mean.add_(1)
            return y

    def test_buffers_and_attributes(self):
        net = Around(self.Busy()).double()
        model = engm.GradNormModule(net)
        losses = losses_of()(model)
        before = dict(vars(net.inner))
        mean = net.inner.mean
        engm.measure(model, losses)
        assert net.inner.mean is mean
        assert bool((mean == 1).all())
        assert vars(net.inner).keys() == before.keys()
        assert all(vars(net.inner)[name] is value for name, value in before.items())

    def test_hooks_of_the_module_itself_do_not_run_again(self):
        net, seen = Around(Form()).double(), []
        net.inner.register_forward_hook(lambda *_: seen.append(1))
        model = engm.GradNormModule(net)
        engm.measure(model, losses_of()(model))
        assert len(seen) == 1

    @pytest.mark.parametrize("in_place", [False, True])
    def test_gradients_of_the_plain_model_are_unchanged(self, in_place):
        class Net(Around):
            def forward(self, x):
                y = super().forward(x)
                return torch.relu_(y) if in_place else y

        net = Net(Form()).double()
        found = []
        for model in (net, engm.GradNormModule(net)):
            x = X.clone().requires_grad_()
            found.append(torch.autograd.grad(losses_of(x)(model).sum(), [x, *net.parameters()]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        check(net, losses_of())

    def test_view_changed_in_place(self):
        class Part(Form):
            def forward(self, x):
                return super().forward(x)[..., :2]

        class Net(Around):
            def forward(self, x):
                return super().forward(x).mul_(2)

        check(Net(Part()).double(), losses_of())

    def test_calls_are_marked(self):
        model = engm.GradNormModule(Around(Form()).double())
        calls = {call.name: call for call in trace(losses_of()(model)).calls}
        assert calls["inner"].rule.generic
        assert not calls["before"].rule.generic


class TestWhenItIsUsed:
    """Where operators account for a parameter, they do."""

    def test_not_where_operators_can(self, run_again):
        class Drops(Form):
            def forward(self, x):
                return F.dropout(super().forward(x), 0.5)

        model = engm.GradNormModule(Around(Drops()).double())
        losses = losses_of()(model)
        assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9
        assert run_again == []

    def test_where_the_examples_lie_in_no_layout(self, run_again):
        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.rand(3, 5, 1))

            def forward(self, x):
                return (torch.tanh(x.permute(1, 2, 0) + self.weight) * self.weight).permute(2, 0, 1)

        net = Around(Turned()).double()
        check(net, losses_of())
        assert set(run_again) == {"Turned"}
        rows = {layer.name: layer.rule for layer in engm.explain(net, X).layers}
        assert rows == {"before": "LinearRule", "inner": "module run again"}

    def test_module_whose_parameters_take_no_part(self):
        class Idle(Form):
            def forward(self, x):
                return x * 2

        check(Around(Idle()).double(), losses_of())
