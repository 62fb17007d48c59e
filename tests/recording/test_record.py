"""Recorded steps against the same steps without recording: the same bits, whatever the network, optimizer and data."""

import copy
import gc
import random
import re
import sysconfig
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, trained
from recorded_training import CLASSES, NETWORKS, OPTIMIZERS, TRACES_ALL, N, Training, batches, same
from torch import nn

import engm
from engm.recording.places import is_followed
from engm.recording.program import hang_on_data, recorded

pytestmark = pytest.mark.torch_insides


def assert_the_same(net, data, least, **options):
    """Recorded steps leave what steps by hand leave, and at least so many of them were replayed."""
    recorded, plain = Training(copy.deepcopy(net), **options), Training(net, **options)
    assert same(recorded.go(recorded.recorded, data), plain.go(plain.by_hand, data)), recorded.recorded.report()
    report = recorded.recorded.report()
    assert report.replayed >= least, report
    assert report.replayed + report.eager.total() == len(data)
    return report


# ENGM in every way; of the others every network, and in turn with and without an attack. A-ENGM and N-ENGM read input
# gradients, which the attack measures.
CASES = [
    (optimizer, name, attacked)
    for i, optimizer in enumerate(OPTIMIZERS)
    for k, name in enumerate(NETWORKS)
    for attacked in (False, True)
    if optimizer == "ENGM" or attacked == (optimizer in ("A-ENGM", "N-ENGM") or (i + k) % 2 == 0)
]


@pytest.mark.parametrize(("optimizer", "name", "attacked"), CASES)
def test_is_the_step_by_hand(optimizer, name, attacked):
    torch.manual_seed(3)
    net = NETWORKS[name]()
    least = 8 if TRACES_ALL or optimizer != "ENGM auto" else 0
    assert_the_same(net, batches(16), least, optimizer=OPTIMIZERS[optimizer], attacked=attacked)


def test_borrowed_norms_that_are_judged_otherwise_from_time_to_time():
    """The steps that take their own norms and those that use the attack's are two kinds, with a program each."""
    torch.manual_seed(3)
    net, data, options = NETWORKS["batch norm"](), batches(40), {"attacked": True, "calibrate_every": 5}
    recorded, plain = Training(copy.deepcopy(net), **options), Training(net, **options)
    found, expected = recorded.go(recorded.recorded, data), plain.go(plain.by_hand, data)
    assert same(found, expected)
    assert {figures["source"] for figures in found[0]} == {"own", "borrowed"}
    report = recorded.recorded.report()
    assert (report.recorded, report.replayed >= 20) == (2, True), report
    assert report.eager["a calibration is due"] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_over_many_steps(name, attacked):
    torch.manual_seed(3)
    options = {"calibrate_every": 30, "check_every": 50}
    report = assert_the_same(NETWORKS[name](), batches(120, (N, N + 2, N)), 90, attacked=attacked, **options)
    judged = attacked and name == "batch norm"  # steps that use borrowed norms and those that do not are two kinds
    assert report.recorded in ((2, 3, 4) if judged else (2,))
    assert report.eager["a comparison with autograd's gradients is due"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "name", "attacked"), [case for case in CASES if case[0] != "ENGM"])
def test_every_other_optimizer_over_many_steps(optimizer, name, attacked):
    """Across calibrations, a comparison, a decay of the learning rate and two changes of the batch's size."""
    torch.manual_seed(3)
    options = {"calibrate_every": 30, "check_every": 50, "optimizer": OPTIMIZERS[optimizer]}
    least = 60 if TRACES_ALL or optimizer != "ENGM auto" else 0
    assert_the_same(NETWORKS[name](), batches(120, (N, N + 2, N)), least, attacked=attacked, **options)


def training(**options):
    torch.manual_seed(3)
    return Training(NETWORKS["group norm"](), **options)


@pytest.mark.parametrize("read", [True, False])
def test_running_statistics_of_another_network_move_once_a_step(read):
    """Also where nobody reads what the batch norm returns, and of the step that is tried while it is recorded."""
    found = []
    for way in ("recorded", "by hand"):
        torch.manual_seed(3)
        net, other = NETWORKS["group norm"](), NETWORKS["batch norm"]()
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.05), 0.5)

        def losses(x, y, model=model, other=other):
            with torch.no_grad():
                beside = other(x)
            logits = model(x)
            return F.cross_entropy(logits + beside if read else logits, y, reduction="none")

        step = engm.record(opt, losses) if way == "recorded" else lambda x, y, o=opt, f=losses: o.backward(f(x, y))
        for x, y in batches(8):
            step(x, y)
            opt.step()
            opt.zero_grad()
        found.append({**net.state_dict(), **{f"other.{name}": value for name, value in other.state_dict().items()}})
        if way == "recorded":
            assert step.report().replayed >= 6, step.report()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_gradients_accumulate():
    a, b = training(), training()
    for number, (x, y) in enumerate(batches(6)):
        torch.manual_seed(number)
        a.recorded(x, y, divisor=2 * N)
        torch.manual_seed(number)
        b.opt.backward(b.losses(x, y), divisor=2 * N)
        assert same([p.grad for p in a.model.parameters()], [p.grad for p in b.model.parameters()])
    assert a.recorded.report().replayed == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t.opt, "alpha", 0.01),
        lambda t: t.model.eval(),
        lambda t: setattr(t.model.body[-1], "p", 0.7),
        lambda t: t.model.head.bias.requires_grad_(False),
        lambda t: t.model.head.weight.data.copy_(torch.ones(CLASSES, 4)),
        lambda t: setattr(t.model.head, "weight", nn.Parameter(torch.ones(CLASSES, 4))),
        lambda t: t.model.head.register_buffer("other", torch.ones(2)),
        lambda t: t.model.double(),
    ],
)
def test_what_changes_between_steps_counts(change):
    a, b = training(), training()
    data = batches(8)
    for t, step in ((a, a.recorded), (b, b.by_hand)):
        t.go(step, data)
        change(t)
    cast = [(x.to(next(a.model.parameters()).dtype), y) for x, y in data]
    a.opt.zero_grad()
    b.opt.zero_grad()
    for number, (x, y) in enumerate(cast):
        for t, step in ((a, a.recorded), (b, b.by_hand)):
            torch.manual_seed(number)
            t.stats = step(x, y)
        assert same(vars(a.stats), vars(b.stats))
        assert same([p.grad for p in a.model.parameters()], [p.grad for p in b.model.parameters()])


def test_plain_values_that_the_loss_function_closes_over_count():
    t = training()
    factor = 1.0

    def losses(x, y):
        return factor * F.cross_entropy(t.model(x), y, reduction="none")

    step = engm.record(t.opt, losses)
    t.model.eval()
    x, y = batches(1)[0]
    for _ in range(3):
        first = step(x, y).losses
    factor = 2.0
    assert torch.equal(step(x, y).losses, 2 * first)


def test_losses_that_are_not_finite_change_nothing():
    t = training()
    data = batches(4)
    t.go(t.recorded, data)
    x, y = data[0]
    with pytest.raises(engm.checks.NonFiniteError):
        t.recorded(x * torch.inf, y)
    assert all(p.grad is None for p in t.model.parameters())
    assert t.recorded.report().replayed == 2


class Decides(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(72, 4), nn.Linear(4, CLASSES)
        self.calls = 0

    def forward(self, x):
        return self.b(self.how(self, torch.relu(self.a(x.flatten(1)))))


def reads_a_value(net, h):
    return h if h.sum().item() > 1e9 else 2 * h


def draws_from_python(net, h):
    return h * random.random()


def moves_rows(net, h):
    order = h[:, 0].argsort()
    return net.b.weight.mean() * h[order].cumsum(1)[order.argsort()] + h


def counts(net, h):
    net.calls += 1
    return h * net.calls


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (reads_a_value, r"'aten._local_scalar_dense' cannot be recorded, at test_record.py:\d+ \(return h if h.sum"),
        (draws_from_python, "draws random numbers from Python"),
        (moves_rows, "rows are moved by"),
    ],
)
def test_what_cannot_be_recorded_says_so_and_runs(how, words):
    torch.manual_seed(0)
    net = Decides(how)
    recorded, plain = Training(copy.deepcopy(net)), Training(net)
    data = batches(5)
    results = []
    for t, step in ((recorded, recorded.recorded), (plain, plain.by_hand)):
        random.seed(0)
        results.append(t.go(step, data))
    assert same(*results)
    report = recorded.recorded.report()
    assert report.replayed == report.recorded == 0
    (reason,) = report.refused
    assert re.search(words, reason), reason
    assert reason in str(report)


def test_a_network_that_counts_its_calls_is_not_replayed():
    torch.manual_seed(0)
    net = Decides(counts)
    assert_the_same(net, batches(5), 0)


def test_refuses_what_is_no_optimizer_of_ours():
    t = training()
    with pytest.raises(TypeError, match=r"engm\.MSGD"):
        engm.record(t.opt.optimizer, t.losses)
    with pytest.raises(ValueError, match="backend must be one of"):
        engm.record(t.opt, t.losses, backend="magic")


def test_a_wrong_loss_function_says_what_it_should_return():
    t = training()
    step = engm.record(t.opt, lambda x, y: (x, y, x))
    with pytest.raises(TypeError, match=r"\(losses, measurement\), it returned 3"):
        step(*batches(1)[0])


@pytest.mark.parametrize("kept", [True, False])
def test_generators_of_the_users(kept):
    """One that is kept goes on as by hand; one that is made, or seeded, in every step is not recorded."""

    class Drawing(Training):
        def losses(self, x, y):
            generator = self.generator if kept else torch.Generator().manual_seed(3)
            return super().losses(x + torch.randn(x.shape, generator=generator), y)

    nets = [NETWORKS["group norm"]() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    results = []
    for net, way in zip(nets, ("recorded", "by_hand"), strict=True):
        t = Drawing(net)
        t.generator = torch.Generator().manual_seed(1)
        results.append(t.go(getattr(t, way), batches(10)))
        if way == "recorded":
            report = t.recorded.report()
    assert same(*results)
    assert (report.replayed > 0) == (kept and TRACES_ALL)
    if not report.replayed:
        assert ("torch._C.Generator" if kept else "generators of random numbers anew") in report.refused[0]


@pytest.mark.parametrize("own", [True, False])
def test_a_step_that_seeds_is_not_recorded(own):
    t = training()
    generator = torch.Generator()

    def losses(x, y):
        source = generator.manual_seed(5) if own else torch.manual_seed(5) and None
        return F.cross_entropy(t.model(x + torch.randn(x.shape, generator=source)), y, reduction="none")

    step = engm.record(t.opt, losses)
    for x, y in batches(6):
        step(x, y)
    assert not step.report().replayed
    traced = TRACES_ALL or not own
    assert ("seeds the random numbers" if traced else "torch._C.Generator") in step.report().refused[0]


def test_gradients_that_come_later():
    """A branch behind a zero: its plan is watched, and a step in which its gradients come runs eagerly."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = (
                nn.Linear(72, CLASSES),
                nn.Linear(72, CLASSES),
                nn.Parameter(torch.zeros(CLASSES)),
            )

        def forward(self, x):
            return self.a(x.flatten(1)) + self.gate * torch.tanh(self.b(x.flatten(1)))

    torch.manual_seed(0)
    report = assert_the_same(Gated(), batches(12), 6, optimizer=lambda m, sgd: engm.ENGM(m, sgd, 0.5))
    assert report.recorded >= 1


def lasting(lengths, steps=5):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def kept_behind_the_end(model, x, mask):
    state = (h := model(x))[:, 0]
    for time in range(1, x.shape[1]):
        state = torch.where(mask[:, time, None], torch.tanh(state * model.gain + h[:, time]), state)
    return state.square().sum(1)


def added_up(model, x, mask):
    h = model(x)
    return sum((h[:, time] * model.gain).sum(1).square() * mask[:, time] for time in range(x.shape[1]))


@pytest.mark.parametrize("losses", [kept_behind_the_end, added_up])
@pytest.mark.parametrize("first", [(2, 2, 3), (3, 2, 3), (3, 3, 3), (1, 1, 1)], ids=str)
def test_sequences_that_are_longer_than_any_before(first, losses):
    """Also where the plan was made anew at the very step that was recorded, which had gradients at fewer times."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gain = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    model = engm.GradNormModule(Sequences().double())
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.01), 1.0)
    step = engm.record(opt, lambda x, mask: losses(model, x, mask))
    for lengths in (first, (3, 3, 3), (5, 5, 5), (4, 1, 4), (5, 3, 2), (1, 5, 5), (3, 3, 3)):
        x = torch.randn(3, 5, 3, dtype=torch.float64)
        wanted = per_example_gradients(losses(model, x, lasting(lengths)), trained(model.unwrap()))
        found = step(x, lasting(lengths))
        torch.testing.assert_close(found.norms, wanted.norms, rtol=1e-9, atol=0)
        for parameter, gradient in zip(model.parameters(), wanted.mean(found.weights), strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        opt.zero_grad()
    assert step.report().recorded


class Clip(torch.autograd.Function):
    """Hands on its input, and backwards the gradient, clipped by its norm over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (10 / gradient.norm()).clamp(max=1)


@pytest.mark.parametrize("forgotten", [False, True], ids=["", "whose plan was forgotten"])
def test_a_function_that_begins_to_mix_the_examples(forgotten):
    """It is replayed, watched, and refused at the step at which it bites; that step changes nothing."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
    model = engm.GradNormModule(nn.ModuleList([first, last]))
    model.unwrap().forward = lambda x: last(Clip.apply(first(x)))
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.01), 1.0)
    step = engm.record(opt, lambda x: model(x).square().sum(1))
    for number in range(6):
        if forgotten:
            model.engm_plans.clear()
        x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        assert torch.equal(step(x).norms, engm.per_example_grad_norms(model, model(x).square().sum(1)))
        opt.zero_grad()
    assert step.report().replayed >= 3, step.report()
    with pytest.raises(RuntimeError, match="for some examples influences"):
        step(1000 * x)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_is_let_go():
    """What was replayed keeps nothing of a batch but what it returns."""
    t = training()
    x, y = batches(1)[0]
    for _ in range(4):
        t.recorded(x, y)
        t.opt.zero_grad()
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None


class Scaled(nn.Module):
    """A network that multiplies by whatever it finds as its factor."""

    def __init__(self):
        super().__init__()
        self.layer, self.factor = nn.Linear(72, CLASSES), None
        self.register_buffer("level", torch.ones(1))

    def forward(self, x):
        h = self.layer(x.flatten(1))
        return h if self.factor is None else h * self.factor


class Options:
    factor = 1.0


FACTOR = 1.0


class InReach(Training):
    """A step whose code finds numbers and tensors in many places."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(Scaled(), optimizer=lambda model, sgd: engm.ENGM(model, sgd, 0.5, weigh=self.weigh))
        self.factor, self.bound, self.options, self.tensor = 1.0, 1.0, Options(), torch.ones(())
        self.given = {"factor": [1.0, torch.ones(())]}
        self.teacher = nn.Sequential(nn.Dropout(0.5), nn.Linear(72, CLASSES)).requires_grad_(False)

    def weigh(self, norms, alpha):
        return alpha / (self.bound + norms)

    def losses(self, x, y):
        number, tensor = self.given["factor"]
        factor = FACTOR * self.factor * self.options.factor * self.tensor * number * tensor
        return factor * F.cross_entropy(self.model(x) + self.teacher(x.flatten(1)), y, reduction="none")


def set_global(_, value):
    global FACTOR
    FACTOR = value


@pytest.mark.parametrize(
    "change",
    [
        set_global,
        lambda t, value: setattr(t, "factor", value),
        lambda t, value: setattr(t, "bound", value),
        lambda t, value: setattr(t, "tensor", torch.tensor(value)),
        lambda t, value: setattr(t.options, "factor", value),
        lambda t, value: t.given["factor"].__setitem__(0, value),
        lambda t, value: t.given["factor"].__setitem__(1, torch.tensor(value)),
        lambda t, value: t.teacher.train(value == 1.0),
        lambda t, value: setattr(t.teacher[0], "p", value / 10),
        lambda t, value: setattr(t.teacher[1], "weight", nn.Parameter(torch.full((CLASSES, 72), value), False)),
        lambda t, value: setattr(t.model.unwrap(), "factor", value),
        lambda t, value: setattr(t.model.unwrap(), "factor", torch.full((CLASSES,), value)),
        lambda t, value: t.model.layer.register_forward_hook(lambda _, given, found: value * found),
    ],
)
def test_what_the_code_of_a_step_reads_counts(change):
    results = []
    for way in ("recorded", "by_hand"):
        t, found = InReach(), []
        for number, value in enumerate((1.0, 2.0, 3.0, 1.0)):
            change(t, value)
            found.append(t.go(getattr(t, way), batches(4), seed=10 * number))
        results.append(found)
        if way == "recorded":
            assert t.recorded.report().replayed >= 2, t.recorded.report()
        set_global(t, 1.0)
    assert same(*results)


@pytest.mark.parametrize("what", ["the batch", "a tensor", "a parameter's"])
def test_what_a_step_writes_into_is_written_once(what):
    class Writing(Training):
        def losses(self, x, y):
            if what == "the batch":
                x.mul_(0.5).sub_(0.1)
            losses = super().losses(x, y)
            with torch.no_grad():
                if what == "a tensor":
                    self.level.lerp_(losses.mean(), 0.1)
                if what == "a parameter's":
                    self.model.head.bias.mul_(0.9)
            return losses / (1 + self.level)

    results, nets = [], [NETWORKS["batch norm"]() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, way in zip(nets, ("recorded", "by_hand"), strict=True):
        t = Writing(net)
        t.level = torch.zeros(())
        data = batches(10)
        results.append([t.go(getattr(t, way), data), t.level, [x for x, _ in data]])
        if way == "recorded":
            assert t.recorded.report().replayed >= 5, t.recorded.report()
    assert same(*results)


def test_what_a_step_puts_elsewhere_is_not_recorded():
    class Replacing(Training):
        def losses(self, x, y):
            losses = super().losses(x, y)
            self.level = 0.9 * self.level + 0.1 * losses.detach().mean()
            return losses / (1 + self.level)

    results, nets = [], [NETWORKS["group norm"]() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, way in zip(nets, ("recorded", "by_hand"), strict=True):
        t = Replacing(net)
        t.level = torch.zeros(())
        results.append([t.go(getattr(t, way), batches(6)), t.level])
        if way == "recorded":
            assert "in the place of level" in t.recorded.report().refused[0]
    assert same(*results)


def decides_a_size(net, h):
    return h * (h.detach() > 0).nonzero().shape[0]


def reads_a_buffer(net, h):
    net.b.level.add_(0.0)
    return h if float(net.b.other) < 1 else 2 * h


@pytest.mark.parametrize("how", [decides_a_size, reads_a_buffer])
def test_sizes_and_values_that_the_host_reads_are_not_recorded(how):
    torch.manual_seed(0)
    net = Decides(how)
    net.b.register_buffer("level", torch.zeros(()))
    net.b.register_buffer("other", torch.zeros(()))
    report = assert_the_same(net, batches(6), 0)
    assert report.recorded == 0
    assert "test_record.py" in report.refused[0]


def test_one_tensor_twice_in_a_batch():
    t = training()
    step = engm.record(t.opt, lambda a, b, y: F.cross_entropy(t.model(a) + 2 * t.model(b), y, reduction="none"))
    t.model.eval()
    (x, y), (other, _) = batches(2)
    for second in (x, x, x, other, other, other):  # two kinds: code may ask whether they are one
        got = step(x, second, y).losses
        assert torch.equal(got, F.cross_entropy(t.model(x) + 2 * t.model(second), y, reduction="none"))
    assert step.report().replayed == 2


def test_modes_of_torch_count():
    t = training()
    x, y = batches(1)[0]
    for _ in range(3):
        t.recorded(x, y)
    with torch.no_grad(), pytest.raises(ValueError, match="graph"):
        t.recorded(x, y)


def test_under_autocast():
    t = training()
    x, y = batches(1)[0]
    t.model.eval()
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            got = t.recorded(x, y)
    assert t.recorded.report().replayed == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert same(vars(got), vars(t.by_hand(x, y)))


class Odd:
    """What a batch may hold, into which nobody can look."""

    __hash__ = None


def test_a_batch_of_odd_things_runs_eagerly():
    t = training()
    step = engm.record(t.opt, lambda x, y, _: t.losses(x, y))
    for x, y in batches(4):
        step(x, y, Odd())
    assert step.report().eager == {"the batch has a Odd in it, into which a program cannot look": 4}


def test_more_kinds_than_programs():
    """Those that are there stay, others run eagerly; what is no longer used makes room."""
    t = training()
    sizes = range(2, 12)
    for _ in range(4):
        for n in sizes:
            t.recorded(*batches(1, (n,))[0])
    report = t.recorded.report()
    assert (report.recorded, report.replayed) == (8, 16)
    for _ in range(102):
        t.recorded(*batches(1, (2,))[0])
    t.recorded(*batches(1, (11,))[0])
    assert report.recorded == 9


def test_an_error_of_the_step_itself_is_no_reason():
    class Failing(Training):
        fails = False

        def losses(self, x, y):
            if self.fails:
                raise KeyError("no")
            return super().losses(x, y)

    t = Failing(NETWORKS["group norm"]())
    x, y = batches(1)[0]
    t.recorded(x, y)
    t.fails = True
    for _ in range(2):
        with pytest.raises(KeyError):
            t.recorded(x, y)
    t.fails = False
    for _ in range(3):
        t.recorded(x, y)
    assert t.recorded.report().replayed >= 1


def test_gradients_that_are_sparse():
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, CLASSES))
    data = [(torch.randint(9, (N, 3)), y) for _, y in batches(6)]
    assert_the_same(net, data, 4, optimizer=lambda m, _: engm.ENGM(m, torch.optim.SGD(m.parameters(), 0.1), 0.5))


@pytest.mark.skipif(
    Path(engm.__file__).is_relative_to(sysconfig.get_path("purelib")), reason="beside an installed package lie others"
)
def test_a_script_named_like_the_package_is_the_users():
    """Its globals are looked at, though its path begins as the package's folder does."""
    package = Path(engm.__file__).parent
    found = {"factor": 1.0}
    exec(compile("def losses(model, x):\n    return model(x) * factor", f"{package}_train.py", "exec"), found)
    inside = {}
    exec(compile("def losses(model, x):\n    return model(x)", str(package / "module.py"), "exec"), inside)
    assert is_followed(found["losses"])
    assert not is_followed(inside["losses"])


def test_what_data_are_written_into_hangs_on_them():
    """Also where an operator writes into a view, or into what it is given by name."""

    def step(x, y):
        filled, named, untouched = (torch.zeros(2, 3) for _ in range(3))
        filled[0].add_(x)
        torch.mul(y, x, out=named[1])
        torch.mul(y, y, out=untouched[1])
        return [filled + 1, named + 1, untouched + 1]

    for first, hangs in ((0, True), (1, True), (2, False)):
        module, _ = recorded(lambda x, y, first=first: step(x, y)[first : first + 1], [torch.ones(3), torch.ones(3)])
        assert hang_on_data(module, 0, 1) == hangs, first


def test_parameters_can_be_swapped_once_a_step_was_recorded(monkeypatch):
    """A program holds tensors in Python alone, so that torch may swap what is in them."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    results = []
    for way in ("recorded", "by_hand"):
        torch.manual_seed(3)
        t = Training(NETWORKS["group norm"]())
        data = batches(4)
        t.go(getattr(t, way), data)
        t.model.unwrap().double()
        results.append(t.go(getattr(t, way), [(x.double(), y) for x, y in data]))
        if way == "recorded":
            assert t.recorded.report().replayed == 4, t.recorded.report()
    assert same(*results)


class Gated(nn.Module):
    """A batch-norm network with a branch that the batch itself closes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x, gate):
        h = self.body(x)
        return self.head(h.mean((2, 3)) + gate * self.branch(h).mean((2, 3)))


def test_a_branch_that_opens_while_steps_are_replayed_is_calibrated():
    """Of what had no gradient when factors were taken there is none; a program notes it when one comes."""
    data = [(x, y, torch.ones(()) if k >= 9 else torch.zeros(())) for k, (x, y) in enumerate(batches(16))]
    left = []
    for way in ("recorded", "by hand"):
        torch.manual_seed(3)
        model = engm.GradNormModule(Gated(), calibrate_every=1000)
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.05), 0.5)

        def losses(x, y, gate, model=model):
            return F.cross_entropy(model(x, gate), y, reduction="none")

        step = engm.record(opt, losses) if way == "recorded" else lambda *b, o=opt, f=losses: o.backward(f(*b))
        norms = []
        for x, y, gate in data:
            norms.append(step(x, y, gate).norms.clone())
            opt.step()
            opt.zero_grad()
        left.append((norms, copy.deepcopy(model.state_dict()), model.calibration.state_dict()))
        if way == "recorded":
            report = step.report()
            assert report.replayed >= 8, report
    assert same(left[0][0], left[1][0])
    assert same(left[0][1], left[1][1])
    assert [entry["taken"] for entry in left[0][2]["factors"]] == [[9] * 10]
    assert [entry["taken"] for entry in left[1][2]["factors"]] == [[9] * 10]


def test_layers_that_are_frozen_later_do_not_end_replays():
    torch.manual_seed(3)
    model = engm.GradNormModule(NETWORKS["batch norm"](), calibrate_every=4)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.05), 0.5)
    step = engm.record(opt, lambda x, y: F.cross_entropy(model(x), y, reduction="none"))
    for number, (x, y) in enumerate(batches(60)):
        if number == 10:
            model.unwrap().body[0].requires_grad_(False)
        step(x, y)
        opt.step()
        opt.zero_grad()
    report = step.report()
    assert report.replayed >= 30, report
