"""Loops and ways through machine code are found, and the built kernels stay within their limits."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import disassembly
import machine_code
import pytest
import roofline
from disassembly import Kernel

from engm import _C

LOOP_IN_A_LOOP = """
00 IADD R1
10 LDS.64 R2, [R1]
20 @P0 BRA 0x50
30 LDG.E R3
40 BRA 0x60
50 IADD R1
60 HMMA.1688 R4
70 @!P1 BRA 0x60
80 @P2 BRA 0x10
90 BRA.DIV UR1, 0xc0
a0 STG.E R4
b0 EXIT
c0 IADD R1
d0 BRA 0x10
"""


def kernel(code: str) -> Kernel:
    """A kernel of lines "address instruction"."""
    lines = [(int(line.split()[0], 16), line.split(maxsplit=1)[1]) for line in code.strip().splitlines()]
    return Kernel("sm_90", "_Z1k", lines)


def test_loops_are_nested_and_code_that_nothing_leads_to_is_left_out() -> None:
    whole = kernel(LOOP_IN_A_LOOP).whole
    (outer,) = whole.inside
    (inner,) = outer.inside
    assert (outer.first, outer.last) == (0x10, 0x80)
    assert (inner.first, inner.last) == (0x60, 0x70)
    assert [block.first for block in whole.own] == [0x00, 0x90]
    assert inner.kind == "multiply"


def test_the_longest_way_goes_around_what_is_to_be_avoided() -> None:
    (outer,) = kernel(LOOP_IN_A_LOOP).whole.inside
    assert outer.path() == 2 + 1 + 1  # two before the branch, one instead of the load, the branch back
    assert outer.path(without="HMMA") == 2 + 2 + 1
    assert outer.inside[0].path() == 2
    assert outer.path(outer.inside) == 0  # there is no way around the loop


def test_the_narrowest_copy_of_a_loop_counts() -> None:
    wide = "00 LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64]"
    assert machine_code.narrowest_copy(kernel(f"{wide}\n10 EXIT").whole) == 16
    assert (
        machine_code.narrowest_copy(kernel(f"{wide}\n10 @P0 LDGSTS.E.LTC128B [R1], desc[UR4][R2.64]\n20 EXIT").whole)
        == 4
    )


def test_registers_threads_and_shared_memory_bound_the_warps_of_a_multiprocessor() -> None:
    def warps(registers: int, threads: int, shared: int = 0) -> int:
        return disassembly.Resources("sm_90", "_ZN4engm4cuda8a_kernelE", threads, registers, 1024, 0).resident_warps(
            shared
        )

    assert warps(32, 256) == 64  # all there are
    assert warps(128, 256) == 16  # 65536 / (128 · 256) blocks
    assert warps(129, 256) == 8  # a warp takes 256 registers at a time
    assert warps(32, 64) == 64  # 32 blocks
    assert warps(32, 256, 100 << 10) == 16  # of 228 KiB, 1 a block the system's


def test_the_ratio_of_a_step_of_one_layer() -> None:
    sgd, engm = roofline.step_times(machine_code.Layer(64, 64, 32), "tf32", norm=30e-6)
    a_map = 128 * 4 * 64 * 32**2 / 3.35e12  # 10.0 µs; products of a pass take 19.5, two maps 20.0
    assert sgd == pytest.approx(3 * 2 * a_map + 13 * a_map)
    assert engm == pytest.approx(sgd + 30e-6 + 4 * a_map)
    of_images, _ = roofline.step_times(machine_code.Layer(3, 64, 32), "bfloat16", norm=0.0)
    assert of_images == pytest.approx((2 * (1 + 3 / 64) + 13) * a_map / 2)


def test_shared_memory_takes_128_bytes_a_cycle() -> None:
    code = "00 LDS R1, [R2]\n10 LDSM.16.MT88.4 R4, [R2]\n20 STS.128 [R2], R4\n30 @!PT LDS RZ, [RZ]\n40 EXIT"
    assert disassembly.shared_cycles(kernel(code).whole) == 1 + 4 + 4


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("precision", machine_code.POLICIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_plans_copy_16_bytes_wherever_shapes_allow(precision: str, channels_last: bool) -> None:
    for layer in machine_code.LARGEST:
        plan = machine_code.plan_of(layer, precision, channels_last, "sm_90")
        assert plan.shared <= machine_code.SHARED["sm_90"]
        for staging in plan.staging:
            assert staging.copies == ("rows" if channels_last else "lines")
            assert channels_last or staging.batches > 0
        assert plan.steps * plan.positions == layer.outputs**2


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("precision", "channels", "size", "channels_last", "copies"),
    [
        ("tf32", 64, 30, False, "elements"),  # lines of 120 bytes
        ("tf32", 62, 32, True, "elements"),
        ("bfloat16", 64, 12, False, "elements"),
        ("tf32", 64, 12, False, "lines"),
        ("bfloat16", 64, 30, True, "rows"),
        ("bfloat16", 60, 32, True, "elements"),
    ],
)
def test_each_operand_is_copied_as_its_own_shape_allows(
    precision: str, channels: int, size: int, channels_last: bool, copies: str
) -> None:
    of_x, of_gy = machine_code.plan_of(
        machine_code.Layer(channels, 64, size), precision, channels_last, "sm_90"
    ).staging
    assert of_x.copies == copies
    assert of_gy.copies == ("rows" if channels_last else copies)


@pytest.fixture(scope="module")
def built_kernels(machine_code_of: Callable[[str], str]) -> Callable[[str], list[Kernel]]:
    """The direct form's kernels in the built extension, by architecture."""
    return functools.cache(lambda architecture: kernels_of(architecture, machine_code_of))


def kernels_of(architecture: str, machine_code_of: Callable[[str], str]) -> list[Kernel]:
    """Skips where the extension was not built for the architecture, or cannot be looked into."""
    if f"{architecture[3]}.{architecture[4]}" not in str(_C.build_info().get("cuda_architectures", "")):
        pytest.skip(f"the extension was not built for {architecture}")
    try:
        disassembly.cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return disassembly.kernels_in(machine_code_of(architecture), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", machine_code.SHARED)
def test_the_built_kernels_stay_within_their_limits(
    architecture: str, built_kernels: Callable[[str], list[Kernel]]
) -> None:
    kernels = built_kernels(architecture)
    text, wrong = machine_code.table(kernels, disassembly.resources([Path(_C.__file__)], architecture), architecture)
    assert not wrong, text


@pytest.mark.slow
def test_predicted_shares_of_the_ceiling_reach_the_goal(built_kernels: Callable[[str], list[Kernel]]) -> None:
    kernels = built_kernels("sm_90")
    for network, layers in roofline.NETWORKS.items():
        for precision in roofline.HEADLINE:
            for channels_last in (False, True):
                found = [roofline.times(layer, kernels, precision, channels_last) for layer in layers]
                useful = sum(times["useful"] for times in found)
                predicted = sum(max(times[name] for name in times if name != "useful") for times in found)
                assert useful / predicted >= 0.45, (network, precision, channels_last)
