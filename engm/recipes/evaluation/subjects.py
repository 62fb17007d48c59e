"""The networks that are evaluated: checkpoints of a run, and weights in a file of somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..config import RunConfig
from ..data import Dataset
from ..models import code_of_network
from ..models.normalization import normalized_by
from ..runs.files import RunFolder, Which
from ..storage.weights_files import digest_of
from ..training.building import build_network, load_weights
from .asking import Subject
from .weights_file import fitted, read_weights


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and what is to be known to make a network of it.

    Attributes:
        path: the file.
        config: names network and data; resolved.
        mean: by which inputs are normalised in front of the network; None: as the file says, or not at all.
        std: likewise.
    """

    path: Path
    config: RunConfig
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def evaluations_file(self) -> Path:
        """The file that says what was found, beside the weights."""
        return self.path.with_name(f"{self.path.name}.evaluation.json")

    def network(self, dataset: Dataset) -> tuple[nn.Module, tuple[float, ...] | None, tuple[float, ...] | None]:
        """The network in evaluation mode, with its normalisation in front; and the mean and deviation of that.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is of another network.
        """
        net = build_network(self.config, dataset)
        about = f"{self.path}, for {self.config.model}"
        passed_over = getattr(net, "passed_over", ())
        found = fitted(read_weights(self.path), net.state_dict(), about, passed_over)
        net.load_state_dict(found.weights)
        mean, std = self._normalisation(found.mean, found.std)
        if mean is not None and std is not None:
            net = normalized_by(net, mean, std, dataset.train.shape[0])
        return net.eval(), mean, std

    def subject(self, dataset: Dataset, device: torch.device) -> Subject:
        """The network as what is looked at, on a device.

        Raises:
            FileNotFoundError, ValueError: as :meth:`network`.
        """
        net, mean, std = self.network(dataset)
        settings = {"model": self.config.model, "width": self.config.width, "norm": self.config.norm}
        normalised = {"mean": None if mean is None else list(mean), "std": None if std is None else list(std)}
        code = code_of_network(self.config.model)
        facts = {"weights": digest_of(net.state_dict()), **settings, **normalised, **code}
        return Subject("weights", net.to(device), facts, self.config.threat)

    def _normalisation(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        if self.mean is None and self.std is None:
            return mean, std
        if self.mean is None or self.std is None:
            raise ValueError("--mean and --std belong together: give both, or neither")
        if mean is not None and std is not None and not (_close(self.mean, mean) and _close(self.std, std)):
            raise ValueError(
                f"{self.path} says that inputs are normalised by mean {_shown(mean)} and std {_shown(std)}, and the "
                f"command line says {_shown(self.mean)} and {_shown(self.std)}: leave --mean and --std out"
            )
        return self.mean, self.std


def of_run(
    folder: RunFolder,
    which: Which,
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    net: nn.Module | None = None,
) -> Subject:
    """A checkpoint of a run as what is looked at.

    Args:
        folder: the run.
        which: ``"best"`` or ``"last"``.
        config: the run's resolved configuration.
        dataset: says classes and shapes.
        device: where to put it.
        net: a network of :func:`of_run` for the same run, whose weights are replaced; None to build one.

    Raises:
        FileNotFoundError, CheckpointError: no such checkpoint, or it is damaged.
        ValueError: it does not fit the data.
    """
    kept = folder.weights(which)
    net = build_network(config, dataset).to(device).eval() if net is None else net
    load_weights(net, kept.weights, dataset)
    facts = {"checkpoint": kept.checkpoint, "epoch": kept.epoch, "weights": digest_of(kept.weights)}
    facts |= code_of_network(config.model)
    return Subject(which, net, facts, config.threat)


def source_of(place: RunFolder | WeightsFile, which: str, dataset: Dataset, device: torch.device) -> Subject:
    """The network that adversarial examples are made on, told from all others by its weights.

    Args:
        place: a run, or a file.
        which: for a run: the checkpoint of this name, ``best`` where it is neither that nor ``last``.
        dataset: whose images are attacked.
        device: where to compute.
    """
    if isinstance(place, WeightsFile):
        return place.subject(dataset, device)
    config = place.config()
    found = of_run(place, "last" if which == "last" else "best", config, dataset, device)
    facts = {"weights": digest_of(found.net.state_dict()), **code_of_network(config.model)}
    return Subject(found.name, found.net, facts, found.threat)


def _close(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    length = max(len(mine), len(theirs))
    pairs = zip([*mine] * (length // len(mine)), [*theirs] * (length // len(theirs)), strict=True)
    return all(abs(a - b) < 1e-4 for a, b in pairs)


def _shown(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
