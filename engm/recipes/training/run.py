"""One training run: built from a configuration, trained epoch by epoch, its state taken and put back.

A run is a function of its configuration. Everything that later steps depend on is in :meth:`Run.state_dict`, and
everything else is a function of seed and position, so a run that was killed and resumed ends with the same bits as one
that was not (on GPUs as far as its kernels repeat themselves). :mod:`engm.recipes.runs.folder` keeps it on disk.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

import engm
from engm.adversarial import AWP, PGD, Guide, Objective, objective
from engm.checks import NonFiniteError

from ..accuracy import Accuracy, OnBatch, evaluate, pgd20
from ..addresses import code_identity, is_address
from ..config import RunConfig, option
from ..data import Dataset, check_same_data, identities
from ..processes import Processes
from .averages import WeightAverage
from .batches import TrainingBatches, seed_for
from .beside import build_beside
from .building import (
    augmentation_of,
    build_network,
    check_radius,
    load_extra,
    load_in_turn,
    load_weights,
    settle_normalization,
)
from .initial import Initial
from .looks import Best, figures_of, robust_of
from .optimizer import paper_optimizer
from .own import check_objective, own_objective
from .precision import DTYPES, FIRST_SCALE, Autocast, check_channels_last, loss_scaler
from .schedule import Schedule
from .trainer import EpochRecord, Trainer


class Run:
    """A training run, from its configuration to its last epoch.

    Args:
        config: the run's settings, which are resolved here.
        processes: the processes that train it together.
        dataset: ``None`` to load the one that the configuration names.
        initial: weights to start from; ``None`` for random ones.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: something in the configuration does not fit; nothing has been
            written then.

    Attributes:
        config: resolved.
        dataset: on the device.
        data: what tells its images from others of the same name, by split.
        net: the network; its ``state_dict`` is what checkpoints hold.
        started_from: the weights that it started from, if they are given.
        initial: what tells these from others.
        average: the average of its weights, if the configuration asks for one.
        beside: what the objective keeps and changes besides the network, if it does.
        trainer: takes the steps.
        schedule: what changes in the course of the run.
        epoch: finished epochs.
        batch: finished batches of the epoch that is under way.
        history: a row of figures for every finished epoch.
        best: the best look at the validation set so far.
    """

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        dataset: Dataset | None = None,
        initial: Initial | None = None,
    ) -> None:
        self.config = config = config.resolved()
        self.processes = processes
        self.dataset = load_in_turn(config, processes) if dataset is None else dataset.to(processes.device)
        self.dataset = load_extra(config, self.dataset, processes.device)
        self.data = identities(self.dataset)
        check_radius(config, self.dataset)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.batches = TrainingBatches(
            self.dataset.train,
            config.batch_size,
            augmentation_of(config, self.dataset),
            config.seed,
            processes,
            memory_format,
            extra=self.dataset.extra,
            extra_fraction=config.extra_fraction,
        )
        if config.batch_size // processes.world % config.accumulate:
            raise ValueError(
                f"--accumulate {config.accumulate}: a process's {config.batch_size // processes.world} examples of a "
                "batch cannot be taken in so many equal parts"
            )
        self.schedule = Schedule(config, self.batches.steps)
        self.net = build_network(config, self.dataset).to(processes.device).to(memory_format=memory_format)
        if config.normalize == "data":
            settle_normalization(self.net, self.dataset.train)
        self.started_from = initial
        self.initial = None if initial is None else initial.identity
        if initial is not None:
            initial.put_in(self.net)
        if config.channels_last:
            check_channels_last(self.net, processes.device)
        self.beside = build_beside(config, self.dataset, processes)
        if processes.rank:
            torch.manual_seed(seed_for("dropout", config.seed, processes.rank))
        # What tells versions of one's own code apart, by the settings that name it; data are told apart themselves.
        named = {name: str(getattr(config, name)) for name in ("model", "objective", "optimizer")}
        self._code = {name: code_identity(text, what=name) for name, text in named.items() if is_address(text)}
        self.average = WeightAverage(config, self.net)
        self._objectives: dict[Hashable, Objective] = {}  # by what changes in the course of the run
        if is_address(config.objective):
            check_objective(self._objective(0), config.objective, self.net, self.dataset.train.shape)
        self.trainer = self._trainer()
        self.evaluation = pgd20(config.eps or 0.0, config.ball, config.evaluation_steps)
        self.epoch = 0
        self.batch = 0
        self.history: list[dict[str, Any]] = []
        self.best: Best | None = None

    def _trainer(self) -> Trainer:
        config, device = self.config, self.processes.device
        forward = self.net
        if config.precision in DTYPES:
            forward = Autocast(self.net, device.type, DTYPES[config.precision])
        every = config.calibrate_every * config.accumulate  # the model counts the parts of a batch
        model = engm.GradNormModule(
            forward, batch_norm=config.batch_norm, calibrate_every=every, coupled=config.coupled
        )
        sgd = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
        training_model = self.processes.wrap(model)
        borrow = config.borrow
        if (borrow, config.batch_norm, config.attack_mode) == (None, "exact", "eval") and config.optimizer != "n-engm":
            borrow = False  # of norms, which go through statistics that this attack does not see
        self._awp = AWP(training_model, config.awp_gamma) if config.awp else None
        return Trainer(
            model,
            paper_optimizer(config, model, sgd),
            self._attack(0, 0),
            objective=self._objective(0),
            seed=seed_for("noise", config.seed),
            borrow=borrow,
            log_every=config.log_every,
            plain=cast(nn.Module, torch.compile(forward)) if config.compile_attack else None,
            forward=training_model,
            processes=self.processes,
            step=config.step,
            accumulate=config.accumulate,
            scaler=loss_scaler(config.precision, device),
        )

    def _objective(self, epoch: int) -> Objective:
        """The objective of an epoch; the same object as long as it is the same objective, as recorded steps ask for."""
        config, schedule = self.config, self.schedule
        patience = schedule.patience(epoch) if config.objective == "fat" else 0
        gap = schedule.gap(epoch) if config.objective == "ates" else 1.0
        beside = self.beside if config.objective != "self-adaptive" or schedule.labels_move(epoch) else None
        key = patience, gap, beside is None
        if key not in self._objectives:
            shared = {"eval_mode": config.attack_mode == "eval"}
            self._objectives[key] = (
                own_objective(config.objective, **shared)
                if is_address(config.objective)
                else objective(
                    config.objective,
                    beta=config.beta,
                    patience=patience,
                    gap=gap,
                    gamma=config.bs_gamma,
                    classes=self.dataset.classes,
                    momentum=config.sat_momentum,
                    beside=beside,
                    label_smoothing=config.label_smoothing,
                    **shared,
                )
            )
        return self._objectives[key]

    def _attack(self, epoch: int, step: int) -> PGD:
        """The training attack at a position; ``step`` counts over the whole run."""
        config, full = self.config, self.config.eps or 0.0
        eps = self.schedule.eps(step)
        # With eps of 0 there is no attack, and its step size need only be valid.
        step_size = (config.step_size or 1.0) * (eps / full) if eps else 1.0
        attack = self._objective(epoch).attack(eps, step_size, config.attack_steps, config.ball)
        return replace(attack, loss_scale=FIRST_SCALE) if config.precision == "fp16" else attack

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the averaged one, if there is one."""
        return self.average.network or self.net

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.batches.steps

    @property
    def alpha(self) -> float | str | None:
        """The threshold in use."""
        return getattr(self.trainer.optimizer, "alpha", None)

    @property
    def over(self) -> bool:
        """Whether training is finished, by its length or by early stopping."""
        return self.epoch >= self.config.epochs or self._stale()

    def _stale(self) -> bool:
        patience = self.config.early_stop
        looked = max((row["epoch"] for row in self.history if row["natural"] is not None), default=0)
        return bool(patience and self.best and looked - self.best.epoch >= patience)

    # -- training ------------------------------------------------------------------------------------------------

    def train_epoch(self, on_step: Callable[[], None], on_last: Callable[[], None] = lambda: None) -> EpochRecord:
        """Trains to the end of the epoch under way, from the batch that the run stands at.

        Args:
            on_step: called after every batch, with ``batch`` counted up; a checkpoint may be taken there.
            on_last: called after all of them, while the figures of the epoch are still part of the state.

        Raises:
            NonFiniteError: a loss was not finite.
        """
        self.begin_epoch()
        position = self.epoch, self.batch
        for (x, y), rows in zip(self.batches.epoch(*position), self.batches.rows(*position), strict=True):
            self.step(x, y, rows)
            on_step()
        on_last()
        return self.trainer.finish_epoch()

    def begin_epoch(self) -> None:
        """Sets what changes with the epoch: objective and weight perturbation."""
        trainer = self.trainer
        trainer.model.train()
        trainer.objective = self._objective(self.epoch)
        trainer.awp = self._awp if self.schedule.awp(self.epoch) else None

    def step(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> None:
        """Trains on one batch of the epoch under way.

        Args:
            x: natural inputs ``[n, C, H, W]`` in [0, 1]; with several processes, this one's.
            y: labels ``[n]``.
            rows: where the examples are in the training set, ``[n]``; see :meth:`Trainer.step`.

        Raises:
            NonFiniteError: a loss or a gradient is not finite (found later on a GPU, when figures are looked at).
        """
        self.trainer.attack = self._attack(self.epoch, self.trainer.steps)
        beside = [] if self.beside is None else self.beside.param_groups
        for group in [*self.trainer.optimizer.param_groups, *beside]:
            group["lr"] = self.schedule.lr(self.epoch, self.batch)
        self.trainer.step(x, y, rows)
        self.batch += 1
        self.average.after_step(self.net, self.epoch + 1, last=self.batch == self.batches.steps)

    def finish_epoch(self, record: EpochRecord, on_batch: OnBatch | None = None) -> bool:
        """Looks at the validation set if it is time, and notes the epoch.

        Args:
            record: from :meth:`train_epoch`.
            on_batch: called after each batch of the validation set.

        Returns:
            Whether the weights are the best so far.
        """
        self.synchronise()
        self.average.settle(self.dataset.train)
        self.epoch, self.batch = self.epoch + 1, 0
        accuracy = plain = None
        if self.epoch % self.config.evaluate_every == 0 or self.epoch == self.config.epochs:
            accuracy = self.evaluate("validation", on_batch=on_batch)
            if self.evaluated is not self.net:
                plain = self.evaluate("validation", self.net, on_batch)
        better = accuracy is not None and (self.best is None or robust_of(accuracy) > self.best.score)
        if accuracy is not None and better:
            self.best = Best(self.epoch, self.trainer.steps, accuracy)
        looks = figures_of(accuracy)
        if self.average.model is not None:
            looks.update(figures_of(plain, "plain_"))
        quantile = getattr(self.trainer.optimizer, "quantile", None)
        if quantile is not None:  # alpha follows the norms; this is the one after the epoch's last step
            looks["alpha"] = float(quantile.value)
        self.history.append(
            {
                "epoch": self.epoch,
                **record.summary,
                "lr": record.lr,
                "seconds": sum(record.step_seconds),
                "step_seconds": median(record.step_seconds),
                **looks,
            }
        )
        self.trainer.log_epoch(self.epoch, record, looks)
        return better

    def evaluate(self, split: str, net: nn.Module | None = None, on_batch: OnBatch | None = None) -> Accuracy:
        """Natural accuracy and accuracy under the evaluation attack, in float32 and evaluation mode.

        Args:
            split: ``"validation"`` or ``"test"``.
            net: other weights than the present ones.
            on_batch: called after each batch.
        """
        examples = getattr(self.dataset, split)
        return evaluate(net or self.evaluated, examples, self.evaluation, processes=self.processes, on_batch=on_batch)

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the network with other weights."""
        net = copy.deepcopy(self.net)
        load_weights(net, weights, self.dataset)
        return net

    def synchronise(self) -> None:
        """Brings the running statistics of several processes together."""
        for net in self._networks:
            self.processes.average_buffers(net)

    @property
    def _networks(self) -> list[nn.Module]:
        """The network, and behind it the one with averaged weights and the guide of LBGAT, if there are these."""
        averaged = [] if self.average.model is None else [self.average.model.module]
        return [self.net, *averaged, *([self.beside.net] if isinstance(self.beside, Guide) else [])]

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; plain containers and tensors. Every process must call it.

        Raises:
            NonFiniteError: one of the latest losses, or a weight, is not finite: this state is not worth keeping.
        """
        if not bool(torch.stack([p.isfinite().all() for p in self.net.parameters()]).all()):
            raise NonFiniteError(f"the weights are not finite after step {self.trainer.steps}")
        cuda = self.processes.device.type == "cuda"
        return {
            "device": self.processes.device.type,
            "data": self.data,
            "initial": self.initial,
            "code": self._code,
            "net": self.net.state_dict(),
            "average": None if self.average.model is None else self.average.model.state_dict(),
            "trainer": self.trainer.state_dict(),
            "beside": None if self.beside is None else self.beside.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "best": None if self.best is None else asdict(self.best),
            "buffers": [self.processes.gather_buffers(net) for net in self._networks],
            "random": self.processes.gather(torch.get_rng_state()),
            "random_cuda": self.processes.gather(torch.cuda.get_rng_state(self.processes.device)) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: it was taken with another number of processes, on another kind of device, with other data, or
                after another start.
        """
        if len(state["random"]) != self.processes.world:
            raise ValueError(
                f"this run was trained by {len(state['random'])} processes; go on with as many, "
                f"not {self.processes.world}"
            )
        if state["device"] != self.processes.device.type:  # whose generators have another kind of state
            raise ValueError(
                f"this run was trained on {state['device']}; go on there, with --device {state['device']}, or begin "
                "another run on this device"
            )
        if "data" in state:
            check_same_data(state["data"], self.data, self.dataset.name)
        else:  # written before the data had an identity
            warnings.warn("this checkpoint does not say what it was trained on: that is not checked", stacklevel=2)
        for name, identity in self._code.items():
            if state.get("code", {}).get(name, identity) != identity:
                warnings.warn(
                    f"{option(name)} {getattr(self.config, name)}: the file is another one than this run was trained "
                    "with so far. The run goes on with it as it is now",
                    stacklevel=2,
                )
        if self.initial not in (None, state.get("initial")):
            raise ValueError(
                f"the weights in {self.config.init} are not those that this run started from: bring the old ones back, "
                "or begin another run in another --out"
            )
        self.initial = state.get("initial")
        load_weights(self.net, state["net"], self.dataset)
        if self.average.model is not None:
            self.average.model.load_state_dict(state["average"])
        for net, every_rank in zip(self._networks, state["buffers"], strict=True):
            if every_rank:
                net.load_state_dict(every_rank[self.processes.rank], strict=False)
        self.trainer.load_state_dict(state["trainer"])
        if self.beside is not None:
            self.beside.load_state_dict(state["beside"])
        self.epoch, self.batch, self.history = state["epoch"], state["batch"], state["history"]
        best = state["best"]
        self.best = None if best is None else Best(best["epoch"], best["steps"], Accuracy(**best["accuracy"]))
        torch.set_rng_state(state["random"][self.processes.rank])
        if state["random_cuda"] is not None and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"][self.processes.rank], self.processes.device)
