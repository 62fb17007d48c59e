"""Which settings the paper and the authors of the methods that it compares published, number by number.

Tables 3 and 4 of the paper take "the best setup reported by the original papers" (section 3.2). This is the one list of
these set-ups; what it does not name is the default of :class:`~engm.recipes.config.RunConfig`, which is the paper's own
(section 3, training setup). Code means what the authors gave away with their paper, in the repository that is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALPHA = {"resnet18": 5.0, "wrn-34-10": 10.4}
"""ENGM's threshold where the paper prints it: section 3 and section 3.3.

The 10.4 are 5 times 2.08, the "square root of the ratio of the total parameters" 48.2 and 11.1 million. Only 46.16
million of the former are ever used and trained, so that :func:`engm.alpha_for` gives 10.16. ``--alpha paper`` is the
printed number, ``--alpha scaled`` the other.
"""
NAIVE_SHARE = 0.1
"""N-ENGM's threshold over ENGM's: 0.5 beside 5 (section 3)."""

LENGTH = 200
"""Epochs of every method of Table 3, "for the sake of consistency", with decays after 100 and 150 (section 3.2)."""


@dataclass(frozen=True)
class Published:
    """A setting and where it was published.

    Attributes:
        setting: its name in :class:`~engm.recipes.config.RunConfig`.
        value: its value.
        source: who published it where.
    """

    setting: str
    value: Any
    source: str


@dataclass(frozen=True)
class Setup:
    """How the authors of a method trained.

    Attributes:
        chosen: what makes a run of the method, as ``objective``, which no user chooses otherwise in these tables.
        published: learning rates and their like.
        length: the authors' number of epochs and those after which they divide the learning rate by ten, for Table 4.
            Their code divides *at* an epoch, counted from 1, mostly: at the 75th is after 74.
    """

    chosen: dict[str, Any]
    published: tuple[Published, ...] = ()
    length: tuple[Published, ...] = ()

    def settings(self, epochs: int) -> dict[str, Any]:
        """The published settings but for the length of training, for a run of some length.

        A warm-up is a share of the length that it was published for, as decays are: the ten of AWP's 200 epochs are
        two of 30.
        """
        found = {p.setting: p.value for p in self.published}
        if "awp_warmup" in found:
            found["awp_warmup"] = round(found["awp_warmup"] * epochs / LENGTH)
        return found

    def own_length(self) -> dict[str, Any]:
        """The authors' number of epochs and decays."""
        return {p.setting: p.value for p in self.length}


_PAPER = "Dabouei et al. 2022, section 3"
_BETA = Published("beta", 6.0, f"{_PAPER}.2: 6 in TRADES and MART")
_TRADES_CODE = "yaodongyu/TRADES, train_trades_cifar10.py"
_MART_CODE = "YisenWang/MART, train_resnet.py"
_MART_WIDE_CODE = "YisenWang/MART, train_wideresnet.py"
_AWP_CODE = "csdongxian/AWP, trades_AWP/train_trades_cifar.py"
_FAT_CODE = "zjfheart/Friendly-Adversarial-Training, FAT.py"
_LBGAT_CODE = "dvlab-research/LBGAT, train_lbgat_cifar100.py"
_BS_CODE = "jinghuichen/BackwardSmoothing, train_trades_backward.py"
_ATES_CODE = "chawins/adv-exp, train_cifar.yml and train_cifar.py, set for a ResNet"
_SAT_CODE = "LayneH/self-adaptive-training, main_adv.py and scripts/cifar10/run_trades_sat.sh"


def _length(epochs: int, decays: tuple[int, ...], source: str) -> tuple[Published, ...]:
    return Published("epochs", epochs, source), Published("decay_epochs", decays, source)


SETUPS: dict[str, Setup] = {
    "vanilla": Setup(
        {"objective": "pgd"},
        (Published("lr", 0.1, _PAPER), Published("weight_decay", 5e-4, _PAPER)),
    ),
    "trades": Setup(
        {"objective": "trades"},
        (_BETA, Published("lr", 0.1, _TRADES_CODE), Published("weight_decay", 2e-4, _TRADES_CODE)),
        _length(76, (74,), _TRADES_CODE),
    ),
    "mart": Setup(
        {"objective": "mart"},
        (_BETA, Published("lr", 0.01, _MART_CODE), Published("weight_decay", 3.5e-3, _MART_CODE)),
    ),
    "mart-wide": Setup(  # the same method on a wide network, for which its authors have a file of its own
        {"objective": "mart"},
        (_BETA, Published("lr", 0.1, _MART_WIDE_CODE), Published("weight_decay", 2e-4, _MART_WIDE_CODE)),
        _length(76, (74,), _MART_WIDE_CODE),
    ),
    "awp": Setup(
        {"objective": "trades", "awp": True},
        (
            _BETA,
            Published("lr", 0.1, _AWP_CODE),
            Published("weight_decay", 5e-4, _AWP_CODE),
            Published("awp_gamma", 5e-3, f"{_PAPER}.2 and {_AWP_CODE}"),
            Published("awp_warmup", 10, f"{_AWP_CODE}, of {LENGTH} epochs (there the tenth has it already)"),
        ),
        _length(LENGTH, (100, 150), f"{_PAPER}.3 and {_AWP_CODE}"),
    ),
    "fat": Setup(
        {"objective": "fat"},
        (Published("lr", 0.1, _FAT_CODE), Published("weight_decay", 2e-4, _FAT_CODE)),
        _length(120, (59, 89), f"{_FAT_CODE}, which halves the learning rate once more at the 110th epoch"),
    ),
    "lbgat": Setup(
        {"objective": "lbgat"},
        (Published("lr", 0.1, f"{_LBGAT_CODE}, whose first epoch has 0.02"),
         Published("weight_decay", 2e-4, _LBGAT_CODE)),
        _length(100, (75, 90), _LBGAT_CODE),
    ),
    "berm": Setup(
        {"objective": "self-adaptive"},
        (Published("beta", 6.0, _SAT_CODE), Published("lr", 0.1, _SAT_CODE),
         Published("weight_decay", 2e-4, _SAT_CODE)),
        _length(100, (74, 89), _SAT_CODE),
    ),
    "bs": Setup(
        {"objective": "backward-smoothing"},
        (Published("beta", 10.0, "jinghuichen/BackwardSmoothing, README.md"), Published("lr", 0.1, _BS_CODE),
         Published("weight_decay", 5e-4, _BS_CODE)),
        _length(100, (50, 75), _BS_CODE),
    ),
    "ates": Setup(
        {"objective": "ates"},
        (Published("lr", 0.05, _ATES_CODE), Published("weight_decay", 5e-4, _ATES_CODE)),
        _length(100, (40, 60, 80), _ATES_CODE),
    ),
}  # fmt: skip
"""The set-ups by the names of rows of Tables 3 and 4."""


def printed_alpha(model: str, width: int | None, method: str) -> float | None:
    """The threshold that the paper prints for a network, or a tenth of it for N-ENGM; ``None`` where it prints none.

    Args:
        model: name of the network, as ``--model`` takes it.
        width: channels of its stem, if they are not the published ones.
        method: name of the optimizer.
    """
    printed = ALPHA.get(model.lower().replace("_", "-")) if width is None else None
    if printed is None:
        return None
    return printed * NAIVE_SHARE if method == "n-engm" else printed
