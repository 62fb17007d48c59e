"""Recorded steps by each of their backends, for ENGM and momentum SGD alike: plain ones, and adversarial ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import workloads

from .record import Stage
from .steps import Setting, batch_of, build, problem
from .timing import Bench, precision

SETTINGS = [
    Setting("resnet18", "group", "tf32"),
    Setting("resnet18", "batch", "tf32"),
    Setting("resnet18", "group", "bf16", "nhwc"),
    Setting("resnet18", "batch", "bf16", "nhwc"),
]
TINY = [Setting("vgg8", "group", "tf32"), Setting("vgg8", "batch", "tf32")]
METHODS = ("msgd", "engm")
BY_HAND = "by hand"


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Times steps by hand, replayed and as CUDA graphs, and then, which takes minutes a case, compiled by Inductor."""
    settings = TINY if bench.tiny else SETTINGS
    attacks = [0, 2 if bench.tiny else 10]
    quick = (BY_HAND, "replay", "cudagraph") if bench.real_cuda else (BY_HAND, "replay")
    for backends, given in ((quick, attacks), ((BY_HAND, "inductor"), attacks[: 1 if bench.tiny else None])):
        for attack_steps in given:
            for setting in settings[: 1 if bench.tiny and "inductor" in backends else None]:
                _case(bench, stage, setting, arguments, backends, attack_steps)


def _case(
    bench: Bench, stage: Stage, setting: Setting, arguments: Any, backends: tuple[str, ...], attack_steps: int
) -> None:
    def work() -> dict[str, Any]:
        n = batch_of(setting, bench, arguments)
        torch.backends.cudnn.benchmark = bench.cuda
        try:
            with precision("tf32" if setting.precision == "bf16" else setting.precision):
                net, x, y = problem(setting, bench, n)
                makers: dict[str, Callable[[], Any]] = {
                    f"{method}, {backend}": partial(
                        workloads.recorded_step,
                        *(net, x, y, method),
                        backend=None if backend == BY_HAND else backend,
                        attack_steps=attack_steps,
                    )
                    for method in METHODS
                    for backend in backends
                }
                steps, failed = build(makers)
                figures = bench.compare(steps, reference, rounds=11, inner=1 if attack_steps else 3)
        finally:
            torch.backends.cudnn.benchmark = False
        return {"reference": reference, "n": n, "contenders": figures | failed}

    reference = f"{METHODS[0]}, {BY_HAND}"
    kind = f"PGD-{attack_steps}" if attack_steps else "plain"
    label = f"{setting}, {kind}, {' / '.join(backends[1:])}"
    stage.case(label, work, network=setting.network, norm=setting.norm, precision=setting.precision,
               memory=setting.memory, attack_steps=attack_steps)  # fmt: skip
    if bench.cuda:
        torch.cuda.empty_cache()
