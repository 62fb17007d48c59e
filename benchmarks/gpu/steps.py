"""Whole training steps in turn, as ratios: plain ones to SGD, adversarial ones (the paper's Table 1) to MSGD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import workloads
from torch import Tensor, nn

import engm
from engm.recipes.training.precision import Autocast

from . import models
from .record import Stage
from .timing import FORMATS, Bench, precision

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """A network and how it is run; ``precision`` "bf16" is autocast over float32 parameters."""

    network: str
    norm: str  # "layer" for transformers
    precision: str
    memory: str = "nchw"
    slow: bool = False  # also contenders that take one backpropagation an example

    def __str__(self) -> str:
        return " ".join([self.network, self.norm, self.precision, self.memory])


PLAIN = [
    Setting("resnet18", "group", "tf32", slow=True),
    Setting("resnet18", "batch", "tf32", slow=True),
    Setting("resnet18", "group", "bf16", "nhwc"),
    Setting("resnet18", "batch", "bf16", "nhwc"),
    Setting("vit-s", "layer", "tf32"),
    Setting("vit-s", "layer", "bf16"),
    Setting("wrn34-10", "batch", "tf32"),
    Setting("wrn34-10", "group", "tf32"),
    Setting("resnet18", "group", "fp32"),
    Setting("resnet18", "batch", "fp32"),
    Setting("vgg8", "group", "tf32"),
    Setting("vgg8", "batch", "tf32"),
    Setting("resnet18", "group", "tf32", "nhwc"),
    Setting("resnet18", "batch", "tf32", "nhwc"),
    Setting("wrn34-10", "batch", "bf16", "nhwc"),
    Setting("vgg8", "group", "bf16", "nhwc"),
    Setting("vit-cifar", "layer", "tf32"),
    Setting("vit-b", "layer", "bf16"),
]
ADVERSARIAL = [
    Setting("resnet18", "batch", "tf32", slow=True),
    Setting("resnet18", "group", "tf32"),
    Setting("resnet18", "batch", "bf16", "nhwc"),
    Setting("resnet18", "group", "bf16", "nhwc"),
    Setting("resnet18", "batch", "fp32"),
    Setting("wrn34-10", "batch", "tf32"),
    Setting("wrn34-10", "batch", "bf16", "nhwc"),
]
TINY = [Setting("resnet18", "group", "tf32", slow=True), Setting("resnet18", "batch", "bf16", "nhwc", slow=True)]
TINY_NETWORKS = [
    Setting("vgg8", "batch", "tf32"),
    Setting("wrn34-10", "group", "tf32"),
    Setting("vit-cifar", "layer", "bf16"),
]


def problem(setting: Setting, bench: Bench, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Network, images and labels on the device, in the setting's memory format and under its autocast."""
    net = models.network(setting.network, setting.norm, tiny=bench.tiny).to(bench.device)
    x, y = models.batch(setting.network, n, bench.device)
    memory = FORMATS[setting.memory]
    net, x = net.to(memory_format=memory), x.contiguous(memory_format=memory)
    if setting.precision == "bf16":
        net = Autocast(net, bench.device.type, torch.bfloat16)
    return net, x, y


def batch_of(setting: Setting, bench: Bench, arguments: Any) -> int:
    """How many examples a step takes."""
    return 2 if bench.tiny else 64 if setting.network == "vit-b" else arguments.batch


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Times plain steps."""
    for setting in [*TINY, *TINY_NETWORKS] if bench.tiny else PLAIN:
        _case(bench, stage, setting, arguments, plain_steps, "sgd", 11)


def run_pgd(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Times adversarial steps."""
    for setting in TINY if bench.tiny else ADVERSARIAL:
        _case(bench, stage, setting, arguments, adversarial_steps, "msgd", 5)


def _case(
    bench: Bench, stage: Stage, setting: Setting, arguments: Any, make: Callable, reference: str, rounds: int
) -> None:
    def work() -> dict[str, Any]:
        n = batch_of(setting, bench, arguments)
        switches = "tf32" if setting.precision == "bf16" else setting.precision
        torch.backends.cudnn.benchmark = bench.cuda
        try:
            with precision(switches):
                steps, failed = build(make(setting, bench, n))
                inner = 1 if make is adversarial_steps else 3
                few = tuple(name for name in steps if "naive" in name or "calibrating" in name)
                figures = bench.compare(steps, reference, rounds=rounds, inner=inner, few=few)
        finally:
            torch.backends.cudnn.benchmark = False
        return {"reference": reference, "n": n, "contenders": figures | failed}

    found = stage.case(str(setting), work, network=setting.network, norm=setting.norm, precision=setting.precision,
                       memory=setting.memory)  # fmt: skip
    if bench.cuda:
        torch.cuda.empty_cache()
    if found:
        shown = ", ".join(f"{k} {v.get('ratio', 'failed')}" for k, v in found.get("contenders", {}).items())
        print(f"    {setting}: {shown}", flush=True)


def build(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, dict[str, str]]]:
    """The steps that can be made, and why the others cannot (Opacus not installed, a layer it refuses)."""
    steps, failed = {}, {}
    for name, maker in makers.items():
        try:
            steps[name] = maker()
        except ImportError as error:
            failed[name] = {"absent": str(error)}
        except Exception as error:
            failed[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return steps, failed


def plain_steps(setting: Setting, bench: Bench, n: int) -> dict[str, Callable[[], Step]]:
    """By name, a maker of one plain training step."""
    net, x, y = problem(setting, bench, n)
    makers: dict[str, Callable[[], Step]] = {
        "sgd": lambda: workloads.plain_sgd(net, x, y),
        "engm": lambda: workloads.engm_step(net, x, y, "engm"),
        "engm, two passes": lambda: reweighted(net, x, y),
        "aengm": lambda: workloads.engm_step(net, x, y, "aengm"),
        "nengm": lambda: workloads.engm_step(net, x, y, "nengm"),
        "msgd": lambda: workloads.engm_step(net, x, y, "msgd"),
    }
    if setting.norm == "batch":
        makers["engm, frozen"] = lambda: workloads.engm_step(net, x, y, "engm", batch_norm="frozen")
        makers["engm, calibrating"] = lambda: workloads.calibrating(net, x, y)
    else:
        makers["opacus ghost"] = lambda: workloads.opacus_ghost(net, x, y)
    if setting.slow:
        makers["naive engm"] = lambda: workloads.naive_engm(net, x, y)
    return makers


def reweighted(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """ENGM for loops that own their backward pass: a norm pass, then that of the reweighted losses."""
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9)
    opt = workloads.outer(model, "engm")

    def step() -> None:
        opt.reweight(workloads.losses_of(model, x, y)).mean().backward()
        opt.step()
        opt.zero_grad()

    return step


def adversarial_steps(setting: Setting, bench: Bench, n: int) -> dict[str, Callable[[], Step]]:
    """By name, a maker of one step with PGD-10, as in the paper's Table 1."""
    net, x, y = problem(setting, bench, n)
    steps = 2 if bench.tiny else 10

    def ours(method: str, borrowed: bool) -> Callable[[], Step]:
        return lambda: workloads.pgd_step(net, x, y, method, borrowed=borrowed, attack_steps=steps)

    makers = {"msgd": lambda: workloads.bare(net, x, y, steps), "msgd, wrapped": ours("msgd", False)}
    for method in ("engm", "aengm", "nengm"):
        makers[f"{method}, borrowed"] = ours(method, True)
        makers[f"{method}, own pass"] = ours(method, False)
    if setting.slow:
        makers["naive engm"] = lambda: workloads.bare(net, x, y, steps, naive=True)
    return makers
