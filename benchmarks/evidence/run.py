"""Runs what the protocol asks for and has no record yet; ended at any moment, the same command goes on.

    python benchmarks/evidence/data.py CIFAR10.npz evidence.npz
    python benchmarks/evidence/run.py evidence.npz --runs runs/evidence --jobs 2

Records are written to benchmarks/evidence/records, one file a run; run folders hold the rest and are needed only until
their record is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import torch
from plan import HERE, Records, Trial, next_trials

from engm.recipes.reproduce.statistics import Record
from engm.recipes.reproduce.workers import at_once
from engm.recipes.storage.atomic_files import make_folder, read_json, write_json

RECORDS = HERE / "records"


def read_records(folder: Path = RECORDS) -> dict[str, Record]:
    """The records there are, by the name of their run."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def carry_out(trials: Sequence[Trial], data: Path, runs: Path, jobs: int, folder: Path = RECORDS) -> dict[str, Record]:
    """Runs trials; every record is written when its run is over."""
    make_folder(runs)
    make_folder(folder)
    began = monotonic()

    def keep(record: Record, done: int) -> None:
        write_json(folder / f"{record['name']}.json", record)
        result = record.get("diverged") or f"test {record['test']}"
        print(f"{monotonic() - began:6.0f} s  {done}/{len(trials)}  {record['name']}: {result}", flush=True)

    at_once([trial.cell(data) for trial in trials], runs, torch.device("cpu"), jobs, keep)
    return read_records(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what data.py wrote")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with a thread of its own")
    parser.add_argument("--plan", action="store_true", help="only say what the next stage is")
    args = parser.parse_args(argv)
    records: Records = read_records()
    while trials := next_trials(records):
        print(f"{len(trials)} runs: {', '.join(trial.name for trial in trials)}", flush=True)
        if args.plan:
            return
        records = carry_out(trials, args.data.absolute(), args.runs, args.jobs)
    print("everything has been run")


if __name__ == "__main__":
    main()
