"""Accuracy against the radius of the attack: a curve for each network and attack, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pictures import legend_below, picture
from ..runs.files import RunFolder
from ..storage.atomic_files import write_json
from .asking import Attacked
from .target import Answers, Place


def curves_of(answers: Answers) -> list[dict[str, Any]]:
    """The curves: ``weights``, ``attack``, ``threat``, ``examples``, and ``points`` of ``eps`` and ``accuracy``."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, asked in answers.items():
        for question, result in asked:
            if not isinstance(question, Attacked):
                continue
            curve = found.setdefault(
                (name, question.name),
                {
                    "weights": name,
                    "attack": question.name,
                    "threat": question.ball.norm,
                    "examples": len(question.test),
                    "points": [],
                },
            )
            curve["points"].append({"eps": question.ball.eps, "accuracy": result["accuracy"]})
    return list(found.values())


def write_sweep(place: Place, answers: Answers) -> tuple[Path, Path]:
    """Writes ``sweep.json`` and ``sweep.png`` into the run's folder, or beside the file with its name in front.

    Returns:
        The two paths.
    """
    if isinstance(place, RunFolder):
        data, drawn = place.path / "sweep.json", place.path / "sweep.png"
    else:
        data, drawn = (place.path.with_name(f"{place.path.name}.sweep.{ending}") for ending in ("json", "png"))
    curves = curves_of(answers)
    write_json(data, {"format": 1, "curves": curves})
    from matplotlib.ticker import PercentFormatter  # imported here, because the command line starts faster without it

    with picture(drawn, (6.0, 4.0)) as figure:
        axes = figure.subplots()
        for curve in curves:
            points = curve["points"]
            axes.plot(
                [point["eps"] * 255 for point in points],
                [point["accuracy"] for point in points],
                marker="o",
                label=f"{curve['weights']}, {curve['attack']}",
            )
        norm = "l2" if curves[0]["threat"] == "l2" else "l-inf"
        axes.set_xlabel(f"radius of the attack, {norm}, in grey levels (eps times 255)")
        axes.set_ylabel(f"accuracy on {curves[0]['examples']} images")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        legend_below(figure)
    return data, drawn
