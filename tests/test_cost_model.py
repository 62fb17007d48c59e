"""The cost model: FLOPs by formula, and the form that dispatch takes."""

import pytest

from engm import _C


def conv(channels, rows, size, kernel=3, stride=1, groups=1):
    padding = kernel // 2 if kernel != stride else 0
    out = (size + 2 * padding - kernel) // stride + 1
    two = lambda value: [value, value]  # noqa: E731
    return _C.conv_cost(channels, rows, two(kernel), two(stride), two(padding), [1, 1], groups, two(size), two(out))


def test_linear_flops():
    cost = _C.linear_cost(T=10, p=100, d=30)
    assert cost.direct_flops == 2 * 10 * 100 * 30
    assert cost.gram_flops == 10 * 10 * (100 + 30) + 2 * 10 * 10
    assert cost.bytes(8) == 8 * 10 * (100 + 30)


@pytest.mark.parametrize(("T", "form"), [(1, "gram"), (4, "gram"), (2048, "direct")])
def test_linear_form(T, form):
    assert _C.linear_cost(T, 512, 512).form == form


def test_conv_direct_flops_count_groups():
    assert conv(32, 64, 16).direct_flops == 2 * 16 * 16 * 9 * 32 * 64
    assert conv(32, 64, 16, groups=4).direct_flops == 2 * 16 * 16 * 9 * 8 * 64


@pytest.mark.parametrize(
    ("cost", "form"),
    [
        (conv(32, 32, 32), "direct"),
        (conv(64, 64, 32), "direct"),
        (conv(128, 128, 8), "gram"),
        (conv(256, 256, 4), "gram"),
        (conv(512, 512, 4), "gram"),
        (conv(3, 64, 32), "direct"),
        (conv(3, 768, 224, kernel=16, stride=16), "direct"),  # a patch embedding: no tap is shared
        (conv(64, 64, 56, groups=64), "direct"),
    ],
)
def test_conv_form(cost, form):
    assert cost.form == form


def test_gram_is_far_cheaper_on_small_maps():
    """The gain that the pixel identity is for (design 2.2): it grows as the map shrinks."""
    gains = [cost.direct_flops / cost.gram_flops for cost in (conv(64, 64, 16), conv(128, 128, 8), conv(256, 256, 4))]
    assert gains == sorted(gains)
    assert gains[1] > 10
    assert gains[2] > 80


def test_one_dimensional_values_are_accepted():
    cost = _C.conv_cost(8, 4, [3], [1], [1], [1], 1, [20], [20])
    assert cost.direct_flops == 2 * 20 * 3 * 8 * 4
    with pytest.raises(ValueError, match="one to three"):
        _C.conv_cost(8, 4, [], [1], [1], [1], 1, [20], [20])
