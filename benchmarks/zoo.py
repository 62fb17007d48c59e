"""Which networks engm measures exactly, by which rules it does, and what a step costs.

python benchmarks/zoo.py check [--only SUBSTRING] [--mode eval]     exactness in float64, and ENGM/SGD in float32
python benchmarks/zoo.py exact [--part 1/2]                         exactness alone, in both modes; which fall short
python benchmarks/zoo.py time  [--models NAME ...] [--batch 16]     ten models beside Opacus and torch.func
python tools/write_models_page.py                                   docs/models.md, made from both

Every network of ``check`` and ``time`` is written as soon as it is measured (zoo_results.py). A run that was stopped
goes on with those that are missing when the same command is given again. ``exact`` writes nothing; two processes of one
thread take half an hour each.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import interleaved
import output
import peers
import torch
import workloads
import zoo_models
import zoo_results
from torch import nn
from zoo_models import Case

import engm

ROOT = Path(__file__).resolve().parent.parent
EXACT = 1e-9  # relative error of a norm in float64 up to which a model counts as exact
EXACT_IN_PARTS = 1e-6  # where the model computes parts of itself in float32 all the same
TEN = (
    "resnet18",
    "resnet50",
    "regnet_y_400mf",
    "densenet121",
    "mobilenet_v3_small",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "BertForSequenceClassification",
    "GPT2LMHeadModel",
)


def calm(net: nn.Module) -> nn.Module:
    """The network without randomness, which no oracle could repeat, and without branches or heads that begin at zero.

    Dropout and stochastic depth are off. Parameters that are nowhere larger than 0.001 (the scale of a residual branch,
    a head) get noise, for behind them every gradient is zero and nothing would be compared.
    """
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and parameter.numel() and float(parameter.abs().max()) < 1e-3:
                parameter.normal_(std=0.05)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if type(module).__name__.endswith(("StochasticDepth", "DropPath", "Dropout")):
            module.eval()
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return net


def check(case: Case, mode: str) -> dict[str, Any]:
    """Rules, error and time ratio of one model, or why it is refused."""
    start = time.perf_counter()
    net, found = verified(case, mode)
    if "refused" not in found:
        gc.collect()
        found |= _timed(net, case)
        found["seconds"] = round(time.perf_counter() - start, 1)
    return found


def verified(case: Case, mode: str) -> tuple[nn.Module, dict[str, Any]]:
    """One model, and its rules and error, or why it is refused."""
    torch.manual_seed(0)
    net = calm(case.make().train(mode == "train"))
    found: dict[str, Any] = {"family": case.family, "name": case.name, "options": case.options, "mode": mode}
    found["parameters"] = sum(p.numel() for p in net.parameters())
    try:
        found |= _verified(copy.deepcopy(net).double(), case)
    except Exception as error:
        found["refused"] = f"{type(error).__name__}: {error}"
        found["trace"] = traceback.format_exc().replace(f"{ROOT}/", "").splitlines()[-3:]
    return net, found


def short_of_exact(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What was found of the models that are refused or inexact in one of the modes; prints a line each, and a sum."""
    short, errors = [], []
    for case in cases:
        for mode in ("eval", "train"):
            _, found = verified(case, mode)
            gc.collect()
            errors.append(found.get("error", math.inf))
            if not found.get("exact"):
                short.append(found)
                print(f"{case.name}, {mode}: {found.get('refused') or found['worst']}", flush=True)
    exact = len(errors) - len(short)
    print(f"{exact} of {len(errors)} exact, the largest error {max(errors, default=0.0):.1e}", flush=True)
    return short


def _verified(net: nn.Module, case: Case) -> dict[str, Any]:
    model = engm.GradNormModule(net)
    x = case.batch(2)
    x = x.double() if x.is_floating_point() else x
    report = engm.verify(model, lambda m, batch: zoo_models.losses_of(m, batch), x)
    kinds = Counter(layer.rule for layer in report.layers)
    worst = max(report.layers, key=lambda layer: layer.error)
    allowed = EXACT if report.tolerance <= EXACT else EXACT_IN_PARTS
    return {
        "rules": dict(kinds.most_common()),
        "error": report.error,
        "worst": {"name": worst.name, "error": worst.error},
        "exact": report.error <= allowed and worst.error <= allowed,
        "couples": report.couples,
        "calibrated_error": report.calibrated_error,
    }


def _timed(net: nn.Module, case: Case, n: int = 4, rounds: int = 5) -> dict[str, Any]:
    """ENGM's plain step over SGD's, or why SGD's cannot be repeated."""
    x = case.batch(n)
    steps = {"sgd": _sgd_step(net, x)}
    try:
        steps["sgd"]()
        steps["sgd"]()
        steps["engm"] = _engm_step(net, x)
        timings = interleaved.compare(steps, reference="sgd", rounds=rounds)
    except (RuntimeError, engm.checks.NonFiniteError) as error:
        # A network that keeps a part of its graph for the next pass (LeViT), or overflows without trained weights.
        return {"not_timed": str(error)}
    return {"ratio": timings["engm"].as_json(), "sgd": timings["sgd"].as_json(), "batch": n}


def _sgd_step(net: nn.Module, x: torch.Tensor) -> interleaved.Step:
    model = copy.deepcopy(net)
    optimizer = workloads.sgd(model)

    def step() -> None:
        zoo_models.losses_of(model, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _engm_step(net: nn.Module, x: torch.Tensor) -> interleaved.Step:
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9)
    opt = engm.ENGM(model, workloads.sgd(model), alpha=1.0)

    def step() -> None:
        opt.backward(zoo_models.losses_of(model, x))
        opt.step()
        opt.zero_grad()

    return step


# -- beside others -------------------------------------------------------------------------------------------------


class Tensors(nn.Module):
    """A model whose output is the one tensor that the peers can differentiate."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = zoo_models.output_of(self.net(x))
        return out if out.dim() == 2 else out.flatten(1, -2).mean(1)


def beside_others(case: Case, n: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of a plain step as ratios to SGD's, or why a peer cannot do it.

    Networks are in training mode, in which alone Opacus captures, but for those with batch norm, which Opacus refuses
    in any mode.
    """
    torch.manual_seed(0)
    net = Tensors(case.make())
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    net = calm(net.train(not batch_norm))
    x = case.batch(n)
    with torch.no_grad():
        y = torch.arange(n) % net(x).shape[1]
    makers = {
        "SGD": lambda: workloads.plain_sgd(net, x, y),
        "ENGM": lambda: workloads.engm_step(net, x, y, "engm"),
        "Opacus ghost": lambda: workloads.opacus_ghost(net, x, y),
        "torch.func vmap": lambda: peers.vmap_grad(net, x, y),
    }
    steps, reasons = interleaved.runnable(makers)
    timings = interleaved.compare(steps, reference="SGD", rounds=rounds, few=("Opacus ghost", "torch.func vmap"))
    memory = {name: t.peak_bytes / timings["SGD"].peak_bytes for name, t in timings.items()}
    return {
        "name": case.name,
        "family": case.family,
        "batch": n,
        "steps": {name: t.as_json() | {"memory_ratio": round(memory[name], 3)} for name, t in timings.items()},
        "not_run": reasons,
    }


def _shown(found: dict[str, Any]) -> str:
    """What is printed of a network."""
    if "refused" in found:
        return str(found["refused"])
    times = f"{found['ratio']['ratio']:.2f} times SGD" if "ratio" in found else "not timed"
    return f"error {found['error']:.0e}, {times}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("--only", default="", help="models whose family or name holds this")
    checking.add_argument("--mode", choices=["eval", "train"], default="eval")
    checking.add_argument("--again", action="store_true", help="measure what was measured before, too")
    timing = commands.add_parser("time")
    timing.add_argument("--models", nargs="*", default=list(TEN))
    timing.add_argument("--batch", type=int, default=16)
    timing.add_argument("--rounds", type=int, default=5)
    exact = commands.add_parser("exact")
    exact.add_argument("--only", default="", help="models whose family or name holds this")
    exact.add_argument("--part", default="1/1", help="K/N: every Nth model from the Kth on")
    for command in (checking, timing, exact):
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--out", type=Path, default=output.RESULTS / "zoo")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cases = zoo_models.every()
    if args.command == "exact":
        first, every = map(int, args.part.split("/"))
        wanted = [case for case in cases if args.only in f"{case.family} {case.name}"]
        if short_of_exact(wanted[first - 1 :: every]):
            raise SystemExit(1)
    elif args.command == "check":
        path = args.out / f"{args.mode}.jsonl"
        for case in cases:
            known = (case.family, case.name) in zoo_results.read(path) and not args.again
            if args.only not in f"{case.family} {case.name}" or known:
                continue
            found = check(case, args.mode)
            zoo_results.put(path, {"machine": output.machine(), **found})
            print(f"{case.name}: {_shown(found)}", flush=True)
    else:
        for case in cases:
            if case.name in args.models:
                found = beside_others(case, args.batch, args.rounds)
                zoo_results.put(args.out / "time.jsonl", {"machine": output.machine(), **found})
                print(json.dumps({name: step["ratio"] for name, step in found["steps"].items()}), flush=True)


if __name__ == "__main__":
    main()
