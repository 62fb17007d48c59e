"""Steps as CUDA graphs: on the CPU with a double in the graph's place, and on a GPU against steps by hand."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from device_cases import DEVICE, cuda_only, gpu
from graph_double import Double
from recorded_training import CLASSES, NETWORKS, OPTIMIZERS, TRACES_ALL, Training, batches, same
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import engm
from engm.recording.cuda_graph import CudaGraphs, OnDevice
from engm.recording.program import Replay, cleaned
from engm.recording.step import RecordedStep
from engm.recording.waits import obstacles

pytestmark = pytest.mark.torch_insides


def with_double(t):
    t.recorded = RecordedStep(t.opt, t.losses, CudaGraphs(Double, "cpu"))
    return t


def pair(name="batch norm", **options):
    torch.manual_seed(3)
    net = NETWORKS[name]()
    return with_double(Training(copy.deepcopy(net), **options)), Training(net, **options)


CASES = [("ENGM", name, attacked) for name in NETWORKS for attacked in (False, True)]
CASES += [(optimizer, "batch norm", True) for optimizer in OPTIMIZERS if optimizer != "ENGM"]


@pytest.mark.parametrize(("optimizer", "name", "attacked"), CASES)
def test_is_the_step_by_hand(optimizer, name, attacked):
    a, b = pair(name, optimizer=OPTIMIZERS[optimizer], attacked=attacked, calibrate_every=8)
    data = batches(16, (5, 4))
    assert same(a.go(a.recorded, data), b.go(b.by_hand, data)), a.recorded.report()
    report = a.recorded.report()
    assert report.replayed >= (4 if TRACES_ALL or optimizer != "ENGM auto" else 0), report
    assert not report.refused or not TRACES_ALL


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradients_accumulate_in_memory_of_their_own(every, to_none):
    a, b = pair(attacked=True)
    for number, (x, y) in enumerate(batches(12)):
        for t, step in ((a, a.recorded), (b, b.opt)):
            torch.manual_seed(number)
            if t is a:
                t.stats = step(x, y, divisor=every * len(x))
            else:
                losses, measurement = t.losses(x, y)
                t.stats = step.backward(losses, measurement=measurement, divisor=every * len(x))
        assert same(vars(a.stats), vars(b.stats))
        assert same([p.grad for p in a.model.parameters()], [p.grad for p in b.model.parameters()])
        for t in (a, b):
            if number % every == every - 1:
                t.opt.step()
                t.opt.zero_grad(set_to_none=to_none)
    assert a.recorded.report().replayed >= 8


def test_what_a_step_returns_stays():
    """Figures and gradients of one step are none of the memory that the next one writes into."""
    t, _ = pair("group norm")
    kept = []
    for number, (x, y) in enumerate(batches(6)):
        torch.manual_seed(number)
        stats = t.recorded(x, y)
        found = [*vars(stats).values(), *(p.grad for p in t.model.parameters())]
        kept += [(tensor, tensor.clone()) for tensor in found if isinstance(tensor, torch.Tensor)]
        t.opt.zero_grad()
    assert t.recorded.report().replayed == 4
    assert all(same(tensor, value) for tensor, value in kept)


def test_options_and_calibrations_between_steps():
    a, b = pair(calibrate_every=4)
    results = []
    for t, step in ((a, a.recorded), (b, b.by_hand)):
        found = []
        for round_, alpha in enumerate((0.5, 0.01, 0.5, 2.0)):
            t.opt.alpha = alpha
            found.append(t.go(step, batches(6), seed=10 * round_))
        results.append(found)
    assert same(*results)
    assert a.recorded.report().replayed >= 4, a.recorded.report()
    assert a.recorded.report().eager["a calibration is due"] >= 2


def test_memory_that_was_moved_is_noticed():
    """A tensor that is the same object, but has other memory: what the graph reads is no longer there."""
    results = []
    for t in pair("group norm"):
        t.level = torch.ones(3)
        plain = t.losses

        def losses(x, y, t=t, plain=plain):
            return plain(x, y) * t.level.sum()

        step = RecordedStep(t.opt, losses, CudaGraphs(Double, "cpu"))
        way = step if not results else lambda x, y, t=t, losses=losses: t.opt.backward(losses(x, y))
        first = t.go(way, batches(4))
        t.level.set_(torch.full((3,), 2.0))
        results.append([first, t.go(way, batches(4))])
        if way is step:
            assert step.report().eager["tensors that the step reads were replaced by others: write into the old"] == 1
            assert step.report().recorded == 2
    assert same(*results)


def test_programs_share_what_captures():
    t, _ = pair("group norm")
    before = len(Double.made)
    t.go(t.recorded, batches(12, (5, 4)))
    (double,) = Double.made[before:]
    assert len(double.graphs) == t.recorded.report().recorded == 2
    assert double.turns == t.recorded.report().replayed + 2


def test_a_capture_that_fails_is_a_reason():
    class Fails(Double):
        def captured(self, work, generators):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    a, b = pair()
    a.recorded = RecordedStep(a.opt, a.losses, CudaGraphs(Fails, "cpu"))
    data = batches(6)
    assert same(a.go(a.recorded, data), b.go(b.by_hand, data))
    (reason,) = a.recorded.report().refused
    assert reason == (
        "the step cannot be captured as a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    )


@pytest.mark.skipif(DEVICE.type == "cuda" and torch.cuda.is_available(), reason="there is a CUDA device")
def test_needs_a_cuda_device():
    t = Training(NETWORKS["group norm"]())
    with pytest.raises(ValueError, match=r"needs a model on one CUDA device, .* are on cpu: .*backend='replay'"):
        engm.record(t.opt, t.losses, backend="cudagraph")


# Every optimizer on two networks, every network under four optimizers.
HALF = [
    (optimizer, name) for i, optimizer in enumerate(OPTIMIZERS) for k, name in enumerate(NETWORKS) if (i + k) % 2 == 0
]


@pytest.mark.parametrize(("optimizer", "name"), HALF)
def test_nothing_waits_in_the_steps_of_our_own(optimizer, name, monkeypatch):
    """No operator of any optimizer, on any of the networks and with an attack, needs the host."""
    found = []

    def made(_, program, module, inputs):
        found.append(obstacles(module, torch.device("cpu")))
        return program

    monkeypatch.setattr(Replay, "made", made)
    t = Training(NETWORKS[name](), optimizer=OPTIMIZERS[optimizer], attacked=True)
    t.go(t.recorded, batches(3))
    assert found == ([[]] if TRACES_ALL or optimizer != "ENGM auto" else []), t.recorded.report()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_asked_of_a_device_and_in_what_order(fails, monkeypatch):
    asked = []

    def noting(name):
        return lambda *_: asked.append(name)

    @contextmanager
    def graph(*_, **__):
        asked.append("capture")
        yield
        if fails:
            raise RuntimeError("no")

    stream = SimpleNamespace(wait_stream=noting("wait for a stream"), wait_event=noting("wait for the last use"))
    generator = SimpleNamespace(clone_state=lambda: 0, graphsafe_set_state=noting("mend the generator"))
    fakes = {
        "Stream": lambda _: stream,
        "Event": lambda: SimpleNamespace(record=noting("used")),
        "CUDAGraph": lambda: SimpleNamespace(register_generator_state=noting("register"), replay=noting("replay")),
        "graph": graph,
        "device": nullcontext,
        "stream": nullcontext,
        "graph_pool_handle": lambda: 0,
        "current_stream": lambda: stream,
        "current_device": lambda: 0,
        "default_generators": [generator],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capturing = OnDevice(torch.device("cuda:0"))
    begun = ["wait for the last use", "wait for a stream", *["run"] * 3, "wait for a stream"]
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            capturing.captured(lambda: asked.append("run"), [])
        assert asked == [*begun, "capture", "run", "mend the generator", "used"]
    else:
        captured = capturing.captured(lambda: asked.append("run"), [generator])
        with capturing.turn():
            captured.replay()
        assert asked[: len(begun)] == begun
        assert asked[len(begun) :] == ["register", "capture", "run", "used", "wait for the last use", "replay", "used"]


# -- what cannot be in a graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x[x > 0], "'index.Tensor' returns as many numbers as the data say"),
        (lambda x: x.nonzero(), "'nonzero' returns as many"),
        (lambda x: torch.masked_select(x, x > 0), "'masked_select' returns as many"),
        (lambda x: torch.unique(x), "returns as many"),
        (lambda x: x.clone().index_put_((x > 0,), torch.zeros(())), "'index_put_' writes where a mask says"),
        (lambda x: x.to_sparse().coalesce(), "sparse"),
        (lambda x: x.mul_(2), "writes into its inputs"),
        (lambda x: x.view(-1)[:2].zero_() + 1, "writes into its inputs"),
        (lambda x: x.exp()[torch.tensor([0, 1])], None),
        (lambda x: torch.where(x > 0, x, 0).masked_fill(x < 1, 2).cumsum(0), None),
        (lambda x: x.clone().mul_(2), None),
    ],
)
def test_operators_that_wait(function, words):
    module = make_fx(lambda x: [function(x)], tracing_mode="real")(torch.randn(4, 3))
    found = obstacles(cleaned(module), torch.device("cpu"))
    assert found[:1] == [] if words is None else words in found[0], found


CONSTANT = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, a, _: x * a, None),  # a number on the host becomes one on the device
        (lambda x, a, b: x + b.to(x.device), "a tensor of another device: move the batch before"),
        (lambda x, a, _: x * torch.tensor(0.5), None),
        (lambda x, a, _: x * torch.tensor(0.5).to(x.device), "'_to_copy' works on a tensor of cpu"),
        (lambda x, a, _: x * CONSTANT, "'mul.Tensor' works on a tensor of cpu, which is read when"),
        (lambda x, a, _: x * torch.rand(()), "works on a tensor of cpu"),
        (lambda x, a, _: x * (2 * a), "works on a tensor of cpu"),
    ],
)
def test_tensors_of_other_devices(function, words):
    """Tensors without memory stand for the device here."""
    inputs = torch.ones(3, device="meta"), torch.tensor(0.5), torch.ones(3)
    module = make_fx(lambda *given: [function(*given)], tracing_mode="real")(*inputs)
    found = obstacles(cleaned(module), torch.device("meta"))
    assert found[:1] == [] if words is None else words in found[0], found


def test_a_step_that_would_wait_is_refused_and_runs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(72, CLASSES)

        def forward(self, x):
            h = self.layer(x.flatten(1))
            kept = torch.zeros_like(h)
            kept[:, torch.tensor([True, False, True])] = 1.0
            return h * kept

    torch.manual_seed(0)
    net = Masked()
    a, b = with_double(Training(copy.deepcopy(net))), Training(net)
    data = batches(5)
    assert same(a.go(a.recorded, data), b.go(b.by_hand, data))
    (reason,) = a.recorded.report().refused
    assert reason.startswith("a CUDA graph cannot hold this step: 'index_put_"), reason


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_cuda(test):
    for mark in (*gpu, cuda_only):
        test = mark(test)
    return test


class Captured(Training):
    backend = "cudagraph"


def on_gpu(name, **options):
    torch.manual_seed(3)
    net = NETWORKS[name]().to(DEVICE)
    return Captured(copy.deepcopy(net), **options), Training(net, **options)


@on_cuda
@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("optimizer", ["ENGM", "MSGD", "A-ENGM", "SNGM"])
def test_on_a_gpu_is_the_step_by_hand(optimizer, name, attacked):
    if optimizer == "A-ENGM" and not attacked:
        pytest.skip("reads input gradients, which the loss function has to measure")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        a, b = on_gpu(name, optimizer=OPTIMIZERS[optimizer], attacked=attacked, calibrate_every=8)
        data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(24, (5, 4))]
        assert same(a.go(a.recorded, data), b.go(b.by_hand, data)), a.recorded.report()
    finally:
        torch.use_deterministic_algorithms(False)
    assert a.recorded.report().replayed >= 4, a.recorded.report()


@on_cuda
@pytest.mark.parametrize("to_none", [True, False])
def test_on_a_gpu_from_several_streams(to_none):
    """Steps on streams that take turns, with gradients that accumulate over two."""
    a, b = on_gpu("group norm")
    streams = [torch.cuda.Stream() for _ in range(2)]
    for number, (x, y) in enumerate([(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(12)]):
        stream = streams[number % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for t, step in ((a, a.recorded), (b, b.by_hand)):
                torch.manual_seed(number)
                t.stats = step(x, y)
        torch.cuda.current_stream().wait_stream(stream)
        assert same([p.grad for p in a.model.parameters()], [p.grad for p in b.model.parameters()])
        for t in (a, b):
            if number % 2:
                t.opt.step()
                t.opt.zero_grad(set_to_none=to_none)
    assert a.recorded.report().replayed >= 8


@on_cuda
def test_on_a_gpu_nothing_waits():
    """A replayed step does not make the host wait for the device."""
    a, _ = on_gpu("batch norm", attacked=True, calibrate_every=1000)
    data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(12)]
    a.go(a.recorded, data)
    x, y = data[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = a.recorded(x, y).losses
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses).all()


@on_cuda
def test_on_a_gpu_a_failed_capture_leaves_the_generator_usable():
    class Waits(Captured):
        def losses(self, x, y):
            losses = super().losses(x, y)
            return losses * torch.multinomial(losses.detach().exp(), 1).ne(-1)

    torch.manual_seed(3)
    t = Waits(NETWORKS["group norm"]().to(DEVICE))
    t.go(t.recorded, [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(5)])
    assert torch.isfinite(torch.rand(3, device=DEVICE)).all()
    assert F.dropout(torch.ones(9, device=DEVICE)).numel() == 9
