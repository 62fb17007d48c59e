"""Prints figures of benchmarks/results as Markdown tables, as docs/speed.md shows them.

python benchmarks/report.py [benchmarks/results/cpu/steps.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DEFAULT = Path(__file__).parent / "results" / "cpu" / "steps.json"


def table(figures: dict) -> str:
    """The table of one benchmark: seconds a step, ratio to the reference and peak memory of every contender."""
    reference = figures["reference"]
    base = figures["contenders"][reference]["peak_megabytes"]
    lines = ["| contender | s a step | ratio to " + reference + " | peak MB | extra peak |", "|---|---|---|---|---|"]
    for name, row in figures["contenders"].items():
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} ± {row['spread']:.2f} | {row['peak_megabytes']:.0f} "
            f"| {row['peak_megabytes'] / base - 1:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print every table of one file."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    document = json.loads(path.read_text())
    print(f"{document['machine']}, {document['threads']} threads, torch {document['torch']}, n = 64\n")
    for name, figures in document["benchmarks"].items():
        print(f"**{name}**\n\n{table(figures)}\n")


if __name__ == "__main__":
    main()
