"""What is measured on a finished run; every result is kept beside the run and not computed twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ..config import RunConfig
from ..storage.atomic_files import make_folder, read_json, write_json

if TYPE_CHECKING:  # what computes is imported where it is called, because plans of measures are made without torch
    import torch
    from torch import Tensor, nn

    from ..data import Dataset
    from ..runs.files import RunFolder, Which


class Measure(Protocol):
    """A frozen dataclass; its fields say what is measured, ``kind`` under which name it is reported."""

    kind: ClassVar[str]

    @property
    def examples(self) -> int | None:
        """How many images it looks at; ``None``: all."""

    def compute(self, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device) -> Any:
        """The result, as JSON can hold it."""

    def passes(self, config: RunConfig) -> float:
        """About how many forward and backward passes of single images it takes, to judge its cost by."""


def measured(measure: Measure, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device) -> Any:
    """The result: read, if it was computed before with the same settings, or computed and written."""
    settings = {**asdict(measure), "run": fingerprint_of(folder)}  # type: ignore[call-overload]
    path = folder.path / "measures" / f"{measure.kind}.json"
    known: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    wanted = _plain(settings)
    for entry in known:
        if entry["settings"] == wanted:
            return entry["result"]
    result = measure.compute(folder, config, dataset, device)
    make_folder(path.parent)
    write_json(
        path, [*(e for e in known if e["settings"]["run"] == wanted["run"]), {"settings": wanted, "result": result}]
    )
    return result


def fingerprint_of(folder: RunFolder) -> str:
    """Tells one training of the same folder from another: the last checkpoint's checksums."""
    name = folder.weights("last").checkpoint
    return (folder.path / "checkpoints" / name / "SHA256SUMS").read_text(encoding="utf-8").split()[0]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


@dataclass(frozen=True)
class AutoAttack:
    """Accuracy of the best checkpoint under AutoAttack, in [0, 1].

    Attributes:
        examples: the first so many of the test set; ``None``: all.
    """

    examples: int | None
    kind: ClassVar[str] = "autoattack"
    which: ClassVar[Which] = "best"

    def compute(self, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device) -> float:
        """The accuracy, by the package ``pyautoattack``."""
        return float(_assessed("autoattack", self.which, self.examples, folder, dataset, device)["accuracy"])

    def passes(self, config: RunConfig) -> float:
        """AutoAttack takes 100 steps, nine times 100, and 5,000 queries, on the images that still stand."""
        return 600.0 * (self.examples or 10_000)


@dataclass(frozen=True)
class AutoAttackOfLast(AutoAttack):
    """The same of the last checkpoint."""

    kind: ClassVar[str] = "autoattack_last"
    which: ClassVar[Which] = "last"


@dataclass(frozen=True)
class DeepFool:
    """Mean l2 distance to the closest adversary of the last checkpoint, the paper's rho.

    Attributes:
        examples: the first so many of the test set; ``None``: all.
    """

    examples: int | None
    kind: ClassVar[str] = "deepfool"

    def compute(self, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device) -> float | None:
        """The distance; ``None`` if there was no adversary."""
        rho: float | None = _assessed("deepfool", "last", self.examples, folder, dataset, device)["rho"]
        return rho

    def passes(self, config: RunConfig) -> float:
        """DeepFool takes ten backward passes a step, and a handful of steps."""
        return 40.0 * (self.examples or 10_000)


@dataclass(frozen=True)
class Gradients:
    """Norm and variance of the gradients of training images, attacked as in training, after each kept epoch.

    Attributes:
        examples: the first so many of the training set.
        batch_size: number of images at a time.
        statistics: mode of batch norm, as :func:`engm.recipes.analysis.gradient_statistics` takes it.
        epochs: numbers of finished epochs after which the gradients are measured.
    """

    examples: int
    batch_size: int
    epochs: tuple[int, ...]
    statistics: Literal["training", "evaluation"] = "training"
    kind: ClassVar[str] = "gradients"

    def compute(
        self, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device
    ) -> list[dict[str, float]]:
        """The statistics, a row an epoch."""
        from ..analysis import gradient_statistics

        rows = []
        for epoch, net, x, y in _attacked(folder, config, dataset, self.epochs, self.examples, self.batch_size):
            found = gradient_statistics(net, x, y, batch_size=self.batch_size, statistics=self.statistics)
            rows.append({"epoch": epoch, **asdict(found), "variance": found.variance})
        return rows

    def passes(self, config: RunConfig) -> float:
        """An image takes its attack, three passes, and sixteen more for calibration."""
        return len(self.epochs) * self.examples * (config.attack_steps * (config.eps != 0) + 3 + 16)


@dataclass(frozen=True)
class Correlation:
    """Input-gradient norms and the engine's against exact norms, after each kept epoch, in both modes.

    Attributes:
        examples: the first so many of the training set.
        batch_size: number of images at a time.
        epochs: numbers of finished epochs after which the norms are compared.
        alphas: thresholds for the weights.
    """

    examples: int
    batch_size: int
    epochs: tuple[int, ...]
    alphas: tuple[float, ...] = (0.1, 1.0, 3.0)
    kind: ClassVar[str] = "correlation"

    def compute(
        self, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device
    ) -> list[dict[str, Any]]:
        """The figures, two rows an epoch: one in each mode."""
        from ..analysis import norm_correlation

        rows = []
        modes: tuple[Literal["training", "evaluation"], ...] = ("training", "evaluation")
        for epoch, net, x, y in _attacked(folder, config, dataset, self.epochs, self.examples, self.batch_size):
            for mode in modes:
                found = norm_correlation(net, x, y, batch_size=self.batch_size, statistics=mode, alphas=self.alphas)
                rows.append({"epoch": epoch, "statistics": mode, **asdict(found)})
        return rows

    def passes(self, config: RunConfig) -> float:
        """In training mode every image takes one backpropagation of its whole batch."""
        return len(self.epochs) * self.examples * (config.attack_steps + self.batch_size)


@dataclass(frozen=True)
class LossLandscape:
    """Losses around test images for the best checkpoint.

    Attributes:
        examples: the first so many test images.
        points: number of points along a side of the plane.
        rough: test images, the first so many, whose roughness is averaged.
    """

    examples: int
    points: int
    rough: int
    kind: ClassVar[str] = "landscape"

    def compute(self, folder: RunFolder, config: RunConfig, dataset: Dataset, device: torch.device) -> dict[str, Any]:
        """Landscapes, coordinates and the roughness of every image."""
        import torch

        from engm.adversarial import PGD

        from ..analysis import loss_landscape, roughness

        net = _network(folder.weights("best").weights, config, dataset, device)
        count = min(self.rough, len(dataset.test))
        x, y = dataset.test.batch(torch.arange(count))
        if not config.eps:
            raise ValueError("a loss landscape lies along an adversarial perturbation: it needs a radius above 0")
        attack = PGD(config.eps, config.eps / 10, 20, norm=config.ball)
        found = loss_landscape(net, x, y, attack, points=self.points)
        return {
            "coordinates": found.coordinates.tolist(),
            "losses": _rounded(found.losses[: self.examples]),
            "roughness": _rounded(roughness(found.losses, found.coordinates)),
        }

    def passes(self, config: RunConfig) -> float:
        """A point takes a forward pass, a third of a pass with a backpropagation."""
        return self.rough * self.points**2 / 3


def _rounded(values: Tensor) -> Any:
    """The values with six digits, which are more than a picture shows."""
    import torch

    return torch.tensor([float(f"{v:.6g}") for v in values.double().flatten()]).reshape(values.shape).tolist()


def _assessed(
    attack: str, which: Which, examples: int | None, folder: RunFolder, dataset: Dataset, device: torch.device
) -> dict[str, Any]:
    """What ``engm evaluate`` finds, or has found, on the first so many test images at the run's radius."""
    from ..runs.evaluation import assess

    count = len(dataset.test) if examples is None else min(examples, len(dataset.test))
    found: list[dict[str, Any]] = []
    assess(
        folder,
        [attack],
        checkpoints=[which],
        examples=count,
        device=device,
        dataset=dataset,
        on_result=lambda _, name, result: found.append(result),
    )
    return found[0]


def _network(weights: dict[str, Tensor], config: RunConfig, dataset: Dataset, device: torch.device) -> nn.Module:
    from ..training.building import build_network, load_weights

    net = build_network(config, dataset).to(device)
    load_weights(net, weights, dataset)
    return net.eval()


def _attacked(
    folder: RunFolder, config: RunConfig, dataset: Dataset, epochs: Sequence[int], examples: int, batch_size: int
) -> Iterator[tuple[int, nn.Module, Tensor, Tensor]]:
    """Yields ``(epoch, network, x, y)`` with training images as training sees them but for augmentation.

    The images are the same for every run and epoch, and so are the attack's starts.
    """
    import torch

    from engm.adversarial import PGD

    count = min(examples, len(dataset.train)) // batch_size * batch_size
    if count < batch_size:
        raise ValueError(f"gradients are measured on {batch_size} images at a time, and there are {len(dataset.train)}")
    x, y = dataset.train.batch(torch.arange(count))
    for epoch in epochs:
        net = _network(folder.weights_after(epoch).weights, config, dataset, x.device)
        attacked = x
        if config.eps:
            attack = PGD(
                config.eps,
                config.step_size or config.eps / 4,
                config.attack_steps,
                norm=config.ball,
                eval_mode=config.attack_mode == "eval",
            )
            generator = torch.Generator(x.device).manual_seed(0)
            victim = copy.deepcopy(net).train()  # in training mode the attack moves its running statistics
            batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
            attacked = torch.cat([attack(victim, a, b, generator=generator).inputs for a, b in batches])
        yield epoch, net, attacked, y


def evaluation_passes(config: RunConfig, examples: int) -> float:
    """About how many passes natural accuracy and the evaluation attack take: most images fall at once."""
    return examples * (1 + 0.4 * config.evaluation_steps * (config.eps != 0))
