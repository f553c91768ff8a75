"""The interpreter of PTX against Python's integers, numpy's floats and the manual's layouts."""

import numpy as np
import pytest

from erniequant_kernels.ptx.launch import launch
from erniequant_kernels.ptx.machine import UnknownInstruction
from erniequant_kernels.ptx.memory import OutOfBounds

WARP = 32
NUMBERS = np.array(
    [0, 1, 2, 31, 32, 255, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF],
    np.uint32,
)


def run(body, arrays, threads=WARP, grid=(1, 1, 1), shared=1024, **options):
    """Run a kernel with 64-bit parameters %rd1, %rd2, … for arrays; the lane is %r1."""
    names = ", ".join(f".param .u64 .ptr .global .align 1 k_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_{i}];" for i in range(len(arrays)))
    text = (
        f".version 8.4\n.target sm_90\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry k({names})\n.reqntid {threads}\n{{\n"
        ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<300>;\n.reg .b64 %rd<99>;\n"
        f"mov.u32 %r1, %tid.x;\n{loads}\n{body}\nret;\n}}\n"
    )
    done = launch(text, shared, grid, {f"a{i}": a for i, a in enumerate(arrays)}, **options)
    return [done.arrays[f"a{i}"] for i in range(len(arrays))]


STORE = "\nmad.wide.u32 %rd4, %r1, 4, %rd1;\nst.global.b32 [ %rd4 + 0 ], { %r9 };"


def signed(value, bits=32):
    value = int(value) & (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def pairs():
    a, b = np.meshgrid(NUMBERS, NUMBERS)
    size = -a.size % WARP
    return [np.concatenate([x.ravel(), np.ones(size, np.uint32)]) for x in (a, b)]


BINARY = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << min(b, 32),
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    # Rounded towards zero; division by zero is undefined, so it is left out.
    "div.s32": lambda a, b: int(signed(a) / signed(b)) if b else None,
    "rem.s32": lambda a, b: signed(a) - int(signed(a) / signed(b)) * signed(b) if b else None,
    "div.u32": lambda a, b: a // b if b else None,
}


@pytest.mark.parametrize("opcode", BINARY)
def test_integers_of_two_registers(opcode):
    a, b = pairs()
    body = (
        "mov.u32 %r2, %ctaid.x;\nmad.lo.s32 %r3, %r2, 32, %r1;\n"
        + "".join(f"mad.wide.u32 %rd{4 + i}, %r3, 4, %rd{1 + i};\n" for i in range(3))
        + "ld.global.b32 { %r4 }, [ %rd4 + 0 ];\nld.global.b32 { %r5 }, [ %rd5 + 0 ];\n"
        f"{opcode} %r6, %r4, %r5;\nst.global.b32 [ %rd6 + 0 ], {{ %r6 }};"
    )
    *_, found = run(body, [a, b, np.zeros_like(a)], grid=(a.size // WARP, 1, 1))
    for x, y, z in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        expected = BINARY[opcode](x, y)
        assert expected is None or z == expected % (1 << 32), (opcode, x, y)


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("bfe.u32 %r9, %r1, 1, 3;", lambda lane: lane >> 1 & 7),
        ("bfe.s32 %r9, %r1, 3, 2;", lambda lane: signed(lane >> 3 & 3, 2)),
        ("bfe.s32 %r9, %r1, 0, 0;", lambda lane: 0),
        ("prmt.b32 %r9, %r1, 287454020, 0x7540;", lambda lane: 0x11330000 | 0x4400 | lane),
        ("lop3.b32 %r9, %r1, 12, 10, 0x6A;", lambda lane: (lane & 12) ^ 10),
        ("shf.r.wrap.b32 %r9, -16777216, %r1, 24;", lambda lane: lane << 8 | 0xFF),
        ("popc.b32 %r9, %r1;", lambda lane: lane.bit_count()),
        ("clz.b32 %r9, %r1;", lambda lane: 32 - lane.bit_length()),
        ("brev.b32 %r9, %r1;", lambda lane: int(f"{lane:032b}"[::-1], 2)),
        ("not.b32 %r9, %r1;", lambda lane: ~lane),
        ("mad.lo.s32 %r9, %r1, -3, 7;", lambda lane: 7 - 3 * lane),
        ("cvt.u16.u32 %rs1, %r1;\ncvt.s32.s8 %r9, %rs1;", lambda lane: lane),
        ("setp.gt.s32 %p1, %r1, 5;\nselp.b32 %r9, 1, 2, %p1;", lambda lane: 1 if lane > 5 else 2),
        ("mul.wide.s32 %rd9, %r1, -5;\nmov.b64 {%r8, %r9}, %rd9;", lambda n: -5 * n >> 32),
        ("cvt.u64.u32 %rd9, %r1;\nshl.b64 %rd9, %rd9, 33;\nshr.u64 %rd9, %rd9, 1;\n"
         "mov.b64 {%r8, %r9}, %rd9;", lambda lane: lane),
    ],
)  # fmt: skip
def test_instructions_of_the_lane_number(instruction, expected):
    body = (
        f"{instruction}\nmad.wide.u32 %rd4, %r1, 4, %rd1;\nst.global.b32 [ %rd4 + 0 ], {{ %r9 }};"
    )
    (found,) = run(body, [np.zeros(WARP, np.uint32)])
    assert found.tolist() == [expected(lane) % (1 << 32) for lane in range(WARP)]


def test_high_products_of_64_bits():
    values = [0, 1, 0xFFFFFFFF, 0x123456789ABCDEF0, (1 << 63) + 5, (1 << 64) - 1]
    a = np.array([x for x in values for _ in values][:WARP], np.uint64)
    b = np.array([y for _ in values for y in values][:WARP], np.uint64)
    body = "".join(f"mad.wide.u32 %rd{5 + i}, %r1, 8, %rd{1 + i};\n" for i in range(4)) + (
        "ld.global.b64 { %rd10 }, [ %rd5 + 0 ];\nld.global.b64 { %rd11 }, [ %rd6 + 0 ];\n"
        "mul.hi.u64 %rd12, %rd10, %rd11;\nmul.hi.s64 %rd13, %rd10, %rd11;\n"
        "st.global.b64 [ %rd7 + 0 ], { %rd12 };\nst.global.b64 [ %rd8 + 0 ], { %rd13 };"
    )
    *_, high, high_signed = run(body, [a, b, np.zeros_like(a), np.zeros_like(a)])
    for x, y, u, s in zip(a.tolist(), b.tolist(), high.tolist(), high_signed.tolist(), strict=True):
        assert u == x * y >> 64
        assert s == (signed(x, 64) * signed(y, 64) >> 64) % (1 << 64)


def test_bfloat16_conversions_round_to_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 3.4e38, np.inf] * 5)[:WARP]
    body = (
        "mad.wide.u32 %rd4, %r1, 4, %rd1;\nmad.wide.u32 %rd5, %r1, 4, %rd2;\n"
        "ld.global.b32 { %r2 }, [ %rd4 + 0 ];\ncvt.rn.bf16x2.f32 %r3, %r2, 0f3F800000;\n"
        "mov.b32 {%rs1, %rs2}, %r3;\ncvt.f32.bf16 %r4, %rs2;\nst.global.b32 [ %rd5 + 0 ], { %r4 };"
    )
    import torch

    source = values.astype(np.float32)
    _, found = run(body, [source, np.zeros_like(source)])
    expected = torch.from_numpy(source).bfloat16().float().numpy()
    assert np.array_equal(found, expected)


def test_lanes_part_and_meet_again():
    # Lanes loop as often as their number says; behind the loop all take part in a vote.
    body = """
mov.b32 %r2, 0;
mov.b32 %r3, 0;
setp.ge.s32 %p1, %r2, %r1;
@%p1 bra $L__BB0_2;
$L__BB0_1:
add.s32 %r3, %r3, 3;
add.s32 %r2, %r2, 1;
setp.lt.s32 %p1, %r2, %r1;
@%p1 bra $L__BB0_1;
$L__BB0_2:
setp.ne.s32 %p2, %r3, 0;
vote.sync.ballot.b32 %r4, %p2, -1;
add.s32 %r3, %r3, %r4;
mad.wide.u32 %rd4, %r1, 4, %rd1;
st.global.b32 [ %rd4 + 0 ], { %r3 };
"""
    (found,) = run(body, [np.zeros(WARP, np.uint32)])
    assert found.tolist() == [(3 * lane + 0xFFFFFFFE) % (1 << 32) for lane in range(WARP)]


@pytest.mark.parametrize(
    "instruction, source",
    [
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", lambda n: n ^ 5),
        ("shfl.sync.up.b32 %r9, %r1, 3, 0, -1;", lambda n: n - 3 if n >= 3 else n),
        ("shfl.sync.down.b32 %r9, %r1, 3, 31, -1;", lambda n: n + 3 if n < 29 else n),
        ("shfl.sync.idx.b32 %r9, %r1, 7, 31, -1;", lambda n: 7),
        # Segments of eight lanes.
        ("shfl.sync.down.b32 %r9, %r1, 1, 6175, -1;", lambda n: n + 1 if n % 8 < 7 else n),
        ("redux.sync.add.s32 %r9, %r1, -1;", lambda n: 496),
    ],
)
def test_exchanges_between_lanes(instruction, source):
    body = (
        f"{instruction}\nmad.wide.u32 %rd4, %r1, 4, %rd1;\nst.global.b32 [ %rd4 + 0 ], {{ %r9 }};"
    )
    (found,) = run(body, [np.zeros(2 * WARP, np.uint32)], threads=2 * WARP)
    first = found[:WARP].tolist()
    assert first == [source(lane) for lane in range(WARP)]


def bfloat16(values):
    """Exact small integers as bfloat16 patterns."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_matrix_loads_and_product():
    # Through shared memory by ldmatrix, plain for A and transposed for B: all layouts are used.
    generator = np.random.default_rng(0)
    a, b = generator.integers(-8, 8, (16, 16)), generator.integers(-8, 8, (16, 8))
    c = generator.integers(-8, 8, (16, 8)).astype(np.float32)
    body = """
mad.wide.u32 %rd5, %r1, 16, %rd1;
ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd5 + 0 ];
shl.b32 %r2, %r1, 4;
st.shared.v4.b32 [%r2], {%r10, %r11, %r12, %r13};
mad.wide.u32 %rd6, %r1, 8, %rd2;
ld.global.v2.b32 { %r14, %r15 }, [ %rd6 + 0 ];
shl.b32 %r3, %r1, 3;
st.shared.v2.b32 [%r3+512], {%r14, %r15};
bar.sync 0;
and.b32 %r4, %r1, 15;
shl.b32 %r4, %r4, 5;
shr.u32 %r5, %r1, 4;
shl.b32 %r5, %r5, 4;
add.s32 %r4, %r4, %r5;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r4];
and.b32 %r6, %r1, 15;
shl.b32 %r6, %r6, 4;
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r6+512];
mad.wide.u32 %rd7, %r1, 8, %rd3;
ld.global.v2.b32 { %r30, %r31 }, [ %rd7 + 0 ];
ld.global.v2.b32 { %r32, %r33 }, [ %rd7 + 256 ];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r30, %r31, %r32, %r33 }, { %r20, %r21, %r22, %r23 }, { %r24, %r25 }, { %r30, %r31, %r32, %r33 };
st.global.v2.b32 [ %rd7 + 0 ], { %r30, %r31 };
st.global.v2.b32 [ %rd7 + 256 ], { %r32, %r33 };
"""  # noqa: E501
    # Row r of C, columns 2t and 2t + 1, is lane 4r + t: the matrix in order, 8 bytes a lane.
    *_, found = run(body, [bfloat16(a), bfloat16(b), c.copy()])
    assert np.array_equal(found, a @ b + c)


@pytest.mark.parametrize("late", [True, False])
def test_asynchronous_copies_arrive_when_they_are_waited_for(late):
    body = """
mad.wide.u32 %rd3, %r1, 4, %rd1;
mad.wide.u32 %rd4, %r1, 4, %rd2;
shl.b32 %r2, %r1, 2;
mov.b32 %r3, 4;
cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4, %r3;
cp.async.commit_group;
mov.b32 %r3, 0;
cp.async.ca.shared.global [ %r2 + 128 ], [ %rd3 + 0 ], 0x4, %r3;
cp.async.commit_group;
ld.shared.b32 %r5, [%r2];
cp.async.wait_group 1;
ld.shared.b32 %r6, [%r2];
st.global.b32 [ %rd4 + 0 ], { %r5 };
st.global.b32 [ %rd4 + 128 ], { %r6 };
"""
    source = np.arange(1, WARP + 1, dtype=np.uint32)
    _, found = run(body, [source, np.zeros(2 * WARP, np.uint32)], late=late)
    early = np.zeros(WARP, np.uint32) if late else source
    assert np.array_equal(found, np.concatenate([early, source]))


def test_atomics_count_every_lane():
    body = """
mov.b32 %r2, 1;
atom.shared.add.u32 %r3, [global_smem], %r2;
bar.sync 0;
ld.shared.b32 %r4, [global_smem];
shl.b32 %r3, %r3, 8;
or.b32 %r4, %r4, %r3;
mad.wide.u32 %rd4, %r1, 4, %rd1;
st.global.b32 [ %rd4 + 0 ], { %r4 };
"""
    (found,) = run(body, [np.zeros(2 * WARP, np.uint32)], threads=2 * WARP)
    assert sorted(found.tolist()) == [i << 8 | 64 for i in range(64)]


def test_addresses_outside_of_an_array_are_an_error():
    body = "mad.wide.u32 %rd3, %r1, 4, %rd1;\nst.global.b32 [ %rd3 + 0 ], { %r1 };"
    run(body, [np.zeros(WARP, np.uint32)])
    with pytest.raises(OutOfBounds, match=r"st.global.b32 .*byte 124 of argument 0, which has 124"):
        run(body, [np.zeros(WARP - 1, np.uint32)])
    with pytest.raises(OutOfBounds, match="not a multiple of 4"):
        run(body.replace("+ 0", "+ 2"), [np.zeros(WARP + 1, np.uint32)])


def test_unknown_instructions_are_named():
    with pytest.raises(UnknownInstruction, match=r"tcgen05\.mma %r2, %r3"):
        run("tcgen05.mma %r2, %r3;", [np.zeros(1, np.uint32)])
