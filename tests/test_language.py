"""The language of CPU kernels means what Python means by the same text, but that numbers have a width."""

import ctypes
import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite")
from brainmass_kernels.backends.numba import language, machine, network_runtime, runtime

NAMES = vars(network_runtime) | vars(runtime)
WORD_TO_WORD = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_COUNT = itertools.count()


def compiled(text: str, names=NAMES):
    """``work`` of a text as a function of numbers, each a word or a float64, that returns a word."""
    module, name = language.Module(), f"brainmass_kernels_test_language_{next(_COUNT)}"
    source = language.parsed(text, names)["work"]
    kinds = ["f64" if n.startswith("f") else "i64" for n in source.parameters]
    module.export(source, name, tuple(kinds))
    types = [ctypes.c_double if kind == "f64" else ctypes.c_int64 for kind in kinds]
    return ctypes.CFUNCTYPE(ctypes.c_int64, *types)(machine.function(name, lambda: str(module)))


def both(text: str):
    """The function compiled, and as Python has it."""
    names = {}
    exec(text, names)
    return compiled(text), names["work"]


@functools.cache
def quotients():
    return [both(f"def work(a, b):\n    return a {op} b\n") for op in ("//", "%")]


@given(st.integers(-(2**62), 2**62), st.integers(-(2**31), 2**31).filter(bool))
@settings(deadline=None)
def test_integers_are_divided_as_python_does(a, b):
    for ours, pythons in quotients():
        assert ours(a, b) == pythons(a, b)


PROGRAMS = {
    "loops": """
def work(n):
    total = 0
    for i in range(n):
        for j in range(i, n, 2):
            total += i * j
    for i in range(n - 1, -1, -1):
        total = 3 * total + i
    return total % 1000003
""",
    "a loop within that has the same name": """
def work(n):
    total = 0
    for i in range(n):
        for i in range(2):
            total += i
        total += 10
    return total
""",
    "while": """
def work(n):
    steps, x = 0, n
    while x > 1 and steps < 500:
        x = x // 2 if x % 2 == 0 else 3 * x + 1
        steps += 1
    return steps
""",
    "returns": """
def work(n):
    if n < 3:
        if n == 0:
            return -1
        return n
    elif n == 5:
        return 50
    else:
        n = n + 1
    return n * 2
""",
    "logic": """
def work(n):
    a, b = n > 3, not n % 2 == 0
    return (1 if a and b else 0) + (2 if a or b else 0) + (4 if n != 7 else 0) + (n & 6 | n << 2 ^ ~n) + (-n >> 1)
""",
    "least and largest": """
def work(n):
    return min(n, 4) + 10 * max(n, 4) + 100 * abs(2 - n)
""",
    "functions": """
def half(x):
    return x // 2


def both(x):
    return half(x), x - half(x)


def sum_to(n):
    total = 0
    for k in range(n):
        total += k
    return total


def work(n):
    low, high = both(n)
    return sum_to(low) * 100 + sum_to(high)
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_what_python_runs(name):
    ours, pythons = both(PROGRAMS[name])
    assert [ours(n) for n in range(12)] == [pythons(n) for n in range(12)]


def test_numbers_have_a_width():
    assert compiled("def work(n):\n    return i64(i32(n))\n")(2**31) == -(2**31)
    assert compiled("def work(n):\n    return i64(u32(i32(n)) >> 28)\n")(-1) == 15
    assert compiled("def work(n):\n    return i64(i32(n) >> 28)\n")(-1) == -1
    assert compiled("def work(n):\n    return 1 if u32(n) < u32(5) else 0\n")(-1) == 0
    assert compiled("def work(f):\n    return i64(f32(f) * f32(1e6))\n")(0.1) == int(np.float32(0.1) * np.float32(1e6))
    assert compiled("def work(f):\n    return i64(f * 1e17)\n")(0.1) == int(0.1 * 1e17)
    assert compiled("def work(f):\n    return i64(bits(f32(f)))\n")(-2.5) == int(np.float32(-2.5).view(np.int32))
    assert compiled("def work(n):\n    return i64(1.0 / n * 8)\n")(4) == 2
    assert compiled("def work(n):\n    return i64(u8(n))\n")(-1) == 255
    assert compiled("def work(f):\n    return 1 if f != f else 0\n")(math.nan) == 1
    assert compiled("def work(f):\n    return i64(-(2**31)) if f == f else 7\n")(math.nan) == 7


def test_a_name_may_stand_for_values_of_several_types():
    text = "def work(n):\n    x = n + 1\n    y = x * x\n    x = f64(y) / 2.0\n    x = x + 0.5\n    return i64(x)\n"
    assert compiled(text)(4) == 13


def test_memory_is_read_and_written_where_it_is():
    text = """
def work(n):
    words = i64_at(n)
    x, sums = f32_at(words[0]), f32_at(words[1])
    sums[0], sums[1] = x[0], f32(1.0)
    for i in range(1, words[2]):
        sums[0] += x[i]
        sums[1] *= x[i]
    return add_atomically(n + 16, 5)
"""
    x, sums = np.array([1.0, 2.0, 4.0], np.float32), np.zeros(2, np.float32)
    job = np.array([x.ctypes.data, sums.ctypes.data, 3], np.int64)
    assert compiled(text)(job.ctypes.data) == 3
    assert (sums.tolist(), job[2]) == ([7.0, 8.0], 8)


def test_a_closure_is_another_function_for_each_type():
    def work(n):
        return i64(f64(one) * 4.0) + k * n  # noqa: F821

    tree, results = language.Source.of(work).tree, []
    for half, hundred in ((np.float32(0.5), 1), (np.float64(1.5), 100)):
        module, name = language.Module(), f"brainmass_kernels_test_closure_{next(_COUNT)}"
        module.export(language.Source("work", tree, {**NAMES, "one": half, "k": hundred}), name)
        results.append(WORD_TO_WORD(machine.function(name, functools.partial(str, module)))(3))
    assert results == [5, 306]


def test_closures_of_one_name_are_apart_in_one_module():
    def adding(k):
        def add(n):
            x = n + k
            return x * 1

        return add

    functions = dict(zip(("one", "ten"), map(adding, (1, 10))))
    assert compiled("def work(n):\n    return one(n) * 1000 + ten(n)\n", NAMES | functions)(5) == 6015


def test_sums_keep_their_order_unless_a_function_says_otherwise():
    def summed(job):
        x, total = f32_at(i64_at(job)[0]), f32(0.0)  # noqa: F821
        for i in range(64):
            total += x[i]
        f32_at(i64_at(job)[1])[0] = total  # noqa: F821
        return 0

    in_order = language.Source.of(summed)._replace(outside=NAMES)
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    y = np.zeros(1, np.float32)
    job = np.array([x.ctypes.data, y.ctypes.data], np.int64)
    module, name = language.Module(), f"brainmass_kernels_test_sum_{next(_COUNT)}"
    module.export(in_order, name)
    WORD_TO_WORD(machine.function(name, lambda: str(module)))(job.ctypes.data)
    assert y[0] == functools.reduce(np.add, x, np.float32(0.0))
    assert "fadd reassoc" not in str(module)
    other = language.Module()
    other.export(in_order._replace(flags="reassoc"), name)
    assert "fadd reassoc" in str(other)


@pytest.mark.parametrize(
    "line",
    ["x = [n]", "x = n ** 2", "del n", "x = 1 < n < 3", "x = unknown(n)", "with n: pass", "x = +n", "x = ''"],
)
def test_what_the_language_lacks_is_refused(line):
    with pytest.raises((SyntaxError, TypeError), match="the kernels' language has no"):
        compiled(f"def work(n):\n    {line}\n    return n\n")


def test_a_function_of_the_language_is_not_called_by_python():
    with pytest.raises(TypeError, match="in a kernel only"):
        runtime.fma(1.0, 2.0, 3.0)
