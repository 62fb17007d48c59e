"""Whether two runs of one step gave the same numbers: to the bit, or but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

ROUNDINGS = 2250.0  # 5e-13 in float64, 2.7e-4 in float32
COARSE = 0.05  # where a rounding may become a whole step of an attack, or numbers of 16 bits are rounded elsewhere
OF_ALL = 0.01  # of the largest gradient: what a smaller one is measured by, as it may be a difference of larger numbers
TF32 = 2.0**-10  # its unit of rounding
JUMPS = frozenset(["sign", "sgn", "round", "floor", "ceil", "trunc", "frac", "heaviside"])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN for NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout == torch.sparse_coo:
        a, b = a.coalesce(), b.coalesce()
        return same_bits(a.indices(), b.indices()) and same_bits(a.values(), b.values())
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def all_the_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether the tensors hold the same numbers one by one, to the bit."""
    return len(got) == len(want) and all(map(same_bits, got, want))


@dataclass(frozen=True)
class Tolerance:
    """By how much two runs may differ whose operators are the same, but are rounded in other places.

    Attributes:
        coarsest: the unit of rounding of the least precise numbers in the program.
        jumps: whether the program takes signs or rounds, which makes large differences of small ones.
    """

    coarsest: float
    jumps: bool

    @classmethod
    def of(cls, module: fx.GraphModule) -> Tolerance:
        """The tolerance for a recorded program."""
        units, jumps = {torch.finfo(torch.float64).eps}, False
        for node in module.graph.nodes:
            found = node.meta.get("val")
            values = found if isinstance(found, list | tuple) else [found]
            units |= {_unit(value) for value in values if isinstance(value, Tensor) and value.is_floating_point()}
            jumps |= getattr(getattr(node.target, "overloadpacket", None), "__name__", "").rstrip("_") in JUMPS
        return cls(max(units), jumps)

    def relative(self) -> float:
        """The tolerance as a part of a tensor's largest entry."""
        fine = min(COARSE, ROUNDINGS * self.coarsest)
        return COARSE if self.jumps and self.coarsest > torch.finfo(torch.float64).eps else fine

    def holds(self, got: Sequence[Tensor], want: Sequence[Tensor], gradients: int) -> bool:
        """Whether two runs of a program agree.

        Every entry has to be as near as :meth:`relative` says, as a part of the largest entry of its tensor; of a
        gradient, of that or of one hundredth of the largest of all gradients, whichever is larger. Integers and states
        of random generators have to be the same.

        Args:
            got: the tensors that one run left.
            want: those that the other left.
            gradients: how many of them, at the beginning, are gradients.
        """
        if len(got) != len(want):
            return False
        scales = [_largest(tensor) for tensor in want]
        least = OF_ALL * max(scales[:gradients], default=0.0)
        return all(
            self._near(a, b, max(scale, least) if number < gradients else scale)
            for number, (a, b, scale) in enumerate(zip(got, want, scales, strict=True))
        )

    def _near(self, a: Tensor, b: Tensor, scale: float) -> bool:
        if not a.is_floating_point() or a.layout != torch.strided or a.shape != b.shape or a.dtype != b.dtype:
            return same_bits(a, b)
        finite = b.isfinite()
        if not (finite.equal(a.isfinite()) and same_bits(a[~finite], b[~finite])):
            return False
        return bool(((a[finite] - b[finite]).abs() <= self.relative() * scale).all())


def _unit(tensor: Tensor) -> float:
    """The unit of rounding of what is computed with a tensor's numbers."""
    backends = torch.backends
    if (
        tensor.is_cuda
        and tensor.dtype == torch.float32
        and (backends.cudnn.allow_tf32 or backends.cuda.matmul.allow_tf32)
    ):
        return TF32
    return torch.finfo(tensor.dtype).eps


def _largest(tensor: Tensor) -> float:
    """The largest finite entry of a tensor by its absolute value; 0 where there is none, or of integers."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return 0.0
    found = tensor[tensor.isfinite()]
    return float(found.abs().max()) if found.numel() else 0.0
