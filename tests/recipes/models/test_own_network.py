"""Networks of one's own: built by address, with the sizes they ask for, and refused where they are no classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engm.recipes.models import build_model, check_logits, takes_width
from engm.recipes.reproduce import budget

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3, image_size=32, width=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.Flatten(),
            nn.Linear(width * (image_size - 2) ** 2, num_classes),
        )

    def forward(self, x):
        return self.body(x)

def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))

def two_outputs(num_classes):
    net = linear(num_classes)
    net.forward = lambda x: (x, x)
    return net

def a_number(num_classes):
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(SOURCE)
    return tmp_path / "nets.py"


def test_it_gets_the_sizes_that_it_asks_for(file: Path) -> None:
    net = build_model(f"{file}:Net", classes=7, in_channels=1, image_size=8, width=5)
    assert net.training
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert net.get_parameter("body.0.weight").shape == (5, 1, 3, 3)
    grouped = build_model(f"{file}:Net", classes=7, norm="group")
    assert isinstance(grouped.get_submodule("body.1"), nn.GroupNorm)
    assert build_model(f"{file}:linear", classes=4)(torch.rand(3, 3, 32, 32)).shape == (3, 4)


def test_who_takes_a_width(file: Path) -> None:
    names = [f"{file}:Net", f"{file}:linear", "vgg8", "wrn-16-4", "auto", "torchvision:resnet18"]
    assert [takes_width(name) for name in names] == [True, False, True, True, True, False]


def test_a_budget_keeps_its_width_to_networks_that_have_one(file: Path) -> None:
    smoke = budget("smoke")
    assert smoke.config({}).width == smoke.config({"model": f"{file}:Net"}).width == 4
    assert smoke.config({"model": f"{file}:linear"}).width is None
    assert smoke.config({"model": f"{file}:Net", "width": 3}).width == 3


def test_what_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="no parameter of this name, so leave it out"):
        build_model(f"{file}:linear", classes=4, width=3)
    with pytest.raises(ValueError, match=r"a_number must return a torch.nn.Module, and returned a int"):
        build_model(f"{file}:a_number", classes=4)
    with pytest.raises(ValueError, match="did you mean linear"):
        build_model(f"{file}:liner", classes=4)


def test_logits_are_looked_at_and_nothing_changes(file: Path) -> None:
    net = build_model(f"{file}:Net", classes=7)
    before = torch.get_rng_state()
    check_logits(net, "nets:Net", (3, 32, 32), 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert torch.equal(net.get_buffer("body.1.running_mean"), torch.zeros(4))
    with pytest.raises(ValueError, match=r"must return logits \[2, 8\].*returned torch.float32 \[2, 7\]"):
        check_logits(net, "nets:Net", (3, 32, 32), 8)
    with pytest.raises(ValueError, match=r"failed: RuntimeError: .*, at .*nets.py:14\n  File "):
        check_logits(net, "nets:Net", (1, 32, 32), 7)
    with pytest.raises(ValueError, match=r"must return logits \[n, 4\], and returned a tuple"):
        check_logits(build_model(f"{file}:two_outputs", classes=4), "nets:two_outputs", (3, 32, 32), 4)
