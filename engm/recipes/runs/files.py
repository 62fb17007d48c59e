"""A run on disk: where things lie, what is in its checkpoints, and whether a run may train in a folder.

DIR/config.toml       the resolved configuration
DIR/checkpoints/      step-NNNNNNNN (the last two), best-NNNNNNNN (by validation) and epoch-NNNNNN (--keep-epochs)
DIR/log/              step.csv, epoch.csv, TensorBoard events
DIR/results.json      when it is over: test accuracy of best and last, every epoch's figures, the machine
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..config import RunConfig, option
from ..config_files import from_values, read_toml, to_toml
from ..data import Dataset, check_same_data, identities
from ..data_names import names_place
from ..storage.atomic_files import read_object, write_text_atomic
from ..storage.checkpoint import CheckpointStore
from ..training.run import Run
from .contents import RESULTS, described, holds_run
from .going_on import LENGTH, PLACES, moved, of_the_same_run

LAST = "step-"
BEST = "best-"
EPOCH = "epoch-"
KEPT = 2  # periodic checkpoints: the latest and one to fall back on
Which = Literal["best", "last"]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The file of the resolved configuration."""
        return self.path / "config.toml"

    @property
    def results_file(self) -> Path:
        """The file that says what the run came to."""
        return self.path / RESULTS

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints of the run."""
        return CheckpointStore(self.path / "checkpoints", keep=KEPT)

    @property
    def exists(self) -> bool:
        """Whether a run lives here already."""
        return holds_run(self.path)

    @property
    def was_trained(self) -> bool:
        """Whether there is anything that a run came to here, finished or not."""
        return self.exists and (self.results_file.is_file() or bool(self.store.names(LAST)))

    def config(self, data_root: Path | None = None) -> RunConfig:
        """The resolved configuration of the run that lives here.

        Args:
            data_root: where named data sets lie now, if not where they lay in training.

        Raises:
            FileNotFoundError: no run lives here.
            ValueError: its configuration cannot be read.
        """
        if not self.exists:
            raise FileNotFoundError(f"{self.path} is no run folder: the path {described(self.path)}")
        config = from_values(read_toml(self.config_file), source=str(self.config_file)).resolved()
        return config if data_root is None else replace(config, data_root=str(data_root.absolute()))

    def check_free_for(self, config: RunConfig) -> RunConfig:
        """Looks whether ``config`` may train here: in a new or empty folder, or going on with its own run.

        Returns:
            The resolved settings to train with: see :func:`engm.recipes.runs.going_on.of_the_same_run`.

        Raises:
            ValueError: another run lives here, or something else.
        """
        if self.was_trained:
            settled = of_the_same_run(self.config(), config, self.path, self.trained)
            if not self.store.names(LAST) and not self.is_over(settled):
                raise ValueError(
                    f"{self.path} has results of {self.config().epochs} epochs and no checkpoints any more, "
                    "so that it cannot be trained on. Bring its checkpoints back, or choose another --out"
                )
            return settled
        if not self.exists and self.path.exists() and not _is_empty_folder(self.path):
            raise ValueError(
                f"{self.path} exists and is no run folder: the path {described(self.path)}. Choose another --out"
            )
        return config.resolved()

    def trained(self) -> tuple[int, int]:
        """The number of epochs that the run has finished, and of those that it has begun.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        found = self.store.latest(LAST)
        if found is None:
            return 0, 0
        finished = int(found[1]["epoch"])
        return finished, finished + bool(found[1]["batch"])

    def is_over(self, config: RunConfig) -> bool:
        """Whether the run has its results, and these are of as many epochs as a configuration plans."""
        return self.exists and self.results_file.is_file() and self.config().epochs == config.epochs

    def settle(self, config: RunConfig) -> None:
        """Writes the settings that are about to be trained with; results of a run that was shorter go."""
        if not self.exists or not (self.store.names(LAST) or self.is_over(config)):
            write_text_atomic(self.config_file, to_toml(config))  # nothing was trained with other settings
            return
        own = self.config()
        if config.epochs != own.epochs:
            self.results_file.unlink(missing_ok=True)
        changed = {name: getattr(config, name) for name in (*LENGTH, *PLACES)}
        if replace(own, **changed) != own:
            write_text_atomic(self.config_file, to_toml(replace(own, **changed)))

    def check_moved(self, config: RunConfig, load: Callable[[], Dataset]) -> bool:
        """Looks whether data that lie elsewhere now are those that the run was trained on, if it was trained.

        Args:
            config: settings that the run may go on with, resolved.
            load: loads their data, where they lie now.

        Returns:
            Whether they lie elsewhere.

        Raises:
            ValueError: they are others.
        """
        if not self.exists or not moved(self.config(), config):
            return False
        known = self._trained_on()
        if known is not None:
            dataset = load()
            check_same_data(known, identities(dataset), dataset.name)
        return True

    def _trained_on(self) -> dict[str, str] | None:
        """The identities of the data that the run was trained on; ``None`` where nothing says them."""
        if self.results_file.is_file():
            said: dict[str, str] | None = self.results()["data"].get("identity")
            return said
        found = self.store.latest(LAST)
        return None if found is None else found[1].get("data")

    def check_data_there(self, config: RunConfig) -> None:
        """Looks whether the files that the run's data lie in are still in their place.

        Raises:
            FileNotFoundError: they are not; says how to name another place.
        """
        for name in PLACES:
            place = getattr(config, name)
            if place and names_place(place) and not Path(place).exists():
                raise FileNotFoundError(
                    f"nothing is at {place}, where data of the run in {self.path} should lie. If they have moved, say "
                    f"where they are now: engm train --out {self.path} {option(name)} PLACE"
                )

    @property
    def evaluations_file(self) -> Path:
        """The file that says what ``engm evaluate`` found."""
        return self.path / "evaluation.json"

    def results(self) -> dict[str, Any]:
        """What the run came to.

        Raises:
            FileNotFoundError: the run is not over.
            ValueError: the file does not hold them.
        """
        if not self.results_file.is_file():
            raise FileNotFoundError(f"{self.path} has no results yet: train it to the end with engm train --out")
        return read_object(self.results_file, "config", "data", "test")

    def weights(self, which: Which) -> Kept:
        """The weights of the best or the last checkpoint.

        Args:
            which: ``"best"`` on the validation set so far, or ``"last"``.

        Raises:
            FileNotFoundError: no such checkpoint yet.
            CheckpointError: it is damaged; names the file.
        """
        found = self.store.latest(LAST)
        if found is None or (which == "best" and found[1]["best"] is None):
            raise FileNotFoundError(f"{self.path} has no {which} checkpoint yet")
        name, state = found
        if which == "last":
            weights = evaluated_weights(state)
            return Kept(name, state["epoch"], weights, None if weights is state["net"] else state["net"])
        name = best_name(state["best"]["steps"])
        best = self.store.load(name)
        return Kept(name, state["best"]["epoch"], best["net"], best.get("plain"))

    def weights_after(self, epoch: int) -> Kept:
        """The weights after an epoch of ``--keep-epochs``.

        Raises:
            CheckpointError: they were not kept, or are damaged.
        """
        name = f"{EPOCH}{epoch:06d}"
        return Kept(name, epoch, self.store.load(name)["net"])

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(self, run: Run) -> None:
        """Saves a periodic checkpoint. Every process must call this; the first one writes."""
        self.save_state(run, run.state_dict())

    def save_state(self, run: Run, state: dict[str, Any]) -> None:
        """Saves a periodic checkpoint of a state that was taken after the latest step. Every process must call this."""
        with run.processes.together():
            if run.processes.first:
                self.store.save(f"{LAST}{run.trainer.steps:08d}", state)
                self.store.prune(LAST)

    def save_best(self, run: Run) -> None:
        """Saves the weights that were just found to be the best. Every process must call this; the first one writes."""
        with run.processes.together():
            if run.processes.first and run.best is not None:
                accuracy = asdict(run.best.accuracy)
                weights = {"epoch": run.epoch, "net": run.evaluated.state_dict(), "accuracy": accuracy}
                if run.evaluated is not run.net:
                    weights["plain"] = run.net.state_dict()
                self.store.save(best_name(run.best.steps), weights)
                # Two stay: a resumed run may still start from a periodic checkpoint that was written before these
                # weights were, and the best of that one are the weights before.
                self.store.prune(BEST)

    def save_epoch(self, run: Run) -> None:
        """Saves the weights that evaluation looks at after the epoch just finished. Every process must call this."""
        with run.processes.together():
            if run.processes.first:
                weights = {"epoch": run.epoch, "net": run.evaluated.state_dict()}
                self.store.save(f"{EPOCH}{run.epoch:06d}", weights)

    def restore(self, run: Run) -> bool:
        """Puts the run where its latest good checkpoint left it; a damaged one is named in a warning and passed over.

        Returns:
            Whether there was a checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        found = self.store.latest(LAST)
        if found is not None:
            run.load_state_dict(found[1])
        if run.processes.first:  # newer best weights belong to a future that this run may not repeat
            self.store.drop_after(BEST, run.trainer.steps)
        return found is not None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())


@dataclass(frozen=True)
class Kept:
    """Weights out of a checkpoint.

    Attributes:
        checkpoint: name of the checkpoint.
        epoch: number of finished epochs.
        weights: the network's ``state_dict`` (averaged weights, if the run averages), on the CPU.
        plain: the ``state_dict`` of the network that trained, where ``weights`` are an average and it is kept as well.
    """

    checkpoint: str
    epoch: int
    weights: dict[str, Tensor]
    plain: dict[str, Tensor] | None = None


def best_name(steps: int) -> str:
    """The checkpoint of weights that were the best after so many steps."""
    return f"{BEST}{steps:08d}"


def evaluated_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a periodic checkpoint that evaluation looks at: the averaged ones, if there are any."""
    if state["average"] is None or not int(state["average"]["n_averaged"]):  # nothing has been averaged so far
        net: dict[str, Tensor] = state["net"]
        return net
    prefix = "module."
    return {name.removeprefix(prefix): t for name, t in state["average"].items() if name.startswith(prefix)}
