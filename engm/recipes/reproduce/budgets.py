"""How much an analysis may cost: the settings that stand for the paper's where those are out of reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from engm.checks import check_name

from ..config import RunConfig
from .network_counts import COUNTS


@dataclass(frozen=True)
class Budget:
    """A scale at which everything runs.

    Attributes:
        name: as the command takes it.
        purpose: what it is for, in a few words.
        settings: settings of every training run; what is not named is as in the paper.
        seeds: independent runs of every cell.
        alpha: thresholds by optimizer, where the paper's, scaled to the network, are not taken.
        alphas: ENGM's thresholds of Fig. 5a; N-ENGM takes a tenth of them.
        step_share: step of the training attack as a share of eps; ``None`` for the paper's quarter.
        long_epochs: length of the runs of Tables 3 and 4 (200 in the paper); ``None`` for that of the others.
        wide_model: network that stands for WRN-34-10.
        data: default data sets of Fig. 2, 3 and Table 3.
        attacked: number of test images that AutoAttack sees; ``None`` for all.
        attacked_in_sweeps: number of test images that AutoAttack sees in Fig. 5; ``None`` for all, 0 for no AutoAttack.
        fooled: number of test images that DeepFool sees; ``None`` for all.
        looked_at: number of training images whose gradients are measured.
        batch: number of these images at a time.
        kept: number of epochs between two that keep their weights for these measurements, beside those around a decay.
        keep_always: keep them in every run, so that analyses share their runs; at full size it would fill disks.
        timed_steps: number of steps that Table 1 times.
        planned: whether the cost is judged before it starts, which takes some seconds itself. If not, cells run one
            after the other, because a process of its own takes longer to start than a cell of such a budget.
    """

    name: str
    purpose: str
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 3
    alpha: dict[str, str] = field(default_factory=dict)
    alphas: tuple[float, ...] = (1.0, 2.5, 5.0, 10.0, 25.0)
    step_share: float | None = None
    long_epochs: int | None = None
    wide_model: str = "wrn-34-10"
    data: tuple[str, ...] = ("cifar10",)
    attacked: int | None = None
    attacked_in_sweeps: int | None = None
    fooled: int | None = None
    looked_at: int = 1000
    batch: int = 125
    kept: int = 5
    keep_always: bool = True
    timed_steps: int = 20
    planned: bool = True

    def config(self, settings: dict[str, Any], **special: Any) -> RunConfig:
        """A run of this budget.

        Args:
            settings: the user's and the analysis's choices, before the budget's.
            special: what tells the run from the others.
        """
        own = dict(self.settings)
        if {"epochs", "decay_epochs"} & settings.keys():  # the decays belong to the length
            own.pop("decay_epochs", None)
        if "model" in settings and not _takes_width(settings["model"]):  # the width belongs to the budget's network
            own.pop("width", None)
        merged = {**own, **settings, **special}
        config = RunConfig(**merged)
        resolved = config.resolved()
        eps = resolved.eps
        own_steps = resolved.attack_steps != config.attack_steps  # a method with a number and a size of its own
        if self.step_share is not None and eps and "step_size" not in merged and not own_steps:
            config = replace(config, step_size=self.step_share * eps)
        return config

    def threshold(self, optimizer: str, config: RunConfig) -> str:
        """``--alpha`` of an optimizer: what was found for the budget's own network, for another the paper's, scaled."""
        own = all(getattr(config, name) == self.settings.get(name) for name in ("model", "width"))
        return self.alpha.get(optimizer, "paper") if own and config.norm == "batch" else "paper"

    def kept_epochs(self, config: RunConfig) -> tuple[int, ...]:
        """The epochs whose weights measurements look at: evenly spaced, and the ends of both sides of each decay."""
        decays = config.resolved().decay_epochs or ()
        chosen = {1, config.epochs, *range(self.kept, config.epochs, self.kept)}
        chosen |= {epoch for decay in decays[:1] for epoch in (decay, decay + 1)}
        return tuple(sorted(epoch for epoch in chosen if 1 <= epoch <= config.epochs))


def _takes_width(model: str) -> bool:
    if model in {known for known, *_ in COUNTS}:  # ours, which do; others are looked for with torch
        return True
    from ..models import takes_width

    return takes_width(model)


BUDGETS = {
    "smoke": Budget(
        "smoke",
        "every command in seconds, on 8x8 digits: shows that it runs, and nothing else",
        {
            "data": "digits",
            "model": "small-resnet",
            "width": 4,
            "epochs": 2,
            "decay_epochs": (1,),
            "train_examples": 64,
            "test_examples": 40,
            "batch_size": 32,
            "attack_steps": 2,
            "evaluation_steps": 3,
            "calibrate_every": 2,
            "tau": 2,
            "threads": 1,
            "loggers": (),
            "step": "eager",  # a recorded program takes seconds to make, and a run has four steps
        },
        seeds=1,
        alpha={"engm": "5.0", "a-engm": "5.0", "n-engm": "0.5"},
        alphas=(2.5, 5.0),
        wide_model="wrn-10-1",
        data=("digits",),
        attacked=4,
        attacked_in_sweeps=0,
        fooled=20,
        looked_at=32,
        batch=16,
        kept=1,
        timed_steps=2,
        planned=False,
    ),
    "small": Budget(
        "small",
        "a first answer on CPU cores: 1,024 images, VGG-8 of width 16, 30 epochs without augmentation",
        {
            "model": "vgg8",
            "width": 16,
            "epochs": 30,
            "decay_epochs": (19, 23),
            "train_examples": 1024,
            "validation_examples": 500,
            "test_examples": 1000,
            "augment": "none",
            "batch_size": 64,
            "attack_steps": 5,
            "evaluate_every": 2,
            "save_every": 100_000,
            "threads": 1,
            "loggers": (),
        },
        step_share=0.4,
        alphas=(0.75, 1.5, 3.0, 6.0, 12.0),  # multiples of what alpha_for gives
        # By validation robust accuracy, the mean of best and last, in the sweep of Fig. 5a (docs/results/fig5a), of up
        # to 12.0 and 0.6.
        alpha={"engm": "1.5", "a-engm": "1.5", "n-engm": "0.3"},
        wide_model="wrn-16-1",
        attacked=200,
        attacked_in_sweeps=0,
        fooled=500,
        looked_at=256,
        batch=64,
    ),
    "paper": Budget(
        "paper",
        "the paper's own set-up",
        long_epochs=200,
        data=("cifar10", "cifar100", "tiny-imagenet"),
        keep_always=False,
    ),
}


def budget(name: str) -> Budget:
    """A budget by name.

    Raises:
        ValueError: there is none of this name; the message says which is nearest.
    """
    check_name(name, tuple(BUDGETS), what="budget (--budget)")
    return BUDGETS[name]
