"""The Gram form's plan and kernels by themselves: no binding that goes back to the direct form, as the operators do."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_GRADIENT = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)
SMALL, SM_86, SM_90 = 24 << 10, 99 << 10, 227 << 10  # bytes of shared memory


@dataclass(frozen=True)
class Precision:
    """What the kernel promises for one `engm::cuda::Precision`."""

    number: int
    dtype: torch.dtype
    error: float  # of the squared norm, as a share of the sum of magnitudes
    cancellation: float

    @property
    def sums(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def seen(self, t: Tensor) -> Tensor:
        """The operand that is multiplied; TF32 is rounded to nearest, ties away from zero."""
        if self.number == 0:
            t = ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return t.double()


PRECISIONS = {
    "tf32": Precision(0, torch.float32, 5e-7, 64),
    "float32": Precision(1, torch.float32, 5e-7, 64),
    "bfloat16": Precision(2, torch.bfloat16, 5e-7, 512),
    "float16": Precision(3, torch.float16, 5e-7, 512),
    "float64": Precision(4, torch.float64, 1e-15, 4096),
}


@dataclass(frozen=True)
class Conv:
    """A convolution in one to three dimensions; a linear layer is one with a single tap over a line."""

    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def numbers(self, x: Tensor, gy: Tensor) -> list[int]:
        def three(values: tuple[int, ...], fill: int) -> list[int]:
            given = tuple(values) or (fill,) * len(self.kernel)
            return [fill] * (3 - len(given)) + list(given)

        found = [x.shape[0], self.groups, x.shape[1] // self.groups, gy.shape[1] // self.groups]
        for values in (x.shape[2:], gy.shape[2:], self.kernel, self.stride):
            found += three(values, 1)
        found += three(self.padding, 0) + three(self.dilation, 1)
        for t in (x, gy):
            found += [t.stride(0), t.stride(1), *three(t.stride()[2:], 0)]
        return found

    def settings(self) -> dict:
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return {
            "stride": self.stride or ones,
            "padding": self.padding or zeros,
            "dilation": self.dilation or ones,
        }

    def output(self, size: tuple[int, ...]) -> tuple[int, ...]:
        s = self.settings()
        each = zip(size, self.kernel, s["stride"], s["padding"], s["dilation"], strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // step + 1 for n, k, step, p, d in each)

    def norm_sq(self, x: Tensor, gy: Tensor) -> Tensor:
        shape = (gy.shape[1], x.shape[1] // self.groups, *self.kernel)
        gradient = WEIGHT_GRADIENT[len(self.kernel) - 1]
        rows = zip(x.split(1), gy.split(1), strict=True)
        each = [gradient(a.contiguous(), shape, b.contiguous(), groups=self.groups, **self.settings()) for a, b in rows]
        return torch.stack([g.square().sum() for g in each])


@dataclass
class Result:
    """What one call wrote."""

    out: Tensor
    reliable: list[int]
    magnitude: Tensor
    plan: dict[str, int]


def array(values):
    return (ctypes.c_int64 * len(values))(*values)


def address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


class Library:
    """gram_cases.cpp, compiled into the given library."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.loaded = loaded
        self.loaded.plan_gram.restype = ctypes.c_int64
        for function in (self.loaded.run_gram, self.loaded.run_rank_one, self.loaded.run_contraction):
            function.restype = ctypes.c_char_p

    def plan(self, numbers: list[int], precision: Precision, limit: int = SM_86) -> tuple[int, dict[str, int]]:
        names = ("bands", "pairs", "steps", "chunks", "apart", "threads", "shared")
        found = array([0] * len(names))
        count = self.loaded.plan_gram(array(numbers), precision.number, ctypes.c_int64(limit), found)
        return count, dict(zip(names, found, strict=True))

    def gram(self, x: Tensor, gy: Tensor, conv: Conv, precision: Precision, limit: int = SM_86) -> Result:
        n, numbers = x.shape[0], conv.numbers(x, gy)
        out, sums = torch.full((n,), torch.nan, dtype=precision.sums), torch.zeros(n, 2, dtype=torch.float64)
        reliable = torch.full((n,), 7, dtype=torch.uint8)
        tensors = (x, gy, out, reliable, sums)
        arguments = (array(numbers), precision.number, ctypes.c_int64(limit), *map(address, tensors))
        error = self.loaded.run_gram(*arguments)
        assert error is None, error.decode()
        _, plan = self.plan(numbers, precision, limit)
        assert plan["shared"] <= limit
        return Result(out, reliable.tolist(), sums[:, 1], plan)

    def check(self, x: Tensor, gy: Tensor, conv: Conv, precision: Precision, limit: int = SM_86) -> Result:
        """Runs and compares with float64."""
        result = self.gram(x, gy, conv, precision, limit)
        expected = conv.norm_sq(precision.seen(x), precision.seen(gy))
        error = (result.out.double() - expected).abs()
        assert bool((error <= precision.error * result.magnitude).all()), (result, expected)
        assert bool((result.magnitude >= expected * (1 - 1e-5)).all())
        # Not at the edge of the bound, where the last digit decides.
        for i, ratio in enumerate((result.magnitude / expected / precision.cancellation).tolist()):
            if not 0.99 < ratio < 1.01:
                assert result.reliable[i] == (0 if ratio > 1 else 1)
        return result

    def contract(self, p: Tensor, q: Tensor, precision: Precision) -> tuple[Tensor, list[int]]:
        """The contraction of two Gram matrices ``[n, T, T]``, and which examples are reliable.

        Rows are laid out as the bindings do, with NaN behind them and the strictly lower triangle NaN.
        """
        n, positions = p.shape[:2]
        pack = 16 // precision.sums.itemsize
        pitch = -(-positions // pack) * pack
        laid_out = []
        for matrix in (p, q):
            rows = torch.full((n, positions, pitch), torch.nan, dtype=precision.sums)
            above = torch.ones(positions, positions, dtype=torch.bool).triu()
            rows[..., :positions] = torch.where(above, matrix.to(precision.sums), torch.nan)
            laid_out.append(rows)
        out, reliable = torch.full((n,), torch.nan, dtype=precision.sums), torch.full((n,), 7, dtype=torch.uint8)
        sizes = [ctypes.c_int64(v) for v in (n, positions, pitch)]
        tensors = map(address, (*laid_out, out, reliable))
        error = self.loaded.run_contraction(precision.number, *sizes, *tensors)
        assert error is None, error.decode()
        return out, reliable.tolist()

    def check_contraction(self, p: Tensor, q: Tensor, precision: Precision) -> list[int]:
        """Runs and compares with float64."""
        out, reliable = self.contract(p, q, precision)
        terms = p.to(precision.sums).double() * q.to(precision.sums).double()
        expected, magnitude = terms.sum((1, 2)), terms.abs().sum((1, 2))
        error = (out.double() - expected.clamp_min(0)).abs()
        assert bool((error <= (1e-14 if precision.sums == torch.float64 else 3e-7) * magnitude).all()), (out, expected)
        for i, ratio in enumerate((magnitude / expected / precision.cancellation).tolist()):
            if not 0.99 < ratio < 1.01:
                assert reliable[i] == int(0 <= ratio < 1), (ratio, reliable[i])
        return reliable
