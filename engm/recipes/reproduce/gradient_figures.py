"""Fig. 2 and Table 5: norm and variance of the gradients, in natural and adversarial training and by radius."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..methods import LABELS
from ..pictures import kind_style, legend_below, mark_decays, mean_curve, style_of
from .analysis import Analysis, Request, data_name
from .cells import Cell
from .measures import DeepFool, Measure
from .outcome import Outcome, Table
from .published import TABLE5
from .statistics import Record, figure, mean_of, paired_finding, selected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NATURAL, ADVERSARIAL = "natural", "adversarial"
QUANTITIES = {"mean_norm": "expected norm μ", "variance": "variance σ²"}
UNITS = {"mean_norm": "nats", "variance": "nats²"}  # of a loss in nats, per unit of the weights
EPS = (0, 2, 4, 6, 8, 10)  # of Table 5, in 1/255 of the largest pixel value


# -- Fig. 2 ------------------------------------------------------------------------------------------------------------


def training_cells(request: Request) -> list[Cell]:
    """The runs of Fig. 2 with their gradients."""
    return natural_and_adversarial(request, request.gradients)


def natural_and_adversarial(request: Request, measures: Callable[[RunConfig], Sequence[Measure]]) -> list[Cell]:
    """Natural and adversarial training with MSGD; VGG-8 on SVHN beside the first data set, if nobody chose others."""
    return [
        request.cell(
            {"data": data_name(data), "training": training},
            optimizer="msgd",
            seed=seed,
            measures=measures,
            keep=True,
            data=data,
            defaults=schedule(request),
            **special,
            **radius(training),
        )
        for seed in request.seeds
        for data, special in networks(request).items()
        for training in (NATURAL, ADVERSARIAL)
    ]


def schedule(request: Request) -> dict[str, Any]:
    """Settings of the paper's Fig. 2 and 3, whose runs are shorter than those of the tables and have one decay."""
    return {"epochs": 100, "decay_epochs": (75,)} if request.budget.name == "paper" else {}


def radius(training: str) -> dict[str, Any]:
    """Settings of natural training, which is adversarial training with a radius of 0, and of adversarial training."""
    return {"eps": 0.0} if training == NATURAL else {}


def networks(request: Request) -> dict[str, dict[str, Any]]:
    """The paper's two data sets with their networks, or the one that was chosen."""
    if request.budget.name != "paper" or "data" in request.settings:
        return {request.first_data: {}}
    return {"cifar10": {"model": "resnet18"}, "svhn": {"model": "vgg8"}}


def at_epoch(epoch: int, quantity: str) -> Callable[[Record], float | None]:
    """Reads one figure of the gradients measured after an epoch."""

    def read(record: Record) -> float | None:
        rows = record.get("measures", {}).get("gradients", [])
        return next((float(row[quantity]) for row in rows if row["epoch"] == epoch), None)

    return read


def over_epochs(quantity: str) -> Callable[[Record], float | None]:
    """Reads the mean of one figure over the training, by trapezoids between the epochs that were looked at."""

    def read(record: Record) -> float | None:
        rows = record.get("measures", {}).get("gradients", [])
        if len(rows) < 2:
            return float(rows[0][quantity]) if rows else None
        area = sum((b["epoch"] - a["epoch"]) * (a[quantity] + b[quantity]) / 2 for a, b in pairwise(rows))
        return float(area / (rows[-1]["epoch"] - rows[0]["epoch"]))

    return read


def summarise_training(records: Sequence[Record]) -> Outcome:
    """The outcome of Fig. 2."""
    sets = list(dict.fromkeys(r["labels"]["data"] for r in selected(records, {})))
    findings, tables = [], []
    for data in sets:
        runs = selected(records, {"data": data})
        decays, last = runs[0]["config"]["decay_epochs"], runs[0]["config"]["epochs"]
        crossed = decays[:1] if decays and decays[0] < last else []
        for quantity, name in QUANTITIES.items():
            findings.append(
                paired_finding(
                    f"{data}: the {name} is higher in adversarial than in natural training (mean over the training)",
                    records,
                    {"data": data, "training": ADVERSARIAL},
                    {"data": data, "training": NATURAL},
                    over_epochs(quantity),
                    expected="greater",
                )
            )
        findings += [
            _across_decay(records, data, training, quantity, name, expected, decay, last)
            for decay in crossed
            for training, expected in ((NATURAL, "falls"), (ADVERSARIAL, "grows"))
            for quantity, name in QUANTITIES.items()
        ]
        tables.append(_epochs_table(records, data))
    return Outcome(
        tables,
        findings,
        gradient_rows(records),
        lambda drawn: _draw_training(records, sets, drawn),
        (9, 3.4 * len(sets) + 0.4),
    )


def _across_decay(
    records: Sequence[Record], data: str, training: str, quantity: str, name: str, expected: str, decay: int, last: int
) -> Any:
    both = [
        {**r, "labels": {**r["labels"], "at": at}}
        for r in selected(records, {"data": data, "training": training})
        for at in (decay, last)
    ]
    return paired_finding(
        f"{data}, {training} training: the {name} {expected} after the learning rate's decay "
        f"(epoch {decay} against {last})",
        both,
        {"at": last},
        {"at": decay},
        lambda r: at_epoch(r["labels"]["at"], quantity)(r),
        expected="greater" if expected == "grows" else "less",
    )


def _epochs_table(records: Sequence[Record], data: str) -> Table:
    runs = selected(records, {"data": data})
    epochs = sorted({row["epoch"] for r in runs for row in r["measures"]["gradients"]})
    lines = [
        [
            str(epoch),
            *(
                mean_of(records, {"data": data, "training": training}, at_epoch(epoch, quantity)).text(2)
                for quantity in QUANTITIES
                for training in (NATURAL, ADVERSARIAL)
            ),
        ]
        for epoch in epochs
    ]
    count = runs[0]["measures"]["gradients"][0]["examples"]
    return Table(
        f"{data}, {runs[0]['config']['model']}: gradients of {count} training images after an epoch, batch norm in "
        "training mode, mean ± standard deviation of single runs. The paper prints curves without numbers.",
        ["epoch", *(f"{name}, {training}" for name in QUANTITIES.values() for training in (NATURAL, ADVERSARIAL))],
        lines,
    )


def gradient_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The figures of every run and epoch, for the CSV file."""
    names = sorted({name for r in records for name in r["labels"]})
    return [
        {**{name: r["labels"].get(name) for name in names}, **row}
        for r in selected(records, {})
        for row in r["measures"]["gradients"]
    ]


def _draw_training(records: Sequence[Record], sets: Sequence[str], drawn: Figure) -> None:
    axes = drawn.subplots(len(sets), 2, squeeze=False)
    for row, data in enumerate(sets):
        for axis, (quantity, name) in zip(axes[row], QUANTITIES.items(), strict=True):
            for index, training in enumerate((NATURAL, ADVERSARIAL)):
                runs = selected(records, {"data": data, "training": training})
                curves = [{p["epoch"]: p[quantity] for p in run["measures"]["gradients"]} for run in runs]
                mean_curve(axis, curves, kind_style(index), f"{training} training")
            mark_decays(axis, {e for r in selected(records, {"data": data}) for e in r["config"]["decay_epochs"]})
            axis.set(title=data, xlabel="epoch", ylabel=f"{name} of the gradients, {UNITS[quantity]}", yscale="log")
    legend_below(drawn)


FIG_2 = Analysis("fig2", "Norm and variance of gradients over training (Fig. 2)", training_cells, summarise_training)

# -- Table 5 -----------------------------------------------------------------------------------------------------------


def radius_cells(request: Request) -> list[Cell]:
    """The runs of Table 5: MSGD and ENGM at every radius."""
    return [
        request.cell(
            {"eps": eps},
            optimizer=optimizer,
            seed=seed,
            measures=lambda config: [*request.gradients(config), DeepFool(request.budget.fooled)],
            keep=True,
            eps=eps / 255,
        )
        for seed in request.seeds
        for eps in EPS
        for optimizer in ("msgd", "engm")
    ]


RHO = figure("measures", "deepfool")


def summarise_radii(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 5."""
    lines = []
    for eps in EPS:
        mu, sigma2, rho_msgd, rho_engm = TABLE5[eps]
        msgd, engm_ = {"eps": eps, "optimizer": "msgd"}, {"eps": eps, "optimizer": "engm"}
        if not selected(records, {"eps": eps}):
            continue
        lines.append(
            [
                str(eps),
                f"{mean_of(records, msgd, over_epochs('mean_norm')).text(2)} ({mu:g})",
                f"{mean_of(records, msgd, over_epochs('variance')).text(1)} ({sigma2:g})",
                f"{mean_of(records, msgd, RHO).text(3)} ({rho_msgd:g})",
                f"{mean_of(records, engm_, RHO).text(3)} ({rho_engm:g})",
                f"{mean_of(records, engm_, over_epochs('mean_norm')).text(2)}",
                f"{mean_of(records, engm_, over_epochs('variance')).text(1)}",
            ]
        )
    done = selected(records, {})
    count = done[0]["measures"]["gradients"][0]["examples"] if done else 0
    table = Table(
        "Mean ± standard deviation of single runs, in brackets the paper's (of another network: compare the trend). μ "
        f"and σ²: of {count} training images, attacked as in training, mean over the training. ρ: "
        "mean l2 distance to the closest adversary by DeepFool, last checkpoint.",
        ["ε · 255", "μ, MSGD", "σ², MSGD", "ρ, MSGD", "ρ, ENGM", "μ, ENGM", "σ², ENGM"],
        lines,
    )
    present = [eps for eps in EPS if selected(records, {"eps": eps, "optimizer": "msgd"})]
    findings = []
    if len(present) > 1:
        low, high = present[0], present[-1]
        for quantity, name in QUANTITIES.items():
            findings.append(
                paired_finding(
                    f"The {name} grows with the radius (ε of {high} against {low}, MSGD)",
                    records,
                    {"eps": high, "optimizer": "msgd"},
                    {"eps": low, "optimizer": "msgd"},
                    over_epochs(quantity),
                    expected="greater",
                )
            )
    for eps in present:
        *_, rho_msgd, rho_engm = TABLE5[eps]
        more = rho_engm > rho_msgd
        findings.append(
            paired_finding(
                f"At ε of {eps}, ENGM's ρ is {'larger' if more else 'smaller'} than MSGD's "
                f"({rho_engm} against {rho_msgd})",
                records,
                {"eps": eps, "optimizer": "engm"},
                {"eps": eps, "optimizer": "msgd"},
                RHO,
                expected="greater" if more else "less",
                digits=3,
            )
        )
    rows = [
        {
            **{name: r["labels"][name] for name in ("eps", "optimizer", "seed")},
            "mean_norm": over_epochs("mean_norm")(r),
            "variance": over_epochs("variance")(r),
            "rho": RHO(r),
        }
        for r in done
    ]
    return Outcome([table], findings, rows, lambda drawn: _draw_radii(records, present, drawn), (10, 5.6))


def _draw_radii(records: Sequence[Record], present: Sequence[int], drawn: Figure) -> None:
    """Draws the three figures of the table over the radius: above of these runs, below the paper's, at one scale."""
    axes = drawn.subplots(2, 3, sharex=True, sharey="col")
    reads = {f"{name}, {UNITS[q]}": over_epochs(q) for q, name in QUANTITIES.items()}
    for column, (name, read) in enumerate({**reads, "ρ by DeepFool, l2 distance": RHO}.items()):
        ours, paper = axes[:, column]
        for index, optimizer in enumerate(("msgd", "engm")):
            style = style_of(optimizer).line()
            means = [mean_of(records, {"eps": eps, "optimizer": optimizer}, read) for eps in present]
            deviations = [0.0 if m.n < 2 else m.deviation for m in means]
            ours.errorbar(present, [m.value for m in means], deviations, **style, label=LABELS[optimizer])
            if column == 2 or optimizer == "msgd":  # the paper prints the gradients of MSGD alone
                printed = [TABLE5[eps][column if column < 2 else 2 + index] for eps in present]
                paper.plot(present, printed, **style)
        paper.set_xlabel("radius ε of the attack, 1/255")
        for axis, whose in ((ours, "these runs"), (paper, "the paper")):
            axis.set(title=whose, ylabel=name)
    legend_below(drawn)


TABLE_5 = Analysis("table5", "Gradients and robustness by radius (Table 5)", radius_cells, summarise_radii)
