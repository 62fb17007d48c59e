"""What counts as a change of dictionaries, types and tensors, and what does not."""

import gc
import weakref

import pytest
import torch
from torch import nn

from engm.capture.held import ANY_LENGTH, Held
from engm.capture.layers import Walks, named_modules, trained_parameters


class Other(nn.Linear):
    pass


def held_of(module, *, length=None):
    attributes = vars(module)
    tensors = [*module.parameters(), *module.buffers()]
    parts = [(attributes, len(attributes) if length is None else length, ("training", "tag", "forward"))]
    return Held([module], [module._parameters, module._buffers], parts, tensors)


def scaled(module):
    module.weight.data = module.weight.data * 2


CHANGES = {
    "another type": lambda m: setattr(m, "__class__", Other),
    "another value": lambda m: setattr(m, "training", False),
    "a value that is new": lambda m: setattr(m, "forward", nn.Linear(2, 2).forward),
    "an attribute that nobody watches, by the length": lambda m: setattr(m, "unknown", 1),
    "a value that is gone": lambda m: delattr(m, "tag"),
    "equal, but another type": lambda m: setattr(m, "tag", 1.0),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().clone())),
    "no parameter": lambda m: setattr(m, "bias", None),
    "a parameter more": lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(1))),
    "a buffer more": lambda m: m.register_buffer("more", torch.zeros(1)),
    "other memory": scaled,
    "another type of numbers": lambda m: m.double(),
    "a frozen parameter": lambda m: m.weight.requires_grad_(False),
    "another shape in the same memory": lambda m: setattr(m.weight, "data", m.weight.data.view(3, 2)),
}


@pytest.fixture
def module():
    module = nn.Linear(3, 2)
    module.tag = 1
    return module


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(module, change):
    held = held_of(module)
    assert held.same()
    change(module)
    assert not held.same()
    assert held_of(module).same()


def test_numbers_are_no_change(module):
    held = held_of(module)
    with torch.no_grad():
        module.weight.mul_(2)
    assert held.same()


def test_lengths_may_be_any(module):
    held = held_of(module, length=ANY_LENGTH)
    module.unknown = 1
    assert held.same()


def test_scripted_modules_are_never_the_same(module):
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        scripted = torch.jit.script(nn.Linear(3, 2))
    assert not Held([scripted], [scripted._parameters], [], []).same()


def test_cycles_are_collected():
    module = nn.Linear(3, 2)
    module.held = Held([module], [vars(module)], [], list(module.parameters()))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_walks_are_made_again_after_a_change():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    walks, walked = Walks(net), []

    def walk(root):
        walked.append(root)
        return trained_parameters(root)

    assert [name for name, _ in walks.found(walk)] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    walks.found(walk)
    assert len(walked) == 1
    net[1].bias.requires_grad_(False)
    net.append(nn.Linear(2, 1, bias=False))
    assert [name for name, _ in walks.found(walk)] == ["0.weight", "0.bias", "1.weight", "2.weight"]
    assert len(walked) == 2
    both = walks.found_by_both(trained_parameters, walk)
    assert both[0] == both[1] == trained_parameters(net)
    assert len(walked) == 2
    net[0].weight.requires_grad_(False)
    assert [name for name, _ in walks.found_by_both(walk, trained_parameters)[1]] == ["0.bias", "1.weight", "2.weight"]
    assert len(walked) == 3
    assert [name for name, _ in named_modules(net)] == ["", "0", "1", "2"]
