"""Recorded steps by each of their backends, for ENGM and momentum SGD alike: plain ones, and adversarial ones."""

from __future__ import annotations

from typing import Any

from .record import Stage
from .recorded import Recorded, time_recorded
from .steps import Setting
from .timing import Bench

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
        contenders = {
            f"{method}, {backend}": Recorded(method, None if backend == BY_HAND else backend)
            for method in METHODS
            for backend in backends
        }
        for attack_steps in given:
            for setting in settings[: 1 if bench.tiny and "inductor" in backends else None]:
                label = " / ".join(backends[1:])
                time_recorded(bench, stage, setting, arguments, contenders, attack_steps, label)
