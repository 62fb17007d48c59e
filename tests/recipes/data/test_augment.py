"""Crops and flips of a whole batch, against torchvision's of one image at a time."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engm.recipes.data import CROP_AND_FLIP, Augmentation, Draw


def one_by_one(x: Tensor, draw: Draw, padding: int) -> Tensor:
    """What torchvision's RandomCrop and RandomHorizontalFlip do once they have drawn."""
    height, width = x.shape[2:]
    out = []
    for image, (top, left), flip in zip(x, draw.offsets.tolist(), draw.flips.tolist(), strict=True):
        image = TF.crop(TF.pad(image, [padding]), top, left, height, width)
        out.append(TF.hflip(image) if flip else image)
    return torch.stack(out)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 7),
    channels=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 5),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_torchvision(
    n: int,
    channels: int,
    height: int,
    width: int,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 256, (n, channels, height, width), generator=generator).to(dtype)
    before = x.clone()
    augmentation = Augmentation(padding, flip)
    draw = augmentation.draw(n, generator)
    images = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    found = augmentation.apply(images, draw)
    assert found.dtype == dtype
    assert torch.equal(found, one_by_one(x, draw, padding))
    assert torch.equal(images, before)


def test_draws_cover_every_offset_and_half_of_the_flips() -> None:
    draw = CROP_AND_FLIP.draw(4000, torch.Generator().manual_seed(0))
    assert draw.offsets.shape == (4000, 2)
    pairs = draw.offsets.unique(dim=0)
    assert len(pairs) == 81  # 0 .. 8 in both directions, independently
    assert draw.offsets.min() == 0
    assert draw.offsets.max() == 8
    assert 0.46 < draw.flips.float().mean() < 0.54
    assert not Augmentation(padding=4).draw(100, torch.Generator()).flips.any()


def test_a_part_of_the_batch_with_its_part_of_the_draw() -> None:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = CROP_AND_FLIP.draw(6, torch.Generator().manual_seed(1))
    whole = CROP_AND_FLIP.apply(x, draw)
    assert torch.equal(CROP_AND_FLIP.apply(x[2:4], draw.take(slice(2, 4))), whole[2:4])
    rows = torch.tensor([5, 0, 0])
    assert torch.equal(CROP_AND_FLIP.apply(x[rows], draw.take(rows)), whole[rows])


def test_none_is_none() -> None:
    x = torch.rand(3, 1, 4, 4)
    assert Augmentation().apply(x, Augmentation().draw(3, torch.Generator())) is x
    with pytest.raises(ValueError, match="padding must be at least 0"):
        Augmentation(padding=-1)


def test_draws_do_not_touch_the_global_random_state() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = CROP_AND_FLIP.draw(5, torch.Generator().manual_seed(7))
    again = CROP_AND_FLIP.draw(5, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.offsets, again.offsets)
    assert torch.equal(first.flips, again.flips)
