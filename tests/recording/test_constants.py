"""What a step makes where no tracer looks is no constant of its program: recorded steps are the steps by hand."""

import copy
import functools
import types
from collections import UserDict, deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, trained
from recorded_training import same
from torch import nn
from torch.overrides import TorchFunctionMode

import engm
from engm.recording.program import unknown_tensor

pytestmark = pytest.mark.torch_insides
N = 4


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch():
    return torch.randn(N, 6, dtype=torch.float64), torch.randint(3, (N,))


def losses_of(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")


class Side:
    """A network that is trained by recorded steps, or by the same steps by hand."""

    def __init__(self, record, losses, make=network, optimizer=None, data=batch):
        torch.manual_seed(3)
        self.net = make()
        self.model = engm.GradNormModule(self.net)
        inner = torch.optim.SGD(self.net.parameters(), 0.1)
        self.opt = engm.ENGM(self.model, inner, 0.5) if optimizer is None else optimizer(self.model, inner)
        self.extra = types.SimpleNamespace()
        self.teacher = nn.Linear(6, 3).double().requires_grad_(False)
        self.step = self.by_hand
        self.losses = lambda *given: losses(self, *given)
        self.data = data
        if record:
            self.step = engm.record(self.opt, self.losses)

    def by_hand(self, *given):
        return self.opt.backward(self.losses(*given))

    def go(self, steps, change):
        found = []
        for number in range(steps):
            change(self, number)
            torch.manual_seed(number)
            found.append(dict(vars(self.step(*self.data()))))
            found.append([p.grad.clone() for p in self.net.parameters()])
            if number % 3:  # gradients of two steps add up from time to time
                self.opt.step()
                self.opt.zero_grad()
        return found, self.net.state_dict(), vars(self.extra)


def compared(losses, change=lambda side, number: None, replayed=0, refused="", steps=8, **options):
    """Recorded steps leave the bits of those by hand; so many are replayed, or the reason why not has these words."""
    recorded, plain = Side(True, losses, **options), Side(False, losses, **options)
    found, expected = recorded.go(steps, change), plain.go(steps, change)
    report = recorded.step.report()
    assert same(found, expected), report
    assert report.replayed >= replayed, report
    assert refused in "".join(report.refused) if refused else not report.refused, report
    return recorded


def pgd(side, x, y):
    adversarial = nn.Parameter(x.clone())
    with side.model.paused():
        (slope,) = torch.autograd.grad(losses_of(side.model(adversarial), y).sum(), adversarial)
    return losses_of(side.model((adversarial + 0.1 * slope.sign()).detach()), y)


def replaced_in_a_module(side, x, y):
    side.teacher.weight = nn.Parameter(x.mean(0).expand(3, 6).contiguous(), requires_grad=False)
    return losses_of(side.model(x) + side.teacher(x), y)


POOL = ThreadPoolExecutor(1)

UNSEEN = {
    "an attack on a parameter": pgd,
    "labels that are a parameter": lambda s, x, y: losses_of(s.model(x), nn.Parameter(y, requires_grad=False)),
    "what is computed, as a parameter": lambda s, x, y: losses_of(s.model(x + nn.Parameter(0.1 * x).detach()), y),
    "another class": lambda s, x, y: losses_of(s.model(x.as_subclass(torch.Tensor)), y),
    "a dictionary of parameters": lambda s, x, y: losses_of(s.model(nn.ParameterDict({"x": x})["x"].detach()), y),
    "another thread": lambda s, x, y: losses_of(s.model(sum(POOL.map(lambda k: x * k, (1.0, 0.5)))), y),
    "a parameter of a module": replaced_in_a_module,
    "figures of the last step": lambda s, x, y: (
        losses_of(s.model(x), y) * (1 if s.opt.stats is None else s.opt.stats.losses)
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_tracer_sees_is_not_recorded(name):
    compared(UNSEEN[name], refused="that was not there before the step")


def test_norms_of_an_attack_on_a_parameter():
    """Against one backward pass an example, at steps that would be replayed."""
    side = Side(True, pgd)
    for number in range(5):
        torch.manual_seed(number)
        x, y = batch()
        side.opt.zero_grad()
        stats = side.step(x, y)
        twin = types.SimpleNamespace(model=engm.GradNormModule(copy.deepcopy(side.net)))
        truth = per_example_gradients(pgd(twin, x, y), trained(twin.model.unwrap()))
        torch.testing.assert_close(stats.norms, truth.norms)


def test_memory_that_a_step_swaps():
    def swaps(side, x, y):
        side.level.data = 0.9 * side.level.data + x.mean(0)
        return losses_of(side.model(x + side.level), y)

    def change(side, number):
        side.level = torch.zeros(6, dtype=torch.float64) if number == 0 else side.level
        side.extra.level = side.level

    compared(swaps, change, refused="other memory")


@functools.lru_cache(maxsize=4)
def cached(n):
    return torch.linspace(0, 1, n, dtype=torch.float64)


KEPT, NUMBERS = torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64).numpy()

SEEN = {
    "numbers of the code": lambda s, x, y: losses_of(s.model(x * torch.tensor([1.0, 2, 3, 4, 5, 6]).double()), y),
    "numbers of NumPy": lambda s, x, y: losses_of(s.model(x * torch.from_numpy(NUMBERS)), y),
    "a number": lambda s, x, y: losses_of(2 * s.model(x) ** 2, y),
    "a view of a global": lambda s, x, y: losses_of(s.model(x * KEPT[:6].detach()), y),
    "what is cached": lambda s, x, y: losses_of(s.model(x * cached(6)), y),
    "draws": lambda s, x, y: losses_of(s.model(x + 0.1 * torch.rand_like(x)), y),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_is_there_is_recorded(name):
    compared(SEEN[name], replayed=5)


def test_known_tensors_take_the_place_of_their_views():
    graph = torch.fx.Graph()
    for name in ("one", "other"):
        graph.call_function(torch.ops.aten.neg.default, (graph.get_attr(name),))
    module = torch.fx.GraphModule({"one": KEPT.view(6), "other": KEPT[:3]}, graph)
    assert unknown_tensor(module, [KEPT], []) is None
    assert module.one is KEPT
    assert module.other is not KEPT
    assert "neg" in unknown_tensor(module, [], [])


def test_what_another_thread_writes():
    def losses(side, x, y):
        POOL.submit(side.level.copy_, x.mean(0)).result()
        return losses_of(side.model(x + side.level), y)

    def change(side, number):
        side.level = torch.zeros(6, dtype=torch.float64) if number == 0 else side.level
        side.extra.level = side.level.clone()

    compared(losses, change, refused="written into")


def test_a_batch_that_is_read_elsewhere_too():
    """A parameter of the batch's memory is one of the batch, though a global has that memory as well."""
    held = types.SimpleNamespace(x=batch()[0])
    given = []

    def data():
        given.append(held.x if len(given) < 3 else batch()[0])
        return given[-1], torch.arange(N) % 3

    def losses(side, x, y):
        return losses_of(side.model(nn.Parameter(x, requires_grad=False)) + held.x.mean(), y)

    left = []
    for record in (True, False):
        given.clear()
        left.append(Side(record, losses, data=data).go(6, lambda side, number: None))
    assert same(*left)


GRADIENTS = {
    "opt.zero_grad()": lambda s: s.opt.zero_grad(),
    "model.zero_grad()": lambda s: s.model.zero_grad(),
    "changed": lambda s: [p.grad.mul_(0.9) for p in s.net.parameters() if p.grad is not None],
    "set": lambda s: setattr(s.net[0].weight, "grad", torch.ones_like(s.net[0].weight)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_the_loss_function_looks_at(name):
    def losses(side, x, y):
        GRADIENTS[name](side)
        return losses_of(side.model(x), y)

    compared(losses, refused="reads, clears or changes .grad")


def adversary(inside, momentum=0.0):
    """A loss function that trains a network of its own, and what sets this up and changes its learning rate."""

    def losses(side, x, y):
        out = side.model(x)
        own = F.softplus(side.extra.judge(out.detach())).mean()
        if inside:
            side.extra.opt.zero_grad()
            own.backward()
            side.extra.opt.step()
        else:
            own.backward()
        with torch.no_grad():
            shift = side.extra.judge(out).squeeze(1)
        return losses_of(out, y) * (1 + shift**2)

    def change(side, number):
        if number == 0:
            side.extra.judge = nn.Linear(3, 1).double()
            side.extra.opt = torch.optim.SGD(side.extra.judge.parameters(), 0.1, momentum=momentum)
        elif not inside:
            side.extra.opt.step()
            side.extra.opt.zero_grad()
        side.extra.opt.param_groups[0]["lr"] = 0.1 if number < 6 else 0.01
        side.extra.weights = [p.detach().clone() for p in side.extra.judge.parameters()]

    return losses, change


def of_adversary(inside, momentum):
    losses, change = adversary(inside, momentum)
    left, reports = [], []
    for record in (True, False):
        side = Side(record, losses)
        weights = []
        for number in range(11):
            change(side, number)
            weights.append(side.extra.weights)
            torch.manual_seed(number)
            side.step(*batch())
            weights.append([p.grad.clone() for p in side.extra.judge.parameters()])
        left.append(weights)
        reports.append(side.step.report() if record else None)
    assert same(*left), reports[0]
    assert not reports[0].refused, reports[0]
    return reports[0].replayed


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizer_that_the_loss_function_steps(momentum):
    assert of_adversary(True, momentum) >= 4


def test_gradients_that_are_left_in_another_network():
    assert of_adversary(False, 0.0) >= 7


def test_gradients_of_another_network_that_add_up():
    """By hand they add up, which a program that was recorded without any cannot do."""
    losses, change = adversary(False)
    left = []
    for record in (True, False):
        side = Side(record, losses)
        change(side, 0)
        for number in range(8):
            torch.manual_seed(number)
            side.step(*batch())
            left.append([p.grad.clone() for p in side.extra.judge.parameters()])
            if number < 4:
                side.extra.opt.zero_grad()
    assert same(left[:8], left[8:])


class Median(engm.ExampleOptimizer):
    uses_norms = True

    def weights(self, norms):
        found = norms.of_gradients
        self.latest.append(found.detach())
        return engm.optim.Weighting((torch.cat(list(self.latest)).median() / found).clamp(max=1), found)


class Fixed(engm.ExampleOptimizer):
    uses_norms = True

    def weights(self, norms):
        return engm.optim.Weighting((self.policy.bound / norms.of_gradients).clamp(max=1), norms.of_gradients)


def test_an_optimizer_of_the_users_that_keeps_norms():
    def make(model, inner):
        opt = Median(model, inner)
        opt.latest = deque(maxlen=3)
        return opt

    side = compared(
        lambda s, x, y: losses_of(s.model(x), y), optimizer=make, refused="which a program cannot do again", steps=10
    )
    assert len(side.opt.latest) == 3


def test_an_optimizer_of_the_users_with_options_in_an_object():
    def make(model, inner):
        opt = Fixed(model, inner)
        opt.policy = types.SimpleNamespace(bound=0.5)
        return opt

    def change(side, number):
        side.opt.policy.bound = 0.5 if number < 5 else 0.1

    compared(lambda s, x, y: losses_of(s.model(x), y), change, optimizer=make, replayed=3, steps=9)


def test_weigh_that_is_replaced():
    def change(side, number):
        if number in (0, 5):
            side.opt.weigh = (lambda v, a: a / (a + v)) if number == 0 else (lambda v, a: torch.full_like(v, 0.5))

    compared(lambda s, x, y: losses_of(s.model(x), y), change, replayed=3, steps=9)


def test_the_learning_rate_in_the_loss():
    def change(side, number):
        side.opt.param_groups[0]["lr"] = 0.1 if number < 5 else 0.2

    compared(lambda s, x, y: losses_of(s.model(x), y) * (1 + s.opt.param_groups[0]["lr"]), change, replayed=3, steps=9)


def test_the_learning_rate_makes_no_new_kind():
    def change(side, number):
        side.opt.param_groups[0]["lr"] = 0.1 / (1 + number)

    compared(lambda s, x, y: losses_of(s.model(x), y), change, replayed=6)


class Holding(nn.Module):
    """A network that holds what it reads in containers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.teachers, self.window, self.levels = [self.teacher()], (slice(0, 3),), [torch.zeros(3)]
        self.double()
        self.renew("teachers")
        self.renew("levels")

    @staticmethod
    def teacher():
        return nn.Linear(6, 6).double().requires_grad_(False)

    def renew(self, name):
        made = {"teachers": [self.teacher()], "window": (slice(2, 5),), "levels": [torch.rand(3).double()]}
        setattr(self, name, made[name])

    def forward(self, x):
        return self.head(self.teachers[0](x)) + x[:, self.window[0]] + self.levels[0]


@pytest.mark.parametrize("name", ["teachers", "window", "levels"])
def test_containers_that_are_replaced(name):
    def change(side, number):
        if number == 5:
            torch.manual_seed(8)
            side.net.renew(name)

    compared(lambda s, x, y: losses_of(s.model(x), y), change, make=Holding, replayed=3, steps=9)


class Noting(nn.Module):
    """A network that keeps what it computed, in new lists and as views of what it has."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3).double()
        self.features, self.last, self.view, self.of_layers = [], None, None, {}

    def forward(self, x):
        self.features = []
        out = self.head(x)
        self.features.append(out.detach())
        self.last, self.view = (out.detach(), [out.detach()]), self.head.weight.detach().view(-1)
        self.of_layers["head"] = out.detach()
        return out * self.view.square().sum()


def test_what_a_network_keeps_of_the_last_step_makes_no_new_kind():
    compared(lambda s, x, y: losses_of(s.model(x), y), make=Noting, replayed=3)


class Inheriting(nn.Linear):
    pass


class Plain:
    def value(self):
        return 1.0


class Doubled:
    def value(self):
        return 2.0


def with_default(value=1.0):
    return value


CODES = with_default.__code__, (lambda value: 2 * value).__code__


class Tagged:
    pass


OPTIONS, TABLE, DATA, OBJECT, TAG = (
    types.SimpleNamespace(label_smoothing=0.0),
    {"a": 1.0},
    UserDict(),
    Plain(),
    Tagged(),
)
DATA["loss weight"], TAG.factor, GET, TAGS = 1.0, 1.0, TABLE.get, {TAG}
PROXY = types.MappingProxyType(DATA.data)

CHANGED = {
    "all attributes": (
        lambda value: setattr(OPTIONS, "label_smoothing", 0.1 * (value - 1)),
        lambda s, x, y: F.cross_entropy(s.model(x), y, reduction="none", **vars(OPTIONS)),
    ),
    "a method of C": (lambda value: TABLE.update(a=value), lambda s, x, y: losses_of(s.model(x), y) * GET("a")),
    "a key that is no name": (
        lambda value: DATA.update({"loss weight": value}),
        lambda s, x, y: losses_of(s.model(x), y) * DATA["loss weight"],
    ),
    "a view of a dictionary": (
        lambda value: DATA.update({"loss weight": value}),
        lambda s, x, y: losses_of(s.model(x), y) * PROXY["loss weight"],
    ),
    "an object in a set": (
        lambda value: setattr(TAG, "factor", value),
        lambda s, x, y: losses_of(s.model(x), y) * sum(tag.factor for tag in TAGS),
    ),
    "defaults": (
        lambda value: setattr(with_default, "__defaults__", (value,)),
        lambda s, x, y: losses_of(s.model(x), y) * with_default(),
    ),
    "code": (
        lambda value: setattr(with_default, "__code__", CODES[value > 1]),
        lambda s, x, y: losses_of(s.model(x), y) * with_default(),
    ),
    "the class of an object": (
        lambda value: setattr(OBJECT, "__class__", Plain if value == 1 else Doubled),
        lambda s, x, y: losses_of(s.model(x), y) * OBJECT.value(),
    ),
    "the sign of zero": (
        lambda value: setattr(TAG, "factor", 0.0 if value == 1 else -0.0),
        lambda s, x, y: (
            losses_of(s.model(x), y) + torch.atan2(torch.full_like(x[:, 0], TAG.factor), -torch.ones_like(x[:, 0]))
        ),
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_code_reads_without_a_name(name):
    change, losses = CHANGED[name]
    try:
        compared(losses, lambda side, number: change(1.0 if number < 5 else 2.0), replayed=3, steps=9)
    finally:
        with_default.__defaults__ = (1.0,)
        change(1.0)
        TAG.factor = 1.0


@pytest.mark.parametrize("kind", [Inheriting, nn.Tanh])
def test_a_forward_that_a_class_is_given(kind, monkeypatch):
    """A class of the user's that had torch's so far, and a class of torch's own."""

    def of_user(self, x):
        return F.linear(x, self.weight, self.bias) * 2 if kind is Inheriting else torch.sigmoid(x)

    def make():
        return nn.Sequential(Inheriting(6, 3), nn.Tanh(), nn.Linear(3, 3)).double()

    left = []
    for record in (True, False):
        side = Side(record, lambda s, x, y: losses_of(s.model(x), y), make=make)
        with monkeypatch.context() as patch:
            for number in range(8):
                if number == 4:
                    patch.setattr(kind, "forward", of_user, raising=False)
                torch.manual_seed(number)
                left.append(dict(vars(side.step(*batch()))))
    assert same(left[:8], left[8:])


class Sigmoids(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return torch.sigmoid(*args) if func is torch.tanh else func(*args, **(kwargs or {}))


class WithTanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_mode_around_the_step():
    left = []
    for record in (True, False):
        side = Side(record, lambda s, x, y: losses_of(s.model(x), y), make=WithTanh)
        for number in range(8):
            torch.manual_seed(number)
            given = batch()
            if number < 4:
                found = side.step(*given)
            else:
                with Sigmoids():
                    found = side.step(*given)
            left.append(dict(vars(found)))
    assert same(left[:8], left[8:])


def test_a_default_device_is_recorded():
    with torch.device("cpu"):
        compared(lambda s, x, y: losses_of(s.model(x), y), replayed=6)


def numbered(make):
    """Batches, of which the fifth and those after it are otherwise."""
    numbers = {}

    def data():
        number = numbers[torch.initial_seed()] = torch.initial_seed()
        return make(*batch(), number >= 4)

    return data


def tagged(x, y, otherwise):
    x.gain = 2.0 if otherwise else 1.0
    return x, y


def conjugated(x, y, otherwise):
    z = torch.complex(x, x)
    return (z.conj() if otherwise else z), y


BATCHES = {
    "one tensor twice": (
        lambda x, y, otherwise: (x, x if otherwise else x.clone(), y),
        lambda s, x, other, y: losses_of(s.model(x), y) * (2 if other is x else 1),
    ),
    "an attribute": (tagged, lambda s, x, y: losses_of(s.model(x), y) * x.gain),
    "conjugated": (conjugated, lambda s, x, y: losses_of(s.model(x.imag), y)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_otherwise(name):
    make, losses = BATCHES[name]
    compared(losses, data=numbered(make), replayed=3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module():
    compared(
        lambda s, x, y: losses_of(s.model(x), y),
        make=lambda: nn.Sequential(nn.Linear(6, 5), torch.jit.script(nn.Tanh()), nn.Linear(5, 3)).double(),
        replayed=5,
    )
