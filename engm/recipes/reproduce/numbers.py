"""One page of every number that the paper prints: the command for it, and what was measured at which budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig
from ..methods import LABELS
from ..setups import ALPHA, SETUPS
from .accuracy_rows import COLUMNS, Figure_
from .correlation_figure import worst_line_error
from .gradient_figures import EPS, RHO, over_epochs
from .method_tables import METHODS
from .outcome import Table
from .published import MEAN_GAIN, TABLE1_SECONDS, TABLE2, TABLE3, TABLE4, TABLE5, Accuracies
from .registry import ANALYSES
from .statistics import Record, mean_of, selected
from .step_times import OWN, paper_ratio, ratios
from .wide_table import SYSTEMS

Documents = Mapping[str, dict[str, Any]]
NOT_RUN = "not run"


def numbers_page(found: Documents, title: str, introduction: str) -> str:
    """Markdown: a section a table of the paper, its figures, the numbers of its text, and its set-ups.

    Args:
        found: results by analysis, from :func:`~engm.recipes.reproduce.page.documents`; nothing else is read.
        title: title of the page.
        introduction: text below the title.
    """
    sections = {
        "Table 1: seconds of an iteration": _times(found),
        "Table 2: optimizers": _optimizers(found),
        "Table 3: training methods, ℓ∞": _methods(found),
        "Table 3's supplement: training methods, ℓ2": _l2(found),
        "Table 4: robust systems on WRN-34-10": _systems(found),
        "Table 5: gradients and robustness by radius": _radii(found),
        "Figures": _figures(found),
        "Numbers in the text": _text(found),
        "Set-up": _setup(),
        "Set-ups of the methods' authors": _setups(),
    }
    parts = [f"# {title}", introduction]
    parts += [f"## {heading}\n\n{table.markdown().rstrip()}" for heading, table in sections.items()]
    return "\n\n".join(parts) + "\n"


def results_of(name: str, found: Documents) -> dict[str, Any] | None:
    """The results that hold an analysis's runs: its own, or those of one that is made of the same cells."""
    if name in found:
        return found[name]
    return next((document for key, document in found.items() if ANALYSES[key].cells == ANALYSES[name].cells), None)


def command(name: str, row: str = "") -> str:
    """The command for the paper's own set-up, as code."""
    return f"`engm reproduce {name} --budget paper{f' --rows {row}' if row else ''}`"


def _where(document: dict[str, Any] | None, labels: Mapping[str, Any]) -> str:
    """At which budget a row was measured, with how many runs."""
    runs = len(selected(document["records"], labels)) if document else 0
    return f"{document['budget']}, {runs} run{'s' * (runs > 1)}" if document and runs else NOT_RUN


def _accuracies(
    printed: Accuracies, labels: Mapping[str, Any], columns: Sequence[str], document: dict[str, Any] | None
) -> list[tuple[str, str]]:
    """What the paper prints of a row and what was measured, column by column."""
    records = document["records"] if document else []
    pairs = []
    for read, name in (COLUMNS[column] for column in columns):
        mean = mean_of(records, labels, read)
        paper = getattr(printed, name)
        shown = f"{paper:.2f}".removesuffix("0") if name == "overfit" else f"{paper:.2f}"
        pairs.append((shown, mean.text(scale=100) if mean.n else NOT_RUN))
    return pairs


def _row(
    label: str,
    name: str,
    row: str,
    printed: Accuracies,
    labels: Mapping[str, Any],
    columns: Sequence[str],
    found: Documents,
) -> list[str]:
    document = results_of(name, found)
    cells = [f"{paper} · {ours}" for paper, ours in _accuracies(printed, labels, columns, document)]
    return [label, *cells, _where(document, labels), command(name, row)]


_WORDS = ("measured at", "command")
_HOW = "Per cent: what the paper prints · what was measured."


def _times(found: Documents) -> Table:
    document = results_of("table1", found)
    lines = []
    for name, seconds in TABLE1_SECONDS.items():
        measured = NOT_RUN
        if document:
            record = document["records"][0]
            middle = sorted(ratios(record, f"{name}, {OWN}"))
            measured = f"{middle[len(middle) // 2]:.2f}"
        where = document["budget"] if document else NOT_RUN
        ratio = paper_ratio(name)
        lines.append([LABELS[name], f"{seconds:.2f}", f"{ratio:.2f}", measured, where, command("table1")])
    return Table(
        "On a Titan RTX; seconds of another machine say little, so that ratios to MSGD are compared, each optimizer "
        "with a norm pass of its own.",
        ["optimizer", "s, the paper", "ratio, the paper", "ratio, measured", "measured at", "command"],
        lines,
        _WORDS,
    )


def _optimizers(found: Documents) -> Table:
    columns = list(COLUMNS)
    lines = [
        _row(LABELS[name], "table2", name, printed, {"optimizer": name}, columns, found)
        for name, printed in TABLE2.items()
    ]
    return Table(_HOW, ["optimizer", *columns, "measured at", "command"], lines, _WORDS)


def _methods(found: Documents) -> Table:
    columns = ["Natural", "Best", "AA", "Overfit"]
    lines = []
    for (data, method, optimizer), printed in TABLE3.items():
        labels = {"data": data, "threat": "linf", "method": method, "optimizer": optimizer}
        label = f"{data}, {METHODS[method]}, {LABELS[optimizer]}"
        row = f"{data}-{method}-{optimizer}"
        lines.append(_row(label, "table3", row, printed, labels, columns, found))
    headings = ["data, method, optimizer", "Natural", "PGD-20", "AA", "Overfit", "measured at", "command"]
    return Table(_HOW, headings, lines, _WORDS)


def _l2(found: Documents) -> Table:
    lines = []
    for method in METHODS:
        labels = {"method": method, "threat": "l2"}
        where = _where(results_of("table3-l2", found), labels)
        lines.append([METHODS[method], "in a supplement, not at hand", where, command("table3-l2")])
    return Table(
        "ε = 128/255, AutoAttack in ℓ2; the mean gain is among the numbers of the text below.",
        ["method, with MSGD and ENGM, on three data sets", "the paper", "measured at", "command"],
        lines,
        ("the paper", *_WORDS),
    )


def _systems(found: Documents) -> Table:
    document = results_of("table4", found)
    lines = []
    for (method, optimizer), printed in TABLE4.items():
        labels = {"method": method, "optimizer": optimizer}
        (natural, our_natural), (robust, our_robust) = _accuracies(printed, labels, ["Natural", "AA"], document)
        how = command("table4", f"{method}-{optimizer}")
        label = f"{SYSTEMS[method].label}, {LABELS[optimizer]}"
        lines.append([label, natural, robust, our_natural, our_robust, _where(document, labels), how])
    return Table(
        "Per cent, quoted and measured in columns of their own.",
        ["method, optimizer", "quoted: natural", "quoted: AA", "measured: natural", "measured: AA", "measured at",
         "command"],
        lines,
        _WORDS,
    )  # fmt: skip


def _radii(found: Documents) -> Table:
    document = results_of("table5", found)
    records = document["records"] if document else []
    rows: list[tuple[str, str, Figure_, int, int]] = [
        ("μ (MSGD)", "msgd", over_epochs("mean_norm"), 2, 2),
        ("σ² (MSGD)", "msgd", over_epochs("variance"), 1, 1),
        ("ρ, MSGD", "msgd", RHO, 2, 3),
        ("ρ, ENGM", "engm", RHO, 2, 3),
    ]
    lines = []
    for place, (label, optimizer, read, printed, digits) in enumerate(rows):
        cells = []
        for eps in EPS:
            mean = mean_of(records, {"eps": eps, "optimizer": optimizer}, read)
            cells.append(f"{TABLE5[eps][place]:.{printed}f} · {mean.text(digits) if mean.n else NOT_RUN}")
        lines.append([label, *cells, _where(document, {"optimizer": optimizer}), command("table5")])
    return Table(
        "What the paper prints · what was measured. Which optimizer μ and σ² are of is not said there; here MSGD's.",
        ["ε · 255", *map(str, EPS), "measured at", "command"],
        lines,
        _WORDS,
    )


FIGURES = {
    "fig1": "robust accuracy and overfitting with MSGD and ENGM (by the caption; the drawing is not at hand)",
    "fig2": "μ and σ² over 100 epochs of natural and adversarial training, ResNet-18 on CIFAR-10, VGG-8 on SVHN",
    "fig3": "correlation of the norms in both modes (a, b), error of ŵ at α of 0.1, 1 and 3 (c, d)",
    "fig4": "loss landscapes of four images, MSGD and ENGM",
    "fig5a": "natural accuracy over α, ENGM and N-ENGM",
    "fig5b": "robust accuracy over α",
    "fig5c": "overfitting over α",
    "fig5d": "natural accuracy over τ of 1, 10, 50, 100 and 300, A-ENGM",
    "fig5e": "robust accuracy over τ",
    "fig5f": "accuracy over λ of TRADES",
    "fig5g": "robust accuracy over weight decay",
    "fig5h": "learning curves of the seven optimizers, last 60 epochs",
}
"""What each figure and panel shows. None has numbers printed in it."""


def _figures(found: Documents) -> Table:
    lines = []
    for name, shown in FIGURES.items():
        document = results_of(name, found)
        where = NOT_RUN
        if document:
            held = document["analysis"]
            where = f"[{document['budget']}, {len(document['records'])} runs]({held}/picture.svg)"
        lines.append([name, shown, where, command(name)])
    return Table(
        "Curves and pictures: the paper prints no numbers in them. `engm reproduce fig5` runs all panels at once.",
        ["figure", "shows", "measured at", "command"],
        lines,
        ("shows", *_WORDS),
    )


@dataclass(frozen=True)
class Said:
    """A number of the paper's text.

    Attributes:
        claim: what it is a number of.
        printed: as it is printed.
        analysis: the analysis that measures it; ``""`` where it is arithmetic.
        read: what the records of that analysis say; ``None`` where a run of the whole budget would be needed first.
    """

    claim: str
    printed: str
    analysis: str
    read: Callable[[Sequence[Record]], str] | None = None


def _mean_error(records: Sequence[Record]) -> str:
    return f"{worst_line_error(records).text(1)} hundredths"


SAID = (
    Said("ENGM's time over MSGD's (section 3.1)", "roughly 8.5", "table1"),
    Said("ENGM's mean gain under AutoAttack, ℓ∞ (3.2)", f"{MEAN_GAIN['linf']} points", "table3"),
    Said("ENGM's mean gain under AutoAttack, ℓ2 (3.2)", f"{MEAN_GAIN['l2']} points", "table3-l2"),
    Said("less overfitting on vanilla training, CIFAR-10 (3.2)", "9.3 %", "table3"),
    Said("the same, CIFAR-100", "13.5 %", "table3"),
    Said("the same, Tiny-ImageNet (its own rows give 16.27)", "16.2 %", "table3"),
    Said("noise of ℓ∞ over that of ℓ2, as ℓ2 lengths (3.2; at most 3.5: √3072 · 8/128)", "roughly 3", ""),
    Said("AWP: gain of ENGM over MSGD (3.3)", "1.28 points", "table4"),
    Said("AWP: gain of N-ENGM over MSGD (3.3)", "0.94 points", "table4"),
    Said("largest error of ŵ over training and α (2.5)", "less than 10 %", "fig3", _mean_error),
    Said("best α of ENGM and N-ENGM on ResNet-18 (3.4)", "5 and 0.5", "fig5b"),
    Said("robustness of A-ENGM at τ = 50 over ENGM's (3.4)", "roughly 85 %", "fig5e"),
    Said("variance of T(a) (Theorem 1)", "at most 4α²", ""),
)
"""The numbers of the text that are results."""


def _text(found: Documents) -> Table:
    lines = []
    for said in SAID:
        document = results_of(said.analysis, found) if said.analysis else None
        measured, where = NOT_RUN, NOT_RUN
        if document and said.read:
            measured, where = said.read(document["records"]), str(document["budget"])
        if not said.analysis:
            measured, where = "no run: arithmetic", ""
        lines.append([said.claim, said.printed, measured, where, command(said.analysis) if said.analysis else ""])
    return Table(
        "Results in sentences. A claim that has a direction and no number has its verdict on the [page of results]"
        "(README.md).",
        ["number", "the paper", "measured", "measured at", "command"],
        lines,
        ("the paper", "measured", *_WORDS),
    )


# What the paper prints of its set-up, by setting; the values are the defaults of a run, which a test compares.
PRINTED_SETUP: dict[str, tuple[str, Any]] = {
    "lr": ("initial learning rate", 0.1),
    "momentum": ("momentum", 0.9),
    "weight_decay": ("weight decay", 5e-4),
    "batch_size": ("batch size", 128),
    "epochs": ("epochs", 120),
    "decay_epochs": ("learning rate divided by 10 at", (75, 90)),
    "attack_steps": ("steps of the training attack", 10),
    "eps": ("its ε, ℓ∞", 8 / 255),
    "step_size": ("its step", 2 / 255),
    "evaluation_steps": ("steps of the evaluation attack, of 8/(255·10)", 20),
    "validation_examples": ("validation examples", 1000),
    "max_norm": ("threshold of MSGD + GNC", 25.0),
    "beta_gamma": ("momentum of A-ENGM's γ", 0.7),
    "tau": ("τ of A-ENGM", 50),
    "beta": ("coefficient of TRADES and MART", 6.0),
    "awp_gamma": ("size of AWP", 5e-3),
}


def _setup() -> Table:
    default = RunConfig(data="cifar10").resolved()
    lines = []
    for setting, (what, printed) in PRINTED_SETUP.items():
        lines.append([what, _plain(printed), f"`--{setting.replace('_', '-')}`: {_plain(getattr(default, setting))}"])
    lines += [
        ["α of ENGM and A-ENGM, ResNet-18", "5", f"`--alpha paper`: {ALPHA['resnet18']:g}"],
        ["α of N-ENGM, ResNet-18", "0.5", "`--alpha paper`: 0.5"],
        ["α of ENGM, WRN-34-10", "10.4", f"`--alpha paper`: {ALPHA['wrn-34-10']:g}; `--alpha scaled`: 10.16"],
        ["ε of ℓ2", "128/255", "`--threat l2`: 128/255"],
        ["epochs of Tables 3 and 4, decays", "200; 100, 150", "`--epochs 200`: the same"],
    ]
    return Table("Settings, not results: what is printed, and what a run takes if nobody says otherwise.",
                 ["setting", "the paper", "here"], lines, ("the paper", "here"))  # fmt: skip


def _setups() -> Table:
    wide = {system.setup for system in SYSTEMS.values()}
    lines = []
    for name, setup in SETUPS.items():
        tables = ["Table 3"] * (name in METHODS) + ["Table 4"] * (name in wide)
        for p in setup.published:
            lines.append([name, f"`{p.setting}`", _plain(p.value), p.source, ", ".join(tables)])
        lines += [[name, f"`{p.setting}`", _plain(p.value), p.source, "Table 4"] for p in setup.length]
    return Table(
        "From `engm/recipes/setups.py`. `mart-wide` is MART on a wide network, `berm` self-adaptive training, `bs` "
        "backward smoothing. What is not listed is the paper's own set-up.",
        ["method", "setting", "value", "source", "used in"],
        lines,
        ("setting", "source", "used in"),
    )


def _plain(value: Any) -> str:
    """A value as people write it: radii as so many 255ths."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float) and value < 1 and abs(value * 255 - round(value * 255)) < 1e-9:
        return f"{round(value * 255)}/255"
    return f"{value:g}" if isinstance(value, float) else str(value)
