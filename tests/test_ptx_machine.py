"""The machine that runs PTX, on kernels written by hand."""

import numpy as np
import pytest
from ptx_machine import Program, PtxError


def kernel(code: str, arrays: int, threads: int = 64, before: str = "") -> Program:
    """A kernel whose registers %rd0, %rd1, ... are the addresses of its arrays, and %rd9 four times the thread."""
    params = ",\n".join(f".param .u64 .ptr .align 256 k_param_{i}" for i in range(arrays))
    loads = "\n".join(f"ld.param::entry.b64 %rd{i}, [k_param_{i}];" for i in range(arrays))
    return Program(f"""
        .version 9.0
        .target sm_90a
        .visible .entry k(
        {params}
        )
        .maxntid {threads}, 1, 1
        {{
            .reg .pred %p<9>;
            .reg .b32 %r<99>;
            .reg .b64 %rd<99>;
            {before}
        $L__func_begin0:
            .loc 1 2 0
            {loads}
            mov.u32 %r90, %ctaid.x;
            mov.u32 %r91, %tid.x; // a comment; with a semicolon
            mad.lo.s32 %r92, %r90, {threads}, %r91;
            mul.wide.u32 %rd9, %r92, 4;
            {code}
            ret;
        $L__func_end0:

}}
""")


def run(code: str, *operands, blocks: int = 2, shared: int = 0, before: str = "", dtype="f4"):
    """What one result for each thread is."""
    out = np.empty(64 * blocks, dtype)
    made = kernel(code, len(operands) + 1, before=before)
    return made.run([np.asarray(x) for x in operands], [out], blocks, shared)[0]


STORE = "add.s64 %rd8, %rd1, %rd9; st.global.b32 [%rd8], %r1;"
THREADS = np.arange(128, dtype="f4")


def test_a_loop():
    """x = 0.5 x + 1, three times."""
    code = f"""
        add.s64 %rd7, %rd0, %rd9;
        ld.global.b32 %r1, [%rd7];
        mov.b32 %r2, 0;
    $L__BB0_1:
        fma.rn.f32 %r1, %r1, 0f3F000000, 0f3F800000;
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p1, %r2, 3;
        @%p1 bra $L__BB0_1;
        {STORE}"""
    np.testing.assert_array_equal(run(code, THREADS), THREADS / 8 + 1.75)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("shf.l.wrap.b32 %r1, -2147483648, 1, 33;", 3),
        ("shl.b32 %r1, 1, 32;", 0),
        ("shr.s32 %r1, -8, 1;", 2**32 - 4),
        ("mul.hi.u32 %r1, -1, -1;", 2**32 - 2),
        ("cvt.rni.s32.f32 %r1, 0f40200000;", 2),  # 2.5
        ("cvt.rzi.s32.f32 %r1, 0f7F800000;", 2**31 - 1),  # infinity
        ("sub.s32 %r1, 0, 1;", 2**32 - 1),
        ("setp.ltu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 5, 7, %p1;", 5),  # NaN
        ("setp.ne.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 5, 7, %p1;", 7),
        ("setp.lt.s32 %p1, -1, 0; selp.b32 %r1, 5, 7, %p1;", 5),
        ("setp.gt.u32 %p1, -1, 0; selp.b32 %r1, 5, 7, %p1;", 5),
        ("copysign.f32 %r1, 0f80000000, 0f3F800000;", 0xBF800000),
        ("min.NaN.f32 %r1, 0f7FC00000, 0f3F800000;", 0x7FC00000),
        ("min.f32 %r1, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("add.rn.f32 %r1, 0f00400000, 0f00400000;", 0x00800000),
        ("add.rn.ftz.f32 %r1, 0f00400000, 0f00400000;", 0),
        ("mov.b64 %rd3, -1; cvt.s64.s32 %rd3, %rd3; cvt.u32.u64 %r1, %rd3;", 2**32 - 1),
        ("mov.b32 %r2, 3; mad.wide.s32 %rd3, %r2, -2, 8; cvt.u32.u64 %r1, %rd3;", 2),
        ("mov.b32 %r2, 5; { .reg .b32 a, b; mov.b32 a, %r2; add.s32 b, a, a; mov.b32 %r1, b; }", 10),
        ("rcp.approx.ftz.f32 %r1, 0f7F000000;", 0),  # 2^-127, flushed
        ("mul.rn.f32 %r1, 0f3F800001, 0f3F800001;", 0x3F800002),
        ("fma.rn.f32 %r1, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000),  # 2^-46, which a product loses
        ("mov.b32 %r1, 0d3FF0000000000000;", 0),  # the low word
    ],
)
def test_an_instruction(line, want):
    np.testing.assert_array_equal(run(line + STORE.replace("%rd1", "%rd0"), dtype="u4"), np.uint32(want))


@pytest.mark.parametrize(
    ("how", "source"),
    [
        ("bfly.b32 %r1, %r2, 2, 31, -1;", lambda i: i ^ 2),
        ("idx.b32 %r1, %r2, 5, 31, -1;", lambda i: i // 32 * 32 + 5),
        ("down.b32 %r1, %r2, 4, 31, -1;", lambda i: np.where(i % 32 < 28, i + 4, i)),
        ("up.b32 %r1, %r2, 1, 0, -1;", lambda i: np.where(i % 32 > 0, i - 1, i)),
    ],
)
def test_warps_shuffle(how, source):
    code = f"add.s64 %rd7, %rd0, %rd9; ld.global.b32 %r2, [%rd7]; shfl.sync.{how} {STORE}"
    np.testing.assert_array_equal(run(code, THREADS), source(np.arange(128)))


def test_elected_threads_store_alone():
    """What others do not write is NaN."""
    code = f"""
        mov.b32 %r1, 0f3F800000;
        elect.sync %r5|%p2, -1;
        not.pred %p3, %p2;
        @%p3 bra $L__BB0_2;
        add.rn.f32 %r1, %r1, 0f3F800000;
        {STORE.replace("%rd1", "%rd0")}
    $L__BB0_2:"""
    got = run(code)
    np.testing.assert_array_equal(got[::32], 2.0)
    assert np.isnan(got).sum() == 124


SHARED = ".shared .align 16 .b8 memory;"


def test_shared_memory_is_of_a_block_and_begins_as_nan():
    code = f"""
        mul.wide.u32 %rd5, %r91, 4;
        mov.b64 %rd6, memory;
        add.s64 %rd7, %rd6, %rd5;
        @%p0 bra $L__BB0_1;
    $L__BB0_1:
        cvt.rn.f32.u32 %r3, %r92;
        st.shared.b32 [%rd7], %r3;
        bar.sync 0;
        sub.s32 %r6, 63, %r91;
        mul.wide.u32 %rd5, %r6, 4;
        add.s64 %rd7, %rd6, %rd5;
        ld.shared.b32 %r1, [%rd7];
        {STORE.replace("%rd1", "%rd0")}""".replace("@%p0 bra $L__BB0_1;", "")
    np.testing.assert_array_equal(run(code, shared=256, before=SHARED), [*range(63, -1, -1), *range(127, 63, -1)])
    unwritten = code.replace("st.shared.b32 [%rd7], %r3;", "")
    assert np.isnan(run(unwritten, shared=256, before=SHARED)).all()
    with pytest.raises(PtxError, match="word 0 to 63 of memory, which has 63"):
        run(code, shared=252, before=SHARED)


LOAD = f"add.s64 %rd7, %rd0, %rd9; ld.global.b32 %r1, [%rd7+OFFSET]; {STORE}"


@pytest.mark.parametrize("offset", [4, -4, 2])
def test_out_of_bounds(offset):
    with pytest.raises(PtxError, match="of array 0, which has 128"):
        run(LOAD.replace("OFFSET", str(offset)), THREADS)


def test_threads_with_a_predicate_load_alone():
    """The others keep what they had, wherever their address is."""
    code = f"""
        setp.lt.u32 %p1, %r92, 100;
        add.s64 %rd7, %rd0, %rd9;
        mov.b32 %r1, 0fBF800000;
        @%p1 ld.global.b32 {{ %r1 }}, [ %rd7 + 0 ];
        {STORE}"""
    np.testing.assert_array_equal(run(code, THREADS[:100]), [*THREADS[:100], *[-1.0] * 28])


def test_a_vector_may_end_beyond_an_array():
    """LLVM loads three of four so; what lies there is NaN."""
    code = f"ld.global.v2.b32 {{%r2, %r1}}, [%rd0+8]; {STORE}"
    assert np.isnan(run(code, np.zeros(3, "f4"))).all()
    with pytest.raises(PtxError, match="of array 0"):
        run(code, np.zeros(2, "f4"))


def test_threads_that_store_different_values_at_one_place():
    with pytest.raises(PtxError, match="different values at one place of array 1"):
        run("add.s64 %rd7, %rd0, %rd9; ld.global.b32 %r1, [%rd7]; st.global.b32 [%rd1], %r1;", THREADS)


def test_threads_that_part():
    code = "setp.lt.s32 %p1, %r91, 5; @%p1 bra $L__BB0_1; bar.sync 0; $L__BB0_1: " + STORE
    with pytest.raises(PtxError, match="threads part at a branch"):
        run("mov.b32 %r1, 0;" + code, THREADS)


def test_what_is_not_known():
    """Only where it is reached: for numbers that do not occur there may be instructions of all kinds."""
    with pytest.raises(PtxError, match=r"does not know brev\.b32"):
        run(f"brev.b32 %r1, 1; {STORE}", THREADS)
    code = f"mov.b32 %r1, 0; bra.uni $L__BB0_1; brev.b32 %r1, 1; $L__BB0_1: {STORE}"
    np.testing.assert_array_equal(run(code, THREADS), 0.0)


def test_another_number_of_arrays():
    with pytest.raises(PtxError, match="1 arrays for a kernel of 2 parameters"):
        kernel(STORE, 2).run([], [np.empty(128, "f4")], 2)
