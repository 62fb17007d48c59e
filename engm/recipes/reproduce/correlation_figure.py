"""Fig. 3: norms of input gradients against those of parameter gradients, and the error of weights made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..pictures import Style, kind_style, legend_below, mean_curve, style_of
from .analysis import Analysis, Request
from .cells import Cell
from .gradient_figures import ADVERSARIAL, NATURAL, natural_and_adversarial
from .measures import Correlation
from .outcome import Outcome, Table
from .statistics import Finding, Mean, Record, Verdict, mean_of, paired_finding, selected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("training", "evaluation")
PREDICTORS = {"line": "A-ENGM's line", "input": "N-ENGM, best scale", "engine": "ours"}
LARGEST_ERROR = 0.1  # what the paper reports for the line


def correlation_cells(request: Request) -> list[Cell]:
    """Natural and adversarial training with MSGD: the runs of Fig. 2."""

    def measures(config: RunConfig) -> list[Correlation]:
        budget = request.budget
        kept = budget.kept_epochs(config)
        # Exact norms through batch statistics cost one backpropagation an example, so every other epoch has to do.
        return [Correlation(budget.looked_at, budget.batch, tuple(sorted({*kept[::2], kept[-1]})))]

    return natural_and_adversarial(request, measures)


def _rows(record: Record, mode: str) -> list[dict[str, Any]]:
    return [row for row in record["measures"]["correlation"] if row["statistics"] == mode]


def pearson(mode: str, predictor: str, epoch: int | None = None) -> Callable[[Record], float | None]:
    """Correlation with the exact norms: after an epoch, or the mean over those looked at."""

    def read(record: Record) -> float | None:
        found = [row["pearson"][predictor] for row in _rows(record, mode) if epoch in (None, row["epoch"])]
        return fmean(found) if found else None

    return read


def weight_error(mode: str, alpha: str, predictor: str) -> Callable[[Record], float | None]:
    """The mean over the epochs of the mean of ``|w' - w|``."""

    def read(record: Record) -> float | None:
        found = [row["weight_errors"][alpha][predictor] for row in _rows(record, mode)]
        return fmean(found) if found else None

    return read


def summarise_correlation(records: Sequence[Record]) -> Outcome:
    """The outcome of Fig. 3."""
    sets = list(dict.fromkeys(r["labels"]["data"] for r in selected(records, {})))
    tables, findings = [], []
    for data in sets:
        tables += [_pearson_table(records, data), _error_table(records, data)]
        findings += _findings(records, data)
    return Outcome(
        tables, findings, _csv(records), lambda drawn: _draw(records, sets, drawn), (11, 3.4 * len(sets) + 1.0)
    )


def _pearson_table(records: Sequence[Record], data: str) -> Table:
    runs = selected(records, {"data": data})
    epochs = sorted({row["epoch"] for r in runs for row in r["measures"]["correlation"]})
    columns = [(training, mode) for training in (NATURAL, ADVERSARIAL) for mode in MODES]
    lines = [
        [
            str(epoch),
            *(
                f"{mean_of(records, {'data': data, 'training': training}, pearson(mode, 'input', epoch)).text(2)}"
                f" · {mean_of(records, {'data': data, 'training': training}, pearson(mode, 'engine', epoch)).text(3)}"
                for training, mode in columns
            ),
        ]
        for epoch in epochs
    ]
    count = runs[0]["measures"]["correlation"][0]["examples"]
    return Table(
        f"{data}, {runs[0]['config']['model']}: Pearson correlation with the exact norms of parameter gradients, of "
        f"{count} training images after an epoch: norms of input gradients · ours, calibrated on another batch (mean "
        "± standard deviation of single runs). In evaluation mode ours are exact. The paper prints curves only.",
        ["epoch", *(f"{training} training, {mode} mode" for training, mode in columns)],
        lines,
    )


def _error_table(records: Sequence[Record], data: str) -> Table:
    runs = selected(records, {"data": data, "training": ADVERSARIAL})
    alphas = list(runs[0]["measures"]["correlation"][0]["weight_errors"]) if runs else []
    labels = {"data": data, "training": ADVERSARIAL}
    lines = [
        [
            f"{alpha}, {mode} mode",
            mean_of(records, labels, weight_error(mode, alpha, "weight")).text(3),
            *(mean_of(records, labels, weight_error(mode, alpha, name)).text(2, 100) for name in PREDICTORS),
        ]
        for mode in MODES
        for alpha in alphas
    ]
    return Table(
        f"{data}, adversarial training: mean of |ŵ − w| in hundredths, mean over epochs; the line, the scale and our "
        "calibration come from another batch than the one judged. With a mean weight near 0 or 1 the threshold lies "
        "outside of the norms and any predictor is right.",
        ["α", "mean w", *PREDICTORS.values()],
        lines,
    )


def _findings(records: Sequence[Record], data: str) -> list[Finding]:
    found = []
    for training in (NATURAL, ADVERSARIAL):
        for mode in MODES:
            labels = {"data": data, "training": training}
            mean = mean_of(records, labels, pearson(mode, "input"))
            found.append(
                Finding(
                    f"{data}, {training} training, {mode} mode: input and parameter gradient norms correlate (judged: "
                    "above 0)",
                    f"correlation {mean.text(2)} (mean over epochs)",
                    _beyond(mean, 0.0, above=True),
                )
            )
    runs = selected(records, {"data": data, "training": ADVERSARIAL})
    both = [{**r, "labels": {**r["labels"], "at": at}} for r in runs for at in ("first", "last")]

    def at(record: Record) -> float | None:
        rows = _rows(record, "training")
        row = rows[0] if record["labels"]["at"] == "first" else rows[-1]
        return float(row["pearson"]["input"])

    found.append(
        paired_finding(
            f"{data}: the correlation becomes stronger as adversarial training proceeds (training mode)",
            both,
            {"at": "last"},
            {"at": "first"},
            at,
            expected="greater",
            digits=2,
        )
    )
    mean = worst_line_error(runs)
    found.append(
        Finding(
            f"{data}: the error of A-ENGM's weights is below 10 % at α of 0.1, 1 and 3 (training mode)",
            f"largest mean error over epochs and α: {mean.text(1)} hundredths",
            _beyond(mean, 100 * LARGEST_ERROR, above=False),
        )
    )
    return found


def worst_line_error(records: Sequence[Record]) -> Mean:
    """The largest error of A-ENGM's weights over epochs and the paper's thresholds, in hundredths: the mean of runs."""
    from ..analysis.correlation import MEDIAN

    worst = [
        max(
            errors["line"]
            for row in _rows(record, "training")
            for alpha, errors in row["weight_errors"].items()
            if alpha != MEDIAN  # which is no threshold of the paper's
        )
        for record in selected(records, {"training": ADVERSARIAL})
    ]
    return Mean.of([100 * value for value in worst])


def _beyond(mean: Mean, bound: float, *, above: bool) -> Verdict:
    """Whether the interval lies on one side of a bound."""
    if mean.n < 2:
        return "cannot say"
    low, high = mean.value - mean.half_width, mean.value + mean.half_width
    if low <= bound <= high:
        return "cannot say"
    return "agrees" if (mean.value > bound) == above else "contradicts"


def _csv(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            **{name: r["labels"][name] for name in ("data", "training", "seed")},
            **{name: row[name] for name in ("epoch", "statistics", "examples", "mean_norm", "slope", "intercept")},
            **{f"pearson_{name}": value for name, value in row["pearson"].items()},
            **{
                f"error_{name}_alpha_{alpha}": value
                for alpha, errors in row["weight_errors"].items()
                for name, value in errors.items()
            },
        }
        for r in selected(records, {})
        for row in r["measures"]["correlation"]
    ]


def _draw(records: Sequence[Record], sets: Sequence[str], drawn: Figure) -> None:
    axes = drawn.subplots(len(sets), 3, squeeze=False)
    for (natural, adversarial, errors), data in zip(axes, sets, strict=True):
        for axis, training in ((natural, NATURAL), (adversarial, ADVERSARIAL)):
            runs = selected(records, {"data": data, "training": training})
            kinds = [(mode, name) for name in ("input", "engine") for mode in MODES]
            for index, (mode, name) in enumerate(kinds):
                shown = f"{'input gradients' if name == 'input' else 'our norms'}, {mode} mode"
                curves = [{row["epoch"]: row["pearson"][name] for row in _rows(run, mode)} for run in runs]
                mean_curve(axis, curves, kind_style(index), shown)
            axis.set(title=f"{data}, {training} training", xlabel="epoch", ylim=(None, 1.02))
            axis.set_ylabel("correlation with the exact norms")
        runs = selected(records, {"data": data, "training": ADVERSARIAL})
        for index, alpha in enumerate(runs[0]["measures"]["correlation"][0]["weight_errors"] if runs else []):
            for name, method in (("line", "a-engm"), ("engine", "engm")):
                curves = [
                    {row["epoch"]: 100 * row["weight_errors"][alpha][name] for row in _rows(run, "training")}
                    for run in runs
                ]
                style = Style(style_of(method).colour, "osD^"[index % 4], kind_style(index).dash, name == "engine")
                mean_curve(errors, curves, style, f"α {alpha}, {PREDICTORS[name]}")
        errors.set(title=f"{data}, {ADVERSARIAL} training, training mode", xlabel="epoch")
        errors.set_ylabel("mean error |ŵ − w| of the weights, 1/100")
    legend_below(drawn)


FIG_3 = Analysis(
    "fig3", "Input-gradient norms against parameter-gradient norms (Fig. 3)", correlation_cells, summarise_correlation
)
