"""The paper's Table 1 as CUDA graphs: every method's step recorded, so that the device decides and not the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Recorded:
    """A method's step and what runs it: a backend of ``engm.record``, or None for steps by hand."""

    method: str
    backend: str | None
    borrowed: bool = True  # whether norms are those of the attack's last step


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Times adversarial steps and plain ones, setting by setting."""
    backend = "cudagraph" if bench.real_cuda else "replay"
    adversarial = {
        "msgd": Recorded("msgd", backend),
        "engm, borrowed": Recorded("engm", backend),
        "engm, own pass": Recorded("engm", backend, borrowed=False),
        "aengm, borrowed": Recorded("aengm", backend),
        "nengm, borrowed": Recorded("nengm", backend),
    }
    plain = {name: Recorded(name, backend) for name in ("msgd", "engm")}
    for setting in TINY if bench.tiny else SETTINGS:
        for contenders, attack_steps in ((adversarial, 2 if bench.tiny else 10), (plain, 0)):
            time_recorded(bench, stage, setting, arguments, contenders, attack_steps, "recorded")


def time_recorded(
    bench: Bench,
    stage: Stage,
    setting: Setting,
    arguments: Any,
    contenders: Mapping[str, Recorded],
    attack_steps: int,
    label: str,
) -> None:
    """Times recorded steps in turn, as ratios to the first of the contenders.

    Args:
        bench: where.
        stage: which the figures belong to.
        setting: network, precision and order of memory.
        arguments: of the command line.
        contenders: by name.
        attack_steps: of PGD; 0 for plain steps.
        label: what the case is called behind its setting and the kind of step.
    """
    reference = next(iter(contenders))

    def work() -> dict[str, Any]:
        n = batch_of(setting, bench, arguments)
        torch.backends.cudnn.benchmark = bench.cuda
        try:
            with precision("tf32" if setting.precision == "bf16" else setting.precision):
                net, x, y = problem(setting, bench, n)
                makers: dict[str, Callable[[], Any]] = {
                    name: partial(
                        workloads.recorded_step,
                        *(net, x, y, made.method),
                        backend=made.backend,
                        attack_steps=attack_steps,
                        borrowed=made.borrowed,
                    )
                    for name, made in contenders.items()
                }
                steps, failed = build(makers)
                figures = bench.compare(steps, reference, rounds=15, inner=1 if attack_steps else 5)
        finally:
            torch.backends.cudnn.benchmark = False
        return {"reference": reference, "n": n, "contenders": figures | failed}

    kind = f"PGD-{attack_steps}" if attack_steps else "plain"
    stage.case(f"{setting}, {kind}, {label}", work, network=setting.network, norm=setting.norm,
               precision=setting.precision, memory=setting.memory, attack_steps=attack_steps)  # fmt: skip
    if bench.cuda:
        torch.cuda.empty_cache()
