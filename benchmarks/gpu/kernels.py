"""Every operator on the layers of real networks, beside its peers and against the ceilings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engm import ops, reference

from . import layers, peers
from .ceilings import measured
from .layers import ConvLayer, LinearLayer
from .record import Stage
from .timing import Bench, precision

# Settings come in the order of interest, so that a stage that runs out of time has seen what matters.
CONV_SETTINGS = [
    ("tf32", "nchw"),
    ("bf16", "nhwc"),
    ("tf32", "nhwc"),
    ("fp32", "nchw"),
    ("bf16", "nchw"),
    ("fp32", "nhwc"),
]
LINEAR_SETTINGS = ["tf32", "bf16", "fp32"]
GRAM_AT_MOST = 6.0  # times the direct form's FLOPs: a Gram form that takes more is not worth a look


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Runs all cases; each is one contender on one layer."""
    n = 3 if bench.tiny else arguments.batch
    ceilings = measured(stage.record)
    convolutions = layers.TINY_CONVOLUTIONS if bench.tiny else layers.CONVOLUTIONS
    linears = layers.TINY_LINEARS if bench.tiny else layers.LINEARS
    for turn, (name, memory) in enumerate(CONV_SETTINGS[:2] if bench.tiny else CONV_SETTINGS):
        for layer in convolutions:
            _convolution(bench, stage, layer, n, name, memory, ceilings)
        if turn < len(LINEAR_SETTINGS):
            for linear in linears:
                _linear(bench, stage, linear, n, LINEAR_SETTINGS[turn], ceilings)
        if turn == 0:
            _small_operators(bench, stage, n, ceilings)


def _convolution(
    bench: Bench, stage: Stage, layer: ConvLayer, n: int, name: str, memory: str, ceilings: dict[str, float]
) -> None:
    calls: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]] = {
        form: lambda x, gy, form=form: lambda: ops.conv_norm_sq(x, gy, *layer.geometry, form=form)
        for form in ("auto", "direct", "gram")
    }
    calls["kept gradients"] = lambda x, gy: lambda: ops.conv_grads(x, gy, *layer.geometry)[0]
    calls["corrected"] = lambda x, gy: _corrected(layer, x, gy)
    calls["summed gradient"] = lambda x, gy: lambda: peers.summed_conv(layer, x, gy)
    calls["unfold, bmm"] = lambda x, gy: lambda: peers.unfold(layer, x, gy)
    calls["opacus"] = lambda x, gy: peers.opacus_conv(layer, x, gy)
    if name != "fp32":
        calls["grouped backward"] = lambda x, gy: lambda: peers.grouped_backward(layer, x, gy)
    if (name, memory) == ("tf32", "nchw"):
        calls["grouped forward"] = lambda x, gy: lambda: peers.grouped_forward(layer, x, gy)
    if layer.flops("gram") > GRAM_AT_MOST * layer.flops("direct"):
        del calls["gram"]

    def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = bench.randn(n, layer.channels, layer.side, layer.side, dtype=dtype, memory=memory)
        return x, bench.randn(n, layer.rows, layer.out, layer.out, dtype=dtype, memory=memory)

    def expected(x: Tensor, gy: Tensor) -> Tensor:
        return reference.conv_norm_sq(x[:3].double(), gy[:3].double(), *layer.geometry)

    _time(bench, stage, layer, n, name, memory, calls, operands, expected, ceilings)


def _corrected(layer: ConvLayer, x: Tensor, gy: Tensor) -> Callable[[], Tensor]:
    shift, scale = torch.randn_like(gy[:, :, 0, 0]), torch.randn_like(gy[:, :, 0, 0])
    weight = x.new_empty(layer.rows, layer.channels, layer.kernel, layer.kernel).normal_()
    correction = shift.contiguous(), weight[0].clone(), scale.contiguous(), weight
    return lambda: ops.conv_norm_sq(x, gy, *layer.geometry, "direct", *correction)


def _linear(bench: Bench, stage: Stage, layer: LinearLayer, n: int, name: str, ceilings: dict[str, float]) -> None:
    calls: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]] = {
        form: lambda a, b, form=form: lambda: ops.linear_norm_sq(a, b, form) for form in ("auto", "direct", "gram")
    }
    calls["kept gradients"] = lambda a, b: lambda: ops.linear_grads(a, b)[0]
    calls["summed gradient"] = lambda a, b: lambda: peers.summed_linear(a, b)
    calls["bmm"] = lambda a, b: lambda: peers.bmm(a, b)
    calls["gram by bmm"] = lambda a, b: lambda: peers.gram_bmm(a, b)
    calls["opacus"] = peers.opacus_linear
    weights = torch.rand(n, device=bench.device)
    calls["weighted sum, scaled_accumulate"] = lambda a, b: lambda: ops.scaled_accumulate(a, b, weights.to(b.dtype))
    calls["weighted sum, scale_examples + GEMM"] = lambda a, b: _scaled(a, b, weights)
    calls["weighted sum, weighted_gemm"] = lambda a, b: _weighted(a, b, weights)
    if layer.flops("gram") > GRAM_AT_MOST * layer.flops("direct"):
        del calls["gram"], calls["gram by bmm"]
    if layer.weight * n * 4 > peers.LARGEST / 4:
        del calls["kept gradients"]

    def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return bench.randn(n, layer.T, layer.p, dtype=dtype), bench.randn(n, layer.T, layer.d, dtype=dtype)

    def expected(a: Tensor, b: Tensor) -> Tensor:
        return reference.linear_norm_sq(a[:3].double(), b[:3].double())

    _time(bench, stage, layer, n, name, "", calls, operands, expected, ceilings)


def _scaled(a: Tensor, b: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    return lambda: peers.summed_linear(a, ops.scale_examples([b], weights)[0])


def _weighted(a: Tensor, b: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.weighted_gemm(a, b, weights)


def _time(
    bench: Bench,
    stage: Stage,
    layer: ConvLayer | LinearLayer,
    n: int,
    name: str,
    memory: str,
    calls: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]],
    operands: Callable[[torch.dtype], tuple[Tensor, Tensor]],
    expected: Callable[[Tensor, Tensor], Tensor],
    ceilings: dict[str, float],
) -> None:
    """Adds a case for every contender, each on operands of its own making."""
    setting = f"{name} {memory}".strip()
    for contender, make in calls.items():

        def work(contender: str = contender, make: Callable = make) -> dict[str, Any]:
            # For plain training's gradient cuDNN looks for its fastest algorithm, as it does in training.
            torch.backends.cudnn.benchmark = contender == "summed gradient" and bench.cuda
            with precision(name) as dtype:
                first, second = operands(dtype)
                call = make(first, second)
                result = call()
                figures: dict[str, Any] = {}
                if contender != "corrected" and isinstance(result, Tensor) and result.shape == (n,):
                    want = expected(first, second)
                    figures["norm error"] = float(f"{_norm_error(result[:3], want):.2e}")
                figures |= bench.milliseconds(call)
            bytes_moved = n * layer.elements * first.element_size()
            flops = n * layer.flops("gram" if contender in ("gram", "gram by bmm") else "direct")
            return figures | rates(figures["ms"], flops, bytes_moved, name, ceilings)

        stage.case(
            f"{layer} | {setting} | {contender}", work,
            layer=str(layer), setting=setting, contender=contender, count=layer.count, n=n,
        )  # fmt: skip


def _norm_error(got: Tensor, want: Tensor) -> float:
    """Largest relative error of a norm."""
    return float((got.double().sqrt() / want.sqrt() - 1).abs().max())


def rates(ms: float, flops: float, bytes_moved: float, name: str, ceilings: dict[str, float]) -> dict[str, float]:
    """TFLOP/s and GB/s, and their shares of the ceilings."""
    tflops, gigabytes = 1e-9 * flops / ms, 1e-6 * bytes_moved / ms
    found = {"tflops": round(tflops, 3), "gigabytes_per_second": round(gigabytes, 1)}
    if ceilings.get(name) and flops:
        found["of matmul"] = round(tflops / ceilings[name], 4)
    if ceilings.get("copy"):
        found["of copy"] = round(gigabytes / ceilings["copy"], 4)
    return found


def _small_operators(bench: Bench, stage: Stage, n: int, ceilings: dict[str, float]) -> None:
    """Times the operators that memory bounds, against the bytes that each must read and write once."""
    cases = small_calls(bench, n)
    for label, make in cases.items():

        def work(make: Callable = make) -> dict[str, Any]:
            call, bytes_moved = make()
            figures = bench.milliseconds(call)
            return figures | rates(figures["ms"], 0.0, bytes_moved, "", ceilings)

        stage.case(
            label, work, layer=label, setting="bytes", contender="engm" if "torch" not in label else "torch", n=n
        )


def small_calls(bench: Bench, n: int) -> dict[str, Callable[[], tuple[Callable[[], Any], float]]]:
    """By label, a maker of a call and of the bytes that the call cannot do without."""
    calls: dict[str, Callable[[], tuple[Callable[[], Any], float]]] = {}
    shapes = [(4, 9), (6, 5)] if bench.tiny else [(64, 1024), (128, 256), (256, 64), (512, 16), (160, 1024)]
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for channels, pixels in shapes:
            for contender in ("engm", "torch"):
                label = f"affine [{n}, {channels}, {pixels}] {short} {contender}"
                calls[label] = lambda c=channels, s=pixels, t=dtype, who=contender: _affine(bench, (n, c, s), 1, t, who)
        tokens = (5, 12) if bench.tiny else (196, 768)
        for contender in ("engm", "torch"):
            label = f"affine [{n}, {tokens[0]}, {tokens[1]}] channels last {short} {contender}"
            calls[label] = lambda t=dtype, who=contender, size=tokens: _affine(bench, (n, *size), 2, t, who)
    calls["embedding"] = lambda: _embedding(bench, n)
    calls["clip_weights"] = lambda: _clip(bench, n)
    calls["scale_examples, backprops of ResNet-18"] = lambda: _lists(bench, n, "scale_examples")
    calls["weighted_sums, biases and scales"] = lambda: _lists(bench, n, "weighted_sums")
    return calls


def _affine(
    bench: Bench, shape: tuple[int, int, int], channel_dim: int, dtype: torch.dtype, who: str
) -> tuple[Callable[[], Any], float]:
    x, gy = bench.randn(*shape, dtype=dtype), bench.randn(*shape, dtype=dtype)
    statistics = (1, shape[1], 1)  # of a channel, or (channels last) of a position
    mean, rstd = bench.randn(*statistics), bench.randn(*statistics)  # fp32 whatever x is, as layers keep them
    affine = ops.affine_norm_sq if who == "engm" else reference.affine_norm_sq
    return lambda: affine(x, gy, mean, rstd, channel_dim), 2 * x.numel() * x.element_size()


def _embedding(bench: Bench, n: int) -> tuple[Callable[[], Any], float]:
    tokens, width = (6, 8) if bench.tiny else (256, 768)
    indices, gy = torch.randint(0, 1000, (n, tokens), device=bench.device), bench.randn(n, tokens, width)
    return lambda: ops.embedding_norm_sq(indices, gy), gy.numel() * 4


def _clip(bench: Bench, n: int) -> tuple[Callable[[], Any], float]:
    squares = torch.rand(62, n, device=bench.device)
    return lambda: ops.clip_weights(squares, 1.0), squares.numel() * 4


def _lists(bench: Bench, n: int, name: str) -> tuple[Callable[[], Any], float]:
    op, weights = getattr(ops, name), torch.rand(n, device=bench.device)
    sides = [(64, 1024)] * 5 + [(128, 256)] * 4 + [(256, 64)] * 4 + [(512, 16)] * 4
    shapes = [(4, 9)] * 3 if bench.tiny else sides if name == "scale_examples" else [(64,), (128,), (256,), (512,)] * 10
    tensors = [bench.randn(n, *shape) for shape in shapes]
    moved = sum(t.numel() for t in tensors) * 4
    return lambda: op(tensors, weights), 2 * moved if name == "scale_examples" else moved
