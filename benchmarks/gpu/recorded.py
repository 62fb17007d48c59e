"""The paper's Table 1 as CUDA graphs: every method's step recorded, so that the device decides and not the host."""

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
    Setting("resnet18", "batch", "tf32"),
    Setting("resnet18", "batch", "bf16", "nhwc"),
    Setting("resnet18", "group", "tf32"),
    Setting("resnet18", "group", "bf16", "nhwc"),
    Setting("resnet18", "batch", "tf32", "nhwc"),
]
TINY = [Setting("vgg8", "batch", "tf32")]
ADVERSARIAL = {  # contender: method, whether norms are borrowed from the attack
    "msgd": ("msgd", False),
    "engm, borrowed": ("engm", True),
    "engm, own pass": ("engm", False),
    "aengm, borrowed": ("aengm", True),
    "nengm, borrowed": ("nengm", True),
}
PLAIN = {"msgd": ("msgd", False), "engm": ("engm", False)}


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Times adversarial steps and plain ones, setting by setting."""
    for setting in TINY if bench.tiny else SETTINGS:
        for contenders, attack_steps in ((ADVERSARIAL, 2 if bench.tiny else 10), (PLAIN, 0)):
            _case(bench, stage, setting, arguments, contenders, attack_steps)


def _case(
    bench: Bench,
    stage: Stage,
    setting: Setting,
    arguments: Any,
    contenders: dict[str, tuple[str, bool]],
    attack_steps: int,
) -> None:
    def work() -> dict[str, Any]:
        n = batch_of(setting, bench, arguments)
        torch.backends.cudnn.benchmark = bench.cuda
        try:
            with precision("tf32" if setting.precision == "bf16" else setting.precision):
                net, x, y = problem(setting, bench, n)
                makers: dict[str, Callable[[], Any]] = {
                    name: partial(
                        workloads.recorded_step,
                        *(net, x, y, method),
                        backend="cudagraph" if bench.real_cuda else "replay",
                        attack_steps=attack_steps,
                        borrowed=borrowed,
                    )
                    for name, (method, borrowed) in contenders.items()
                }
                steps, failed = build(makers)
                figures = bench.compare(steps, "msgd", rounds=15, inner=1 if attack_steps else 5)
        finally:
            torch.backends.cudnn.benchmark = False
        return {"reference": "msgd", "n": n, "contenders": figures | failed}

    kind = f"PGD-{attack_steps}" if attack_steps else "plain"
    stage.case(f"{setting}, {kind}, recorded", work, network=setting.network, norm=setting.norm,
               precision=setting.precision, memory=setting.memory, attack_steps=attack_steps)  # fmt: skip
    if bench.cuda:
        torch.cuda.empty_cache()
