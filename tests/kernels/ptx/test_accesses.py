"""Sectors, lines and conflicts of small kernels whose counts follow from a formula."""

import numpy as np
import pytest

from erniequant_kernels.ptx.accesses import LOOP, PROLOGUE, clocks, totals, traffic
from erniequant_kernels.ptx.launch import launch

WARP = 32


def kernel(body, threads=WARP, parameters=2):
    """PTX of a kernel with the lane's number in %r1 and 64-bit parameters in %rd1, %rd2, …"""
    names = ", ".join(f".param .u64 .ptr .global .align 1 k_{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_{i}];" for i in range(parameters))
    return (
        f".version 8.4\n.target sm_90\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry k({names})\n.reqntid {threads}\n{{\n"
        ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<99>;\n"
        f"mov.u32 %r1, %tid.x;\n{loads}\n{body}\nret;\n}}\n"
    )


def counted(body, shared=4096, **sizes):
    text = kernel(body, **sizes)
    given = dict.fromkeys(f"p{i}" for i in range(sizes.get("parameters", 2)))
    return traffic(launch(text, shared, (1, 1, 1), given, record=True))


def strided(stride, width, vector=""):
    """A load by every lane, ``stride`` bytes apart."""
    registers = {4: "{ %r2 }", 8: "{ %r2, %r3 }", 16: "{ %r2, %r3, %r4, %r5 }"}[width]
    return (
        f"mad.wide.u32 %rd3, %r1, {stride}, %rd1;\nld.global{vector}.b32 {registers}, [ %rd3 + 0 ];"
    )


@pytest.mark.parametrize(
    "stride, width, vector, sectors, lines",
    [
        (4, 4, "", 4, 1),  # 128 bytes: one line
        (16, 16, ".v4", 16, 4),  # 512 bytes: four sectors a quarter of a warp
        (8, 4, "", 8, 2),  # every second word
        (32, 4, "", 32, 8),
        (128, 4, "", 32, 32),
        (64, 8, ".v2", 32, 16),  # what lanes along the inputs of packed weights do
        (0, 4, "", 1, 1),  # all lanes read one word
    ],
)
def test_sectors_and_lines_of_a_strided_load(stride, width, vector, sectors, lines):
    (load,) = counted(strided(stride, width, vector))
    assert (load.requests, load.sectors, load.lines) == (1, sectors, lines)
    used = width if stride == 0 else WARP * width
    assert load.bytes == used and load.least_sectors == -(-used // 32)
    assert load.uncoalesced == (sectors > -(-used // 32))
    assert clocks([load]) == lines


def test_words_that_two_loads_share_out_are_not_wasted():
    # Even words by one load, odd words by the other: each touches twice the sectors it fills.
    even = strided(8, 4)
    both = even + "\n" + even.replace("%rd3", "%rd4").replace("+ 0", "+ 4")
    first, second = counted(both)
    assert first.sectors == second.sectors == 8 == 2 * first.least_sectors
    assert not first.uncoalesced and not second.uncoalesced
    (alone,) = counted(even)
    assert alone.uncoalesced and alone.wasted_sectors == 8
    # A store of the other half does not fetch it.
    load, store = counted(
        even + "\nmad.wide.u32 %rd4, %r1, 8, %rd1;\nst.global.b32 [ %rd4 + 4 ], { %r1 };"
    )
    assert load.uncoalesced and store.uncoalesced


def test_lanes_that_do_not_load_touch_nothing():
    # Eight lanes, of which the predicate takes the first four: half a sector.
    (load,) = counted(
        "setp.lt.u32 %p1, %r1, 4;\nmad.wide.u32 %rd3, %r1, 4, %rd1;\n"
        "@%p1 ld.global.b32 { %r2 }, [ %rd3 + 0 ];"
    )
    assert (load.sectors, load.bytes, load.lines) == (1, 16, 1)
    assert counted("setp.lt.u32 %p1, %r1, 0;\n@%p1 ld.global.b32 { %r2 }, [ %rd1 + 0 ];") == []


@pytest.mark.parametrize(
    "row, wavefronts",
    [
        (128, 32),  # lanes down a column of a matrix of 32 words a row: all in one bank
        (132, 1),  # the usual padding of a transpose by one word
        (8, 2),  # every second bank twice
        (0, 1),  # one word for all lanes
    ],
)
def test_conflicts_of_a_shared_column(row, wavefronts):
    (load,) = counted(
        f"mad.lo.u32 %r2, %r1, {row}, 0;\nmov.b32 %r3, global_smem;\nadd.s32 %r2, %r2, %r3;\n"
        "ld.shared.b32 %r4, [%r2];",
        shared=8192,
    )
    assert (load.wavefronts, load.conflicts) == (wavefronts, wavefronts - 1)


@pytest.mark.parametrize("swizzled, wavefronts", [(False, 32), (True, 4)])
def test_conflicts_of_matrix_loads(swizzled, wavefronts):
    # Rows of 128 bytes: eight rows of a matrix share four banks, unless chunks of 16 bytes are
    # permuted by the row.
    chunk = "and.b32 %r4, %r1, 7;\nshl.b32 %r4, %r4, 4;\n" if swizzled else "mov.b32 %r4, 0;\n"
    (load,) = counted(
        f"shl.b32 %r2, %r1, 7;\n{chunk}xor.b32 %r2, %r2, %r4;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r2];"
    )
    assert (load.wavefronts, load.conflicts) == (wavefronts, wavefronts - 4)


def test_wide_shared_loads_take_a_phase_for_each_128_bytes():
    (load,) = counted("shl.b32 %r2, %r1, 4;\nld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];")
    assert (load.wavefronts, load.conflicts) == (4, 0)


def test_asynchronous_copies_count_on_both_sides():
    # 16 bytes a lane from 4 lines, to rows 256 bytes apart in shared memory: eight lanes of a
    # phase meet in the same four banks.
    body = (
        "mad.wide.u32 %rd3, %r1, 16, %rd1;\nmul.lo.s32 %r2, %r1, 256;\n"
        "mov.b32 %r3, 16;\ncp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r3;\n"
        "cp.async.commit_group;\ncp.async.wait_group 0;"
    )
    source, target = counted(body, shared=8192)
    assert (source.space, source.sectors, source.lines) == ("global", 16, 4)
    assert (target.space, target.wavefronts, target.conflicts) == ("shared", 32, 28)
    assert clocks([source, target]) == 32  # the slower side


LOOP_OF_LOADS = """
mov.b32 %r9, 0;
ld.global.b32 { %r7 }, [ %rd2 + 0 ];
$L__BB0_1:
mad.wide.u32 %rd3, %r1, 16, %rd1;
ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r20, %r21, %r22, %r23 }, { %r2, %r3, %r4, %r5 }, { %r2, %r3 }, { %r20, %r21, %r22, %r23 };
add.s64 %rd1, %rd1, 512;
add.s32 %r9, %r9, 1;
setp.lt.s32 %p1, %r9, 5;
@%p1 bra $L__BB0_1;
mad.wide.u32 %rd4, %r1, 128, %rd2;
st.global.b32 [ %rd4 + 0 ], { %r20 };
"""  # noqa: E501


def test_sections_are_those_of_the_main_loop():
    text = kernel(LOOP_OF_LOADS, threads=2 * WARP)
    launched = launch(text, 0, (1, 1, 1), {"a": None, "b": None}, record=True)
    before, within, after = traffic(launched)
    assert [one.section for one in (before, within, after)] == [PROLOGUE, LOOP, "epilogue"]
    # Two warps; a turn reads 512 bytes a warp, of which the second warp has the next 512.
    assert (before.requests, within.requests, after.requests) == (2, 2, 2)
    assert (within.sectors, within.lines) == (32, 8)
    assert after.uncoalesced and after.sectors == 64
    sums = totals(launched, [before, within, after])
    # Turns overlap by half: six pieces of 512 bytes in five turns.
    assert sums[LOOP].read_bytes == pytest.approx(6 * 512 / 5)
    assert sums[PROLOGUE].read_bytes == 32
    assert sums["epilogue"].written_bytes == 64 * 32
    assert sums["epilogue"].clocks == sums["epilogue"].store_clocks == 64


def test_leaving_the_main_loop_early_changes_no_count_of_a_turn():
    text = kernel(LOOP_OF_LOADS)
    few, all_turns = (
        traffic(launch(text, 0, (1, 1, 1), {"a": None, "b": None}, record=True, most_turns=most))
        for most in (2, None)
    )
    assert few == all_turns


def test_counts_are_averages_over_programs():
    # Programs 1 and 2 read lines of their own, program 0 none.
    body = (
        "mov.u32 %r2, %ctaid.x;\nsetp.ne.s32 %p1, %r2, 0;\nmad.lo.s32 %r3, %r2, 32, %r1;\n"
        "mad.wide.u32 %rd3, %r3, 4, %rd1;\n@%p1 ld.global.b32 { %r4 }, [ %rd3 + 0 ];"
    )
    (load,) = traffic(
        launch(kernel(body), 0, (3, 1, 1), {"a": np.zeros(96, np.int32), "b": None}, record=True)
    )
    assert load.sectors == pytest.approx(2 * 4 / 3)
