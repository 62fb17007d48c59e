"""The networks and inputs that Opacus and BackPACK test themselves on, with engm's norms in place of theirs.

    git clone https://github.com/pytorch/opacus OPACUS
    git clone https://github.com/f-dangel/backpack BACKPACK
    python benchmarks/peer_suites.py --opacus OPACUS --backpack BACKPACK

Of Opacus every test that draws a layer and an input by hypothesis and hands them to ``GradSampleHooks_test.run_test``:
the norms are compared with those of Opacus' own reference, which backpropagates one example at a time
(``opacus/utils/per_sample_gradients_utils.py``, ``compute_microbatch_grad_sample``). Of BackPACK the settings of its
first-order extensions, compared with its own ``AutogradExtensions.batch_l2_grad``, and those of its derivatives, whose
layers have no loss of their own: a drawn sum of an example's outputs is taken. All in float64. One comparison is the
norms of one parameter over one batch; it is wrong where any is off by more than 1e-9 of the parameter's largest, or
of a ten thousandth of the network's largest where that is more.

Neither suite is in its package: each needs a checkout, and the libraries that the checkout's tests import.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import output
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import engm
from engm.exact import exact_squared_norms
from engm.module import couples

TOLERANCE = 1e-9
DRAWN = 400  # inputs that hypothesis draws for each of Opacus' tests
SHOWN = 10  # failures that are written out


@dataclass
class Outcome:
    """What a suite said: the largest relative error, and what was wrong or could not be compared."""

    cases: int = 0
    comparisons: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def compare(self, case: str, parameters: Sequence[str], got: Tensor, expected: Tensor) -> None:
        """Squared norms ``[parameters, n]`` of one case."""
        self.cases += 1
        # The bias of an attention's keys changes nothing: its gradient is rounding.
        floor = (1e-4 * expected.max().sqrt()).clamp_min(torch.finfo(expected.dtype).tiny)
        for name, ours, theirs in zip(parameters, got.sqrt(), expected.sqrt(), strict=True):
            scale = theirs.max().clamp_min(floor)
            error = ((ours - theirs).abs().max() / scale).item()
            self.comparisons += 1
            self.worst = max(self.worst, error)
            if not error <= TOLERANCE:
                self.wrong.append(f"{case}: {name} is off by {error:.1e}")


def squared_norms(module: nn.Module, losses_of: Callable[[nn.Module], Tensor]) -> Tensor:
    """engm's squared norms ``[parameters, n]``, the parameters as the module lists them."""
    wrapped = engm.GradNormModule(module)
    rows = engm.measure(wrapped, losses_of(wrapped)).squared_norms
    return torch.stack([rows[name] for name in names(module)])


def names(module: nn.Module) -> list[str]:
    """The parameters that norms are taken over."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def of_opacus(folder: Path) -> Outcome:
    """Opacus' tests of grad samples, by pytest, their ``run_test`` replaced."""
    import pytest
    from hypothesis import settings

    outcome = Outcome()

    class Plugin:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            common = importlib.import_module("opacus.tests.grad_samples.common")
            assert Path(str(common.__file__)).is_relative_to(folder), "an installed opacus hides the checkout"
            common.GradSampleHooks_test.run_test = lambda test, x, module, *args, **kwargs: _opacus_case(
                outcome, test.id(), x, module, *args, **kwargs
            )

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                outcome.wrong.append(f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")

    sys.path.insert(0, str(folder))
    # As many examples a test as hypothesis draws by default tell little of layers with seven options.
    settings.register_profile("thorough", max_examples=DRAWN)
    settings.load_profile("thorough")
    pytest.main([str(folder / "opacus" / "tests" / "grad_samples"), "-q", "-p", "no:cacheprovider"], [Plugin()])
    return outcome


def _opacus_case(
    outcome: Outcome,
    case: str,
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    chunk_method: Callable[[Any], Any] = iter,
    **_: Any,
) -> None:
    from opacus.utils.per_sample_gradients_utils import (  # type: ignore[import-not-found, unused-ignore]
        compute_microbatch_grad_sample,
        is_batch_empty,
        unpack_packedsequences,
    )

    if not isinstance(x, PackedSequence) and is_batch_empty(x):
        outcome.leave_out("a batch without elements: there is nothing to compare")
        return
    examples = unpack_packedsequences(x) if isinstance(x, PackedSequence) else x
    reference = compute_microbatch_grad_sample(examples, module, batch_first, "sum", chunk_method)
    n = len(next(iter(reference.values())))
    inputs = x if type(x) is tuple else (x,)

    def losses(network: nn.Module) -> Tensor:
        y = network(*inputs)
        rows = unpack_packedsequences(y) if isinstance(y, PackedSequence) else y.unbind(0 if batch_first else 1)
        return torch.stack([row.abs().sum() for row in rows])

    squared = squared_norms(module, losses)
    expected = torch.stack([reference[name].reshape(n, -1).square().sum(1) for name in reference])
    outcome.compare(case, list(reference), squared, expected)


FIRST_ORDER = {
    "batch_grad.batch_grad_settings": "BATCH_GRAD_SETTINGS",
    "batch_l2_grad.batchl2grad_settings": "BATCHl2GRAD_SETTINGS",
    "sum_grad_squared.sumgradsquared_settings": "SUMGRADSQUARED_SETTINGS",
    "variance.variance_settings": "VARIANCE_SETTINGS",
}


def of_backpack(folder: Path) -> Outcome:
    """BackPACK's settings of first-order extensions and of derivatives."""
    outcome = Outcome()
    sys.path.insert(0, str(folder))
    extension = importlib.import_module("test.extensions.problem")
    for module, name in FIRST_ORDER.items():
        settings = getattr(importlib.import_module(f"test.extensions.firstorder.{module}"), name)
        for problem in extension.make_test_problems(settings):
            _backpack_case(outcome, problem)
    derivatives = importlib.import_module("test.core.derivatives.derivatives_test")
    lists = [value for key, value in vars(derivatives).items() if key.endswith("PROBLEMS")]
    # Some of the lists are parts of others.
    for problem in {id(problem): problem for problems in lists for problem in problems}.values():
        _derivative_case(outcome, problem)
    return outcome


def _backpack_case(outcome: Outcome, problem: Any) -> None:
    autograd = importlib.import_module("test.extensions.implementation.autograd")
    problem.set_up()
    factor = problem.compute_reduction_factor()

    def losses(network: nn.Module) -> Tensor:
        y, n = network(problem.input), len(problem.input)
        # Rows of an example lie beside each other where the output has several an example.
        rows = len(y) // n
        parts = zip(y.split(rows), problem.target.split(len(problem.target) // n), strict=True)
        return torch.stack([problem.loss_function(output, target) for output, target in parts]) * factor

    expected = torch.stack(autograd.AutogradExtensions(problem).batch_l2_grad())
    outcome.compare(problem.make_id(), names(problem.model), squared_norms(problem.model, losses), expected)
    problem.tear_down()


def _derivative_case(outcome: Outcome, problem: Any) -> None:
    if problem.is_loss() or not names(problem.make_module()):
        outcome.leave_out("a derivative of a loss, or of a layer without parameters")
        return
    problem.set_up()
    module, x = problem.module, problem.input
    factors = torch.randn(problem.output_shape, dtype=torch.float64)

    def losses(network: nn.Module) -> Tensor:
        y = network(x)
        return ((y[0] if isinstance(y, tuple) else y) * factors).flatten(1).sum(1)

    if couples(engm.GradNormModule(module)):
        outcome.leave_out("batch norm in training mode: its norms are estimated")
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    expected = exact_squared_norms(losses(module), parameters)
    outcome.compare(problem.make_id(), names(module), squared_norms(module, losses), expected)


SUITES = {"opacus": of_opacus, "backpack": of_backpack}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SUITES:
        parser.add_argument(f"--{name}", type=lambda text: Path(text).resolve(), metavar="CHECKOUT")
    parser.add_argument("--out", type=Path, default=output.RESULTS / "peer_suites.json")
    parser.add_argument("--only", choices=sorted(SUITES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    checkouts = {name: folder for name in SUITES if (folder := getattr(args, name)) is not None}
    if not checkouts or not all(folder.is_dir() for folder in checkouts.values()):
        parser.error("name the folder of a checkout by --opacus, by --backpack, or of each by both")
    if args.only:
        torch.set_default_dtype(torch.float64)
        print(json.dumps(asdict(SUITES[args.only](checkouts[args.only]))))
        return
    outcomes = {}
    for name, folder in checkouts.items():
        # One process a suite: both have modules of common names, and the default type of numbers is set for all.
        command = [sys.executable, __file__, "--only", name, f"--{name}", str(folder)]
        said = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
        outcomes[name] = {"commit": head.stdout.strip()} | json.loads(said.splitlines()[-1])
    output.show(
        "the peers' own suites, engm against their references in float64",
        ["suite", "cases", "comparisons", "wrong", "worst"],
        [
            [name, str(o["cases"]), str(o["comparisons"]), str(len(o["wrong"])), f"{o['worst']:.1e}"]
            for name, o in outcomes.items()
        ],
    )
    for name, o in outcomes.items():
        for line in o["wrong"][:SHOWN]:
            print(f"{name}: {line}")
    output.save(args.out, {"machine": output.machine(), "suites": outcomes})


if __name__ == "__main__":
    main()
