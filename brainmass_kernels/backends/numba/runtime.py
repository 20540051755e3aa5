"""What emitted CPU kernels are made with: functions that LLVM vectorises, threads, and the call from XLA.

The functions have no branch and no call, so that a loop over lanes becomes SIMD; they take a NaN or an infinity as any
other number. Nothing is compiled with fast-math flags: they would reorder the sums that the step is careful about, and
let a lane that diverged disturb others. Products are fused with sums by the emitter, one way everywhere, so that a
replayed step has the bits of the step itself.

An emitted kernel is called by XLA's typed FFI: its handler reads the addresses of all buffers from the call frame
(`XLA_FFI_CallFrame` in jaxlib's xla/ffi/api/c_api.h), starts threads, and joins them. Neither Python nor its lock has
a part in it.
"""

# pyright: reportCallIssue=false, reportReturnType=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportArgumentType=false
# ruff: noqa: F401
# These functions are read by `language`, never run by Python; kernels take all names from here.
from __future__ import annotations

import math

import numpy as np

from .intrinsics import (
    absolute,
    add_atomically,
    bits,
    c_function,
    ceil,
    copysign,
    f32_at,
    f64_at,
    floor,
    fma,
    i32_at,
    i64_at,
    load_atomically,
    one_of,
    round_away,
    round_even,
    sqrt,
    together2,
    together4,
    together8,
)
from .language import f32, f64, i8, i16, i32, i64, out_of_line, reordering, u8, u16, u32, u64

inf, nan = math.inf, math.nan

# Functions of one number ---------------------------------------------------------------------------------------------


def maximum(x, y):
    return x if x > y or x != x else y


def minimum(x, y):
    return x if x < y or x != x else y


def clamped(x, low, high):
    x = low if x < low else x
    return high if x > high else x


# Adding one of these rounds to an integer, which is then in the low bits.
_SHIFT32, _SHIFT64 = f32(1.5 * 2.0**23), f64(1.5 * 2.0**52)
# The same, and the integer has the bias of an exponent.
_BIASED32 = f32(1.5 * 2.0**23 + 127)
_LOG2E = 1.4426950408889634
# ln 2 in two: the product of the first with an exponent is exact.
_LN2_HIGH32, _LN2_LOW32 = f32(0.693145751953125), f32(1.4286068203094173e-06)
_LN2_HIGH64, _LN2_LOW64 = f64(0.6931471805601177), f64(-1.7239444525614835e-13)


def _exp_remainder32(r):
    """(exp(r) - 1 - r) / r^2 for abs(r) < 0.35."""
    p = fma(f32(0.0013951718574389815), r, f32(0.008369598537683487))
    p = fma(p, r, f32(0.0416661873459816))
    p = fma(p, r, f32(0.16666512191295624))
    return fma(p, r, f32(0.5))


def _exp_remainder64(r):
    p = fma(f64(1 / 6227020800), r, f64(1 / 479001600))
    p = fma(p, r, f64(1 / 39916800))
    p = fma(p, r, f64(1 / 3628800))
    p = fma(p, r, f64(1 / 362880))
    p = fma(p, r, f64(1 / 40320))
    p = fma(p, r, f64(1 / 5040))
    p = fma(p, r, f64(1 / 720))
    p = fma(p, r, f64(1 / 120))
    p = fma(p, r, f64(1 / 24))
    p = fma(p, r, f64(1 / 6))
    return fma(p, r, f64(0.5))


def exp32(x):
    x = clamped(x, f32(-104.0), f32(89.0))
    shifted = fma(x, f32(_LOG2E), _SHIFT32)
    n = shifted - _SHIFT32
    r = fma(n, -_LN2_LOW32, fma(n, -_LN2_HIGH32, x))
    power = fma(_exp_remainder32(r), r * r, r) + f32(1.0)
    # The exponent may not fit in one factor: in two halves it does.
    whole = i32(bits(shifted) - bits(_SHIFT32))
    half = i32(whole >> i32(1))
    a = bits(i32(i32(half + i32(127)) << i32(23)))
    b = bits(i32(i32(i32(whole - half) + i32(127)) << i32(23)))
    return power * a * b


def exp64(x):
    x = clamped(x, f64(-746.0), f64(710.0))
    shifted = fma(x, f64(_LOG2E), _SHIFT64)
    n = shifted - _SHIFT64
    r = fma(n, -_LN2_LOW64, fma(n, -_LN2_HIGH64, x))
    power = fma(_exp_remainder64(r), r * r, r) + f64(1.0)
    whole = bits(shifted) - bits(_SHIFT64)
    half = whole >> 1
    return power * bits((half + 1023) << 52) * bits((whole - half + 1023) << 52)


def tanh32(x):
    """h / (1 + h), h = (exp(2 abs(x)) - 1) / 2, and where h is small, h - h h / (1 + h). Within 2 ulp."""
    sign = i32(bits(x) & i32(-(2**31)))
    size = bits(i32(bits(x) ^ sign))
    size = f32(9.02) if size > f32(9.02) else size
    shifted = fma(size, f32(2 * _LOG2E), _BIASED32)
    r = fma(shifted - _BIASED32, f32(-0.5 * 0.6931471805599453), size)
    p = fma(f32(0.0444236621260643), r, f32(0.13387489318847656))
    p = fma(p, r, f32(0.33333778381347656))
    p = fma(p, r, f32(0.6666615605354309))
    p = fma(p, r, f32(0.9999999403953552))
    power = bits(i32(bits(shifted) << i32(23)))
    h = fma(power, fma(p, r * r, r), fma(power, f32(0.5), f32(-0.5)))
    far = h / (h + f32(1.0))
    y = fma(-h, far, h) if h < f32(0.45) else far
    return bits(i32(bits(y) | sign))


def tanh_absolute32(x):
    """1 - 2 / (1 + exp(2 x)), within 1.8e-7 of tanh."""
    x = clamped(x, f32(-9.02), f32(9.02))
    shifted = fma(x, f32(2 * _LOG2E), _BIASED32)
    r = fma(shifted - _BIASED32, f32(-0.5 * 0.6931471805599453), x)
    p = fma(f32(0.0444236621260643), r, f32(0.13387489318847656))
    p = fma(p, r, f32(0.33333778381347656))
    p = fma(p, r, f32(0.6666615605354309))
    p = fma(p, r, f32(0.9999999403953552))
    power = bits(i32(bits(shifted) << i32(23)))
    half = fma(power, fma(p, r * r, r), fma(power, f32(0.5), f32(0.5)))
    return f32(1.0) - f32(1.0) / half


def logistic2_32(x):
    """1 / (1 + 2^x), within 1.3e-7. A sum of few terms that wait for each other: a run of one lane waits for them."""
    x = clamped(x, f32(-126.0), f32(126.0))
    shifted = x + _BIASED32
    r = x - (shifted - _BIASED32)
    # (2^r - 1) / r for abs(r) <= 1/2.
    p = fma(f32(0.001326472731307149), r, f32(0.009671512991189957))
    p = fma(p, r, f32(0.05550733581185341))
    p = fma(p, r * r, fma(f32(0.24022242426872253), r, f32(0.6931470036506653)))
    power = bits(i32(bits(shifted) << i32(23)))
    return f32(1.0) / fma(power * r, p, power + f32(1.0))


def logistic2_64(x):
    x = clamped(x, f64(-1022.0), f64(1022.0))
    shifted = x + _SHIFT64
    n = shifted - _SHIFT64
    r = (x - n) * f64(0.6931471805599453)
    power = bits((bits(shifted) + 1023) << 52)
    e = fma(power, fma(_exp_remainder64(r), r * r, r), power)
    return f64(1.0) / (e + f64(1.0))


def fast_tanh32(x):
    """2 t / (1 + t^2), where t is a ratio of polynomials near tanh(x / 2). Within 8 ulp."""
    x = clamped(x, f32(-8.6), f32(8.6))
    square = x * x
    top = x * fma(fma(f32(2.7777319300985546e-05), square, f32(0.013524942787064)), square, f32(0.5))
    low = fma(fma(f32(0.0009215138112996901), square, f32(0.11038218051524701)), square, f32(1.0))
    return (top + top) * low / fma(top, top, low * low)


def tanh64(x):
    """e / (e + 2), e = exp(2 abs(x)) - 1."""
    double = absolute(x) + absolute(x)
    double = f64(40.0) if double > f64(40.0) else double
    shifted = fma(double, f64(_LOG2E), _SHIFT64)
    n = shifted - _SHIFT64
    r = fma(n, -_LN2_LOW64, fma(n, -_LN2_HIGH64, double))
    power = bits((bits(shifted) + 1023) << 52)
    e = fma(power, fma(_exp_remainder64(r), r * r, r), power - f64(1.0))
    return copysign(e / (e + f64(2.0)), x)


fast_tanh64 = tanh_absolute64 = tanh64


def logistic32(x):
    return f32(1.0) / (f32(1.0) + exp32(-x))


def logistic64(x):
    return f64(1.0) / (f64(1.0) + exp64(-x))


def _log_of_normal32(x, less):
    """Of a normal number over 0, less some whole powers of two."""
    word = bits(x)
    exponent = i32(i32(word - i32(0x3F3504F3)) >> i32(23))  # of the number over sqrt(1/2)
    m = bits(i32(word - i32(exponent << i32(23)))) - f32(1.0)
    p = fma(f32(-0.07634474337100983), m, f32(0.12761567533016205))
    p = fma(p, m, f32(-0.13160187005996704))
    p = fma(p, m, f32(0.14201758801937103))
    p = fma(p, m, f32(-0.16623356938362122))
    p = fma(p, m, f32(0.20001226663589478))
    p = fma(p, m, f32(-0.2500081956386566))
    p = fma(p, m, f32(0.3333333134651184))
    n = f32(exponent) - less
    square = m * m
    y = fma(p * m, square, fma(n, _LN2_LOW32, f32(-0.5) * square)) + m
    return fma(n, _LN2_HIGH32, y)


def log32(x):
    """Within 1 ulp, of subnormal numbers too where the machine is not told to take them as zero."""
    tiny = x < f32(2.0**-126)
    scaled = x * f32(2.0**23) if tiny else x
    y = _log_of_normal32(scaled, f32(23.0) if tiny else f32(0.0))
    y = x if x == f32(inf) else y
    y = f32(-inf) if x == f32(0.0) else y
    return y if x >= f32(0.0) else f32(nan)


def log_of_uniform32(x):
    """The same bits for a number from 2^-32 to 1."""
    return _log_of_normal32(x, f32(0.0))


def log64(x):
    return math.log(x)


def quotient(x, y):
    """Of integers, rounded towards zero; by zero it is -1, as XLA has it."""
    if y == 0:
        return -1
    whole = abs(x) // abs(y)
    return whole if (x < 0) == (y < 0) else -whole


# Rows of lanes ------------------------------------------------------------------------------------------------------


def named(kind: str, *functions):
    """Functions of one kind, under its name: all of them take words."""
    for function in functions:
        function.__name__ = f"{function.__name__}_{kind}"
    return functions


def _row_functions(kind: str, at, one):
    def spread(row, source, valid, block):
        """Read a block of lanes into a row; lanes beyond the batch repeat its last."""
        to, lanes = at(row), at(source)
        for i in range(valid):
            to[i] = lanes[i]
        for i in range(valid, block):
            to[i] = lanes[valid - 1]

    def gather(target, row, valid):
        """Write the lanes of a row that are in the batch."""
        to, lanes = at(target), at(row)
        for i in range(valid):
            to[i] = lanes[i]

    def clear(row, block):
        to = at(row)
        for i in range(block):
            to[i] = one - one

    def totals(target, row, valid, group):
        """Write the sums of each so many lanes of a row, always in the same order."""
        to, lanes = at(target), at(row)
        for first in range(0, valid, group):
            result = lanes[first]
            for i in range(first + 1, min(valid, first + group)):
                result += lanes[i]
            to[first // group] = result

    return named(kind, *map(out_of_line, (spread, gather, clear, reordering("reassoc")(totals))))


spread_f32, gather_f32, clear_f32, totals_f32 = _row_functions("f32", f32_at, f32(1.0))
spread_f64, gather_f64, clear_f64, totals_f64 = _row_functions("f64", f64_at, f64(1.0))
spread_i32, _, _, _ = _row_functions("i32", i32_at, i32(1))


# The call from XLA --------------------------------------------------------------------------------------------------

# Offsets in XLA_FFI_CallFrame and what it points at; all fields that are read here are of 8 bytes.
_EXTENSION, _API, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 8, 16, 72, 112, 160
_BUFFER_DATA, _ARRAY_DATA = 24, 16
_METADATA, _METADATA_VERSION, _METADATA_TRAITS, _API_VERSION = 24, 24, 32, 32


def word(address):
    return i64_at(address)[0]


def argument(frame, k):
    """The address of the data of argument ``k``."""
    return word(word(word(frame + _ARGUMENTS) + 8 * k) + _BUFFER_DATA)


def result(frame, k):
    """The address of the data of result ``k``."""
    return word(word(word(frame + _RESULTS) + 8 * k) + _BUFFER_DATA)


def attribute(frame):
    """The one attribute, an array of int64."""
    return i64_at(word(word(word(frame + _ATTRIBUTES)) + _ARRAY_DATA))


def describe(frame):
    """Answer a call that asks for the handler's metadata only, with the version of the interface that asks."""
    words = i64_at(frame)
    extension = words[_EXTENSION // 8]
    if extension == 0:
        return False
    metadata = i64_at(extension)[_METADATA // 8]
    i64_at(metadata)[_METADATA_VERSION // 8] = i64_at(words[_API // 8])[_API_VERSION // 8]
    i32_at(metadata)[_METADATA_TRAITS // 4] = 0
    return True


_advise = c_function("madvise")
# Bytes that are worth pages of 2 MB, a multiple of every size of small pages, and MADV_HUGEPAGE of Linux.
LARGE, _WHOLE_PAGES, _HUGE = 1 << 22, 1 << 16, 14


def in_large_pages(frame, sizes, count):
    """Ask for large pages for the results, which often are new memory: each small page of it costs a fault.

    The attribute has their bytes from the place ``sizes`` on.
    """
    for k in range(count):
        size = attribute(frame)[sizes + k]
        if size >= LARGE:
            begin = (result(frame, k) + _WHOLE_PAGES - 1) // _WHOLE_PAGES * _WHOLE_PAGES
            end = (result(frame, k) + size) // _WHOLE_PAGES * _WHOLE_PAGES
            _advise(begin, end - begin, _HUGE)


_create_thread, _join_thread = c_function("pthread_create"), c_function("pthread_join")
_yield = c_function("sched_yield")

# The first bytes of the scratch hold the call itself: next block, next thread, frame, number of threads, then the
# threads' own names, and last, in a cache line of its own, how often threads have met.
JOB_BYTES = 4096
_MEETINGS = JOB_BYTES - 64
MOST_THREADS = _MEETINGS // 8 - 8
# Times that a thread looks for the others before it lets others have its processor.
_PATIENCE = 4000


def start(job, frame, task, threads):
    """Run ``task(job)`` on this many threads, this one among them."""
    words = i64_at(job)
    words[0], words[1], words[2], words[3] = 0, 0, frame, 0
    words[_MEETINGS // 8] = 0
    started = 0
    for _k in range(threads - 1):
        # A thread that cannot be had is no error: the others take its blocks.
        if i32(_create_thread(job + 8 * (8 + started), 0, task, job)) == 0:
            started += 1
    return started


def wait_for(address, least):
    """Wait until the number at an address is this or more; what it is then."""
    found, looks = load_atomically(address), 0
    while found < least:
        looks += 1
        if looks > _PATIENCE:
            _yield()
        found = load_atomically(address)
    return found


def meet(job, threads, times):
    """Wait until all threads have come here this many times."""
    if threads > 1:
        add_atomically(job + _MEETINGS, 1)
        wait_for(job + _MEETINGS, threads * times)
    return times + 1


def join(job, started):
    for k in range(started):
        _join_thread(i64_at(job)[8 + k], 0)
