"""Modules without a rule of their own: found by running the module again, or refused with a reason."""

import gc
import weakref

import pytest
import torch
from engine_checks import TOLERANCE, check
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_losses, relative, tensor
from torch import nn
from unknown_modules import Around, Form, X, losses_of

import engm
from engm.graph.trace import trace
from engm.rules import fallback, find_rule
from engm.rules.arguments import Arguments, Frame

pytestmark = pytest.mark.torch_insides


class Cache:
    """An object among the arguments."""

    scale = 2.0


class Bare:
    """An object that cannot be referred to weakly."""

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
        with pytest.raises(RuntimeError, match=r"layer 'inner' \(Aside\) for some examples influences"):
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
        """The object may lead back to the graph, a circle that would never be freed."""

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
