"""Adversarial training on real images: seconds an epoch of each method, and how faithful ENGM's weights are."""

from __future__ import annotations

import copy
import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fidelity
import torch
import workloads
from torch import Tensor, nn

import engm
from engm.adversarial import paused
from engm.recipes.accuracy import evaluate, pgd20
from engm.recipes.data import load_npz
from engm.recipes.training.precision import Autocast

from . import models
from .record import Absent, Stage
from .timing import FORMATS, Bench, precision

SAVE_EVERY = 30.0  # seconds
EPOCHS = 30  # at most, where nothing else is asked for
METHODS = ("msgd", "engm-borrowed", "engm-own")
LOOKS = (0, 5, 20, 50, 100, 200, 300, 500, 800, 1200, 1600, 2000)  # steps at which weights are compared with exact ones


@dataclass
class Runner:
    """One network in training."""

    name: str
    model: engm.GradNormModule
    opt: torch.optim.Optimizer
    generator: torch.Generator
    milliseconds: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Trains with all methods over the same batches, as far as the stage's time reaches; this is one case."""
    facts = {"data": str(arguments.data), "precision": arguments.training_precision, "methods": arguments.methods}
    stage.case("training", lambda: _train(bench, stage, arguments), **facts)


def _train(bench: Bench, stage: Stage, arguments: Any) -> dict[str, Any]:
    if arguments.data is None or not Path(arguments.data).exists():
        raise Absent("no --data CIFAR10.npz with x_train, y_train, x_test, y_test")
    data = load_npz(arguments.data, validation_examples=8 if bench.tiny else 1000).to(bench.device)
    n, budget = (4 if bench.tiny else arguments.batch), stage.left
    memory = FORMATS["nhwc" if arguments.training_precision == "bf16" else "nchw"]
    torch.backends.cudnn.benchmark = bench.cuda
    switches = "tf32" if arguments.training_precision == "bf16" else arguments.training_precision
    figures: dict[str, Any] = {"n": n, "epochs": []}
    start = saved = time.monotonic()
    try:
        with precision(switches):
            runners = _runners(bench, arguments, memory)
            order, epoch, steps = torch.Generator().manual_seed(0), 0, 0
            per_epoch = len(data.train) // n
            done = False
            while not done:
                rows = torch.randperm(len(data.train), generator=order).to(bench.device)
                for index in range(per_epoch):
                    x, y = data.train.batch(rows[index * n : (index + 1) * n])
                    x = x.contiguous(memory_format=memory)
                    for runner in runners[steps % len(runners) :] + runners[: steps % len(runners)]:
                        _step(bench, runner, x, y, steps)
                    steps += 1
                    if time.monotonic() - saved > SAVE_EVERY:
                        saved = time.monotonic()
                        looks = {runner.name: runner.looks for runner in runners if runner.looks}
                        stage.partly("training", {**figures, "steps": steps, "looks": looks})
                    out_of_time = time.monotonic() - start > 0.85 * budget  # the rest is for the evaluation
                    done = out_of_time or (bench.tiny and steps == 2)
                    if done:
                        break
                epoch += 1
                figures["epochs"].append(_epoch(epoch, runners, per_epoch))
                print("   ", figures["epochs"][-1], flush=True)
                done = done or epoch == (arguments.epochs or EPOCHS)
            figures |= {"steps": steps, "looks": {r.name: r.looks for r in runners if r.looks}}
            figures["evaluation"] = _evaluate(bench, runners, data)
    finally:
        torch.backends.cudnn.benchmark = False
    figures["fidelity"] = {name: _means(looks) for name, looks in figures["looks"].items()}
    return figures


def _runners(bench: Bench, arguments: Any, memory: torch.memory_format) -> list[Runner]:
    net: nn.Module = models.network("resnet18", arguments.norm, tiny=bench.tiny).to(bench.device, memory_format=memory)
    if arguments.training_precision == "bf16":
        net = Autocast(net, bench.device.type, torch.bfloat16)
    runners = []
    for name in arguments.methods:
        model = engm.GradNormModule(copy.deepcopy(net))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        opt = engm.MSGD(model, sgd) if name == "msgd" else engm.ENGM(model, sgd, alpha=5.0)
        runners.append(Runner(name, model, opt, torch.Generator(bench.device).manual_seed(0)))
    return runners


def _step(bench: Bench, runner: Runner, x: Tensor, y: Tensor, number: int) -> None:
    """Attacks, weighs and updates. The clock runs over what a user pays, not over the look at exact gradients."""
    steps = 2 if bench.tiny else 10
    attack = workloads.attack_of(steps, eval_mode=False)  # borrowed norms are faithful in this mode only
    model, opt = runner.model, runner.opt
    model.train()
    state: dict[str, Any] = {}

    def forward() -> None:
        state["found"] = attack(model, x, y, generator=runner.generator, measure="borrowed" in runner.name)
        with paused(model) if runner.name == "msgd" else nullcontext():  # plain training captures nothing
            state["losses"] = workloads.losses_of(model, state["found"].inputs, y)

    def update() -> None:
        state["stats"] = opt.backward(state["losses"], measurement=state["found"].measurement)  # type: ignore[attr-defined]

    def finish() -> None:
        opt.step()
        opt.zero_grad()

    look = "engm" in runner.name and number in LOOKS
    if not look:
        runner.milliseconds.append(bench.elapsed(lambda: (forward(), update(), finish())))
    else:
        forward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        judge = fidelity.Judge(fidelity.exact_gradients(state["losses"], parameters))
        update()
        figures = judge(state["stats"].norms)
        runner.looks.append({"step": number, **figures, "mean_exact_norm": float(judge.norms.mean())})
        del judge
        finish()
    runner.losses.append(state["losses"].detach().mean())


def _means(looks: list[dict[str, float]]) -> dict[str, float]:
    """Means and worst looks, leaving out figures that are not numbers."""
    errors = [look["weight_error"] for look in looks if math.isfinite(look["weight_error"])]
    cosines = [look["cosine"] for look in looks if math.isfinite(look["cosine"])]
    if not errors or not cosines:
        return {}
    return {
        "looks": len(looks),
        "weight error": statistics.fmean(errors),
        "worst weight error": max(errors),
        "cosine": statistics.fmean(cosines),
        "worst cosine": min(cosines),
    }


def _epoch(epoch: int, runners: list[Runner], per_epoch: int) -> dict[str, Any]:
    """Figures since the last call; ``epoch seconds`` are of a whole epoch at the mean step."""
    row: dict[str, Any] = {"epoch": epoch}
    for runner in runners:
        times = runner.milliseconds or [math.nan]
        row[runner.name] = {
            "steps": len(runner.losses),
            "median step ms": round(statistics.median(times), 3),
            "epoch seconds": round(1e-3 * per_epoch * statistics.fmean(times), 2),
            "loss": round(float(torch.stack(runner.losses).mean()), 4) if runner.losses else None,
        }
        runner.milliseconds, runner.losses = [], []
    first = runners[0].name
    for runner in runners[1:]:
        row[runner.name]["ratio"] = round(row[runner.name]["epoch seconds"] / row[first]["epoch seconds"], 4)
    return row


def _evaluate(bench: Bench, runners: list[Runner], data: Any) -> dict[str, Any]:
    test = data.test.take(torch.arange(min(len(data.test), 4 if bench.tiny else 1000), device=bench.device))
    found = {}
    for runner in runners:
        accuracy = evaluate(runner.model, test, None if bench.tiny else pgd20(8 / 255))
        found[runner.name] = {"natural": accuracy.natural, "robust": accuracy.robust, "examples": accuracy.examples}
    return found
