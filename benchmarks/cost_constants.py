"""Measures the CPU's cost table anew and prints the lines that belong into csrc/cost_tables.cpp.

`engm.tune` fits a table for one machine and keeps it in the user's cache. This script is for the table that is built
in: it measures the same layers several times, fits every measurement by itself, which shows how far the constants can
be trusted, and then the medians of all of them. Nothing else should run on the machine.

    python benchmarks/cost_constants.py [--threads 2] [--seconds 60] [--repeats 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import fmean, median

import output
import torch

from engm import _C
from engm.cost import tuning
from engm.cost.table import ANY, Constants
from engm.cost.tuning import FORMS, Timing, fit_constants, is_held_out, measure_layers


def pooled(measurements: Sequence[Sequence[Timing]]) -> list[Timing]:
    """Every layer with the median of its times over the measurements."""
    return [
        Timing(repeated[0].parts, {form: median(timing.seconds[form] for timing in repeated) for form in FORMS})
        for repeated in zip(*measurements, strict=True)
    ]


def column(constants: Constants, timings: Sequence[Timing]) -> list[str]:
    """A table's constants, and how it would choose on the timed layers."""
    right = fmean(timing.regret(constants) == 0 for timing in timings)
    lost = fmean(timing.regret(constants) for timing in timings)
    return [*(f"{value:.3g}" for value in constants.values()), f"{right:.0%}", f"{lost:.1%}"]


def function(constants: Constants) -> str:
    """The C++ function with what is not 0."""
    settings = [f"  table.{name} = {value:.3g};" for name, value in constants.items() if value > 0]
    return "\n".join(["CostTable builtin_cpu() {", "  CostTable table;", *settings, "  return table;", "}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints how the fits agree, and the function to paste."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one measurement of all layers")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    builtin = _C.cost_table("cpu", builtin=True)
    measurements = []
    for repeat in range(args.repeats):
        started = time.perf_counter()
        timings, rounds = measure_layers("cpu", ANY, args.seconds)
        measurements.append(timings)
        print(f"measurement {repeat + 1}: {rounds} rounds, {time.perf_counter() - started:.0f} s", flush=True)
    every = pooled(measurements)
    tables = {"built in": column(builtin, every)}
    for number, timings in enumerate(measurements, 1):
        if fit := fit_constants(timings):
            tables[str(number)] = column(fit, every)
    final = fit_constants(every)
    if final is None:
        raise SystemExit("No constants fit these times: is the machine busy?")
    tables["all"] = column(final, every)
    unseen = [timing for i, timing in enumerate(every) if is_held_out(i)]
    if seen := fit_constants([timing for i, timing in enumerate(every) if not is_held_out(i)]):
        tables["two thirds, on the rest"] = column(seen, unseen)
        tables["built in, on the rest"] = column(builtin, unseen)
    title = f"{output.processor()}, {args.threads} threads, {len(tuning.LAYERS)} layers; fits by measurement"
    rows = zip((*builtin, "faster form taken", "time lost"), *tables.values(), strict=True)
    output.show(title, ["", *tables], rows)
    print(f"For csrc/cost_tables.cpp:\n\n{function(final)}")


if __name__ == "__main__":
    main()
