"""Extra examples in every batch: how many, which, of several processes alike, and to the same bits after a stop."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import CPU, PLAIN, KilledAt, tiny_dataset, train_tiny

from engm.recipes.data import Augmentation, Split, StreamedSplit, with_extra
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder
from engm.recipes.training.batches import TrainingBatches

NOTHING = Augmentation()


def numbered(count: int, first: int = 0) -> Split:
    """Images whose only pixel says which they are, as a label too."""
    numbers = torch.arange(first, first + count)
    return Split((numbers / 1000).view(-1, 1, 1, 1), numbers)


def labels(batches: TrainingBatches, epoch: int, start: int = 0) -> torch.Tensor:
    found = list(batches.epoch(epoch, start))
    for x, y in found:
        torch.testing.assert_close(x.flatten() * 1000, y.float())
    return torch.stack([y for _, y in found])


def mixed(extra: Split | StreamedSplit, processes: Processes = CPU, fraction: float = 0.3) -> TrainingBatches:
    return TrainingBatches(numbered(40), 10, NOTHING, 3, processes, extra=extra, extra_fraction=fraction)


def test_every_batch_has_its_share_and_an_epoch_its_length() -> None:
    batches = mixed(numbered(100, 500))
    assert batches.steps == 4
    for epoch in (0, 1):
        found = labels(batches, epoch)
        assert found.shape == (4, 10)
        assert ((found >= 500).sum(1) == 3).all()
        assert len(found.unique()) == 40  # nothing comes twice
        assert torch.equal(found[2:], labels(batches, epoch, 2))
    assert not torch.equal(labels(batches, 0).sort().values, labels(batches, 1).sort().values)


def test_few_extra_examples_come_several_times_and_equally_often() -> None:
    found = labels(mixed(numbered(6, 500)), 0)
    counts = found[found >= 500].bincount()[500:]
    assert counts.tolist() == [2] * 6


def test_several_processes_share_the_batches_of_one() -> None:
    whole = labels(mixed(numbered(100, 500)), 0)
    parts = [labels(mixed(numbered(100, 500), Processes(torch.device("cpu"), rank, 2)), 0) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert all(bool((part >= 500).any()) for part in parts)


def test_extra_examples_may_be_streamed() -> None:
    split = numbered(100, 500)
    streamed = StreamedSplit(split.inputs, split.labels, (1, 1, 1), workers=0)
    assert torch.equal(labels(mixed(streamed), 1), labels(mixed(split), 1))


def test_without_extra_examples_the_order_is_as_it_was() -> None:
    from engm.recipes.training.batches import seed_for

    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed_for("order", 3, 2)))
    found = labels(TrainingBatches(numbered(40), 10, NOTHING, 3, CPU), 2)
    assert torch.equal(found.flatten(), order)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--extra-fraction 0.01 of 10 examples a process leaves no original"):
        mixed(numbered(9), fraction=0.01)
    with pytest.raises(ValueError, match=r"--extra-fraction 0.2 of 2 examples"):
        mixed(numbered(9), Processes(torch.device("cpu"), 0, 5), fraction=0.2)


def write(path: Path, images: tuple[int, ...] = (50, 8, 8, 1), names: tuple[str, str] = ("image", "label")) -> Path:
    draw = np.random.default_rng(0)
    arrays = (draw.integers(0, 256, images, np.uint8), np.arange(images[0]) % 2)
    np.savez(path, **dict(zip(names, arrays, strict=True)))
    return path


def test_files(tmp_path: Path) -> None:
    data, cpu = tiny_dataset(), torch.device("cpu")
    found = [
        with_extra(data, write(tmp_path / f"{number}.npz", names=names), in_memory=memory, device=cpu, workers=0).extra
        for number, (names, memory) in enumerate(((("image", "label"), "auto"), (("x_train", "y_train"), False)))
    ]
    assert isinstance(found[0], Split)
    assert isinstance(found[1], StreamedSplit)
    rows = torch.arange(50)
    assert torch.equal(found[0].batch(rows)[0], found[1].batch(rows)[0])

    def refused(path: Path) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            with_extra(data, path, in_memory=True, device=cpu, workers=0)
        return str(error.value)

    assert "[3, 8, 8] (as [C, H, W]), and those of halves of [1, 8, 8]" in refused(
        write(tmp_path / "c.npz", (9, 8, 8, 3))
    )
    assert "expected the arrays image, label or x_train, y_train; label missing" in refused(
        write(tmp_path / "n.npz", names=("image", "labels"))
    )
    assert "no data file at" in refused(tmp_path / "none.npz")
    three = tmp_path / "three.npz"
    np.savez(three, image=np.zeros((3, 8, 8, 1), np.uint8), label=np.arange(3))
    assert "labels must be class indices from 0 to 1" in refused(three)


def test_a_run_goes_on_to_the_same_bits_and_knows_its_extra_data(tmp_path: Path) -> None:
    config = replace(PLAIN, extra=str(write(tmp_path / "extra.npz")), extra_fraction=0.5, epochs=2)

    def trained(path: Path, *stops: int) -> dict[str, torch.Tensor]:
        for steps in stops:
            with suppress(KeyboardInterrupt):
                train_tiny(config, path, view=KilledAt(steps))
        results = train_tiny(config, path)
        assert results["data"]["identity"].keys() == {"train", "validation", "test", "extra"}
        assert results["data"]["extra"] == 50
        assert train_tiny(config, path) == results  # over
        return RunFolder(path).weights("last").weights

    whole, stopped = trained(tmp_path / "whole"), trained(tmp_path / "stopped", 3, 3)
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
    (tmp_path / "stopped" / "results.json").unlink()
    write(tmp_path / "extra.npz", (51, 8, 8, 1))
    with pytest.raises(ValueError, match="the extra images of halves are not those that this run was trained on"):
        train_tiny(config, tmp_path / "stopped")
