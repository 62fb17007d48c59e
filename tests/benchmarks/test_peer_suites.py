"""What ``benchmarks/peer_suites.py`` calls wrong, and what it takes for rounding; the suites are not in any package."""

import peer_suites
import pytest
import torch
from torch import nn


@pytest.mark.parametrize(("error", "wrong"), [(1e-10, 0), (1e-8, 1), (float("nan"), 1)])
def test_the_tolerance(error, wrong):
    expected = torch.tensor([[4.0, 1.0], [9.0, 9.0]], dtype=torch.float64)
    got = expected.clone()
    got[0, 0] = (2 * (1 + error)) ** 2
    outcome = peer_suites.Outcome()
    outcome.compare("case", ["weight", "bias"], got, expected)
    assert (outcome.cases, outcome.comparisons, len(outcome.wrong)) == (1, 2, wrong)


def test_rounding_beside_a_gradient_is_not_wrong():
    outcome = peer_suites.Outcome()
    rows = torch.tensor([[1.0], [1e-34]], dtype=torch.float64)
    outcome.compare("case", ["weight", "bias of keys"], rows, torch.tensor([[1.0], [4e-34]], dtype=torch.float64))
    assert not outcome.wrong
    assert outcome.worst < 1e-9


def test_norms_are_taken_of_what_trains():
    network = nn.Linear(3, 2).double()
    network.bias.requires_grad_(False)
    x = torch.randn(4, 3, dtype=torch.float64)
    squared = peer_suites.squared_norms(network, lambda module: module(x).sum(1))
    torch.testing.assert_close(squared, 2 * x.square().sum(1)[None])


@pytest.mark.parametrize("argv", [[], ["--opacus", "no such folder"]])
def test_without_a_checkout_nothing_is_written(argv, tmp_path, capsys):
    with pytest.raises(SystemExit):
        peer_suites.main([*argv, "--out", str(tmp_path / "figures.json")])
    assert "name the folder of a checkout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
