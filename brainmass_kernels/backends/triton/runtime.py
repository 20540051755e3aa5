"""What emitted Triton kernels call: NVIDIA's library of functions, and shorter ones of the hardware's own.

The special-function unit has exp2 to 2^-22, a reciprocal to 2^-23 and tanh to 2^-11. The first two are enough where
only the absolute error counts, as in a firing rate; "fast" takes the third. AMD's GPUs take what Triton offers there.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportMissingImports=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.libdevice import (
    acos,
    acosh,
    asin,
    asinh,
    atan,
    atan2,
    atanh,
    cbrt,
    cos,
    cosh,
    erf,
    erfc,
    exp,
    exp2,
    expm1,
    fmod,
    log,
    log1p,
    nextafter,
    pow,
    rint,
    round,
    sin,
    sinh,
    tan,
    tanh,
)  # fmt: skip

from ... import noise

__all__ = [
    "INF", "NAN", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "device",
    "erf", "erfc", "exp", "exp2", "expm1", "fast_log", "fast_logistic", "fast_tanh", "fmod", "kernel", "log",
    "log1p", "logistic", "logistic2", "nextafter", "pow", "rint", "round", "rsqrt", "scattered", "sin", "sinh", "sqrt",
    "tan", "tanh", "tanh_absolute", "tanh_absolute_amd", "threefry", "tl", "total",
]  # fmt: skip

INF, NAN = tl.constexpr(float("inf")), tl.constexpr(float("nan"))
# What is launched, and the functions that it calls.
kernel = device = triton.jit


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def scattered(places):
    """The same places, of which the compiler does not know that they are in a row."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [places], tl.int32, True, 1)


def _threefry_ptx() -> str:
    """`noise.threefry` in assembly: Triton's compiler takes time for each operation, and its square for all."""
    keys, lines = ("key0", "key1", "key2"), [".reg .b32 key0, key1, key2, x0, x1;"]
    lines += ["mov.b32 key0, $2;", "mov.b32 key1, $3;", "xor.b32 key2, key0, key1;"]
    lines += [f"xor.b32 key2, key2, {noise.PARITY};", "add.s32 x0, $4, key0;", "add.s32 x1, $5, key1;"]
    for i in range(noise.ROUNDS):
        lines += ["add.s32 x0, x0, x1;", f"shf.l.wrap.b32 x1, x1, x1, {noise.ROTATIONS[i % 8]};", "xor.b32 x1, x1, x0;"]
        if i % 4 == 3:
            j = i // 4 + 1
            lines += [
                f"add.s32 x0, x0, {keys[j % 3]};",
                f"add.s32 x1, x1, {keys[(j + 1) % 3]};",
                f"add.s32 x1, x1, {j};",
            ]
    return "{ " + " ".join([*lines, "mov.b32 $0, x0;", "mov.b32 $1, x1;"]) + " }"


_THREEFRY = tl.constexpr(_threefry_ptx())


@triton.jit
def threefry(key0, key1, half, stream):
    return tl.inline_asm_elementwise(
        _THREEFRY, "=r,=r,r,r,r,r", [key0, key1, half, stream], (tl.int32, tl.int32), True, 1
    )


@triton.jit
def tanh_absolute(x):
    """1 - 2 / (1 + exp(2 x)), within 4e-7 of tanh."""
    if x.dtype == tl.float64:
        return tanh(x)
    else:
        return tl.fma(_reciprocal(1.0 + _exp2(x * 2.8853900817779268)), -2.0, 1.0)


@triton.jit
def logistic2(x):
    """1 / (1 + 2^x), within 3e-7."""
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + exp2(x))
    else:
        return _reciprocal(1.0 + _exp2(x))


@triton.jit
def tanh_absolute_amd(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def fast_tanh(x):
    if x.dtype == tl.float64:
        return tanh(x)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fast_log(x):
    if x.dtype == tl.float64:
        return log(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        return y * 0.6931471805599453


@triton.jit
def fast_logistic(x):
    return 0.5 + 0.5 * fast_tanh(0.5 * x)


@triton.jit
def logistic(x):
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + exp(-x))
    else:
        return tl.div_rn(1.0, 1.0 + exp(-x))


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def rsqrt(x):
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.rsqrt(x)


@triton.jit
def total(x):
    return tl.sum(x, axis=0)
