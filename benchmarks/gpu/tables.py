"""The result file as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = dict[str, Any]


def stage(name: str, entry: dict[str, Any]) -> str:
    """One stage as text: its figures, and what failed, is absent or was passed over for want of time."""
    cases = entry["cases"]
    lines = [f"## {name}: {len(cases)} cases, {entry['seconds']:.0f} s", ""]
    lines += DRAW.get(name, _listed)([case for case in cases if "error" not in case and "absent" not in case])
    for case in cases:
        for mark in ("error", "absent"):
            if mark in case:
                lines.append(f"{mark}: {case['case']}: {case[mark].splitlines()[0][:200]}")
    passed = entry.get("passed over", [])
    if passed:
        lines.append(f"passed over for want of time: {len(passed)}, from {passed[0]}")
    return "\n".join(lines) + "\n"


def document(found: dict[str, Any]) -> str:
    """The whole file: the machine, then every stage."""
    machine = {key: value for key, value in found.get("machine", {}).items() if key != "engm"}
    head = ", ".join(f"{key} {value}" for key, value in machine.items())
    return "\n".join([head, "", *[stage(name, entry) for name, entry in found["stages"].items()]])


def _listed(cases: list[Case]) -> list[str]:
    """The label of every case and its plain figures."""
    keep = ("ms", "tflops", "gigabytes_per_second", "microseconds", "in engm's kernels", "calls", "report")
    return [f"{case['case']:60} " + "  ".join(f"{k} {case[k]}" for k in keep if k in case) for case in cases]


def _kernels(cases: list[Case]) -> list[str]:
    """A block a setting: a line a layer, a column a contender; milliseconds, and TFLOP/s of the direct form."""
    lines: list[str] = []
    for setting in dict.fromkeys(case["setting"] for case in cases):
        rows = [case for case in cases if case["setting"] == setting]
        if setting == "bytes":
            for case in rows:
                share = f"  {case['of copy']:.0%} of copy" if "of copy" in case else ""
                lines.append(f"{case['case']:60} {case['ms']:.4f} ms  {case['gigabytes_per_second']} GB/s{share}")
            lines.append("")
            continue
        contenders = list(dict.fromkeys(case["contender"] for case in rows))
        lines += [
            f"**{setting}**, milliseconds",
            "",
            "| layer | " + " | ".join(contenders) + " | TFLOP/s | of matmul | norm error |",
        ]
        lines.append("|" + "---|" * (len(contenders) + 4))
        for layer in dict.fromkeys(case["layer"] for case in rows):
            by = {case["contender"]: case for case in rows if case["layer"] == layer}
            best = by.get("auto", {})
            values = [f"{by[c]['ms']:.4f}" if c in by else "" for c in contenders]
            direct = by.get("direct", {})
            error = max(
                (case.get("norm error", 0.0) for name, case in by.items() if name in ("auto", "direct", "gram")),
                default=0,
            )
            share = f"{direct['of matmul']:.0%}" if "of matmul" in direct else ""
            values += [str(direct.get("tflops", best.get("tflops", ""))), share, f"{error:.1e}"]
            lines.append(f"| {layer} | {' | '.join(values)} |")
        lines.append("")
    return lines


def _contenders(cases: list[Case]) -> list[str]:
    """A block a network: milliseconds a step, ratio, peak memory and its excess over the reference."""
    lines: list[str] = []
    for case in cases:
        found = case["contenders"]
        reference = case.get("reference", "sgd")
        base = found.get(reference, {}).get("peak megabytes")
        lines += [
            f"**{case['case']}**, n = {case['n']}",
            "",
            f"| contender | ms | ratio to {reference} | peak MB | extra peak |",
            "|---|---|---|---|---|",
        ]
        for name, row in found.items():
            peak = row.get("peak megabytes")
            extra = f"{peak / base - 1:+.0%}" if peak and base else ""
            why = row.get("absent") or row.get("error")
            if why:
                lines.append(f"| {name} | {why.splitlines()[0][:90]} | | | |")
            else:
                ratio = f"{row['ratio']:.3f} ± {row['spread']:.3f}" if "ratio" in row else ""
                lines.append(f"| {name} | {row.get('ms', '')} | {ratio} | {peak} | {extra} |")
        lines.append("")
    return lines


def _training(cases: list[Case]) -> list[str]:
    """Epochs, fidelity and accuracy, as JSON."""
    keys = ("epochs", "fidelity", "evaluation")
    return [f"{key}: {json.dumps(case[key], indent=1)}" for case in cases for key in keys if key in case]


def _runs(cases: list[Case]) -> list[str]:
    """A block a seed: how far each method came, what a step took, and the accuracies."""
    lines: list[str] = []
    for case in cases:
        state = "finished" if case.get("finished") else "not finished: call again with the same folder"
        lines += [
            f"**{case['case']}**, {case['plan']['epochs']} epochs planned, {state}",
            "",
            "| method | epochs | ms a step | loss | best natural / robust (validation) | best, last robust (test) |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in case["methods"].items():
            last = row["history"][-1] if row["history"] else None
            best, test = row["best"], row.get("test")
            values = [
                f"{row['epochs']} of {row['of']}",
                f"{1e3 * last['step_seconds']:.2f}" if last else "",
                f"{last['loss']:.4f}" if last else "",
                f"{best['natural']:.4f} / {best['robust']:.4f}" if best else "",
                f"{test['best']['robust']:.4f}, {test['last']['robust']:.4f}" if test else "",
            ]
            lines.append(f"| {name} | {' | '.join(values)} |")
        lines.append("")
    return lines


DRAW: dict[str, Callable[[list[Case]], list[str]]] = {
    "kernels": _kernels,
    "steps": _contenders,
    "pgd": _contenders,
    "recorded": _contenders,
    "backends": _contenders,
    "memory": _contenders,
    "training": _training,
    "runs": _runs,
}

if __name__ == "__main__":
    print(document(json.loads(Path(sys.argv[1]).read_text())))
