"""Command line of the GPU benchmarks: see ``python benchmarks/gpu/run.py --help``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engm

from . import backends, ceilings, kernels, memory, recorded, runs, steps, tables, training
from .faked import faked_cuda
from .record import DeviceLostError, Record, Stage, machine
from .timing import Bench


def tune(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Fits the cost model to this device; ``cost_table.json`` may become ENGM_COST_TABLE of a later run."""

    def work() -> dict[str, Any]:
        found = engm.tune(bench.device, path=arguments.out / "cost_table.json", seconds=max(1.0, 0.7 * stage.left))
        print(found, flush=True)
        return {"report": str(found)}

    stage.case("cost model", work)


def self_test(bench: Bench, stage: Stage, _: Any) -> None:
    """Tries every kernel in every precision; torch computes in the place of one that fails, and figures are torch's."""

    def work() -> dict[str, Any]:
        report = engm.self_test(bench.device)
        print(report, flush=True)
        return {"ok": report.ok, "trials": [dataclasses.asdict(trial) for trial in report.trials]}

    stage.case("kernels", work)


STAGES: dict[str, tuple[Callable[..., None], float]] = {  # what runs, and its seconds
    "self_test": (self_test, 20),
    "ceilings": (ceilings.run, 20),
    "kernels": (kernels.run, 150),
    "steps": (steps.run, 150),
    "pgd": (steps.run_pgd, 100),
    "recorded": (recorded.run, 300),
    "backends": (backends.run, 400),
    "memory": (memory.run, 40),
    "profile": (memory.run_profile, 25),
    "tune": (tune, 60),
    "training": (training.run, 480),
    "runs": (runs.run, 480),
}
RESTARTS = 6  # how often a process whose CUDA context died is replaced


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="output directory: gpu.json, gpu.md")
    usual = "self_test,ceilings,recorded,kernels,steps,pgd,memory,profile"
    parser.add_argument("--stages", default=usual, help=", ".join(STAGES))
    parser.add_argument("--seconds", type=float, help="seconds of all stages together, each scaled down to fit")
    parser.add_argument("--device", default="cuda", help="cuda, cpu, or fake: the CPU, taking the steps of a GPU")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny shapes, one repetition")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz, for the stages training and runs")
    parser.add_argument("--epochs", type=int, help="of training, at most (30); of runs (as many as the time allows)")
    parser.add_argument("--runs", type=Path, default=Path("build/gpu/runs"), help="folder that runs are resumed from")
    parser.add_argument("--seeds", default="0", help="of runs, as 0,1,2")
    parser.add_argument("--methods", default=",".join(training.METHODS), help="methods of training")
    parser.add_argument("--norm", default="batch", choices=["batch", "group"], help="norm of the network in training")
    parser.add_argument("--training-precision", default="tf32", choices=["tf32", "fp32", "bf16"])
    parser.add_argument("--resume", action="store_true", help="pass over what the output directory holds already")
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    arguments.stages = arguments.stages.split(",")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if not set(arguments.methods) <= set(training.METHODS):
        parser.error(f"--methods must be some of {','.join(training.METHODS)}")
    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}: expected some of {', '.join(STAGES)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device fake --tiny rehearses the benchmarks without one")
    return arguments


def main() -> None:
    """Runs the stages that were asked for and saves each as it goes; a dead CUDA context is left with its process."""
    arguments = parse()
    if arguments.device == "fake":
        with faked_cuda():
            return measure(arguments, torch.device("cpu"))
    return measure(arguments, torch.device(arguments.device))


def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """Runs the stages on a device."""
    record = Record(arguments.out, resume=arguments.resume)
    if not arguments.resume:
        for name in arguments.stages:
            record.document["stages"].pop(name, None)
    record.document["machine"] = machine(device)
    record.document["arguments"] = {key: str(value) for key, value in vars(arguments).items()}
    record.save()
    seconds = {name: STAGES[name][1] for name in arguments.stages}
    share = min(1.0, arguments.seconds / sum(seconds.values())) if arguments.seconds else 1.0
    bench = Bench(device, arguments.tiny, faked=arguments.device == "fake")
    for name in arguments.stages:
        given = seconds[name] * share
        if arguments.seconds and len(seconds) == 1:
            given = arguments.seconds
        with record.stage(name, given, device).running() as stage:
            try:
                STAGES[name][0](bench, stage, arguments)
            except DeviceLostError as error:
                print(f"    the device is lost: {error}", flush=True)
                record.save()
                start_again(arguments)
            except Exception as error:
                stage.add({"case": "(the stage itself)", "error": repr(error), "traceback": traceback.format_exc()})
                traceback.print_exc()
        print(tables.stage(name, record.document["stages"][name]), flush=True)
        (arguments.out / "gpu.md").write_text(tables.document(record.document) + "\n")


def start_again(arguments: Any) -> None:
    """Goes on in a process with a fresh CUDA context, which passes over what is recorded (the fatal case included)."""
    if arguments.restarts >= RESTARTS:
        sys.exit(f"the CUDA context died {RESTARTS + 1} times: see gpu.json")
    given = sys.argv[1:]
    if "--restarts" in given:
        at = given.index("--restarts")
        del given[at : at + 2]
    command = [sys.executable, str(Path(__file__).with_name("run.py")), *given]
    if "--resume" not in given:
        command.append("--resume")
    os.execv(sys.executable, [*command, "--restarts", str(arguments.restarts + 1)])


if __name__ == "__main__":
    main()
