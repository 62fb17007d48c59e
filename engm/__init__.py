"""engm clips every example's gradient before averaging, exactly and almost for free.

Example:
    >>> model = engm.GradNormModule(net)
    >>> opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), alpha=5.0)
    >>> losses = F.cross_entropy(model(x), y, reduction="none")  # [n], one loss an example
    >>> opt.backward(losses)
    >>> opt.step()
    >>> opt.zero_grad()
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops, reference
    from .backward.norms import Measurement
    from .build import SelfTestReport, __version__, build_info, self_test
    from .cost.tuning import CostTable, tune
    from .exact import naive_grad_norms
    from .explain import Explanation, explain
    from .measurement import measure, per_example_grad_norms
    from .module import GradNormModule
    from .optim import AENGM, ENGM, FENGM, GNC, MSGD, NENGM, SNGM, ExampleOptimizer, StepStats, alpha_for
    from .recording import record
    from .rules import register_rule
    from .verify import VerifyReport, verify

__all__ = [
    "AENGM",
    "ENGM",
    "FENGM",
    "GNC",
    "MSGD",
    "NENGM",
    "SNGM",
    "CostTable",
    "ExampleOptimizer",
    "Explanation",
    "GradNormModule",
    "Measurement",
    "SelfTestReport",
    "StepStats",
    "VerifyReport",
    "__version__",
    "alpha_for",
    "build_info",
    "explain",
    "measure",
    "naive_grad_norms",
    "ops",
    "per_example_grad_norms",
    "record",
    "reference",
    "register_rule",
    "self_test",
    "tune",
    "verify",
]

# Rooms above this one, which come when they are asked for: ``engm.adversarial.PGD`` needs no import of its own.
_ABOVE = ("adversarial",)
# Where the names above come from. They are imported when one of them is first asked for, so that ``engm --help``, which
# needs none, does not wait for torch.
_MODULES = ("ops", "reference")
_HOMES = {
    "backward.norms": ("Measurement",),
    "build": ("SelfTestReport", "__version__", "build_info", "self_test"),
    "cost.tuning": ("CostTable", "tune"),
    "exact": ("naive_grad_norms",),
    "explain": ("Explanation", "explain"),
    "measurement": ("measure", "per_example_grad_norms"),
    "module": ("GradNormModule",),
    "optim": (
        "AENGM",
        "ENGM",
        "FENGM",
        "GNC",
        "MSGD",
        "NENGM",
        "SNGM",
        "ExampleOptimizer",
        "StepStats",
        "alpha_for",
    ),
    "recording": ("record",),
    "rules": ("register_rule",),
    "verify": ("VerifyReport", "verify"),
}


def _load() -> None:
    """Imports every public name into this module."""
    globals().update({name: import_module(f"{__name__}.{name}") for name in _MODULES})
    for home, names in _HOMES.items():
        module = import_module(f"{__name__}.{home}")
        globals().update({name: getattr(module, name) for name in names})


class _Package(ModuleType):
    """This package, whose functions ``explain`` and ``verify`` are not replaced by the modules that they come from.

    Python sets a module as an attribute of its package whenever that is imported, also after the function was.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__ and name not in _MODULES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name that is asked for the first time."""
        if name == "_C":  # which Python imports next, and which needs torch's libraries
            import_module("torch")
        if name in _ABOVE:
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_ABOVE})


if "torch" in sys.modules:  # who has torch waits for nothing, and has the operators registered by the import alone
    _load()
