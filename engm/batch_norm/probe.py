"""Exact squared norms of a few examples, what factors they give, and how far off weights are by these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import total
from ..exact import exact_squared_norms
from ..terms.loss_scale import UNSCALED, LossScale

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUNDING = 30  # epsilons of a type that a gradient of rounding alone may have, as a share of the whole gradient


class ExactSample:
    """Draws a few examples and computes their exact squared norms.

    Args:
        examples: how many are drawn (all, if there are fewer).
        seed: what the draws come from. The k-th draw is a function of ``seed``, ``k`` and the examples to choose from
            alone, so that a resumed run repeats it.
    """

    def __init__(self, examples: int, seed: int = 0) -> None:
        self.examples = examples
        self.seed = seed
        self.draws = 0

    def draw(
        self,
        losses: Tensor,
        parameters: Sequence[Tensor],
        scale: LossScale = UNSCALED,
        among: Tensor | None = None,
        passes: int = 0,
        covered: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns ``(indices [k], exact squared norms [L, k])``; ``scale`` is on the losses inside the passes.

        Args:
            losses: ``[n]``.
            parameters: the ``L`` tensors.
            scale: on the losses.
            among: boolean ``[n]``, on the CPU: the examples to draw from; default all.
            passes: backward passes that are run at least, for others who take part in each.
            covered: boolean ``[r, n]``, on the CPU: of every row of which there is one, an example is drawn.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)  # only 32 bits of it count
        self.draws += 1
        indices = torch.randperm(losses.shape[0], generator=generator, device="cpu")
        indices = indices if among is None else indices[among[indices]]
        first: list[int] = []
        for row in () if covered is None else covered:
            if not bool(row[first].any()):
                first += indices[row[indices]][:1].tolist()
        others = [index for index in indices.tolist() if index not in first]
        indices = torch.tensor(sorted([*first, *others][: self.examples]), dtype=torch.int64, device="cpu")
        exact = exact_squared_norms(losses, parameters, indices.tolist(), scale)
        for _ in range(passes - len(indices)):
            torch.autograd.grad(losses[0], parameters, retain_graph=True, allow_unused=True)
        return indices.to(losses.device, non_blocking=True), exact


def ratio(exact: Tensor, measured: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Factors ``[L]`` in float64 from squared norms ``[L, k]``, and which of them say something, boolean ``[L]``.

    Each example's squares are divided by its whole exact squared norm first, so that every example counts alike. Plain
    sums follow the few with the largest gradients, and 16 examples are few: over a CIFAR-10 run the mean error of the
    weights was 4.0 % this way against 6.1 % (frozen) and 3.3 % against 4.0 % (with the local correction); on digits
    there was no difference (benchmarks/results/cpu/fidelity_*.json).
    The sums run over the probes of all ranks of the ``group``, in one all-reduce of ``2 L`` numbers.
    Where a sum is not finite, or the tensor got no gradient, there is nothing to be said.
    """
    exact_sum, measured_sum = total(group, *_even_sums(exact, measured))
    sound = torch.isfinite(exact_sum) & torch.isfinite(measured_sum) & ((exact_sum != 0) | (measured_sum != 0))
    return _quotients(exact_sum, measured_sum, exact.dtype), sound


def error_of_halves(exact: Tensor, measured: Tensor, factors: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Mean error of the weights of probed examples by factors from others, 0-dimensional; None if there are no others.

    Every second example of each rank's probe, squared norms ``[L, k]``, is one half; of every second rank it is the
    other. It is an estimate for factors from half as many examples as are used, so a little too large. A tensor that
    has no gradient in one half is mapped by the ``factors`` of both, ``[L]``.
    """
    turn = 0 if group is None else group.rank() % 2
    halves = [(exact[:, (first + turn) % 2 :: 2], measured[:, (first + turn) % 2 :: 2]) for first in (0, 1)]
    sums = total(group, *(part for half in halves for part in _even_sums(*half)))
    errors, counts = [], []
    for half, (exact_sum, measured_sum) in zip(halves, ((sums[2], sums[3]), (sums[0], sums[1])), strict=True):
        silent = (exact_sum == 0) & (measured_sum == 0)
        found, count = _errors(torch.where(silent, factors, _quotients(exact_sum, measured_sum, exact.dtype)), *half)
        others = (~silent).any()
        errors.append(torch.where(others, found, torch.zeros_like(found)))
        counts.append(count * others)
    return _mean(errors[0] + errors[1], counts[0] + counts[1], group)


def error_of(factors: Tensor, exact: Tensor, measured: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Mean error of the weights of probed examples by these factors, 0-dimensional, from squared norms ``[L, k]``."""
    return _mean(*_errors(factors, exact, measured), group)


def _errors(factors: Tensor, exact: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the errors of weights as shares of the exact ones, and of how many examples, both 0-dimensional.

    An error is ``|exact norm / mapped norm - 1|``, as of alpha / norm. An example without a gradient has none: whatever
    its weight, nothing is multiplied by it.
    """
    exact = exact.double().sum(0)
    ratios = exact / (measured.double() * factors.double().unsqueeze(1)).sum(0)
    counts = exact != 0
    return torch.where(counts, (ratios.sqrt() - 1).abs(), torch.zeros_like(ratios)).sum(), counts.sum().double()


def _mean(errors: Tensor, examples: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """The mean over the examples of all ranks from this one's sum and number; None if there are none."""
    errors, count = total(group, errors, examples)
    return errors / count if bool(count) else None


def _even_sums(exact: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Sums ``[L]`` of both over the examples, each of which counts alike."""
    exact, measured = exact.double(), measured.double()
    whole = exact.sum(0)
    share = torch.where(whole != 0, 1 / whole, torch.zeros_like(whole))
    return (exact * share).sum(1), (measured * share).sum(1)


def _quotients(exact: Tensor, measured: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors from even sums of squares that were formed in ``dtype``; 1 where there is nothing to map.

    Nor is there where both are rounding, as of a bias in front of a batch norm: their quotient would be any number.
    """
    rounding = torch.maximum(exact, measured) <= (ROUNDING * torch.finfo(dtype).eps) ** 2
    return torch.where((measured == 0) | rounding, torch.ones_like(exact), exact / measured)
