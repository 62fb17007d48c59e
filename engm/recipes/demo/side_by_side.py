"""The demonstration's runs: the run of ``engm train``, once for every method, all of them step by step side by side.

Everything but the outer optimizer is the same for all methods: initial weights, order of the examples, attack noise,
schedule, evaluation. The test set is looked at once, when training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..accuracy import Accuracy
from ..data import Dataset, load_digits
from ..methods import LABELS
from ..processes import Processes
from ..training.building import build_network
from ..training.run import Best, Run
from ..training.trainer import EpochRecord, Trainer
from ..training.turns import take_turns
from .settings import DemoSettings, default_alpha


@dataclass
class MethodRun:
    """One method's run, as it grows.

    Attributes:
        name: name of the method.
        run: the run, which keeps the figures of every epoch and the best look at the validation set.
        epochs: training figures, one record an epoch.
        best_weights: the network's ``state_dict`` at the best look.
        test_best: accuracy on the test set with these weights.
        test_last: accuracy on the test set with the last weights.
    """

    name: str
    run: Run
    epochs: list[EpochRecord] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    test_best: Accuracy | None = None
    test_last: Accuracy | None = None

    @property
    def label(self) -> str:
        """The method as tables print it."""
        return LABELS[self.name]

    @property
    def trainer(self) -> Trainer:
        """The method's model, optimizer and attack."""
        return self.run.trainer

    @property
    def validation(self) -> dict[int, Accuracy]:
        """The looks at the validation set by number of finished epochs."""
        examples = len(self.run.dataset.validation)
        looks = (row for row in self.run.history if row["natural"] is not None)
        return {row["epoch"]: Accuracy(row["natural"], row["robust"], examples) for row in looks}

    @property
    def best(self) -> Best:
        """The look at the validation set with the highest robust accuracy so far (the first of equals).

        Raises:
            RuntimeError: the first look is still to come.
        """
        if self.run.best is None:
            raise RuntimeError("no best yet: the first look at the validation set is still to come")
        return self.run.best

    def finish_epoch(self) -> None:
        """Takes the epoch's figures, looks at the validation set if it is time, and keeps the best weights."""
        record = self.trainer.finish_epoch()
        self.epochs.append(record)
        if self.run.finish_epoch(record):
            self.best_weights = {name: tensor.clone() for name, tensor in self.run.net.state_dict().items()}

    def test(self) -> None:
        """Takes the one look at the test set."""
        self.test_last = self.run.evaluate("test")
        if self.best.epoch == self.run.epoch:
            self.test_best = self.test_last
        else:
            self.test_best = self.run.evaluate("test", self.run.with_weights(self.best_weights))


@dataclass(frozen=True)
class Demo:
    """A demonstration, before, while and after it runs.

    Attributes:
        settings: what it runs.
        dataset: the examples.
        parameters: number of the network's parameters.
        alpha: ENGM's threshold.
        runs: one for each method.
    """

    settings: DemoSettings
    dataset: Dataset
    parameters: int
    alpha: float
    runs: list[MethodRun]

    def batches(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """The batches of every epoch in turn; the examples are drawn in a new order each time."""
        train, training = self.dataset.train, self.settings.training
        order = torch.Generator().manual_seed(training.seed)
        steps = len(train) // training.batch_size
        for _ in range(training.epochs):
            rows = torch.randperm(len(train), generator=order)[: steps * training.batch_size]
            yield train.batches(rows.split(training.batch_size))


def prepare(settings: DemoSettings, dataset: Dataset | None = None) -> Demo:
    """Builds one run a method, all from the same weights.

    Args:
        settings: what to run.
        dataset: ``None`` for the digits.

    Raises:
        ValueError: a setting is out of range.
    """
    dataset = dataset or load_digits()
    net = build_network(settings.config(), dataset)
    alpha = default_alpha(net) if settings.alpha is None else settings.alpha
    processes = Processes(dataset.train.labels.device)
    runs = [MethodRun(name, Run(settings.config_of(name, alpha), processes, dataset)) for name in settings.methods]
    for run in runs:
        run.trainer.generator.manual_seed(settings.training.seed)  # as ever, so that published figures repeat
    return Demo(settings, dataset, sum(p.numel() for p in net.parameters()), alpha, runs)


def run(
    demo: Demo,
    *,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> None:
    """Trains all methods and fills in their runs.

    Args:
        demo: from :func:`prepare`.
        on_step: called after every batch.
        on_epoch: called with the number of finished epochs, after every epoch.
    """
    for epoch, batches in enumerate(demo.batches(), start=1):
        for method in demo.runs:
            method.run.begin_epoch()
        for _ in take_turns([method.run for method in demo.runs], batches):
            if on_step is not None:
                on_step()
        for method in demo.runs:
            method.finish_epoch()
        if on_epoch is not None:
            on_epoch(epoch)
    for method in demo.runs:
        method.test()
