"""The identity of images: the same wherever they lie, another one when any of them differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny_dataset

from engm.recipes.data import Split, StreamedSplit, check_same_data, identities, identity
from engm.recipes.data.identity import LOOKED_AT


def split(n: int = 20, dtype: torch.dtype = torch.uint8) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return Split(images if dtype == torch.uint8 else images.float() / 255, torch.arange(n) % 3)


def test_it_does_not_hang_on_where_the_images_lie() -> None:
    held = split()
    streamed = StreamedSplit(held.inputs, held.labels, held.shape, workers=0)
    assert identity(held) == identity(split()) == identity(split(dtype=torch.float32)) == identity(streamed)


@pytest.mark.parametrize("change", ["pixel", "label", "order", "number"])
def test_it_hangs_on_what_they_are(change: str) -> None:
    held = split()
    inputs, labels = held.inputs.clone(), held.labels.clone()
    if change == "pixel":
        inputs[7, 2, 3, 3] ^= 1
    elif change == "label":
        labels[7] = (labels[7] + 1) % 3
    rows = {"order": torch.arange(20).flip(0), "number": torch.arange(19)}.get(change, torch.arange(20))
    assert identity(Split(inputs, labels).take(rows)) != identity(held)


def test_of_many_images_some_are_looked_at_and_all_labels() -> None:
    many = split(10 * LOOKED_AT)
    labels = many.labels.clone()
    labels[12] += 1
    assert identity(Split(many.inputs, labels)) != identity(many)
    assert identity(Split(many.inputs.flip(1), many.labels)) != identity(many)


def test_the_message_names_the_splits() -> None:
    data = tiny_dataset()
    other = replace(data, test=data.test.take(torch.arange(5)))
    check_same_data(identities(data), identities(tiny_dataset()), "halves")
    with pytest.raises(ValueError, match="the test images of halves are not those"):
        check_same_data(identities(data), identities(other), "halves")
