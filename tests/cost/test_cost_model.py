"""The cost model: FLOPs by formula, and the form that dispatch takes."""

import math
import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import engm
from engm import _C, ops
from engm.cost import tuning

PRECISIONS = ["tf32", "float32", "bfloat16", "float16", "float64"]


@pytest.fixture(autouse=True)
def _built_in_tables(monkeypatch):
    """No saved table, and none that a test leaves behind."""
    monkeypatch.setenv("ENGM_COST_TABLE", "built-in")
    _C.reset_cost_tables()
    yield
    _C.reset_cost_tables()


def conv(channels, rows, size, kernel=3, stride=1, groups=1, **where):
    padding = kernel // 2 if kernel != stride else 0
    out = (size + 2 * padding - kernel) // stride + 1
    two = lambda value: [value, value]  # noqa: E731
    return _C.conv_cost(
        channels, rows, two(kernel), two(stride), two(padding), [1, 1], groups, two(size), two(out), **where
    )


def test_linear_flops():
    cost = _C.linear_cost(T=10, p=100, d=30)
    assert cost.direct_flops == 2 * 10 * 100 * 30
    assert cost.gram_flops == 10 * 10 * (100 + 30) + 2 * 10 * 10
    assert cost.bytes(8) == 8 * 10 * (100 + 30)


@pytest.mark.parametrize(("T", "form"), [(1, "gram"), (4, "gram"), (2048, "direct")])
def test_linear_form(T, form):
    assert _C.linear_cost(T, 512, 512).form == form


def test_conv_direct_flops_count_groups():
    assert conv(32, 64, 16).direct_flops == 2 * 16 * 16 * 9 * 32 * 64
    assert conv(32, 64, 16, groups=4).direct_flops == 2 * 16 * 16 * 9 * 8 * 64


@pytest.mark.parametrize(
    ("cost", "form"),
    [
        (conv(32, 32, 32), "direct"),
        (conv(64, 64, 32), "direct"),
        (conv(128, 128, 8), "gram"),
        (conv(256, 256, 4), "gram"),
        (conv(512, 512, 4), "gram"),
        (conv(3, 64, 32), "direct"),
        (conv(3, 768, 224, kernel=16, stride=16), "direct"),  # a patch embedding: no tap is shared
        (conv(64, 64, 56, groups=64), "direct"),
    ],
)
def test_conv_form(cost, form):
    assert cost.form == form


def test_gram_is_far_cheaper_on_small_maps():
    """The gain of the pixel identity grows as the map shrinks."""
    gains = [cost.direct_flops / cost.gram_flops for cost in (conv(64, 64, 16), conv(128, 128, 8), conv(256, 256, 4))]
    assert gains == sorted(gains)
    assert gains[1] > 10
    assert gains[2] > 80


def test_one_dimensional_values_are_accepted():
    cost = _C.conv_cost(8, 4, [3], [1], [1], [1], 1, [20], [20])
    assert cost.direct_flops == 2 * 20 * 3 * 8 * 4
    with pytest.raises(ValueError, match="one to three"):
        _C.conv_cost(8, 4, [], [1], [1], [1], 1, [20], [20])


SPACE = st.builds(
    conv,
    channels=st.sampled_from([4, 16, 64, 96]),
    rows=st.sampled_from([4, 24, 64, 128]),
    size=st.integers(3, 40),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    device=st.sampled_from(["cpu", "cuda:0"]),
    precision=st.sampled_from(PRECISIONS),
)


@given(cost=SPACE)
def test_every_layer_has_a_finite_time_and_takes_the_lesser(cost):
    assert 0 < cost.direct_time < float("inf")
    assert 0 < cost.gram_time < float("inf")
    assert cost.form == ("gram" if cost.gram_time < cost.direct_time else "direct")


@given(
    T=st.integers(2, 300),
    p=st.integers(1, 300),
    d=st.integers(1, 300),
    more=st.integers(0, 40),
    device=st.sampled_from(["cpu", "cuda:0"]),
    precision=st.sampled_from(PRECISIONS),
)
def test_more_work_never_takes_less_time(T, p, d, more, device, precision):
    small = _C.linear_cost(T, p, d, device, precision)
    for large in (
        _C.linear_cost(T + more, p, d, device, precision),
        _C.linear_cost(T, p + more, d, device, precision),
        _C.linear_cost(T, p, d + more, device, precision),
    ):
        assert large.direct_time >= 0.7 * small.direct_time  # wider tiles read operands less often
        assert large.gram_time >= small.gram_time


@given(T=st.integers(2, 256), k=st.integers(1, 6), device=st.sampled_from(["cpu", "cuda:0"]))
def test_wider_layers_never_leave_the_gram_form(T, k, device):
    if _C.linear_cost(T, 128 * k, 128 * k, device, "tf32").form == "gram":
        assert _C.linear_cost(T, 256 * k, 256 * k, device, "tf32").form == "gram"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_forms(precision):
    """Few positions of wide layers take the Gram form on any card, many positions of narrow ones the direct form."""
    cuda = {"device": "cuda:0", "precision": precision}
    assert _C.linear_cost(1, 64, 64, **cuda).form == "gram"
    assert _C.linear_cost(16, 1024, 1024, **cuda).form == "gram"
    assert _C.linear_cost(4096, 64, 64, **cuda).form == "direct"
    assert conv(512, 512, 4, **cuda).form == "gram"
    assert conv(64, 64, 32, **cuda).form == "direct"
    assert conv(3, 64, 32, **cuda).form == "direct"


def test_cuda_pays_for_whole_tiles():
    """A partial tile of the direct form costs as much as a whole one; FLOPs are counted without padding."""
    part, whole = conv(50, 40, 16, device="cuda:0"), conv(64, 64, 16, device="cuda:0")
    assert part.direct_parts[0] == whole.direct_parts[0] == whole.direct_flops
    assert part.direct_flops < whole.direct_flops
    narrow = conv(3, 64, 16, device="cuda:0")
    assert narrow.direct_parts[0] == pytest.approx(conv(8, 64, 16, device="cuda:0").direct_flops * 8 / 6)
    linear = _C.linear_cost(64, 100, 120, "cuda:0", "tf32")
    assert linear.direct_parts[0] == 2 * 64 * 128 * 128
    assert _C.linear_cost(64, 100, 70, "cuda:0", "float64").direct_parts[0] == 2 * 64 * 128 * 96


def test_cuda_bands():
    """Bands have at most 64 positions and 128 pixels; a pair of them is a block; symmetric products are halved."""
    flops, read, read_last, added, blocks, *products = conv(64, 32, 8, device="cuda:0").gram_parts
    assert (added, blocks) == (9 * 10 * 256, 1)
    assert flops == 2 * 10 * 256 * (64 + 32 + 1)
    assert (read, read_last, products) == (64 * (64 + 32), 0, [0, 0, 0])
    assert conv(64, 32, 16, device="cuda:0").gram_parts[4] == 4 * 5 / 2
    assert conv(64, 64, 8, kernel=1, device="cuda:0").gram_parts[4] == 1
    wide = conv(3, 64, 64, kernel=16, stride=8, device="cuda:0")  # 256 pixels a position: one tap after the other
    assert wide.gram_parts[3] == 256 * triangle_of_bands(81)


def triangle_of_bands(positions):
    """Elements above the diagonal of a matrix of two bands of positions, in fragments of 16 x 16."""
    fragments = math.ceil(math.ceil(positions / 2) / 16)
    return 256 * (fragments * fragments + fragments * (fragments + 1))


def test_cuda_products():
    """Linear layers have whole matrix products in tiles of 64, the factors read and three halves of both matrices."""
    *others, flops, elements, examples = _C.linear_cost(100, 40, 24, "cuda:0").gram_parts
    assert others == [0] * 5
    assert (flops, elements, examples) == (2 * 128 * 128 * (40 + 24), 100 * (40 + 24) + 3 * 100 * 100, 1)
    assert _C.linear_cost(100, 40, 24, "cpu").gram_parts[5:] == [0, 0, 0]


# Milliseconds for 128 examples on an H200: T, p, d, direct form, two products by torch.bmm and sums by torch.
MEASURED = {
    "tf32": [(196, 384, 1152, 0.395, 0.167), (196, 384, 384, 0.151, 0.098), (196, 768, 768, 0.497, 0.190),
             (196, 768, 3072, 1.967, 0.366), (64, 384, 1536, 0.171, 0.048)],
    "bfloat16": [(196, 384, 1152, 0.176, 0.165), (196, 384, 384, 0.068, 0.121), (196, 768, 768, 0.225, 0.165),
                 (196, 768, 3072, 0.842, 0.289), (64, 384, 1536, 0.081, 0.044)],
    "float32": [(196, 384, 1152, 0.813, 0.639), (196, 384, 384, 0.283, 0.347), (196, 384, 1536, 1.037, 0.789)],
}  # fmt: skip


@pytest.mark.parametrize("precision", MEASURED)
def test_the_built_in_table_takes_the_form_that_was_faster(precision):
    for T, p, d, direct, gram in MEASURED[precision]:
        cost = _C.linear_cost(T, p, d, "cuda:0", precision)
        assert cost.form == ("gram" if gram < direct else "direct"), (T, p, d)
        # A kernel in the place of torch's passes makes the Gram form faster than these figures.
        assert 0.4 < cost.gram_time / cost.direct_time / (gram / direct) < 1.2, (T, p, d)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_patches_are_rows_of_a_linear_layer_on_cuda(precision):
    """No pixel is shared between positions; neither order of memory nor pixels behind the last patch matter."""
    cuda = {"device": "cuda:0", "precision": precision}
    linear = _C.linear_cost(14 * 14, 3 * 16 * 16, 384, **cuda)
    for side, last in ((224, False), (224, True), (230, False)):
        patches = conv(3, 384, side, kernel=16, stride=16, channels_last=last, **cuda)
        assert (patches.gram_parts, patches.direct_parts) == (linear.gram_parts, linear.direct_parts)
        assert (patches.form, patches.gram_flops) == (linear.form, linear.gram_flops)
    assert conv(3, 384, 224, kernel=16, stride=15, **cuda).gram_parts[5:] == [0, 0, 0]
    assert conv(4, 384, 224, kernel=16, stride=16, groups=2, **cuda).gram_parts[5:] == [0, 0, 0]
    assert conv(3, 384, 224, kernel=16, stride=16, device="cpu").form == "direct"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("groups", [1, 24])
def test_elements_of_either_layout_have_constants_of_their_own(device, groups):
    first, last = (conv(24, 24, 9, groups=groups, device=device, channels_last=value) for value in (False, True))
    flops, step, elements, none = first.direct_parts
    assert (last.direct_parts, none) == ([flops, step, 0, elements], 0)
    flops, elements, none, *others = first.gram_parts
    assert (last.gram_parts, none) == ([flops, 0, elements, *others], 0)
    _C.set_cost_table(device, {"direct_last_element": 1e9})
    table = _C.cost_table(device)
    assert conv(24, 24, 9, groups=groups, device=device).direct_time == first.direct_time
    dear = conv(24, 24, 9, groups=groups, device=device, channels_last=True)
    assert dear.form == "gram"
    assert dear.direct_time == pytest.approx(
        dear.direct_parts[0] + table["tile_steps"] * dear.direct_parts[1] + 1e9 * dear.direct_parts[3]
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_times_are_parts_times_constants(device):
    layer = conv(24, 40, 9, device=device)
    table = _C.cost_table(device)
    timing = tuning.Timing(
        {"direct": layer.direct_parts, "gram": layer.gram_parts}, {"direct": layer.direct_time, "gram": layer.gram_time}
    )
    assert timing.pick(table) == layer.form
    assert timing.regret(table) == 0


# Tables that are set at run time.

GRAM_IS_FREE = {"gram_flop": 0, "gram_element": 0, "gram_last_element": 0, "tap_flop": 0, "gram_block": 0}
GRAM_IS_DEAR = {"gram_block": 1e18}
LAST_IS_DEAR = {**GRAM_IS_FREE, "gram_last_element": 1e18}


def taken(call):
    """The form that an operator dispatches to, from the bits of its result.

    Examples whose Gram terms cancel are done again in direct form, and then the bits are the same.
    """
    auto, direct, gram = call("auto"), call("direct"), call("gram")
    assume(not torch.equal(direct, gram))
    return "direct" if torch.equal(auto, direct) else "gram" if torch.equal(auto, gram) else None


@given(
    n=st.integers(8, 24),
    T=st.integers(2, 40),
    p=st.integers(8, 64),
    table=st.sampled_from([{}, GRAM_IS_FREE, GRAM_IS_DEAR]),
)
def test_linear_dispatch_is_what_explain_shows(n, T, p, table):
    _C.reset_cost_tables()
    _C.set_cost_table("cpu", table)
    a, b = torch.randn(n, T, p), torch.randn(n, T, 32)
    (layer,) = engm.explain(nn.Sequential(nn.Linear(p, 32)), a[: 1 + n // 2]).layers
    assert taken(lambda form: ops.linear_norm_sq(a, b, form)) == layer.form
    if table:
        assert layer.form == ("gram" if table is GRAM_IS_FREE else "direct")


@given(
    n=st.integers(8, 24),
    side=st.integers(3, 12),
    c=st.integers(4, 48),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    table=st.sampled_from([{}, GRAM_IS_FREE, GRAM_IS_DEAR, LAST_IS_DEAR]),
)
def test_conv_dispatch_is_what_explain_shows(n, side, c, layout, table):
    _C.reset_cost_tables()
    _C.set_cost_table("cpu", table)
    x, gy = (torch.randn(n, k, side, side).to(memory_format=layout) for k in (c, 32))
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    (layer,) = engm.explain(nn.Sequential(nn.Conv2d(c, 32, 3, padding=1)), x[: 1 + n // 2]).layers
    assert taken(lambda form: ops.conv_norm_sq(x, gy, *geometry, form=form)) == layer.form
    if table is LAST_IS_DEAR:
        assert layer.form == ("direct" if layout is torch.channels_last else "gram")
    elif table:
        assert layer.form == ("gram" if table is GRAM_IS_FREE else "direct")


def test_explain_names_the_table():
    x, net = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 4))
    assert engm.explain(net, x).cost_table == "built-in (cpu)"
    _C.set_cost_table("cpu", GRAM_IS_FREE, source="/a/file.json")
    plan = engm.explain(net, x)
    assert plan.cost_table == "/a/file.json (cpu)"
    assert "/a/file.json (cpu)" in str(plan).splitlines()[0]


def test_tables_are_kept_by_device_and_precision():
    _C.set_cost_table("cuda:1", {"tap_flop": 3}, "tf32")
    assert _C.cost_table("cuda:1", "tf32")["tap_flop"] == 3
    assert _C.cost_table("cuda:1", "float64") == _C.cost_table("cuda:1", "float64", builtin=True)
    assert _C.cost_table("cuda:0", "tf32") == _C.cost_table("cuda:0", "tf32", builtin=True)
    _C.set_cost_table("cuda", {"gram_flop": 7})
    assert all(_C.cost_table("cuda:0", precision)["gram_flop"] == 7 for precision in PRECISIONS)
    assert _C.cost_table("cpu") == _C.cost_table("cpu", builtin=True)
    assert (_C.cost_table_source("cuda:0"), _C.cost_table_source("cpu")) == ("set by hand", "built-in")
    _C.reset_cost_tables()
    assert _C.cost_table_source("cuda:1") == "built-in"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.set_cost_table("cpu", {"speed": 1}), "'speed' is no constant of the cost model; it has tile_steps"),
        (lambda: _C.set_cost_table("cpu", {"gram_flop": -1}), "'gram_flop' must be finite and not negative, got -1"),
        (lambda: _C.set_cost_table("cpu", {"gram_flop": float("nan")}), "finite"),
        (lambda: _C.set_cost_table("tpu", {}), "device must be"),
        (lambda: _C.cost_table("cuda:x"), "device must be"),
        (lambda: _C.linear_cost(2, 2, 2, "cuda:0", "int8"), "precision must be"),
    ],
)
def test_bad_tables_change_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert _C.cost_table("cpu") == _C.cost_table("cpu", builtin=True)


def test_tables_may_change_while_operators_run():
    a, b = torch.randn(8, 16, 32), torch.randn(8, 16, 32)
    known = [ops.linear_norm_sq(a, b, form) for form in ("direct", "gram")]
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            _C.set_cost_table("cpu", GRAM_IS_FREE)
            _C.set_cost_table("cpu", GRAM_IS_DEAR)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        results = [ops.linear_norm_sq(a, b) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(any(torch.equal(result, each) for each in known) for result in results)


@pytest.mark.parametrize(("allowed", "precision"), [("tf32", "tf32"), ("ieee", "float32")])
def test_float32_on_cuda_follows_the_backends(allowed, precision):
    matmul, conv2d = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv2d.fp32_precision
    try:
        matmul.fp32_precision = conv2d.fp32_precision = allowed
        assert _C.cuda_precision("float32", False) == _C.cuda_precision("float32", True) == precision
    finally:
        matmul.fp32_precision, conv2d.fp32_precision = before
    assert _C.cuda_precision("bfloat16", True) == "bfloat16"
    assert _C.cuda_precision("float64", False) == "float64"
