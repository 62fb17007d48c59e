"""Fig. 4: the loss around test images, for networks trained with MSGD and with ENGM, at the same levels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..methods import LABELS
from .analysis import Analysis, Request
from .cells import Cell
from .measures import LossLandscape
from .outcome import Outcome, Table
from .statistics import Record, mean_of, paired_finding, selected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIMIZERS = ("msgd", "engm")
EXAMPLES, POINTS, ROUGH = 4, 21, 64
LEVELS = 13


def landscape_cells(request: Request) -> list[Cell]:
    """The runs of Table 2 with these two optimizers."""
    if request.settings.get("eps") == 0:
        raise ValueError("--eps 0: a loss landscape lies along an adversarial perturbation, which needs a radius")
    return [
        request.cell({}, optimizer=name, seed=seed, measures=lambda config: [LossLandscape(EXAMPLES, POINTS, ROUGH)])
        for seed in request.seeds
        for name in OPTIMIZERS
    ]


def mean_roughness(record: Record) -> float | None:
    """The roughness, a mean over the images."""
    return fmean(record["measures"]["landscape"]["roughness"])


def summarise_landscapes(records: Sequence[Record]) -> Outcome:
    """The outcome of Fig. 4."""
    finding = paired_finding(
        "The loss landscape of ENGM is smoother than MSGD's (shown by pictures; here: mean absolute curvature)",
        records,
        {"optimizer": "engm"},
        {"optimizer": "msgd"},
        mean_roughness,
        expected="less",
        unit=" nats",
        digits=3,
    )
    done = selected(records, {})
    count = len(done[0]["measures"]["landscape"]["roughness"]) if done else 0
    table = Table(
        f"Roughness of the loss around {count} test images: mean absolute second derivative along the adversarial "
        "perturbation and across it, nats per squared length of the perturbation (ours; the paper shows pictures).",
        ["optimizer", "roughness", "runs"],
        [
            [LABELS[name], mean_of(records, {"optimizer": name}, mean_roughness).text(4), str(len(found))]
            for name in OPTIMIZERS
            if (found := selected(records, {"optimizer": name}))
        ],
    )
    rows: list[dict[str, Any]] = [
        {"optimizer": r["labels"]["optimizer"], "seed": r["labels"]["seed"], "image": k, "roughness": value}
        for r in done
        for k, value in enumerate(r["measures"]["landscape"]["roughness"])
    ]
    return Outcome([table], [finding], rows, lambda drawn: _draw(records, drawn), (11, 6.4))


def _draw(records: Sequence[Record], drawn: Figure) -> None:
    """Draws the first seed's images, one in each column, at the same levels within a column."""
    import torch

    from ..analysis import level_sets

    first = [found[0] for name in OPTIMIZERS if (found := selected(records, {"optimizer": name}))]
    losses = [torch.tensor(r["measures"]["landscape"]["losses"]) for r in first]
    axes = drawn.subplots(len(first), len(losses[0]), squeeze=False, sharex=True, sharey=True)
    levels = level_sets(losses, LEVELS)
    for column, marks in enumerate(levels.tolist()):
        for row, record in enumerate(first):
            steps = record["measures"]["landscape"]["coordinates"]
            axis, plane = axes[row][column], losses[row][column].T.tolist()
            shown = axis.contourf(steps, steps, plane, levels=marks, cmap="viridis", extend="both")
            axis.contour(steps, steps, plane, levels=marks, colors="black", linewidths=0.4)
            axis.plot(0, 0, "x", color="white", markersize=7, markeredgewidth=2)
            axis.grid(visible=False)
            axis.set_title(f"{LABELS[record['labels']['optimizer']]}, image {column + 1}")
            if row == len(first) - 1:
                axis.set_xlabel("along the perturbation, in its lengths")
            if column == 0:
                axis.set_ylabel("across it, in its lengths")
        drawn.colorbar(
            shown,
            ax=axes[:, column],
            location="bottom",
            shrink=0.9,
            ticks=marks[:: (LEVELS - 1) // 3],
            format="%.2f",
            label="loss, nats (×: the image)",
        )


FIG_4 = Analysis("fig4", "Loss landscapes (Fig. 4)", landscape_cells, summarise_landscapes)
