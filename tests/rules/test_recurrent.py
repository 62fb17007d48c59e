"""LSTM, GRU, RNN and their cells, with all their options, and what holds for every call that is seen as a whole."""

import gc
import weakref

import pytest
import torch
from engine_checks import TOLERANCE, check
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_losses, relative, tensor
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import engm
from engm.graph.trace import trace
from engm.rules import find_rule
from engm.rules.recurrent import RecurrentRule

pytestmark = pytest.mark.torch_insides

LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
X = tensor(4, 5, 3)


class Reader(nn.Module):
    """A recurrent layer between others, whose initial states and chosen outputs take part in the losses.

    Args:
        layer: the layer.
        start: compute initial states from the input.
        read: which of the outputs the network returns: 0 the sequence, 1 and 2 the last states.
        lengths: of the sequences, which are packed then.
    """

    def __init__(self, layer, start=False, read=(0, 1, 2), lengths=None):
        super().__init__()
        self.layer, self.read, self.lengths = layer, read, lengths
        hidden, cell = layer.proj_size or layer.hidden_size, layer.hidden_size
        self.before = nn.Linear(layer.input_size, layer.input_size)
        sizes = (hidden, cell) if isinstance(layer, nn.LSTM) else (hidden,)
        stacked = layer.num_layers * (2 if layer.bidirectional else 1)
        self.start = nn.ModuleList(nn.Linear(layer.input_size, stacked * size) for size in sizes) if start else None
        self.stacked = stacked

    def forward(self, x):  # [n, T, p]
        inputs = self.before(x)
        inputs = inputs if self.layer.batch_first else inputs.transpose(0, 1)
        if self.lengths is not None:
            ordered = self.lengths == sorted(self.lengths)[::-1]
            lengths, first = torch.tensor(self.lengths), self.layer.batch_first
            inputs = pack_padded_sequence(inputs, lengths, batch_first=first, enforce_sorted=ordered)
        states = None
        if self.start is not None:
            states = [f(x[:, 0]).reshape(len(x), self.stacked, -1).transpose(0, 1) for f in self.start]
            states = tuple(states) if isinstance(self.layer, nn.LSTM) else states[0]
        output, last = self.layer(inputs, states)
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, batch_first=True)
        elif not self.layer.batch_first:
            output = output.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        found = [output, *(torch.sin(state.transpose(0, 1)) for state in last)]
        return torch.cat([found[k].flatten(1) for k in self.read if k < len(found)], 1)


@st.composite
def layers(draw):
    """A layer with any options, and which of its outputs are read."""
    kind = draw(st.sampled_from(sorted(LAYERS)))
    hidden = draw(st.integers(2, 4))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if kind == "LSTM":
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = LAYERS[kind](draw(st.integers(1, 4)), hidden, **options)
    read = draw(st.lists(st.sampled_from([0, 1, 2] if kind == "LSTM" else [0, 1]), min_size=1, unique=True))
    return Reader(layer, draw(st.booleans()), tuple(read)).double()


class TestLayers:
    @settings(max_examples=8, deadline=None)
    @given(net=layers(), n=st.integers(1, 4), length=st.integers(1, 5))
    def test_all_options(self, net, n, length):
        x = tensor(n, length, net.layer.input_size)
        check(net, lambda m: random_losses(m(x)))

    @settings(max_examples=12, deadline=None)
    @given(net=layers(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
    def test_packed_sequences(self, net, lengths):
        net.lengths = lengths
        x = tensor(len(lengths), max(lengths), net.layer.input_size)
        check(net, lambda m: random_losses(m(x)))

    @pytest.mark.parametrize("kind", sorted(LAYERS))
    def test_single_sequence_without_a_batch(self, kind):
        class Single(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = LAYERS[kind](3, 4, num_layers=2)

            def forward(self, x):
                return self.layer(x[0])[0].unsqueeze(0)

        check(Single().double(), lambda m: random_losses(m(X[:1])))

    @pytest.mark.parametrize("kind", sorted(LAYERS))
    def test_float32(self, kind):
        net = Reader(LAYERS[kind](3, 4, num_layers=2, bidirectional=True, batch_first=True))
        check(net, lambda m: random_losses(m(X.to(next(m.parameters()).dtype))))

    def test_bfloat16(self):
        net = Reader(nn.GRU(3, 8, batch_first=True)).bfloat16()
        model = engm.GradNormModule(net)
        losses = random_losses(model(X.bfloat16()))
        norms = engm.measure(model, losses).norms
        assert norms.dtype == torch.float32
        assert relative(norms, engm.naive_grad_norms(model, losses)) <= TOLERANCE["norm, bfloat16"]

    def test_autocast(self):
        net = Reader(nn.GRU(3, 8, batch_first=True), start=True)
        model = engm.GradNormModule(net)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = random_losses(model(X.float()))
            norms = engm.measure(model, losses).norms
        assert relative(norms, engm.naive_grad_norms(model, losses)) <= TOLERANCE["norm, bfloat16"]

    @pytest.mark.parametrize("trained", ["bias", "weight_hh", "l1_reverse"])
    def test_some_parameters_frozen(self, trained):
        net = Reader(nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)).double()
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(trained in name)
        check(net, lambda m: random_losses(m(X)))

    def test_two_views_of_an_example(self):
        net = Reader(nn.GRU(3, 4, batch_first=True)).double()
        both = torch.cat([X, X + 1])
        check(net, lambda m: random_losses(m(both)).view(2, -1).sum(0), views=2)

    def test_called_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.LSTM(3, 3, batch_first=True)

            def forward(self, x):
                once, state = self.layer(x)
                return self.layer(once.flip(1), state)[0]

        check(Twice().double(), lambda m: random_losses(m(X)))

    def test_wrong_layout_is_refused(self):
        class Mistaken(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.GRU(3, 4)  # not batch_first: examples are taken for steps

            def forward(self, x):
                return self.layer(x)[0]

        model = engm.GradNormModule(Mistaken().double())
        losses = random_losses(model(tensor(4, 4, 3)))
        with pytest.raises(RuntimeError, match="layer"):
            engm.measure(model, losses)

    def test_explained(self):
        plan = engm.explain(Reader(nn.LSTM(3, 4, batch_first=True)), X.float())
        assert plan.supported
        assert {layer.name: layer.rule for layer in plan.layers} == {"before": "LinearRule", "layer": "RecurrentRule"}

    def test_cost_counts_every_matrix(self):
        layer = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        cost = find_rule(layer).cost(layer, (2, 7, 3), (2, 7, 4))
        assert cost.direct_flops == find_rule(layer).cost(layer, (9, 7, 3), (9, 7, 4)).direct_flops
        assert cost.direct_flops >= 2 * 7 * sum(p.numel() for p in layer.parameters() if p.dim() == 2)


class TestDropoutBetweenLayers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("kind", sorted(LAYERS))
    def test_masks_are_drawn_again(self, kind, packed, bidirectional, dtype):
        torch.manual_seed(3)
        layer = LAYERS[kind](3, 5, num_layers=3, dropout=0.4, bidirectional=bidirectional, batch_first=True)
        model = engm.GradNormModule(Reader(layer, lengths=[3, 5, 1, 2] if packed else None).to(dtype))
        losses = random_losses(model(X.to(dtype)))
        torch.rand(7)
        before = torch.get_rng_state()
        norms = engm.measure(model, losses).norms
        assert torch.equal(torch.get_rng_state(), before)
        precision = "float32" if dtype == torch.float32 else "float64"
        assert relative(norms, engm.naive_grad_norms(model, losses)) <= TOLERANCE[f"norm, {precision}"]

    def test_everything_dropped(self):
        net = Reader(nn.LSTM(3, 4, num_layers=2, dropout=1.0, batch_first=True)).double()
        check(net, lambda m: random_losses(m(X)))

    def test_none_in_evaluation_mode(self):
        net = Reader(nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)).double().eval()
        check(net, lambda m: random_losses(m(X)))

    @pytest.mark.parametrize("state", [None, torch.Generator().manual_seed(1).get_state()])
    def test_refused_where_the_masks_cannot_be_told(self, state, monkeypatch):
        monkeypatch.setattr(RecurrentRule, "before", lambda self, module: state)
        model = engm.GradNormModule(Reader(nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)).double())
        losses = random_losses(model(X))
        with pytest.raises(RuntimeError, match=r"layer 'layer' \(LSTM\) drops out.*nn\.Dropout between"):
            engm.measure(model, losses)


class TestWholeCalls:
    """What holds for every module that takes and returns several tensors."""

    @staticmethod
    def net(**options):
        return Reader(nn.LSTM(3, 4, batch_first=True, **options), start=True).double()

    def test_gradients_of_the_plain_model_are_unchanged(self):
        net = self.net(num_layers=2)
        found = []
        for model in (net, engm.GradNormModule(net)):
            x = X.clone().requires_grad_()
            found.append(torch.autograd.grad(random_losses(model(x)).sum(), [x, *net.parameters()]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_second_derivatives_of_the_plain_model_are_unchanged(self):
        net = self.net()
        found = []
        for model in (net, engm.GradNormModule(net)):
            x = X.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(random_losses(model(x)).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))
        for a, b in zip(*found, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

    def test_function_transforms_see_the_plain_model(self):
        net = self.net()
        model = engm.GradNormModule(net)

        def loss(module):
            return lambda p: random_losses(torch.func.functional_call(module, p, (X,))).sum()

        parameters = {name: p.detach() for name, p in net.named_parameters()}
        plain, ours = (torch.func.grad(loss(module))(parameters) for module in (net, model))
        assert all(torch.equal(plain[name], ours[name]) for name in plain)
        tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
        plain, ours = (torch.func.jvp(loss(module), (parameters,), (tangents,))[1] for module in (net, model))
        torch.testing.assert_close(plain, ours)

    def test_outputs_changed_in_place(self):
        class Changes(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.GRU(3, 4, batch_first=True)

            def forward(self, x):
                output, last = self.layer(x)
                torch.relu_(output)
                last.mul_(2)
                return torch.cat([output.flatten(1), last[0]], 1)

        check(Changes().double(), lambda m: random_losses(m(X)))

    def test_hook_of_the_user_on_one_output(self):
        class Hooked(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.GRU(3, 4, batch_first=True)

            def forward(self, x):
                output, last = self.layer(x)
                last.register_hook(lambda gradient: 3 * gradient)
                return torch.cat([output.flatten(1), last[0]], 1)

        check(Hooked().double(), lambda m: random_losses(m(X)))

    @pytest.mark.parametrize("backward", ["none", "plain", "measure", "both"])
    def test_calls_die_with_the_graph(self, backward):
        model = engm.GradNormModule(self.net(num_layers=2))
        gc.collect()
        gc.disable()
        try:
            losses = random_losses(model(X))
            calls = [weakref.ref(call) for call in trace(losses).calls]
            (whole,) = [ref() for ref in calls if ref().name == "layer"]
            inputs = [weakref.ref(activations) for activations in whole._activations]
            del whole
            assert len(inputs) == 3
            if backward in ("measure", "both"):
                engm.measure(model, losses)
            if backward in ("plain", "both"):
                losses.sum().backward()
                assert [ref() for ref in inputs] == [None] * 3
            del losses
            assert [ref() for ref in calls + inputs] == [None] * (len(calls) + 3)
        finally:
            gc.enable()

    def test_one_pass_backward_lets_the_inputs_go(self):
        model = engm.GradNormModule(self.net())
        losses = random_losses(model(X))
        inputs = [weakref.ref(t) for call in trace(losses).calls if call.name == "layer" for t in call._activations]
        engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), 1.0).backward(losses)
        assert [ref() for ref in inputs] == [None] * 3

    def test_no_hook_is_left_after_an_exception(self):
        class Fails(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.GRU(3, 4)

            def forward(self, x):
                self.layer(x.flatten())

        net = Fails()
        with pytest.raises(ValueError, match="GRU"):
            engm.GradNormModule(net)(X.float())
        assert not net.layer._forward_hooks
        assert not net.layer._forward_pre_hooks

    @pytest.mark.parametrize("how", ["in place", "replaced"])
    def test_parameters_changed_after_the_forward_pass(self, how):
        net = self.net()
        model = engm.GradNormModule(net, strict=False)
        losses = random_losses(model(X))
        with torch.no_grad():
            if how == "in place":
                net.layer.weight_hh_l0.add_(1)
            else:
                net.layer.weight_hh_l0 = nn.Parameter(net.layer.weight_hh_l0 + 1)
        with pytest.raises(RuntimeError, match=r"modified or replaced after its forward|modified by an inplace"):
            engm.measure(model, losses)

    def test_input_changed_after_the_layer_read_it(self):
        class Changes(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.GRU(3, 4, batch_first=True)

            def forward(self, x):
                x = x.clone()
                output, _ = self.layer(x)
                x.mul_(2)
                return output

        model = engm.GradNormModule(Changes().double(), strict=False)
        losses = random_losses(model(X))
        with pytest.raises(RuntimeError, match=r"modified in place|modified by an inplace"):
            engm.measure(model, losses)

    def test_measure_after_backward_is_one_clear_error(self):
        model = engm.GradNormModule(self.net())
        losses = random_losses(model(X))
        losses.sum().backward()
        with pytest.raises(RuntimeError, match=r"already backpropagated|second time"):
            engm.measure(model, losses)
