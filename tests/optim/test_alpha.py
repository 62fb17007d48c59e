"""The scaling rule for alpha (design 2.9)."""

from __future__ import annotations

import pytest
from torch import nn

import engm


class Sized(nn.Module):
    """A network of so many parameters, without the memory."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(count, 1, bias=False, device="meta").weight)


@pytest.mark.parametrize(
    ("count", "method", "alpha"),
    [
        (11_173_962, "engm", 5.0),
        (11_173_962, "aengm", 5.0),
        (11_173_962, "nengm", 0.5),
        (46_160_474, "engm", 10.16),  # WRN-34-10, "10.2"
        (48_263_674, "engm", 10.39),  # the paper's count and its 10.4
        (11_173_962 // 4, "engm", 2.5),
        (11_173_962 * 4, "nengm", 1.0),
    ],
)
def test_scales_with_the_root_of_the_parameter_count(count, method, alpha):
    assert engm.alpha_for(Sized(count), method) == pytest.approx(alpha, rel=1e-3)


def test_default_is_engm():
    assert engm.alpha_for(Sized(11_173_962)) == pytest.approx(5.0, rel=1e-6)


def test_counts_trained_parameters_once_wrapped_or_not():
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    whole = engm.alpha_for(net)
    assert engm.alpha_for(engm.GradNormModule(net)) == whole
    net[0].requires_grad_(False)
    assert engm.alpha_for(net) == pytest.approx(whole / 2**0.5)
    net[0].requires_grad_(True)
    net[1].weight = net[0].weight
    assert engm.alpha_for(net) == pytest.approx(whole * (120 / 220) ** 0.5)


def test_refuses():
    with pytest.raises(ValueError, match=r"method must be one of \['aengm', 'engm', 'nengm'\], got 'adam'"):
        engm.alpha_for(nn.Linear(2, 2), "adam")
    with pytest.raises(ValueError, match="no trained parameters"):
        engm.alpha_for(nn.ReLU())
