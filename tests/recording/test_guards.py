"""What the code of a step reads besides tensors: recorded steps do what steps by hand do after it changed."""

import argparse
import array
import collections
import contextlib
import contextvars
import copy
import dataclasses
import fractions
import functools
import operator
import os
import random
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from recorded_training import TRACES_ALL, same
from torch import nn

import engm
from engm.recording.refusals import of_a_library

pytestmark = pytest.mark.torch_insides

VALUES = (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0)
THE_MODULE = """
factor = 1.0

def get():
    return factor

class Schedule:
    @staticmethod
    def of_module():
        return factor
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).square().sum(1)


def steps(record, change, losses, make, values):
    """What steps leave before each of which something is changed, and the report of the recorded ones."""
    torch.manual_seed(3)
    net = make()
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), 0.5)
    step = engm.record(opt, lambda x: losses(model, x)) if record else lambda x: opt.backward(losses(model, x))
    left = []
    for value in values:
        change(net, value)
        left.append(dict(vars(step(torch.randn(3, 3)))))
        opt.step()
        opt.zero_grad()
    return (left, copy.deepcopy(net.state_dict())), step.report() if record else None


def compare(change, losses=lambda model, x: model(x), make=Net, replayed=2, values=VALUES):
    """Recorded steps leave the bits of steps by hand, and so many are replayed: of each value at least the third."""
    found, report = steps(True, change, losses, make, values)
    expected, _ = steps(False, change, losses, make, values)
    assert same(found, expected), report
    assert report.replayed >= replayed, report
    return report


@dataclasses.dataclass(slots=True)
class Slots:
    factor: float = 1.0


class Options:
    factor = 1.0

    def __init__(self):
        self.inner = types.SimpleNamespace(factor=1.0)

    def value(self):
        return self.inner.factor

    @classmethod
    def of_class(cls):
        return cls.factor

    @staticmethod
    def of_globals():
        return KEPT["factor"]


class Answers:
    def __getattr__(self, name):
        return KEPT["factor"]


class Kind(type):
    @property
    def level(cls):
        return KEPT["factor"]


class WithKind(metaclass=Kind):
    pass


class Made:
    def __init__(self):
        self.factor = KEPT["factor"]


class Entered:
    def __enter__(self):
        return KEPT["factor"]

    def __exit__(self, *_):
        pass


KEPT = {"factor": 1.0}
NAMESPACE, SIMPLE, SLOTS, OPTIONS, PLAIN = (
    argparse.Namespace(factor=1.0),
    types.SimpleNamespace(factor=1.0),
    Slots(),
    Options(),
    Options(),
)
ANSWERS, ENTERED, LOCAL, DEQUE = Answers(), Entered(), threading.local(), collections.deque([1.0], maxlen=1)
VARIABLE = contextvars.ContextVar("variable")
NESTED = {"a": (types.SimpleNamespace(factor=1.0),)}
USER_DICT, PROXY, NUMBERS = collections.UserDict(factor=1.0), types.MappingProxyType(KEPT), array.array("d", [1.0])
WEAK = weakref.ref(OPTIONS)
OPTIMIZER = torch.optim.SGD([torch.zeros(1)], lr=1.0)


@torch.no_grad()
def decorated():
    return KEPT["factor"]


@contextlib.contextmanager
def managed():
    yield KEPT["factor"]


def from_a_context(manager):
    with manager as found:
        return found


def with_defaults(found=[1.0], *, kept={"factor": 1.0}):  # noqa: B006
    return found[0] * kept["factor"]


def with_an_attribute():
    return with_an_attribute.factor


def imports_inside():
    import options_of_a_user

    return options_of_a_user.factor


def imports_from_inside():
    from options_of_a_user import factor

    return factor


def keep(net, value):
    KEPT["factor"] = value


def at(thing, name="factor"):
    return lambda net, value: setattr(thing, name, value)


def within(thing, key="factor"):
    return lambda net, value: thing.__setitem__(key, value)


ATTRIBUTE, OBJECTS = operator.attrgetter("inner.factor"), np.array([types.SimpleNamespace(factor=1.0), None])

READ = {  # what changes the number that code reads, and the code
    "a namespace of argparse": (at(NAMESPACE), lambda: NAMESPACE.factor),
    "a simple namespace": (at(SIMPLE), lambda: SIMPLE.factor),
    "slots": (at(SLOTS), lambda: SLOTS.factor),
    "a class": (at(Options), lambda: Options.factor),
    "a class, by its object": (at(Options), lambda: PLAIN.factor),
    "an attribute that hides the class's": (at(PLAIN), lambda: PLAIN.factor),
    "an attribute that comes later": (
        lambda net, value: setattr(PLAIN, "late", value) if value > 1 else vars(PLAIN).pop("late", None),
        lambda: getattr(PLAIN, "late", 1.0),
    ),
    "a class method": (at(Options), lambda: Options.of_class()),
    "a static method": (keep, lambda: Options.of_globals()),
    "an object in an object": (at(OPTIONS.inner), lambda: OPTIONS.value()),
    "__getattr__": (keep, lambda: ANSWERS.anything),
    "a property of a metaclass": (keep, lambda: WithKind.level),
    "an object that is made in the step": (keep, lambda: Made().factor),
    "__enter__": (keep, lambda: from_a_context(ENTERED)),
    "a decorated function": (keep, lambda: decorated()),
    "a context manager": (keep, lambda: from_a_context(managed())),
    "a deque": (lambda net, value: DEQUE.append(value), lambda: DEQUE[-1]),
    "a variable of a context": (lambda net, value: VARIABLE.set(value), lambda: VARIABLE.get()),
    "a variable of a thread": (at(LOCAL), lambda: LOCAL.factor),
    "the environment": (
        lambda net, value: os.environ.update(OF_A_TEST=str(value)),
        lambda: float(os.environ["OF_A_TEST"]),
    ),
    "os.getenv": (lambda net, value: os.environ.update(OF_A_TEST=str(value)), lambda: float(os.getenv("OF_A_TEST"))),
    "a nest": (at(NESTED["a"][0]), lambda: NESTED["a"][0].factor),
    "a mapping": (within(USER_DICT), lambda: USER_DICT["factor"]),
    "a mapping that cannot be written into": (keep, lambda: PROXY["factor"]),
    "an array": (within(NUMBERS, 0), lambda: NUMBERS[0]),
    "a weak reference": (at(OPTIONS), lambda: WEAK().factor),
    "a partial": (within(KEPT), functools.partial(lambda kept: kept["factor"], KEPT)),
    "a default": (within(with_defaults.__defaults__[0], 0), lambda: with_defaults()),
    "a default by name": (within(with_defaults.__kwdefaults__["kept"]), lambda: with_defaults()),
    "an attribute of a function": (at(with_an_attribute), lambda: with_an_attribute()),
    "operator.attrgetter": (at(OPTIONS.inner), lambda: ATTRIBUTE(OPTIONS)),
    "an array of objects": (at(OBJECTS[0]), lambda: OBJECTS[0].factor),
    "another optimizer": (within(OPTIMIZER.param_groups[0], "lr"), lambda: OPTIMIZER.param_groups[0]["lr"]),
}


@pytest.mark.parametrize("name", READ)
def test_numbers_that_the_code_of_a_step_finds(name):
    change, read = READ[name]
    try:
        compare(change, lambda model, x: read() * model(x))
    finally:
        change(None, 1.0)


def test_numbers_that_are_objects():
    """A fraction that is put in the place of another has the same number only if it is equal."""
    report = compare(
        lambda net, value: setattr(PLAIN, "factor", fractions.Fraction(value)),
        lambda model, x: float(PLAIN.factor) * model(x),
    )
    assert report.recorded == 2


@pytest.mark.parametrize("name", ["attribute", "function", "static method", "import inside", "import from inside"])
def test_a_module_of_the_user(name, tmp_path, monkeypatch):
    (tmp_path / "options_of_a_user.py").write_text(THE_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "options_of_a_user", raising=False)
    import options_of_a_user

    read = {
        "attribute": lambda: options_of_a_user.factor,
        "function": lambda: options_of_a_user.get(),
        "static method": lambda: options_of_a_user.Schedule.of_module(),
        "import inside": imports_inside,
        "import from inside": imports_from_inside,
    }[name]
    compare(at(options_of_a_user), lambda model, x: read() * model(x))


class Reverse(torch.autograd.Function):
    strength = 1.0

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient * Reverse.strength * KEPT["factor"] * ctx.scale, None


class Reversed(Net):
    scale = 1.0

    def forward(self, x):
        return self.b(Reverse.apply(torch.tanh(self.a(x)), self.scale)).square().sum(1)


class Child(Reversed):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    "change", [at(Reverse, "strength"), keep, at(Reversed, "scale"), lambda net, value: setattr(net, "scale", value)]
)
@pytest.mark.parametrize("make", [Reversed, Child])
def test_functions_of_autograd(make, change):
    try:
        compare(change, make=make)
    finally:
        Reverse.strength = Reversed.scale = KEPT["factor"] = 1.0


class Hook:
    factor = 1.0

    def __call__(self, module, given, found):
        return found * self.factor


HOOK = Hook()


@pytest.mark.parametrize(
    ("change", "hang"),
    [
        (keep, lambda net: net.a.register_forward_hook(lambda module, given, found: found * KEPT["factor"])),
        (keep, lambda net: net.a.register_forward_pre_hook(lambda module, given: (given[0] * KEPT["factor"],))),
        (at(HOOK), lambda net: net.a.register_forward_hook(HOOK)),
    ],
)
def test_hooks(change, hang):
    def make():
        net = Net()
        hang(net)
        return net

    compare(change, make=make)
    change(None, 1.0)


HANG = {
    "forward": lambda module: module.register_forward_hook(lambda module, given, found: 3 * found),
    "forward, before": lambda module: module.register_forward_pre_hook(lambda module, given: (3 * given[0],)),
    "backward": lambda module: module.register_full_backward_pre_hook(lambda module, outer: (3 * outer[0],)),
}


@pytest.mark.parametrize("where", ["a module elsewhere", "a layer of a network elsewhere", "the wrapper"])
@pytest.mark.parametrize("hang", HANG)
def test_hooks_that_come_and_go_outside_of_the_network(hang, where):
    elsewhere = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).requires_grad_(False)
    handles, wrapper = [], []

    def losses(model, x):
        wrapper[:] = [model]
        return model(elsewhere(model(x)[:, None] * x))

    def change(net, value):
        if value == 1.0 and handles:
            handles.pop().remove()
        elif value != 1.0 and not handles:
            (model,) = wrapper
            module = {"a module elsewhere": elsewhere, "a layer of a network elsewhere": elsewhere[0]}.get(where, model)
            handles.append(HANG[hang](module))

    # With a hook on gradients, whose rows are whose is measured at every step.
    compare(change, losses, replayed=1 if hang == "backward" else 2, values=(1.0, *VALUES))


def test_what_a_hook_on_the_wrapper_reads():
    """Hooks are followed to what they read, wherever they hang."""
    hung = []

    def losses(model, x):
        if not hung:
            hung.append(model.register_forward_hook(lambda module, given, found: found * KEPT["factor"]))
        return model(x)

    def change(net, value):
        KEPT["factor"] = value

    def make():
        hung.clear()
        return Net()

    try:
        compare(change, losses, make)
    finally:
        KEPT["factor"] = 1.0


def test_a_forward_of_the_wrappers_own():
    wrapper = []

    def losses(model, x):
        wrapper[:] = [model]
        return model(x)

    def change(net, value):
        if value != 1.0 and "forward" not in vars(wrapper[0]):
            plain = wrapper[0].forward
            wrapper[0].forward = types.MethodType(lambda self, x: value * plain(x), wrapper[0])
        elif value == 1.0 and wrapper:
            vars(wrapper[0]).pop("forward", None)

    compare(change, losses, values=(1.0, *VALUES))


def test_a_hook_on_all_modules():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, found: found * KEPT["factor"] if getattr(module, "out_features", 0) == 4 else None
    )
    try:
        compare(keep)
    finally:
        handle.remove()
        KEPT["factor"] = 1.0


@pytest.mark.parametrize("where", ["network", "layer"])
def test_options_that_hang_on_the_network(where):
    class Held(Net):
        def __init__(self):
            super().__init__()
            self.options = self.a.options = argparse.Namespace(factor=1.0)

        def forward(self, x):
            return (self if where == "network" else self.a).options.factor * super().forward(x)

    compare(lambda net, value: setattr(net.options, "factor", value), make=Held)


def test_another_network_that_is_wrapped():
    other = Reversed().requires_grad_(False)
    wrapped = engm.GradNormModule(other)
    compare(lambda net, value: setattr(other, "scale", value), lambda model, x: model(x) + wrapped(x))


@pytest.mark.parametrize("thing", [SIMPLE, Options, SLOTS])
def test_tensors_that_are_replaced(thing):
    """The program reads the tensor that was there: another one in its place is noticed."""
    tensors = {value: torch.tensor(value) for value in VALUES}
    try:
        report = compare(
            lambda net, value: setattr(thing, "factor", tensors[value]),
            lambda model, x: thing.factor * model(x),
            replayed=1,
        )
        assert report.eager["tensors that the step reads were replaced by others: write into the old"]
    finally:
        thing.factor = 1.0


def test_a_generator_that_is_replaced():
    """The numbers are those of the generator that is there now."""

    def make():
        PLAIN.seed = None
        return Net()

    def change(net, value):
        if PLAIN.seed != value:
            PLAIN.seed, PLAIN.generator = value, torch.Generator().manual_seed(int(value))

    compare(
        change,
        lambda model, x: model(x + torch.randn(x.shape, generator=PLAIN.generator)),
        make,
        replayed=4 if TRACES_ALL else 0,
        values=5 * (1.0,) + 5 * (2.0,),
    )


GIVES = {
    "an iterator": (lambda value: iter([value] * 9), lambda: next(PLAIN.given)),
    "a generator of Python's": (lambda value: random.Random(value), lambda: PLAIN.given.random()),
    "a generator of NumPy's": (lambda value: np.random.default_rng(int(value)), lambda: PLAIN.given.random()),
}


@pytest.mark.parametrize("name", GIVES)
def test_what_gives_something_else_each_time_is_not_recorded(name):
    make, read = GIVES[name]
    report = compare(
        lambda net, value: setattr(PLAIN, "given", make(value)), lambda model, x: read() * model(x), replayed=0
    )
    (reason,) = report.eager
    assert reason.startswith("given is a ")
    assert reason.endswith("whose next value nobody knows without taking it")


def test_the_model_itself_as_the_loss_function():
    found = []
    for record in (True, False):
        torch.manual_seed(3)
        model = engm.GradNormModule(Net())
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
        step = engm.record(opt, model) if record else lambda x, o=opt, m=model: o.backward(m(x))
        norms = []
        for _ in range(5):
            norms.append(step(torch.randn(3, 3)).norms)
            opt.step()
            opt.zero_grad()
        found.append(norms)
        if record:
            assert step.report().replayed == 3, step.report()
    assert same(*found)


def test_nothing_is_looked_at_anew_while_all_is_as_it_was(monkeypatch):
    """A step finds out by one look that nothing changed: a walk through all that is in reach would be too slow."""
    model = engm.GradNormModule(Net())
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
    step = engm.record(
        opt, lambda x: KEPT["factor"] * Options.factor * len(os.environ["PATH"]) * OPTIONS.value() * model(x)
    )
    x = torch.randn(3, 3)
    for _ in range(3):
        step(x)
    looks = []
    monkeypatch.setattr(step._reach, "_look", looks.append)
    for _ in range(3):
        step(x)
    assert not looks
    assert step.report().replayed == 4


@pytest.mark.parametrize(
    ("path", "installed"),
    [
        (torch.__file__, True),
        ("/home/user/.local/lib/python3.11/site-packages/numpy/core.py", True),
        ("/opt/other/lib/python3/dist-packages/scipy/stats.py", True),
        ("/home/user/experiments/train.py", False),
        ("/home/user/site-packages.py", False),
    ],
)
def test_what_is_installed_anywhere_is_not_the_users(path, installed):
    """Of another environment too, whose packages a .pth file or PYTHONPATH adds to this one's."""
    assert of_a_library(path) == installed
