"""Every setting of a training run: one dataclass, which the command line, TOML files and run folders share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

from engm.checks import check_name
from engm.names import BATCH_NORM_MODES, BETAS, COUPLED_MODES, NOT_SMOOTHED, OBJECTIVES

from .addresses import is_address, settled
from .data_names import DATASETS, settled_data
from .methods import canonical_method
from .spelling import in_grey_levels, option, parse_duration, parse_normalization, parse_number

THREATS = ("linf", "l2")
AUGMENTATIONS = ("auto", "crop-flip", "crop", "none")
ATTACK_MODES = ("auto", "train", "eval")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("steps", "constant", "linear", "cosine", "cyclic", "one-cycle")
FALLING = ("linear", "cosine", "cyclic", "one-cycle")  # schedules that end at a learning rate of nearly nothing
STEPS = ("auto", "eager", "replay", "cudagraph", "inductor")
_ALPHA_WORDS = {"scaled": ("engm", "a-engm", "n-engm"), "auto": ("engm",)}  # whose thresholds these say
LOG_FORMATS = ("csv", "json", "tensorboard", "wandb")
MOST_THREADS = 1024  # far more take the memory of the machine before the first step
PAPER_EPOCHS = 120  # 200 for the comparison of methods (Table 3), with decays at 100 and 150
PAPER_DECAYS = (75 / PAPER_EPOCHS, 90 / PAPER_EPOCHS)
METHOD_TABLE_EPOCHS = 200
PIXEL_EPS = {"linf": 8 / 255, "l2": 128 / 255}
# The paper's step is a quarter of eps (2/255). It names none for l2: 15/255 is what Rice et al. (2020) take at 128/255.
STEP_SHARE = {"linf": 1 / 4, "l2": 15 / 128}
DIGITS_EPS = {"linf": 0.2, "l2": 1.0}  # 8x8 images of 16 grey levels; see engm.recipes.demo
# The names that a setting may have, and the least values of settings that are numbers.
_NAMES = {
    "objective": OBJECTIVES,
    "threat": THREATS,
    "augment": AUGMENTATIONS,
    "attack_mode": ATTACK_MODES,
    "precision": PRECISIONS,
    "batch_norm": BATCH_NORM_MODES,
    "coupled": COUPLED_MODES,
    "norm": ("batch", "group"),
    "in_memory": ("auto", "yes", "no"),
    "step": STEPS,
    "schedule": SCHEDULES,
}
_AT_LEAST = {
    1: (
        "epochs", "batch_size", "attack_steps", "tau", "calibrate_every", "evaluate_every", "save_every", "log_every",
        "evaluation_steps", "validation_examples", "train_examples", "test_examples", "width", "image_size", "threads",
        "schedule_epochs", "swa_start", "accumulate", "bs_steps", "sat_start",
    ),
    0: ("awp_warmup", "early_stop", "workers", "patience", "beta", "weight_decay", "eps_warmup", "eps", "warmup"),
}  # fmt: skip


def setting(default: Any, text: str, section: str, *, outcome: bool = True) -> Any:
    """A field: its help text, its heading on the help page, and whether it can change what a run computes."""
    return field(default=default, metadata={"help": text, "section": section, "outcome": outcome})


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run; defaults are the paper's. ``None`` and ``"auto"`` are settled by :meth:`resolved`."""

    data: str = setting(
        "digits",
        "digits, cifar10, cifar100, svhn, tiny-imagenet, FILE.npz, a folder, torchvision:NAME, timm:NAME, hf:NAME, or "
        "your own: package.module:function or FILE.py:function.",
        "Data",
    )
    data_root: str = setting("data", "Where named data sets lie.", "Data", outcome=False)
    download: bool = setting(False, "Fetch a missing data set (CIFAR, SVHN, torchvision, hf).", "Data", outcome=False)
    image_size: int | None = setting(None, "Side in pixels that images are scaled to: of folders, say.", "Data")
    validation_examples: int = setting(1000, "Held out of the training set (digits: their own 300).", "Data")
    validation_from_test: bool = setting(False, "Hold them out of the test set, the paper's other reading.", "Data")
    train_examples: int | None = setting(None, "Train on the first so many of the training examples only.", "Data")
    test_examples: int | None = setting(None, "Test on the first so many of the test examples only.", "Data")
    augment: str = setting("auto", "crop-flip, crop, none; auto: as suits the data set.", "Data")
    extra: str | None = setting(
        None, "FILE.npz of extra or generated examples, labelled (image, label or x_train, y_train).", "Data"
    )
    extra_fraction: float = setting(0.7, "With --extra: the share of every batch that they are.", "Data")
    in_memory: str = setting("auto", "yes, no or auto: keep the images on the device as bytes.", "Data", outcome=False)
    workers: int = setting(2, "Loader processes for data that does not fit in memory.", "Data", outcome=False)

    model: str = setting(
        "auto",
        "resnet18, preact-resnet18, vgg8, wrn-34-10, any torchvision or timm name, or your own: "
        "package.module:function or FILE.py:function.",
        "Model",
    )
    width: int | None = setting(None, "Channels of the stem, to shrink networks that have this parameter.", "Model")
    norm: str = setting("batch", "batch or group.", "Model")
    normalize: str = setting(
        "none",
        "Layer in front of the network: none, data (mean and deviation of the training images) or numbers, as "
        "0.49,0.48,0.45/0.25,0.24,0.26.",
        "Model",
    )
    init: str | None = setting(
        None, "Weights to start from: a run folder, a checkpoint of one, a state_dict (.pt) or .safetensors.", "Model"
    )
    init_strict: bool = setting(True, "Refuse weights that do not all fit; else load those that do.", "Model")

    objective: str = setting(
        "pgd",
        "pgd, trades, mart, fat, ates, backward-smoothing, lbgat, self-adaptive, or your own: package.module:name.",
        "Objective",
    )
    beta: float | None = setting(
        None,
        "Weight of the KL term; by default as published: 6 (backward-smoothing: 10; lbgat: 0, which has no such term).",
        "Objective",
    )
    label_smoothing: float = setting(
        0.0, "Share of a label that all classes have alike, in the training loss alone (not for mart).", "Objective"
    )
    patience: int | None = setting(None, "FAT's tau; by default 0, 1, 2 in the course of training.", "Objective")
    gap_first: float = setting(
        0.0, "ATES: an example's attack stops where another class leads by more than this probability.", "Objective"
    )
    gap_last: float = setting(0.4, "What that rises to; with 1 no attack stops.", "Objective")
    gap_epochs: tuple[int, ...] | None = setting(
        None, "Epochs after which it begins to rise, and has risen; by default 30,70 of 100.", "Objective"
    )
    bs_gamma: float = setting(1.0, "Backward smoothing: size of the random change of the logits.", "Objective")
    bs_steps: int = setting(1, "Backward smoothing: steps of its attack behind the start.", "Objective")
    guide: str = setting(
        "auto", "LBGAT: its natural network, as for --model; auto: resnet18 (digits: small-resnet).", "Objective"
    )
    sat_momentum: float = setting(0.9, "Self-adaptive training: share of the old label in the new one.", "Objective")
    sat_start: int | None = setting(
        None, "Self-adaptive training: epoch from which labels move; by default at 0.7 of the run.", "Objective"
    )
    awp: bool = setting(False, "Adversarial weight perturbation around the objective.", "Objective")
    awp_gamma: float = setting(5e-3, "Its size, relative to each weight tensor.", "Objective")
    awp_warmup: int = setting(0, "Epochs without it at first.", "Objective")

    threat: str = setting("linf", "Ball of the attack: linf or l2.", "Attack")
    eps: float | None = setting(None, "Its radius, as 0.03 or 8/255 (the default; l2: 128/255; digits: 0.2).", "Attack")
    step_size: float | None = setting(
        None, "By default a quarter of eps (l2: 15/128 of it; trades with l2: 2 eps over the steps).", "Attack"
    )
    attack_steps: int = setting(10, "Steps of the training attack.", "Attack")
    attack_mode: str = setting(
        "auto", "train or eval: which batch-norm statistics it sees; auto: train for pgd, else eval.", "Attack"
    )
    eps_warmup: float = setting(0.0, "Epochs over which eps grows from 0 (progressive hardening).", "Attack")

    optimizer: str = setting(
        "engm", "engm, a-engm, n-engm, f-engm, sngm, mgnc, msgd, or your own: package.module:function.", "Optimizer"
    )
    alpha: str = setting(
        "paper",
        "Threshold: a number, paper (5 on resnet18, 10.4 on wrn-34-10, else scaled), scaled (to the network, by its "
        "parameters) or auto (a quantile).",
        "Optimizer",
    )
    clip_fraction: float = setting(0.5, "With --alpha auto: share of the examples to clip.", "Optimizer")
    tau: int = setting(50, "A-ENGM: steps between two regressions.", "Optimizer")
    beta_gamma: float = setting(0.7, "A-ENGM: share of the old coefficients in the new ones.", "Optimizer")
    max_norm: float = setting(25.0, "MGNC: largest norm of the mean gradient.", "Optimizer")
    borrow: bool | None = setting(
        None,
        "Take the norms from the attack's last step, where it climbs the loss; default: with batch norm.",
        "Optimizer",
    )
    batch_norm: str = setting("calibrated", "Norms through batch statistics: calibrated, frozen, exact.", "Optimizer")
    calibrate_every: int = setting(50, "Steps between two calibrations.", "Optimizer")
    coupled: str = setting(
        "refuse",
        "Examples that influence each other otherwise than by batch norms: refuse or exact (slow).",
        "Optimizer",
    )
    lr: float = setting(0.1, "Initial learning rate.", "Optimizer")
    momentum: float = setting(0.9, "Of SGD.", "Optimizer")
    weight_decay: float = setting(5e-4, "Of SGD.", "Optimizer")

    epochs: int = setting(PAPER_EPOCHS, "Passes over the training set.", "Schedule")
    schedule: str = setting(
        "steps",
        "Learning rate: steps (see --decay-epochs), constant, linear, cosine, cyclic (up to 0.4 of the run, then down) "
        "or one-cycle (torch's).",
        "Schedule",
    )
    warmup: float = setting(0.0, "Epochs over which the learning rate grows to --lr at first.", "Schedule")
    schedule_epochs: int | None = setting(
        None,
        "Epochs that the learning rate and FAT's tau are planned for; by default --epochs, and in a run that is made "
        "longer what they were planned for.",
        "Schedule",
    )
    decay_epochs: tuple[int, ...] | None = setting(
        None, "With steps: epochs after which it is divided by 10, as 75,90 (scaled with --epochs).", "Schedule"
    )
    batch_size: int = setting(128, "Examples a step, of all processes together.", "Schedule")
    accumulate: int = setting(
        1, "Equal parts that every batch is taken in, one after another, where it does not fit in memory.", "Schedule"
    )
    seed: int = setting(0, "Of weights, data order, augmentation and attack noise.", "Schedule")
    ema: float = setting(
        0.0, "Decay of an average of the weights, which is evaluated as well and chosen by; 0: none.", "Schedule"
    )
    swa_start: int | None = setting(
        None, "The same with an even average of the weights at the end of each epoch, from this one on.", "Schedule"
    )
    early_stop: int = setting(0, "Stop after so many epochs without a better validation; 0: never.", "Schedule")

    evaluate_every: int = setting(1, "Epochs between two looks at the validation set.", "Evaluation")
    evaluation_steps: int = setting(20, "Steps of the evaluation attack; of eps/10 from 20 on.", "Evaluation")
    test: bool = setting(True, "Evaluate best and last on the test set at the end.", "Evaluation")

    device: str = setting("auto", "cpu, cuda, cuda:1 ...", "Machine", outcome=False)
    threads: int | None = setting(None, "CPU threads.", "Machine", outcome=False)
    step: str = setting(
        "auto",
        "eager, replay, cudagraph or inductor: how steps run, as they are or from a recorded program; auto: replay, "
        "on GPUs cudagraph.",
        "Machine",
        outcome=False,
    )
    precision: str = setting(
        "fp32", "fp32, bf16 or fp16 (autocast; norms stay in float32; fp16 with a loss scale).", "Machine"
    )
    tf32: bool = setting(True, "TF32 tensor cores for fp32 on GPUs.", "Machine")
    channels_last: bool = setting(False, "NHWC memory format.", "Machine")
    compile_attack: bool = setting(False, "torch.compile for the attack steps; the rest stays eager.", "Machine")
    fast: bool = setting(False, "All of bf16, channels-last and compile-attack.", "Machine")

    time_limit: str | None = setting(
        None, "End with a checkpoint before so much time is over, as 3h30m; as on SIGTERM.", "Output", outcome=False
    )
    save_every: int = setting(200, "Steps between two checkpoints; one an epoch in any case.", "Output", outcome=False)
    # Not --log: torchrun takes that for an abbreviation of options of its own, even behind the module's name.
    loggers: tuple[str, ...] = setting(
        ("csv", "tensorboard"), "csv, json, tensorboard, wandb or none.", "Output", outcome=False
    )
    log_every: int = setting(50, "Steps between two writes of step figures.", "Output", outcome=False)
    keep_epochs: tuple[int, ...] = setting(
        (), "Epochs whose weights are kept as well, as 1,10,75 (for engm reproduce).", "Output", outcome=False
    )

    def __post_init__(self) -> None:
        """Looks at every value.

        Raises:
            ValueError: one is unknown or out of range; unknown names come with the nearest known one.
        """
        object.__setattr__(self, "optimizer", canonical_method(self.optimizer))
        if not is_address(self.objective):
            object.__setattr__(self, "objective", self.objective.lower())
        if self.data.lower() in DATASETS:
            object.__setattr__(self, "data", self.data.lower())
        self._check_names()
        self._check_ranges()
        self._check_alpha()
        self._check_norms()
        self._check_schedule()
        parse_normalization(self.normalize)
        if self.time_limit is not None:
            parse_duration(self.time_limit)

    def _check_names(self) -> None:
        for name, known in _NAMES.items():
            if name == "objective" and is_address(self.objective):
                continue
            check_name(getattr(self, name), known, what=option(name))
        for name in self.loggers:
            check_name(name, LOG_FORMATS, what=option("loggers"))
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError(f"--loggers names a format twice: {','.join(self.loggers)}")

    def _check_ranges(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, got {self.seed}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"--threads must be at most {MOST_THREADS}, got {self.threads}")
        for least, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not (isfinite(value) and value >= least):
                    raise ValueError(f"{option(name)} must be at least {least}, got {value}")
        for name in ("eps", "step_size"):  # how long an l2 radius may be depends on the images: see check_radius
            value = getattr(self, name)
            if value is not None and self.threat == "linf" and value >= 1:
                raise ValueError(
                    f"{option(name)} must be below 1, because pixels lie in [0, 1], got {value:g}. "
                    f"{in_grey_levels(value)}"
                )
        for name in ("lr", "max_norm", "awp_gamma", "step_size", "bs_gamma"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ValueError(f"{option(name)} must be positive, got {value}")
        for name in ("momentum", "ema", "beta_gamma", "label_smoothing", "sat_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{option(name)} must lie in [0, 1), got {getattr(self, name)}")
        if self.ema and self.swa_start is not None:
            raise ValueError("--ema and --swa-start are two averages of the weights: leave one of them out")
        if self.label_smoothing and is_address(self.objective):
            raise ValueError("--label-smoothing is not for an objective of your own: smooth the labels in its loss")
        if self.label_smoothing and self.objective in NOT_SMOOTHED:
            raise ValueError(
                f"--label-smoothing is not for --objective {self.objective}: {NOT_SMOOTHED[self.objective]}"
            )
        if not -1 <= self.gap_first <= self.gap_last <= 1:
            raise ValueError(
                "--gap-first and --gap-last must lie in [-1, 1], between two probabilities, and rise, got "
                f"{self.gap_first:g} and {self.gap_last:g}"
            )
        for name in ("clip_fraction", "extra_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{option(name)} must lie between 0 and 1, got {getattr(self, name)}")
        if self.gap_epochs is not None and not (
            len(self.gap_epochs) == 2 and 0 <= self.gap_epochs[0] < self.gap_epochs[1]
        ):
            raise ValueError(f"--gap-epochs must be two rising numbers of epochs, as 30,70, got {self.gap_epochs}")
        for name in ("decay_epochs", "keep_epochs"):
            epochs = getattr(self, name) or ()
            if list(epochs) != sorted(set(epochs)) or any(epoch < 1 for epoch in epochs):
                raise ValueError(f"{option(name)} must be rising epoch numbers from 1, got {epochs}")

    def _check_schedule(self) -> None:
        planned = self.schedule_epochs or self.epochs
        if self.warmup and self.schedule in ("cyclic", "one-cycle"):
            raise ValueError(f"--schedule {self.schedule} begins with a rise of its own: leave --warmup out")
        if self.warmup >= planned:
            raise ValueError(f"--warmup {self.warmup:g} takes all of the {planned} epochs: choose fewer")
        if self.schedule in FALLING and planned < self.epochs:
            raise ValueError(
                f"--schedule {self.schedule} is planned for {planned} epochs and ends there, and --epochs is "
                f"{self.epochs}: with --schedule-epochs {self.epochs} it goes on to the end"
            )

    def _check_norms(self) -> None:
        """Refuses norms through the statistics that would come from an attack which does not see these."""
        climbs = self.objective in ("pgd", "fat", "ates") or is_address(self.objective)
        climbs = climbs and not self.label_smoothing  # the attack climbs the loss of the label itself
        lent = self.borrow and climbs and self.optimizer in ("engm", "a-engm", "f-engm")
        if lent and self.batch_norm == "exact" and self.norm == "batch" and self._attack_mode() == "eval":
            raise ValueError(
                "--batch-norm exact takes norms through the batch's statistics, which an attack with --attack-mode "
                "eval does not see: leave one of the three out, --borrow, --batch-norm exact or --attack-mode eval"
            )

    def _check_alpha(self) -> None:
        if self.alpha == "paper":
            return
        for word, known in _ALPHA_WORDS.items():
            if self.alpha == word:
                if self.optimizer not in known:
                    raise ValueError(
                        f"--alpha {word} is for --optimizer {' or '.join(known)}, not for {self.optimizer}"
                    )
                return
        try:
            value = parse_number(self.alpha)
        except ValueError:
            value = nan
        if not (isfinite(value) and value > 0):
            raise ValueError(f"--alpha must be a positive number, paper, scaled or auto, got {self.alpha!r}")
        object.__setattr__(self, "alpha", repr(value))  # so that 5 and 5.0 are the same run

    def resolved(self) -> RunConfig:
        """The same with everything settled that depends on other settings; resolving twice changes nothing."""
        digits = self.data == "digits"
        decays, planned = self.decay_epochs, self.schedule_epochs or self.epochs
        if decays is None and self.schedule != "steps":
            decays = ()
        elif decays is None and planned == METHOD_TABLE_EPOCHS:
            decays = (100, 150)
        elif decays is None:
            decays = tuple(sorted({max(1, round(share * planned)) for share in PAPER_DECAYS}))
        eps = self.eps if self.eps is not None else (DIGITS_EPS if digits else PIXEL_EPS)[self.threat]
        return replace(
            self,
            # Found again from another working directory.
            data=settled_data(self.data),
            objective=settled(self.objective),
            optimizer=settled(self.optimizer),
            data_root=str(Path(self.data_root).expanduser().absolute()),
            model=("small-resnet" if digits else "resnet18") if self.model == "auto" else settled(self.model),
            extra=None if self.extra is None else str(Path(self.extra).expanduser().absolute()),
            init=None if self.init is None else str(Path(self.init).expanduser().absolute()),
            beta=BETAS.get(self.objective, 6.0) if self.beta is None else self.beta,
            guide=self._guide(),
            attack_steps=self.bs_steps if self.objective == "backward-smoothing" else self.attack_steps,
            eps=eps,
            step_size=self.step_size or (eps * self._step_share() or None),
            decay_epochs=decays,
            attack_mode=self._attack_mode(),
            precision="bf16" if self.fast else self.precision,
            channels_last=self.channels_last or self.fast,
            compile_attack=self.compile_attack or self.fast,
        )

    def chosen(self) -> dict[str, Any]:
        """Plain values by name, as :meth:`as_dict`, without those that are what the others make of them.

        With one of these others changed they would not be what :meth:`resolved` makes of them any more.
        """
        own = self.resolved()
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in DERIVED}
        left = {
            n for n, unset in defaults.items() if getattr(replace(own, **{n: unset}).resolved(), n) == getattr(own, n)
        }
        return {name: value for name, value in self.as_dict().items() if name not in left}

    def _attack_mode(self) -> str:
        """The mode of the network during the training attack; by default training mode for PGD alone, as published."""
        if self.attack_mode != "auto":
            return self.attack_mode
        return "train" if self.objective == "pgd" else "eval"

    def _step_share(self) -> float:
        """The default step of the training attack over eps."""
        if self.objective == "backward-smoothing":
            return 1.0  # as in the command of its authors, alpha of 0.031 at epsilon of 0.031
        if self.objective == "trades" and self.threat == "l2":
            return 2 / self.attack_steps  # as in the code of TRADES
        return STEP_SHARE[self.threat]

    def _guide(self) -> str:
        """The natural network of LBGAT: the authors' is a ResNet-18 beside a wide network."""
        if self.objective == "lbgat" and self.guide == "auto":
            return "small-resnet" if self.data == "digits" else "resnet18"
        return settled(self.guide)

    @property
    def ball(self) -> Literal["linf", "l2"]:
        """``threat``, as attacks take it."""
        return "l2" if self.threat == "l2" else "linf"

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, without those that are ``None``; what TOML can hold."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v is not None}

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings in which the two differ and which can change what a run computes: ``{name: (own, other's)}``."""
        mine, theirs = self.resolved(), other.resolved()
        return {
            f.name: (getattr(mine, f.name), getattr(theirs, f.name))
            for f in fields(self)
            if f.metadata["outcome"] and getattr(mine, f.name) != getattr(theirs, f.name)
        }


DERIVED = ("attack_mode", "attack_steps", "beta", "decay_epochs", "eps", "guide", "model", "step_size")
"""Settings that :meth:`RunConfig.resolved` may work out of others."""
