"""The names of `runtime` for Triton's interpreter, which has neither NVIDIA's library nor inline assembly.

The functions are numpy's. Those made of the hardware's exp2 and reciprocal are given errors as large as it may make.
"""

# pyright: reportArgumentType=false, reportMissingImports=false
from __future__ import annotations

import math

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

INF, NAN = math.inf, math.nan


def device(function):
    """Functions that kernels call are plain ones here; only what is launched is interpreted."""
    return function


def kernel(function):
    return InterpretedFunction(function)


def _on_numpy(function):
    """A function of arrays as one of Triton's tensors."""

    def called(*args):
        tensors = [x for x in args if isinstance(x, tl.tensor)]
        like = max(tensors, key=lambda x: x.handle.data.size)
        kind = like.handle.data.dtype
        with np.errstate(all="ignore"):
            data = function(*(x.handle.data if isinstance(x, tl.tensor) else kind.type(x) for x in args))
        return tl.tensor(TensorHandle(np.asarray(data, kind), like.handle.dtype), like.type)

    return called


def _by_math(name: str):
    return _on_numpy(np.vectorize(getattr(math, name)))


def _rounded_down(x, bits: int):
    """Without its last ``bits`` bits."""
    return (x.view(np.int32) & np.int32(-(1 << bits))).view(np.float32)


def _tanh_absolute(x):
    if x.dtype == np.float64:
        return np.tanh(x)
    power = _rounded_down(np.exp2(x * np.float32(2.8853900817779268)), 2)
    return np.float32(1) - np.float32(2) * _rounded_down(np.float32(1) / (np.float32(1) + power), 1)


def _logistic2(x):
    if x.dtype == np.float64:
        return 1 / (1 + np.exp2(x))
    return _rounded_down(np.float32(1) / (np.float32(1) + _rounded_down(np.exp2(x), 2)), 1)


def _round_away(x):
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) < 0.5, whole, whole + np.sign(x))


acos, acosh, asin, asinh = map(_on_numpy, (np.arccos, np.arccosh, np.arcsin, np.arcsinh))
atan, atan2, atanh, cbrt = map(_on_numpy, (np.arctan, np.arctan2, np.arctanh, np.cbrt))
cos, cosh, exp, exp2, expm1 = map(_on_numpy, (np.cos, np.cosh, np.exp, np.exp2, np.expm1))
fmod, log, log1p, nextafter, pow = map(_on_numpy, (np.fmod, np.log, np.log1p, np.nextafter, np.power))
rint, sin, sinh, sqrt, tan, tanh = map(_on_numpy, (np.rint, np.sin, np.sinh, np.sqrt, np.tan, np.tanh))
rsqrt = _on_numpy(lambda x: 1 / np.sqrt(x))
logistic = fast_logistic = _on_numpy(lambda x: 1 / (1 + np.exp(-x)))
round = _on_numpy(_round_away)
erf, erfc = _by_math("erf"), _by_math("erfc")
tanh_absolute = tanh_absolute_amd = _on_numpy(_tanh_absolute)
logistic2 = _on_numpy(_logistic2)
fast_log, fast_tanh = log, tanh


def total(x):
    data = np.sum(x.handle.data, keepdims=True)
    return tl.tensor(TensorHandle(data, x.handle.dtype), x.dtype)
