"""Kernels that repeat: which switches are set meanwhile, and what is heard of operators that have none."""

import warnings

import pytest
import torch

from engm.repeatable import repeatable_kernels


def switches():
    backends, fill = torch.backends, torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        backends.cudnn.deterministic,
        backends.cudnn.benchmark,
        fill.fill_uninitialized_memory,
    )


def test_repeatable_kernels_are_chosen_for_a_while_and_others_are_named():
    before, x = switches(), torch.zeros(3)
    with warnings.catch_warnings(record=True) as shown, repeatable_kernels(torch.device("cuda")) as found:
        assert switches() == (True, True, True, False, False)
        x.exp()
        warnings.warn("of something else", stacklevel=1)
    assert not found
    assert [str(warning.message) for warning in shown] == ["of something else"]
    with repeatable_kernels(torch.device("cuda")) as found:
        x.put_(torch.tensor([1]), torch.tensor([2.0]))  # torch has no kernel of it that repeats
    assert "put_" in found.warnings[0]
    with pytest.raises(KeyError), repeatable_kernels(torch.device("cuda")):
        raise KeyError
    assert switches() == before
    with repeatable_kernels(torch.device("cpu")):
        assert switches() == before
