"""What every benchmark script does with its figures: the machine beside them, JSON, a table, a picture."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu import record

RESULTS = Path(__file__).parent / "results" / "cpu"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What the figures were measured on and with: device, versions, commit."""
    return record.machine(torch.device(device)) | {"processor": processor(), "threads": torch.get_num_threads()}


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Where to compute, and where the figures go: ``name`` is that of the JSON."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    parser.add_argument("--plot", action="store_true", help="a picture beside the JSON")


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the command as JSON holds them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def save(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, first column to the left and the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    print(f"\n{title}")  # as a title of the table it would be broken to the table's width
    table = Table(box=SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """The axes ``[rows, columns]`` of a figure that is saved at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}", flush=True)


def bars(box: Any, names: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Draw ratios as bars on a logarithmic scale, one group a name and one colour a series; None leaves a bar out."""
    height = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        at = [row + (index + 0.5) * height - 0.4 for row, _ in known]
        drawn = box.barh(at, [value for _, value in known], height, label=label, color=f"C{index}")
        box.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
    box.set_yticks(range(len(names)), names, fontsize=8)
    box.invert_yaxis()
    box.set_xscale("log")
    every = [value for values in series.values() for value in values if value is not None]
    smallest, largest = min(1.0, *every), max(every)
    ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if smallest <= tick <= max(2, largest)]
    box.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    box.minorticks_off()
    box.axvline(1, color="grey", linewidth=0.8)
    box.margins(x=0.15)
    if len(series) > 1:
        box.legend(fontsize=8)
