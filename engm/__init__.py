"""engm clips every example's gradient before averaging, exactly and almost for free.

Example:
    >>> model = engm.GradNormModule(net)
    >>> opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), alpha=5.0)
    >>> losses = F.cross_entropy(model(x), y, reduction="none")  # [n], one loss an example
    >>> opt.backward(losses)
    >>> opt.step()
    >>> opt.zero_grad()
"""

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
