"""Images read batch by batch: the same batches as from memory, wherever reading begins and whoever reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engm.recipes.data import CROP_AND_FLIP, Source, Split, StreamedSplit
from engm.recipes.processes import Processes
from engm.recipes.training.batches import TrainingBatches


def both(n: int, *, workers: int = 0, dtype: torch.dtype = torch.uint8) -> tuple[Split, StreamedSplit]:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, 5, 4), generator=generator, dtype=torch.uint8)
    if dtype == torch.float32:
        images = images.float() / 255
    split = Split(images, torch.randint(7, (n,), generator=generator))
    return split, StreamedSplit(split.inputs, split.labels, split.shape, workers=workers)


def assert_same_batches(first: Source, second: Source, rows: list[Tensor]) -> None:
    pairs = list(zip(first.batches(rows), second.batches(rows), strict=True))
    assert len(pairs) == len(rows)
    for (x, y), (other_x, other_y) in pairs:
        assert x.dtype == other_x.dtype == torch.float32
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    rows=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=6), max_size=4),
    taken=st.lists(st.integers(0, 11), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
def test_equals_memory(n: int, rows: list[list[int]], taken: list[int], dtype: torch.dtype) -> None:
    memory, streamed = both(n, dtype=dtype)
    assert len(streamed) == len(memory)
    assert streamed.shape == memory.shape == (3, 5, 4)
    parts = [torch.tensor(part) % n for part in rows]
    assert_same_batches(memory, streamed, parts)
    for part in parts:
        for found, expected in zip(streamed.batch(part), memory.batch(part), strict=True):
            assert torch.equal(found, expected)
    some = torch.tensor(taken) % n
    memory, streamed = memory.take(some), streamed.take(some)
    assert torch.equal(memory.labels, streamed.labels)
    within = [part % len(some) for part in parts]
    assert_same_batches(memory, streamed, within)
    assert_same_batches(memory.take(some % len(some)), streamed.take(some % len(some)), within)
    again = streamed.in_memory()
    assert again.inputs.dtype == dtype
    assert torch.equal(again.inputs, memory.inputs)
    assert torch.equal(again.labels, memory.labels)


def test_loader_processes_read_the_same() -> None:
    memory, streamed = both(23, workers=2)
    assert_same_batches(memory, streamed, list(torch.randperm(23).split(5)))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_random_state_is_touched(workers: int) -> None:
    """Otherwise a run that was resumed within an epoch would draw other numbers for dropout than one that was not."""
    _, streamed = both(8, workers=workers)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    list(streamed.batches(list(torch.arange(8).split(4))))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_batches_are_the_same_from_any_position() -> None:
    memory, streamed = both(26)
    processes = Processes(torch.device("cpu"))
    from_memory, from_stream = (
        TrainingBatches(source, 4, CROP_AND_FLIP, 3, processes) for source in (memory, streamed)
    )
    for start in (0, 4):
        pairs = list(zip(from_memory.epoch(2, start), from_stream.epoch(2, start), strict=True))
        assert len(pairs) == 6 - start
        for (x, y), (other_x, other_y) in pairs:
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


def test_reading_may_stop_early() -> None:
    memory, streamed = both(12, workers=1)
    batches = streamed.batches(list(torch.arange(12).split(2)))
    x, _ = next(batches)
    assert torch.equal(x, memory.batch(torch.arange(2))[0])
    batches.close()  # type: ignore[attr-defined]


def test_only_what_is_asked_for_is_read() -> None:
    class Counting:
        def __init__(self) -> None:
            self.read: list[int] = []

        def __getitem__(self, index: int, /) -> Tensor:
            self.read.append(index)
            return torch.full((1, 2, 2), index, dtype=torch.uint8)

    images = Counting()
    streamed = StreamedSplit(images, torch.arange(9), (1, 2, 2), workers=0).take(torch.tensor([8, 3, 5]))
    assert images.read == []
    x, y = streamed.batch(torch.tensor([2, 0]))
    assert images.read == [5, 8]
    assert y.tolist() == [5, 8]
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([5, 8]) / 255)


class Broken:
    """Image 3 cannot be read."""

    def __getitem__(self, index: int, /) -> Tensor:
        if index == 3:
            raise ValueError(f"{Path('somewhere', 'three.png')}: cannot be used")
        return torch.zeros(1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_one_message(workers: int) -> None:
    streamed = StreamedSplit(Broken(), torch.zeros(6, dtype=torch.int64), (1, 2, 2), workers=workers)
    batches = streamed.batches(list(torch.arange(6).split(2)))
    next(batches)
    with pytest.raises(ValueError, match=r"^somewhere.three\.png: cannot be used$"):
        next(batches)
    with pytest.raises(ValueError, match=r"^somewhere.three\.png: cannot be used$"):
        streamed.in_memory()


def test_batches_go_to_the_device() -> None:
    _, streamed = both(4)
    moved = streamed.to("meta")
    (x, y) = moved.batch(torch.arange(2))
    assert x.device.type == y.device.type == "meta"
    assert moved.take(torch.arange(3)).batch(torch.arange(2))[0].device.type == "meta"
    assert streamed.batch(torch.arange(2))[0].device.type == "cpu"
