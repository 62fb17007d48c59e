"""The public face, as acceptance checks call it (design section 3)."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engm

pytestmark = pytest.mark.torch_insides

NAMES = [name for name in engm.__all__ if not name.startswith("_")]
CALLABLES = [name for name in NAMES if callable(getattr(engm, name))]


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def data():
    return torch.randn(8, 3, 6, 6), torch.arange(8) % 5


def test_the_code_of_the_design_verbatim():
    net = small()
    x_adv, y = data()
    before = [p.detach().clone() for p in net.parameters()]

    model = engm.GradNormModule(net)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    opt = engm.ENGM(model, sgd, alpha=5.0)

    losses = F.cross_entropy(model(x_adv), y, reduction="none")
    stats = opt.backward(losses)
    opt.step()
    opt.zero_grad()

    assert stats.norms.shape == stats.weights.shape == stats.losses.shape == (8,)
    assert torch.equal(stats.losses, losses.detach())
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())


SIGNATURES = {
    "GradNormModule": "(net, *, batch_norm='calibrated', calibrate_every=50, calibrate_examples=16, strict=True, "
    "coupled='refuse', check_every=200, views=1)",
    "per_example_grad_norms": "(model, losses, *, loss_scale=1.0, check=None)",
    "measure": "(model, losses, inputs=None, *, norms=True, loss_scale=1.0, check=None)",
    "naive_grad_norms": "(model, losses)",
    "ENGM": "(model, optimizer, alpha, *, clip_fraction=0.5, weigh=None, groups=None)",
    "AENGM": "(model, optimizer, alpha, *, tau=50, beta_gamma=0.7, average_first_fit=False)",
    "NENGM": "(model, optimizer, alpha)",
    "MSGD": "(model, optimizer)",
    "FENGM": "(model, optimizer, alpha=1.0)",
    "SNGM": "(model, optimizer)",
    "GNC": "(model, optimizer, max_norm=25.0)",
    "tune": "(device='cpu', *, path=None, seconds=20.0)",
    "ENGM.backward": "(self, losses, inputs=None, *, measurement=None, divisor=None, loss_scale=1.0, check=None)",
    "ENGM.reweight": "(self, losses, inputs=None, *, measurement=None, loss_scale=1.0, check=None)",
    "verify": "(model, loss_fn, batch, *, raise_on_error=False)",
    "explain": "(model, x)",
    "alpha_for": "(net, method='engm')",
    "build_info": "()",
    "self_test": "(device=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    function: typing.Any = engm
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert shown == SIGNATURES[name]


@pytest.mark.parametrize("method", ["ENGM", "AENGM", "NENGM", "MSGD", "FENGM", "SNGM", "GNC"])
def test_every_optimizer_shows_one_face(method):
    cls = getattr(engm, method)
    assert issubclass(cls, torch.optim.Optimizer)
    for call in ("backward", "reweight"):
        assert inspect.signature(getattr(cls, call)) == inspect.signature(getattr(engm.ENGM, call))


def test_measurement_verify_and_explain_as_described():
    model = engm.GradNormModule(small())
    x, y = data()
    x.requires_grad_()
    measured = engm.measure(model, F.cross_entropy(model(x), y, reduction="none"), x)
    assert list(measured.squared_norms) == [name for name, _ in model.named_parameters()]
    assert all(norms.shape == (8,) for norms in measured.squared_norms.values())
    assert measured.norms.shape == measured.input_norms.shape == (8,)
    assert measured.input_grads.shape == x.shape
    report = engm.verify(model.double(), nn.CrossEntropyLoss(reduction="none"), (x.detach().double(), y))
    assert isinstance(report, engm.VerifyReport)
    assert report.passed, str(report)
    explanation = engm.explain(model, x.detach().double())
    assert isinstance(explanation, engm.Explanation)
    assert "Conv2d" in str(explanation)
    assert isinstance(engm.build_info(), dict)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring(name):
    assert (inspect.getdoc(getattr(engm, name)) or "").strip()


def public_functions():
    for name in CALLABLES:
        thing = getattr(engm, name)
        if not inspect.isclass(thing):
            yield name, thing
            continue
        for key, member in vars(thing).items():
            function = member.fget if isinstance(member, property) else inspect.unwrap(member)
            if inspect.isfunction(function) and (not key.startswith("_") or key == "__init__"):
                yield f"{name}.{key}", function
    for module in (engm.ops, engm.reference):
        for key, function in vars(module).items():
            if inspect.isfunction(function) and not key.startswith("_") and function.__module__ == module.__name__:
                yield f"{module.__name__}.{key}", function


@pytest.mark.parametrize(
    ("name", "function"), list(public_functions()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_public_function_has_type_hints_and_a_docstring(name, function):
    generated = function.__module__ is None or "__create_fn__" in function.__qualname__
    hints = set(function.__annotations__)
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    assert generated or {*parameters, "return"} <= hints
    if not name.endswith("__init__") and not name.endswith(("forward", ".passed")):
        assert inspect.getdoc(function)


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_name_every_argument(name):
    thing = getattr(engm, name)
    if name.endswith(("Stats", "Report")) or name in ("Measurement", "Explanation"):
        text = inspect.getdoc(thing)
        assert "Attributes:" in text
        assert all(f"{field}:" in text for field in thing.__dataclass_fields__)
        return
    text = inspect.getdoc(thing)
    parameters = [p.name for p in inspect.signature(thing).parameters.values()]
    assert all(f"{parameter}:" in text for parameter in parameters), text


def test_importing_the_core_needs_torch_alone():
    """In a process of its own, with everything of the extra made impossible to import."""
    code = """
import sys
extras = ["torchvision", "sklearn", "rich", "typer", "matplotlib", "PIL", "pandas", "scipy", "opacus", "timm", "pytest"]
for name in extras:
    sys.modules[name] = None
import torch
with_torch = set(sys.modules)
import engm
loaded = {name.partition(".")[0] for name in set(sys.modules) - with_torch}
own = {name for name in loaded if name.startswith("_sysconfigdata_")}  # Python's, by the name of the platform
foreign = loaded - set(sys.stdlib_module_names) - own - {"engm", "torch"}
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
model = engm.GradNormModule(net)
opt = engm.AENGM(model, torch.optim.SGD(net.parameters(), lr=0.1), 1.0)
x = torch.randn(5, 3)
opt.backward(torch.nn.functional.cross_entropy(model(x), torch.arange(5) % 2, reduction="none"), x)
opt.step()
print(sorted(foreign), "engm.recipes" in sys.modules, "engm.adversarial" in sys.modules)
"""
    root = Path(engm.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[] False False"
