"""Random crops and flips of a whole batch at once, on the device that holds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What was drawn for every example of a batch.

    Attributes:
        offsets: ``[n, 2]`` int64, upper left corner of the crop in the padded image: row, column.
        flips: ``[n]`` bool.
    """

    offsets: Tensor
    flips: Tensor

    def take(self, rows: Tensor | slice) -> Draw:
        """The same for some of the examples."""
        return Draw(self.offsets[rows], self.flips[rows])


@dataclass(frozen=True)
class Augmentation:
    """Zero padding and a random crop of the old size, then a horizontal flip of every other image on average.

    Attributes:
        padding: pixels on every side; 0 leaves images where they are.
        flip: whether to flip.

    Raises:
        ValueError: negative padding.
    """

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0 pixels, got {self.padding}")

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        """Draws for ``n`` examples, on the CPU; the generator moves on by as much, whatever is switched on."""
        offsets = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if self.flip else 0.0)
        return Draw(offsets, flips)

    def apply(self, x: Tensor, draw: Draw) -> Tensor:
        """Images ``[n, C, H, W]`` of any type, augmented; the same shape, type and device."""
        if not self.padding and not self.flip:
            return x
        n, channels, height, width = x.shape
        offsets, flips = draw.offsets.to(x.device), draw.flips.to(x.device)
        rows = offsets[:, :1] + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device).expand(n, -1)
        columns = offsets[:, 1:] + torch.where(flips.unsqueeze(1), columns.flip(1), columns)
        padded = F.pad(x, [self.padding] * 4)
        example = torch.arange(n, device=x.device).view(n, 1, 1, 1)
        channel = torch.arange(channels, device=x.device).view(1, channels, 1, 1)
        return padded[example, channel, rows.view(n, 1, height, 1), columns.reshape(n, 1, 1, width)]


CROP_AND_FLIP = Augmentation(padding=4, flip=True)
"""The augmentation that the paper uses for all its data sets."""
