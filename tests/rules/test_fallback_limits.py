"""Where running a module again is refused, what it must leave alone, and when operators are looked at instead."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import check
from oracle import random_losses, relative, truth
from torch import nn
from unknown_modules import Around, Form, X, losses_of

import engm
from engm.graph.trace import trace
from engm.rules import fallback

pytestmark = pytest.mark.torch_insides


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
        assert len(looped) == 2  # a measurement and a step; the comparison with autograd's takes the former's terms
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
        assert not run_again
        rows = {layer.name: layer.rule for layer in engm.explain(net, X).layers}
        assert rows == {"before": "LinearRule", "inner.weight": "operator"}

    def test_module_whose_parameters_take_no_part(self):
        class Idle(Form):
            def forward(self, x):
                return x * 2

        check(Around(Idle()).double(), losses_of())
