"""What do networks take? Their operations, for plans, which are made without torch.

Written by tools/count_networks.py; a test holds every number equal to what is counted from the network itself.
"""

from __future__ import annotations

COUNTS: dict[tuple[str, int | None, tuple[int, int, int], int], tuple[int, int]] = {
    ("small-resnet", None, (1, 8, 8), 10): (1527040, 20),
    ("small-resnet", None, (3, 32, 32), 10): (25003264, 20),
    ("small-resnet", None, (3, 32, 32), 100): (25014784, 20),
    ("small-resnet", None, (3, 64, 64), 200): (100033536, 20),
    ("resnet18", None, (1, 8, 8), 10): (69289984, 46),
    ("resnet18", None, (3, 32, 32), 10): (1110845440, 46),
    ("resnet18", None, (3, 32, 32), 100): (1110937600, 46),
    ("resnet18", None, (3, 64, 64), 200): (4443545600, 46),
    ("preact-resnet18", None, (1, 8, 8), 10): (69289984, 38),
    ("preact-resnet18", None, (3, 32, 32), 10): (1110845440, 38),
    ("preact-resnet18", None, (3, 32, 32), 100): (1110937600, 38),
    ("preact-resnet18", None, (3, 64, 64), 200): (4443545600, 38),
    ("vgg8", None, (1, 8, 8), 10): (11880448, 11),
    ("vgg8", None, (3, 32, 32), 10): (135669760, 11),
    ("vgg8", None, (3, 32, 32), 100): (135761920, 11),
    ("vgg8", None, (3, 64, 64), 200): (542842880, 11),
    ("wrn-34-10", None, (1, 8, 8), 10): (832338432, 66),
    ("wrn-34-10", None, (3, 32, 32), 10): (13317812736, 66),
    ("wrn-34-10", None, (3, 32, 32), 100): (13317927936, 66),
    ("wrn-34-10", None, (3, 64, 64), 200): (53271455744, 66),
    ("small-resnet", 4, (1, 8, 8), 10): (99136, 20),
    ("small-resnet", 4, (3, 32, 32), 10): (1728832, 20),
    ("small-resnet", 4, (3, 32, 32), 100): (1731712, 20),
    ("small-resnet", 4, (3, 64, 64), 200): (6920448, 20),
    ("vgg8", 16, (1, 8, 8), 10): (758272, 11),
    ("vgg8", 16, (3, 32, 32), 10): (9144832, 11),
    ("vgg8", 16, (3, 32, 32), 100): (9167872, 11),
    ("vgg8", 16, (3, 64, 64), 200): (36620288, 11),
    ("wrn-10-1", None, (1, 8, 8), 10): (1527040, 17),
    ("wrn-10-1", None, (3, 32, 32), 10): (25003264, 17),
    ("wrn-10-1", None, (3, 32, 32), 100): (25014784, 17),
    ("wrn-10-1", None, (3, 64, 64), 200): (100033536, 17),
    ("wrn-16-1", None, (1, 8, 8), 10): (3296512, 29),
    ("wrn-16-1", None, (3, 32, 32), 10): (53314816, 29),
    ("wrn-16-1", None, (3, 32, 32), 100): (53326336, 29),
    ("wrn-16-1", None, (3, 64, 64), 200): (213279744, 29),
}
"""Operations of a forward pass of one image, and modules without children, by network, width, image and classes."""
