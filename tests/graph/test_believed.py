"""A rule is believed where the graph tells that its layer computed what the rule is for, and nowhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import engm
from engm.graph.believed import run_otherwise
from engm.graph.trace import trace

GAIN = [1.0]  # of what is between a parameter and its use; 1 is seen in no number


@pytest.fixture(autouse=True)
def gain() -> Iterator[None]:
    yield
    GAIN[0] = 1.0


def check(net: nn.Module, *batches: Any, strict: bool = True, gains: tuple[float, ...] = (1.0, 1.5, 0.5)) -> None:
    """Norms of one step a gain against one backpropagation an example."""
    model = engm.GradNormModule(net.double(), strict=strict)
    for k, gain in enumerate(gains):
        GAIN[0], batch = gain, batches[k % len(batches)]
        own = {name: p for name, p in trained(net).items() if p.is_leaf}
        expected = per_example_gradients(random_losses(net(batch)), own)
        measured = engm.measure(model, random_losses(model(batch)))
        assert relative(measured.norms, expected.norms) < 1e-9
        assert set(measured.squared_norms) == set(own)


class Scaled(nn.Parameter):
    """A parameter that what reads it finds scaled."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                return function(args[0], args[1] * GAIN[0], *args[2:])
            return function(*args, **(kwargs or {}))


class ScaledMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return function(args[0], args[1] * GAIN[0], *args[2:])
        return function(*args, **(kwargs or {}))


class ScaledLinear(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"] * GAIN[0]


class TransposedLinear(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"].t()


class ScaledNorm(nn.InstanceNorm1d):
    def _apply_instance_norm(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, self.weight * GAIN[0], self.bias, True, 0.0, self.eps)


class Within(nn.Module):
    """A network that has something around the call of its first layer."""

    def __init__(self, around: Callable[[nn.Module], Any], first: nn.Module | None = None) -> None:
        super().__init__()
        self.around, self.first, self.second = around, nn.Linear(6, 6) if first is None else first, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with self.around(self.first):
            y = self.first(x)
        y = y[0].mean(1) if isinstance(y, tuple) else y
        return self.second(y.tanh())


@contextmanager
def hook_in_front(layer: nn.Module) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, inputs, output: output * GAIN[0], prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def shape_in_front(layer: nn.Module) -> Iterator[None]:
    """What the layer returns is reshaped before the engine's hook sees it, and back again behind that."""
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: output.view(-1, 3), prepend=True),
        layer.register_forward_hook(lambda module, inputs, output: output.view(-1, 6)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attribute(layer: nn.Module) -> Iterator[None]:
    layer.__dict__["weight"] = layer._parameters["weight"] * GAIN[0]
    try:
        yield
    finally:
        del layer.__dict__["weight"]


@contextmanager
def other_function(layer: nn.Module) -> Iterator[None]:
    original = F.linear
    F.linear = lambda x, w, b=None: original(x * GAIN[0], w, b)
    try:
        yield
    finally:
        F.linear = original


@contextmanager
def other_weights(layer: Any) -> Iterator[None]:
    before = layer._flat_weights
    layer._flat_weights = [w * GAIN[0] for w in before]
    try:
        yield
    finally:
        layer._flat_weights = before


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "around", [lambda layer: ScaledMode(), hook_in_front, attribute, other_function], ids=["mode", "hook", "own", "F"]
)
def test_something_around_a_call(around, strict):
    check(Within(around), tensor(4, 6), strict=strict)


@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_output_that_is_reshaped_in_front(frozen):
    net = Within(shape_in_front)
    if frozen is not None:
        getattr(net.first, frozen).requires_grad_(False)
    check(net, tensor(4, 6), strict=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_other_weights_of_a_recurrent_layer(kind, strict):
    check(Within(other_weights, kind(2, 6, batch_first=True)), tensor(4, 3, 2), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [ScaledLinear, TransposedLinear])
def test_property_in_front_of_a_parameter(kind, strict):
    layer = nn.Linear(6, 6)
    layer.__class__ = kind
    check(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3)), tensor(4, 6), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_subclass_of_parameter(strict):
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[2].weight = Scaled(net[2].weight.detach())
    check(net, tensor(4, 6), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_forward_of_the_type_is_another(strict, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight * GAIN[0], self.bias))
    check(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), tensor(4, 6), strict=strict)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_that_computes_otherwise(affine):
    norm = ScaledNorm(2, affine=True)
    if not affine:
        norm.requires_grad_(False)
    check(nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 3)), tensor(4, 6))


@pytest.mark.parametrize("mode", ["frozen", "calibrated", "exact"])
def test_batch_norm_that_is_scaled(mode):
    """Its statistics are constants where those of a batch norm that is believed are, known of by its node alone."""

    class Called(nn.BatchNorm1d):
        @property
        def weight(self) -> Any:
            return self._parameters["weight"] * GAIN[0]

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    otherwise = nn.Sequential(*plain[:1], nn.BatchNorm1d(6), *plain[2:])
    otherwise[1].load_state_dict(plain[1].state_dict())
    otherwise[1].__class__ = Called
    x = tensor(4, 5)
    norms = []
    for net in (plain, otherwise):
        model = engm.GradNormModule(net.double(), batch_norm=mode, calibrate_examples=4)
        norms.append(engm.measure(model, random_losses(model(x))).norms)
    assert relative(norms[1], norms[0]) < 1e-9


class Generated(nn.Module):
    """A layer whose weight is computed of every example, rows of which are moved on the way."""

    def __init__(self, film: bool, mixing: bool = False) -> None:
        super().__init__()
        self.film, self.mixing = film, mixing
        self.layer: Any = nn.LayerNorm(5) if film else nn.Linear(5, 6)
        del self.layer.weight
        self.generator, self.head = nn.Linear(5, 5 if film else 30), nn.Linear(5 if film else 6, 1)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, order = batch
        w = torch.tanh(self.generator(x))
        w = w[order]
        if self.mixing:
            w = torch.where((order == torch.arange(len(x)))[:, None], w, w.roll(1, 0) + w)
        rows = []
        for k in range(len(x)):
            self.layer.weight = w[k] if self.film else w[k].view(6, 5)
            rows.append(self.layer(y[k : k + 1]))
        return self.head(torch.tanh(torch.cat(rows)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("film", [True, False])
def test_weight_computed_of_every_example(film, strict):
    orders = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 2], [3, 2, 1, 0]]
    batches = [(tensor(4, 5, seed=k), tensor(4, 5, seed=9), torch.tensor(order)) for k, order in enumerate(orders)]
    net = Generated(film).double()
    model = engm.GradNormModule(net, strict=strict)
    optimizer = engm.ENGM(model, torch.optim.SGD(net.parameters(), lr=0.0), 1.0)
    for batch in batches:
        expected = per_example_gradients(net(batch)[:, 0], trained(net))
        assert relative(optimizer.backward(model(batch)[:, 0]).norms, expected.norms) < 1e-9


@pytest.mark.parametrize("film", [True, False])
def test_examples_that_meet_in_a_computed_weight(film):
    model = engm.GradNormModule(Generated(film, mixing=True).double())
    optimizer = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.0), 1.0)
    for _ in range(2):
        optimizer.backward(model((tensor(4, 5), tensor(4, 5, seed=1), torch.arange(4)))[:, 0])
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        optimizer.backward(model((tensor(4, 5), tensor(4, 5, seed=1), torch.tensor([0, 1, 3, 2])))[:, 0])


class Users(nn.Module):
    """A layer with a rule of the user's, which reads what a generator made besides its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.other = nn.Parameter(torch.rand(5)), None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.other


@engm.register_rule(Users)
def _of_users(module: nn.Module, x: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    return {"scale": x * backprops}


def test_what_a_layer_with_a_users_rule_reads_besides_is_looked_at():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.layer, self.head = nn.Linear(5, 5), Users(), nn.Linear(5, 1)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, order = batch
            self.layer.other = torch.tanh(self.generator(x))[order]
            return self.head(torch.tanh(self.layer(x)))[:, 0]

    net = Net().double()
    model = engm.GradNormModule(net)
    optimizer = engm.ENGM(model, torch.optim.SGD(net.parameters(), lr=0.0), 1.0)
    for k, order in enumerate([[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3]]):
        batch = tensor(4, 5, seed=k), torch.tensor(order)
        expected = per_example_gradients(net(batch), trained(net))
        assert relative(optimizer.backward(model(batch)).norms, expected.norms) < 1e-9


def test_computed_tensor_among_the_parameters():
    """As fastai's weight drop puts one there."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.raw = nn.Parameter(self.layer.weight.detach().clone())
            self._write()

        def _write(self) -> None:
            self.layer._parameters["weight"] = self.raw * GAIN[0]

        def forward(self, x: Tensor) -> Tensor:
            self._write()
            return self.layer(x)

    check(Dropped(), tensor(4, 6))


LOW = torch.bfloat16
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear of positions": (lambda: nn.Linear(4, 6), (5, 2, 3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (5, 3, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (5, 4, 6, 6)),
    "conv same": (lambda: nn.Conv1d(4, 6, 2, padding="same"), (5, 4, 6)),
    "conv reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 6, 6)),
    "conv circular": (lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (5, 4, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "batch norm, evaluated": (lambda: nn.BatchNorm1d(4).eval(), (5, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (5, 4, 3, 3)),
    "instance norm, running": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), (5, 4, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (5, 3, 4)),
    "prelu": (lambda: nn.PReLU(4), (5, 4, 3)),
    "prelu of one": (lambda: nn.PReLU(), (5, 4)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), (5, 2, 4)),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), (5, 2, 4)),
    "rnn": (lambda: nn.RNN(4, 3, bias=False), (5, 2, 4)),
    "lstm with dropout": (lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5), (5, 2, 4)),
    "lstm with projections": (lambda: nn.LSTM(4, 3, proj_size=2), (5, 2, 4)),
    "gru with dropout": (lambda: nn.GRU(4, 3, num_layers=2, dropout=0.5), (5, 2, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 3), (5, 4)),
    "gru cell": (lambda: nn.GRUCell(4, 3), (5, 4)),
    "rnn cell": (lambda: nn.RNNCell(4, 3, nonlinearity="relu"), (5, 4)),
}


def disbelieved(layer: nn.Module, *inputs: Any) -> set[int]:
    model = engm.GradNormModule(layer)
    out = model(*inputs)
    while isinstance(out, tuple):
        out = out[0]
    traced = trace(out.double().flatten(1).sum(1), model, model.trainable_parameters())
    assert traced.calls
    return run_otherwise(traced)


@pytest.mark.parametrize("given", ["data", "computed", "leaf"])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, LOW, "autocast"])
@pytest.mark.parametrize("kind", LAYERS)
def test_ordinary_layers_are_believed(kind, precision, given):
    make, shape = LAYERS[kind]
    dtype = torch.float32 if precision == "autocast" else precision
    x = tensor(*shape, dtype=dtype).requires_grad_(given != "data")
    x = x * 2 if given == "computed" else x
    with torch.autocast("cpu", LOW) if precision == "autocast" else nullcontext():
        assert not disbelieved(make().to(dtype), x)
        strange = x.transpose(0, 1).contiguous().transpose(0, 1)  # with other strides
        assert not disbelieved(make().to(dtype), strange)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "linear of positions", "conv", "batch norm", "layer norm", "group norm"])
def test_layers_of_which_a_part_is_frozen_are_believed(kind, frozen):
    make, shape = LAYERS[kind]
    layer = make().double()
    getattr(layer, frozen).requires_grad_(False)
    assert not disbelieved(layer, tensor(*shape))
    assert not disbelieved(layer, tensor(*shape).transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("options", [{}, {"padding_idx": -1}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_tables_are_believed(options):
    indices = torch.tensor([[0, 1, 2], [4, 4, 0]])
    assert not disbelieved(nn.Embedding(5, 3, **options), indices)
    for mode in ("sum", "mean"):
        assert not disbelieved(nn.EmbeddingBag(5, 3, mode=mode, **options), indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, LOW])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_and_initial_states_are_believed(kind, dtype):
    layer = kind(4, 3, bidirectional=True).to(dtype)
    x = (tensor(5, 3, 4, dtype=dtype)).requires_grad_()
    lengths = torch.tensor([2, 5, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x * 2, lengths, enforce_sorted=False)
    assert not disbelieved(layer, packed)
    state = tensor(2, 3, 3, dtype=dtype).requires_grad_() * 2
    assert not disbelieved(layer, x, (state, state) if kind is nn.LSTM else state)
    assert not disbelieved(layer, x[:, 0], None)


def test_bilinear_and_sparse_inputs_are_believed():
    assert not disbelieved(nn.Bilinear(4, 5, 3), tensor(2, 4).float(), tensor(2, 5).float())
    assert not disbelieved(nn.Linear(4, 3), torch.eye(4).to_sparse())


# -- options that are others than the layer was made with --------------------------------------------------------------


def with_options(layer: nn.Module, **options: Any) -> nn.Module:
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor(*shape, seed=k)) for k, shape in enumerate(shapes)]


IMAGES = (4, 3, 6, 6)
CHANGED: dict[str, Callable[[], nn.Module]] = {
    "stride": lambda: with_options(nn.Conv2d(3, 3, 3, padding=1), stride=2),
    "list of strides": lambda: with_options(nn.Conv2d(3, 3, 3, padding=1), stride=[2, 1]),
    "dilation and padding": lambda: with_options(nn.Conv2d(3, 3, 3), dilation=2, padding=2),
    "kernel": lambda: with_options(nn.Conv2d(3, 3, 4, stride=2), weight=parameters((3, 3, 2, 2))[0]),
    "reflection": lambda: with_options(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), padding=(2, 2)),
    "stride of a transposed one": lambda: with_options(nn.ConvTranspose2d(3, 3, 3), stride=2),
    "prelu": lambda: with_options(nn.PReLU(), weight=parameters((3,))[0]),
    "prelu of one": lambda: with_options(nn.PReLU(3), weight=parameters((1,))[0]),
    "pruned": lambda: with_options(
        nn.GroupNorm(1, 8), **dict(zip(("weight", "bias"), parameters((3,), (3,)), strict=True))
    ),
    "running statistics": lambda: with_options(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), track_running_stats=False
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", CHANGED)
def test_options_that_were_changed(kind, strict):
    net = nn.Sequential(CHANGED[kind](), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    check(net, tensor(*IMAGES), strict=strict)


def test_padding_that_is_changed_under_a_plan():
    """The layer pads as it did before."""
    layer = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    net = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    model = engm.GradNormModule(net, strict=False)
    for padding in ((1, 1), (1, 1), (2, 2), [2, 2]):
        layer.padding = padding
        expected = per_example_gradients(random_losses(net(tensor(*IMAGES))), trained(net))
        assert relative(engm.measure(model, random_losses(model(tensor(*IMAGES)))).norms, expected.norms) < 1e-9


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_padding_index_that_counts_from_the_end(kind, strict):
    table = with_options(kind(5, 3), padding_idx=-1)
    net = nn.Sequential(table, nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(4, 3, dtype=torch.long))
    batches = [torch.randint(4 if k == 0 else 5, (4, 3), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    check(net, *batches, strict=strict)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_table_that_was_grown(kind):
    table = with_options(kind(5, 3), weight=parameters((9, 3))[0])
    net = nn.Sequential(table, nn.Flatten(), nn.LazyLinear(2)).double()
    net(torch.zeros(4, 3, dtype=torch.long))
    check(net, torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(0)))


@contextmanager
def switched(layer: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(layer, name)
    setattr(layer, name, value)
    try:
        yield
    finally:
        setattr(layer, name, before)


def test_options_of_recurrent_layers_that_are_switched_around_a_call():
    for layer, name, value, shape in (
        (nn.RNNCell(2, 6), "nonlinearity", "relu", (4, 2)),
        (nn.LSTM(2, 6), "batch_first", True, (4, 3, 2)),
    ):
        check(Within(lambda layer, n=name, v=value: switched(layer, n, v), layer), tensor(*shape), strict=False)


def test_calls_of_a_cell_with_several_nonlinearities():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.RNNCell(2, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for k in range(4):
                self.cell.nonlinearity = ("tanh", "relu")[k % 2]
                state = self.cell(x[:, k], state)
            return self.head(state)

    check(Net(), tensor(4, 4, 2), strict=False)


def test_bilinear_layer_of_one_example():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(5, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(row, row) for row in x])

    check(Net(), tensor(4, 5))
