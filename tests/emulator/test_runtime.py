"""The emulator finds what it claims to find, and leaves right kernels alone."""

import ctypes
import re

import pytest
import torch
from emulator.build import EMULATOR, build_library, kernel_unit, runtime_units

THREADS = 64
SEEDS = range(6)


@pytest.fixture(scope="module")
def library():
    units = [kernel_unit(EMULATOR / "runtime_cases.cpp"), *runtime_units()]
    loaded = ctypes.CDLL(str(build_library("runtime_cases", units, with_torch=False)))
    loaded.run_case.restype = ctypes.c_char_p
    loaded.shared_limit.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def run(library):
    def run_case(name, inputs, outputs, variant=0, blocks=1, threads=THREADS, shared=4 * THREADS):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (inputs, outputs)]
        error = library.run_case(name.encode(), *pointers, variant, blocks, threads, shared)
        return error.decode() if error else None

    return run_case


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("ENGM_EMULATOR_SEED", str(request.param))
    return request.param


def test_block_sum(run, seed):
    inputs, sums = torch.randn(5 * THREADS), torch.empty(5)
    assert run("sum", inputs, sums, blocks=5, shared=8) is None
    torch.testing.assert_close(sums, inputs.view(5, THREADS).sum(1))


def test_cuda_words(run):
    out = torch.zeros(3 * THREADS)
    assert run("words", out, out, blocks=3) is None
    assert bool((out == 2).all())


@pytest.mark.parametrize("name", ["neighbour", "lane"])
def test_a_missing_barrier_shows(run, seed, name):
    inputs, out = torch.randn(THREADS), torch.zeros(THREADS)
    other = [(i + 1) % THREADS if name == "neighbour" else i ^ 1 for i in range(THREADS)]
    assert run(name, inputs, out) is None
    assert torch.equal(out, inputs[other])
    assert run(name, inputs, out, variant=1) is None
    assert bool(out.isnan().any())


def test_uninitialised_shared_memory_is_nan(run, seed):
    out = torch.zeros(THREADS)
    for _ in range(2):
        assert run("uninitialised", out, out) is None
        assert bool((out[:32] == 1).all())
        assert bool(out[32:].isnan().all())


FAULTS = {
    "deadlock": (0, r"deadlock in block 0: 32 threads wait at the __syncthreads of .*; 16 lanes of warp 0 wait"),
    "barriers of two lines": (1, "waits at the __syncthreads of .* while others wait at that of"),
    "a return before a barrier": (2, "(others have returned before|returned while other threads wait)"),
    "a lane missing": (
        3,
        "(without all 32 lanes|returned while other lanes of its warp wait at the shuffle)",
    ),
    "two collectives": (4, "calls .* while other lanes of its warp wait at"),
    "collectives of two lines": (5, "calls __syncwarp at .* while other lanes of its warp wait at the __syncwarp"),
    "a write behind the end": (6, "wrote at offset 256 of its 256 bytes"),
    "a write before the start": (7, "wrote at offset -1 of its 256 bytes"),
    "a misaligned destination": (8, "shared address .* that is not a multiple of 16"),
    "a misaligned source": (9, "from a source that is not aligned"),
    "too many bytes": (10, "copies 17 bytes asynchronously, expected 0 to 16"),
    "a copy out of shared memory": (11, "takes 4 bytes at offset 256 of the block's 256 bytes"),
    "a copy that is not committed": (12, "returned before its asynchronous copies were waited for"),
    "a copy that is not waited for": (13, "returned before its asynchronous copies were waited for"),
    "a misaligned load": (15, "accesses an address that is not a multiple of 16 at .*runtime_cases.cpp"),
    "an index outside an array": (16, "uses index [4-7] of an array that does not have it"),
    "one shuffle fewer": (14, "(without all 32 lanes|returned while other lanes)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(run, seed, name):
    variant, message = FAULTS[name]
    inputs, out = torch.randn(THREADS), torch.zeros(THREADS)
    error = run("faults", inputs, out, variant=variant)
    assert error is not None
    assert re.search(message, error), error
    assert run("faults", inputs, out, variant=99) is None, "a fault must not spoil the next launch"
    assert bool((out == 1).all())


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_copies_arrive_when_they_are_waited_for(run, seed, pending):
    inputs, out = torch.randn(2 * THREADS), torch.zeros(2 * THREADS)
    assert run("copies", inputs, out, variant=pending, shared=8 * THREADS) is None
    other = torch.arange(1, THREADS + 1) % THREADS
    for group in range(2):
        got, expected = out[group * THREADS :][:THREADS], inputs[group * THREADS :][:THREADS][other]
        if group < 2 - pending:
            assert torch.equal(got, expected)
        else:
            # A thread that runs ahead to its last wait may already have brought its own in.
            assert bool((got.isnan() | (got == expected)).all())
            assert bool(got.isnan().any())


@pytest.mark.parametrize("count", [0, 4, 12, 16])
def test_copies_fill_with_zeros(run, count):
    inputs, out = torch.randn(4), torch.full((6 * THREADS,), 7.0)
    assert run("filled", inputs, out, variant=count, shared=24 * THREADS) is None
    expected = torch.where(torch.arange(4) < count // 4, inputs, 0.0)
    assert torch.equal(out[: 4 * THREADS].view(THREADS, 4), expected.expand(THREADS, 4))
    assert torch.equal(out[4 * THREADS :].view(THREADS, 2), (inputs[:2] * (count > 0)).expand(THREADS, 2))


def test_more_shared_memory_than_the_limit_fails(run, library, monkeypatch):
    out = torch.zeros(THREADS)
    assert library.shared_limit() == 99 << 10
    assert run("neighbour", out, out, shared=99 << 10) is None
    assert run("neighbour", out, out, shared=(99 << 10) + 1) == "launch returned 1"
    monkeypatch.setenv("ENGM_EMULATOR_SHARED_KB", "163")
    assert library.shared_limit() == 163 << 10
    assert run("neighbour", out, out, shared=163 << 10) is None


def test_blocks_that_the_card_refuses_fail(run):
    out = torch.zeros(THREADS)
    assert run("neighbour", out, out, threads=1025) == "launch returned 9"
    assert run("neighbour", out, out, threads=0) == "launch returned 9"
    assert run("neighbour", out, out, blocks=0) is None


def test_the_seed_sets_the_schedule(run, monkeypatch):
    def order(seed):
        monkeypatch.setenv("ENGM_EMULATOR_SEED", str(seed))
        out = torch.zeros(1 + 3 * 4 * THREADS)
        assert run("order", out, out, blocks=3) is None
        assert torch.equal(out[1:].sort().values, torch.arange(3 * THREADS).repeat_interleave(4).float())
        return tuple(out[1:].int().tolist())

    orders = {seed: order(seed) for seed in range(8)}
    assert len(set(orders.values())) == 8
    assert order(3) == orders[3]
    assert {each[0] // THREADS for each in orders.values()} == {0, 2}, "blocks run in both directions"
    assert any(len({i // 32 for i in each[:128]}) == 1 for each in orders.values()), "a warp runs ahead"
    assert any(len({i // 32 for i in each[:64]}) == 2 for each in orders.values()), "warps take turns"
