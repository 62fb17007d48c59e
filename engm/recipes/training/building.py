"""What a configuration names, built: data set, augmentation and network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from ..addresses import is_address
from ..config import RunConfig, in_grey_levels, option
from ..data import Augmentation, Dataset, Source, load_data, with_extra
from ..data.memory import InMemory
from ..models import Normalization, build_model, check_logits
from ..models.normalization import NAME, normalized_by
from ..processes import Processes
from ..spelling import parse_normalization

LOOKED_AT = 1000  # images at a time
_IN_MEMORY: dict[str, InMemory] = {"yes": True, "no": False, "auto": "auto"}


def load_dataset(config: RunConfig, device: torch.device, *, validation: bool = True) -> Dataset:
    """The data that a configuration names, on ``device`` where they fit.

    Args:
        config: a resolved configuration.
        device: where the data will be used.
        validation: whether anybody will look at the validation set; otherwise it need not have its size.

    Raises:
        ValueError, FileNotFoundError, ConnectionError, ModuleNotFoundError: see :func:`engm.recipes.data.load_data`.
    """
    # The digits have a split of their own, and their loader refuses any other number of validation examples.
    digits = config.data == "digits"
    dataset = load_data(
        config.data,
        root=config.data_root,
        download=config.download,
        image_size=config.image_size,
        validation_examples=(1000 if digits else config.validation_examples) if validation else None,
        validation_from_test=config.validation_from_test,
        in_memory=_IN_MEMORY[config.in_memory],
        device=device,
        workers=config.workers,
    ).to(device)
    if dataset.classes < 2:
        raise ValueError(f"{config.data} has one class alone, so that there is nothing to learn: expected two or more")
    return replace(
        dataset,
        train=_first(dataset.train, config.train_examples, "train_examples"),
        test=_first(dataset.test, config.test_examples, "test_examples"),
    )


def _first(source: Source, count: int | None, name: str) -> Source:
    """The first so many examples, or all of them."""
    if count is None:
        return source
    if count > len(source):
        raise ValueError(f"{option(name)} {count}: there are {len(source)} of these examples")
    return source.take(torch.arange(count))


def check_radius(config: RunConfig, dataset: Dataset, eps: float | None = None) -> None:
    """Refuses a radius within which every image of [0, 1] lies, whatever the original; ``8`` for ``8/255``, say.

    Args:
        config: a resolved configuration, which says the norm.
        dataset: says how many pixels an image has.
        eps: another radius than the configuration's.

    Raises:
        ValueError: the radius is as long as the diagonal of all images (l2) or as an edge (l-inf).
    """
    radius = (config.eps or 0.0) if eps is None else eps
    longest = 1.0 if config.ball == "linf" else prod(dataset.train.shape) ** 0.5
    if radius >= longest:
        raise ValueError(
            f"--eps {radius:g} is no radius of an attack: pixels lie in [0, 1], so that {config.threat} distances are "
            f"at most {longest:.4g} here and every image would be in the ball of every other. "
            f"{in_grey_levels(radius)}"
        )


def load_in_turn(config: RunConfig, processes: Processes) -> Dataset:
    """Calls :func:`load_dataset` in several processes; the first one downloads for all of them."""
    if config.download and processes.world > 1:
        with processes.together():
            if processes.first:
                load_dataset(config, processes.device)
    return load_dataset(config, processes.device)


def build_network(config: RunConfig, dataset: Dataset) -> nn.Module:
    """The network that a resolved configuration names, for a data set, with weights from the run's seed.

    With ``--normalize data`` its normalization changes nothing before :func:`settle_normalization`, or before weights
    are loaded, which have it with them.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see :func:`engm.recipes.models.build_model`; or a network of
            one's own does not give one logit a class.
    """
    channels, height, _ = dataset.train.shape
    torch.manual_seed(config.seed)
    net = build_model(
        config.model,
        classes=dataset.classes,
        in_channels=channels,
        image_size=height,
        norm=config.norm,
        width=config.width,
    )
    if is_address(config.model):
        check_logits(net, config.model, dataset.train.shape, dataset.classes)
    if config.normalize == "none":
        return net
    mean, std = parse_normalization(config.normalize) or ([0.0], [1.0])
    try:
        return normalized_by(net, mean, std, channels)
    except ValueError as error:
        raise ValueError(f"--normalize {config.normalize}: {error}") from None


def settle_normalization(net: nn.Module, source: Source) -> None:
    """Sets a network's normalization to mean and deviation of every channel over all pixels of some images.

    Raises:
        ValueError: a channel is the same everywhere.
    """
    layer = net.get_submodule(NAME)
    if not isinstance(layer, Normalization):
        raise TypeError(f"expected a Normalization, got {type(layer).__name__}")
    sums = torch.zeros(2, source.shape[0], dtype=torch.float64)
    for x, _ in source.batches(torch.arange(len(source)).split(LOOKED_AT)):
        pixels = x.double()
        sums += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))]).cpu()
    mean, square = sums / (len(source) * prod(source.shape[1:]))
    std = (square - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 1e-6).all()):
        raise ValueError("--normalize data: a channel of the training images has the same value everywhere")
    layer.mean.copy_(mean)
    layer.std.copy_(std)


def load_extra(config: RunConfig, dataset: Dataset, device: torch.device) -> Dataset:
    """The data set with the extra examples that a configuration names, if it names any.

    Raises:
        FileNotFoundError, ValueError: see :func:`engm.recipes.data.with_extra`.
    """
    if config.extra is None:
        return dataset
    return with_extra(
        dataset, config.extra, in_memory=_IN_MEMORY[config.in_memory], device=device, workers=config.workers
    )


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], dataset: Dataset) -> None:
    """Puts weights that were kept into the network that was built for a data set.

    Raises:
        ValueError: they are of another network: the data have other classes or shapes than in training, say.
    """
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        details = " ".join(str(error).splitlines()[1:3]).strip()
        raise ValueError(
            f"the weights are of another network than the one for {dataset.name} with its {dataset.classes} classes "
            f"and images of shape {list(dataset.train.shape)} ({details}): are these the data that the run was trained "
            "on?"
        ) from error


def augmentation_of(config: RunConfig, dataset: Dataset) -> Augmentation:
    """The augmentation that a configuration asks for; ``auto`` is the data set's own."""
    chosen = {
        "auto": dataset.augment,
        "crop-flip": Augmentation(padding=4, flip=True),
        "crop": Augmentation(padding=4, flip=False),
        "none": Augmentation(padding=0, flip=False),
    }
    return chosen[config.augment]
