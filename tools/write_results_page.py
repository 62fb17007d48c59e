"""Writes the pages of docs/results, their pictures and the table of docs/reproduce.md from docs/results/*/results.json.

engm reproduce table2 --budget small --data CIFAR10.npz --out runs/reproduce   # and the other analyses
python tools/write_results_page.py --from runs/reproduce                       # copies their results, then writes
python tools/write_results_page.py                                             # writes from what docs/results holds
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from engm.recipes.reproduce.numbers import numbers_page
from engm.recipes.reproduce.page import documents, draw_pictures, page, table_block, with_block
from engm.recipes.storage.atomic_files import make_folder, write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
REPRODUCE = ROOT / "docs" / "reproduce.md"
COPIED = ("results.json", "table.csv", "config.toml")
PICTURE, LINK = "results/table2/picture.svg", "results/README.md"  # from docs/reproduce.md
NUMBERS = RESULTS / "numbers.md"
NUMBERS_TITLE = "Every number of the paper"
NUMBERS_INTRODUCTION = """This page is generated (`python tools/write_results_page.py`): every number that the paper
prints (Dabouei et al., *Revisiting Outer Optimization in Adversarial Training*, ECCV 2022), the command that computes
it in the paper's own set-up, and what was measured, at which budget. Measured numbers come from the `results.json` of
the [analyses beside this page](README.md) and from nowhere else; what none of them has is *not run*. The budget
`small` is another network on a fiftieth of the data ([what it is](../reproduce.md#budgets)), so that its numbers are
no repetition of the paper's: they stand beside them, never in their place."""
TITLE = "The paper's figures and tables, at a small budget"
INTRODUCTION = """This page is generated (`python tools/write_results_page.py`) from the JSON beside it, which
`engm reproduce` wrote. The budget `small` is two CPU cores for about an hour an analysis: real CIFAR-10, but 1,024
training images, a VGG-8 of width 16, thirty epochs without augmentation, five attack steps. Robust accuracies of such
networks are near 20 %, not 50 %, and nothing here says what ENGM does at the paper's size: run `--budget paper` for
that. No GPU was used.

Every claim of the paper that these runs could bear on is listed with a verdict that is computed, not chosen: runs are
paired by seed (same weights at the start, data order and attack noise), and the 95 % interval of the mean difference
(Student's t) either leaves out zero or does not. With three pairs it leaves out zero only where the difference is large
beside its scatter; one pair can never say anything. Intervals are of seeds only: all runs share one set of test images,
of which 1,000 put another 1.3 points (one standard error) on any single accuracy. About one verdict in forty would be
decided each way by chance. Robust overfitting, (best - last) / best, is also small where the best was low: "overfits
less" is only said where the last checkpoint, shown beside it, is no worse.

Thresholds: `alpha_for` gives 0.74 (N-ENGM 0.074) for this network. On a seed that is used nowhere else, multiples of it
were tried (`fig5a`), and the one with the highest mean of best and last robust accuracy on the *validation* set was
taken, 1.5 and 0.3 (N-ENGM's 1.2, which next to never clips, was tried only after that, and is half a point ahead of
0.3). The differences between them are no larger than the validation set's own error, so another choice
would have been as good. Learning rate, weight decay and momentum are the paper's for every optimizer, and the decays
come at its share of the epochs. A small threshold acts like a small learning rate (section 3.4 of the paper), and
thirty epochs of sixteen steps are few: where a clipped run is less robust at its best, that may be why; these runs do
not show whether it is."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="the --out of engm reproduce, to copy results from")
    source = parser.parse_args().source
    if source is not None:
        for name in documents(source):
            make_folder(RESULTS / name)
            for file in COPIED:
                shutil.copy(source / name / file, RESULTS / name / file)
    found = documents(RESULTS)
    others = [name for name, document in found.items() if document["budget"] != "small"]
    if others or "table2" not in found:
        raise SystemExit(f"this page is of the budget small and needs table2; of another budget: {others or 'none'}")
    draw_pictures(found, RESULTS)
    write_text_atomic(RESULTS / "README.md", page(found, TITLE, INTRODUCTION))
    write_text_atomic(NUMBERS, numbers_page(found, NUMBERS_TITLE, NUMBERS_INTRODUCTION))
    block = table_block(found["table2"], PICTURE, LINK)
    write_text_atomic(REPRODUCE, with_block(REPRODUCE.read_text(encoding="utf-8"), block))


if __name__ == "__main__":
    main()
