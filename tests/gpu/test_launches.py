"""How operators are launched: repeatability, streams, graphs, empty and huge operands, memory."""

import pytest
import torch
from device_cases import (
    DEVICE,
    LAYOUTS,
    MODES,
    assert_norms,
    conv_terms,
    cuda_only,
    every_mode,
    every_operator,
    gpu,
    linear_terms,
    operand,
    tf32,
)

from engm import ops, reference

pytestmark = gpu
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1], 1)


def flat(result):
    return list(result) if isinstance(result, list | tuple) else [result]


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(flat(left), flat(right), strict=True))


def big_calls(dtype=torch.float32):
    """Calls large enough to be split over many blocks, by label."""
    x, gy = operand((32, 64, 32, 32), dtype), operand((32, 64, 32, 32), dtype)
    small = operand((32, 256, 8, 8), dtype), operand((32, 256, 8, 8), dtype)
    a, b = operand((32, 197, 384), dtype), operand((32, 197, 768), dtype)
    weights = torch.rand(32, device=DEVICE).to(torch.float64 if dtype == torch.float64 else torch.float32)
    tokens = torch.randint(0, 50, (32, 256), device=DEVICE), operand((32, 256, 128), dtype)
    statistics = operand((1, 64, 1), dtype), operand((1, 64, 1), dtype)
    return {
        **{f"conv_norm_sq {f}": lambda f=f: ops.conv_norm_sq(x, gy, *GEOMETRY, f) for f in ("direct", "auto")},
        **{f"conv_norm_sq 8x8 {f}": lambda f=f: ops.conv_norm_sq(*small, *GEOMETRY, f) for f in ("gram", "auto")},
        "conv_grads": lambda: ops.conv_grads(x, gy, *GEOMETRY),
        **{f"linear_norm_sq {f}": lambda f=f: ops.linear_norm_sq(a, b, f) for f in ("direct", "gram", "auto")},
        "linear_grads": lambda: ops.linear_grads(a, b),
        "affine_norm_sq": lambda: ops.affine_norm_sq(x.flatten(2), gy.flatten(2), *statistics, 1),
        "affine_norm_sq last": lambda: ops.affine_norm_sq(a, a, None, statistics[1][:, :1], 2),
        "embedding_norm_sq": lambda: ops.embedding_norm_sq(*tokens),
        "scale_examples": lambda: ops.scale_examples([x, a, b], weights),
        "weighted_sums": lambda: ops.weighted_sums([x.flatten(1), a, b], weights),
        "weighted_gemm": lambda: ops.weighted_gemm(a, b, weights),
        "scaled_accumulate": lambda: ops.scaled_accumulate(a, b, weights.to(dtype)),
    }


@every_mode
def test_the_same_call_gives_the_same_bits(mode):
    with tf32(mode.tf32):
        different = [
            name for name, call in big_calls(mode.dtype).items() if not all(same_bits(call(), call()) for _ in range(3))
        ]
        odd = [case.label for case in every_operator(mode.dtype) if not same_bits(case.run(), case.run())]
    assert not different
    assert not odd


@cuda_only
def test_side_streams_give_the_same_bits_and_are_used():
    """On a stream of their own, held back by a long wait on another one: who launches elsewhere reads stale inputs."""
    stale = []
    for case in every_operator():
        copies = [_copy(argument) for argument in case.arguments]
        want = case.op(*copies)
        for copy in copies:
            _spoil(copy)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms: nobody else can be late by chance
            for copy, argument in zip(copies, case.arguments, strict=True):
                _restore(copy, argument)
            got = case.op(*copies)
        side.synchronize()
        if not same_bits(got, want):
            stale.append(case.label)
    assert not stale


def _copy(value):
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_copy(v) for v in value]
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value


def _spoil(value):
    for t in value if isinstance(value, list) else [value]:
        if isinstance(t, torch.Tensor):
            t.zero_()


def _restore(value, source):
    for t, s in zip(value, source, strict=True) if isinstance(value, list) else [(value, source)]:
        if isinstance(t, torch.Tensor):
            t.copy_(s)


@cuda_only
def test_streams_at_once_do_not_disturb_each_other():
    """Workspaces and partial sums of calls that overlap are their own."""
    calls = big_calls()
    with tf32(False):
        want = {name: call() for name, call in calls.items()}
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        got = []
        for turn in range(3):
            for index, (name, call) in enumerate(calls.items()):
                with torch.cuda.stream(streams[(index + turn) % 4]):
                    got.append((name, call()))
        torch.cuda.synchronize()
    assert not {name for name, result in got if not same_bits(result, want[name])}


def norms_and_weights(x, gy, a, b, scales):
    """What a captured training step would hold: norms of every kind of layer, then the weights."""
    squares = [
        ops.conv_norm_sq(x, gy, *GEOMETRY, "direct"),
        ops.conv_norm_sq(x, gy, *GEOMETRY, "gram"),
        ops.conv_grads(x, gy, *GEOMETRY)[0],
        ops.linear_norm_sq(a, b, "direct"),
        ops.linear_norm_sq(a, b, "gram"),
        *ops.affine_norm_sq(x.flatten(2), gy.flatten(2), None, scales, 1)[0],
    ]
    norms, weights = ops.clip_weights(torch.stack(squares), float(x.shape[1]))
    return norms, weights, *ops.scale_examples([gy, b], weights), ops.weighted_gemm(a, b, weights)


@cuda_only
def test_a_graph_replays_with_new_data():
    def draw():
        shapes = (16, 32, 8, 8), (16, 32, 8, 8), (16, 40, 64), (16, 40, 48)
        return [operand(shape, torch.float32) for shape in shapes] + [torch.rand(1, 1, 1, device=DEVICE) + 0.5]

    static = draw()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        norms_and_weights(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = norms_and_weights(*static)
    for _ in range(3):
        fresh = draw()
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert same_bits(captured, norms_and_weights(*fresh))


def test_empty_batches_and_empty_sums():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for none, one, two in zip(*[every_operator(dtype, n=n) for n in (0, 1, 2)], strict=True):
            got, shapes = flat(none.run()), [[t.shape for t in flat(case.run())] for case in (one, two)]
            want = [[0 if a != b else a for a, b in zip(*pair, strict=True)] for pair in zip(*shapes, strict=True)]
            assert [list(g.shape) for g in got] == want, none.label
            assert all(not bool(g.isnan().any()) and float(g.double().sum()) == 0 for g in got), none.label
    for n, T, p in ((2, 0, 4), (2, 3, 0)):
        a, b = torch.randn(n, T, p, device=DEVICE), torch.randn(n, T, 5, device=DEVICE)
        assert torch.equal(ops.linear_norm_sq(a, b), torch.zeros(n, device=DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_mode
def test_unaligned_and_strided_views(layout, mode):
    """Rows that no 16-byte copy may read, in shapes that otherwise take the fast path."""
    a, b = operand((4, 64, 64), mode.dtype, layout), operand((4, 64, 128), mode.dtype, layout)
    x, gy = operand((4, 32, 16, 16), mode.dtype, layout), operand((4, 64, 16, 16), mode.dtype, layout)
    with tf32(mode.tf32):
        for form in ("direct", "gram"):
            want = reference.linear_norm_sq(a.double(), b.double())
            assert_norms(ops.linear_norm_sq(a, b, form), want, mode, linear_terms(a, b))
            want = reference.conv_norm_sq(x.double(), gy.double(), *GEOMETRY)
            assert_norms(ops.conv_norm_sq(x, gy, *GEOMETRY, form), want, mode, conv_terms(x, gy, GEOMETRY))
        x, gy = x.contiguous()[:, 1:], gy.contiguous()[:, 1:]
        dense = ops.conv_norm_sq(x, gy, *GEOMETRY)
    want = reference.conv_norm_sq(x.double(), gy.double(), *GEOMETRY)
    assert_norms(dense, want, mode, conv_terms(x, gy, GEOMETRY))


def test_padding_of_the_operands_is_never_read():
    """NaN all around a view: one element read outside of it shows."""

    def island(shape):
        around = torch.full([s + 2 for s in shape], float("nan"), device=DEVICE)
        view = around[tuple(slice(1, -1) for _ in shape)]
        view.copy_(torch.randn(shape, device=DEVICE))
        return view

    a, b = island((3, 21, 30)), island((3, 21, 18))
    x, gy = island((3, 10, 9, 9)), island((3, 12, 9, 9))
    for form in ("direct", "gram"):
        assert_norms(ops.linear_norm_sq(a, b, form), reference.linear_norm_sq(a.double(), b.double()), MODES[2])
        want = reference.conv_norm_sq(x.double(), gy.double(), *GEOMETRY)
        assert_norms(ops.conv_norm_sq(x, gy, *GEOMETRY, form), want, MODES[2])
    for result in (ops.linear_grads(a, b), ops.conv_grads(x, gy, *GEOMETRY), ops.affine_norm_sq(a, a, None, a[:1], 1)):
        assert not any(bool(t.isnan().any()) for t in result)


def test_outputs_are_written_whole():
    """Memory that was full of NaN is handed out again; every element of every result must be written."""
    for case in every_operator():
        want = case.run()
        for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
            torch.full((size,), float("nan"), device=DEVICE)
        assert same_bits(case.run(), want), case.label


# -- memory --------------------------------------------------------------------------------------------------------


def needs_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" and torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < gigabytes << 30, reason=f"needs {gigabytes} GiB of free GPU memory")


def huge(*shape):
    """Random bfloat16 numbers, made in place: no float32 copy of them is ever there."""
    return torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE).normal_()


def tail_agrees(whole, part, count):
    """The last ``count`` examples, alone and inside the huge batch."""
    torch.testing.assert_close(whole[-count:], part, rtol=1e-4, atol=0)


@cuda_only
@needs_memory(24)
@pytest.mark.parametrize("form", ["direct", "auto"])
def test_linear_operands_with_more_than_2_to_the_31_elements(form):
    a, b = huge(33, 1024, 65536), huge(33, 1024, 8)
    assert a.numel() > 2**31
    whole = ops.linear_norm_sq(a, b, form)
    want = torch.stack([(b[i].double().T @ a[i].double()).square().sum() for i in (0, 31, 32)])
    assert_norms(whole[[0, 31, 32]], want, MODES[3])


@cuda_only
@needs_memory(30)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_images_with_more_than_2_to_the_31_elements(memory):
    x = huge(130, 64, 512, 512).to(memory_format=memory)
    gy = huge(130, 8, 512, 512).to(memory_format=memory)
    assert x.numel() > 2**31
    tail_agrees(ops.conv_norm_sq(x, gy, *GEOMETRY), ops.conv_norm_sq(x[-2:], gy[-2:], *GEOMETRY), 2)
    want = reference.conv_norm_sq(x[-1:].double(), gy[-1:].double(), *GEOMETRY)
    assert_norms(ops.conv_norm_sq(x[-1:], gy[-1:], *GEOMETRY), want, MODES[3])
    norms, grads = ops.conv_grads(x, gy, *GEOMETRY)
    tail_agrees(norms, ops.conv_grads(x[-2:], gy[-2:], *GEOMETRY)[0], 2)
    assert not bool(grads[-1].isnan().any())


@cuda_only
@needs_memory(24)
def test_lists_and_normalisation_with_more_than_2_to_the_31_elements():
    x = huge(130, 64, 512 * 512)
    statistics = (
        torch.zeros(1, 1, 1, device=DEVICE, dtype=torch.bfloat16),
        torch.ones(1, 1, 1, device=DEVICE, dtype=torch.bfloat16),
    )
    whole, part = ops.affine_norm_sq(x, x, *statistics, 1), ops.affine_norm_sq(x[-2:], x[-2:], *statistics, 1)
    tail_agrees(whole[0].T, part[0].T, 2)
    tail_agrees(whole[1], part[1], 2)
    weights = torch.rand(130, device=DEVICE)
    (scaled,) = ops.scale_examples([x], weights)
    torch.testing.assert_close(scaled[-1], (x[-1].float() * weights[-1]).bfloat16())
    (summed,) = ops.weighted_sums([x], weights)
    torch.testing.assert_close(
        summed[-1, -1000:].float(), (x[:, -1, -1000:].float() * weights[:, None]).sum(0), rtol=2e-2, atol=0.1
    )


@cuda_only
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
def test_norms_take_less_memory_than_their_input(form, memory):
    """No unfolded input (nine times x here) and no per-example gradient is ever stored."""
    side = 16 if form == "gram" else 32
    x, gy = (operand((64, 128, side, side), torch.float32).to(memory_format=memory) for _ in range(2))
    a, b = operand((64, 256, 512), torch.float32), operand((64, 256, 512), torch.float32)
    bytes_of_x = x.numel() * 4
    for limit, call in (
        (bytes_of_x, lambda: ops.conv_norm_sq(x, gy, *GEOMETRY, form)),
        (8 * a.numel(), lambda: ops.linear_norm_sq(a, b, form)),  # the Gram form holds both Gram matrices, half of this
    ):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        rise = torch.cuda.max_memory_allocated() - before
        assert rise < limit, f"{rise / 1e6:.1f} MB"


@cuda_only
def test_gram_matrices_are_held_for_a_few_examples_at_a_time():
    """Those of all examples would take 2 GiB."""
    a, b = operand((256, 1024, 16), torch.float32), operand((256, 1024, 16), torch.float32)
    ops.linear_norm_sq(a, b, "gram")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_norm_sq(a, b, "gram")
    assert torch.cuda.max_memory_allocated() - before < 300 << 20
