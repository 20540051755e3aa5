"""The CPU backend: emitted source, compiled by LLVM, called by XLA."""

import concurrent.futures
import ctypes
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import BackendSuite, Case
from jax import lax
from kernel_suite import KernelSuite

import brainmass_kernels as bk
from brainmass_kernels import noise
from brainmass_kernels.backends import numba as backend
from brainmass_kernels.backends.base import Carry, Loop, Operands, lacking
from brainmass_kernels.backends.numba.optable import NUMBA
from brainmass_kernels.pointwise import Program
from brainmass_kernels.schedule import Schedule

pytest.importorskip("llvmlite")
from brainmass_kernels.backends.numba import lanes, language, machine, runtime

FLOAT = jax.ShapeDtypeStruct((), "float32")


class TestKernels(KernelSuite):
    backend = backend.Numba()


class TestNumba(BackendSuite):
    implementation = "numba"
    runs = "numba"
    loop = "custom-call"
    long = (
        "test_inputs[rows]", "test_batches[2]", "test_broadcasting", "test_two_devices", "test_units",
        "test_batch_of_two_axes", "test_schedules[every beyond the checkpoint]",
    )  # fmt: skip


# Numbers ------------------------------------------------------------------------------------------------------------


def observed(fun, lanes, dtype="float32"):
    """A function of one number compiled and run on an array, its results as they are recorded."""
    aval = jax.ShapeDtypeStruct((), dtype)
    count = len(jax.eval_shape(fun, aval))
    program = Program(lambda x: fun(x), [aval])
    loop = Loop(Program(lambda x: (x,), [aval]), program, 0, 1, 0, 0, Schedule(1))
    records = backend.Numba().forward(loop, Operands(()), Carry((jnp.asarray(lanes, dtype),))).records
    assert len(records) == count
    return [np.asarray(r[0]) for r in records]


SPAN = np.concatenate([np.logspace(-30, 2, 40_001), np.linspace(1e-6, 12.0, 300_001)]).astype(np.float32)
# No subnormal numbers: XLA's threads, and with them ours, take those as zero.
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, 500.0, -500.0], np.float32)


def ulps(got, want):
    """Largest error in units of the last place of what is wanted, which is longdouble."""
    unit = np.spacing(np.abs(want.astype(got.dtype)))
    return float(np.max(np.abs(got - want) / unit))


def test_functions_are_within_two_ulp():
    both = np.concatenate([-SPAN, SPAN])
    tanh, exp, log = observed(lambda x: (jnp.tanh(x), jnp.exp(x), jnp.log(jnp.abs(x))), both)
    wide = both.astype(np.longdouble)
    normal = (wide > -87) & (wide < 88)
    assert ulps(tanh, np.tanh(wide)) <= 2.0
    assert ulps(exp[normal], np.exp(wide[normal])) <= 2.0
    assert ulps(log, np.log(np.abs(wide))) <= 2.0


def test_functions_take_what_is_not_finite():
    tanh, exp, log, logistic = observed(
        lambda x: (jnp.tanh(x), jnp.exp(x), jnp.log(x), jax.nn.sigmoid(x)), SPECIAL
    )  # fmt: skip
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(tanh, np.tanh(SPECIAL), rtol=1e-6)
        np.testing.assert_allclose(exp, np.exp(SPECIAL), rtol=1e-6)
        np.testing.assert_allclose(log, np.log(SPECIAL), rtol=1e-6)
        np.testing.assert_allclose(logistic, 1 / (1 + np.exp(-SPECIAL)), rtol=1e-6, atol=1e-37)


EACH = """
def each(job):
    words = i64_at(job)
    x, y = {kind}_at(words[0]), {kind}_at(words[1])
    for i in range(words[2]):
        y[i] = {name}(x[i])
    return 0
"""


def each(name: str, x: np.ndarray) -> np.ndarray:
    """A function of the kernels of each number."""
    module = language.Module()
    source = EACH.format(name=name, kind=f"f{8 * x.dtype.itemsize}")
    module.export(language.parsed(source, vars(runtime))["each"], f"each_{name}")
    address = machine.function(f"each_{name}", lambda: str(module))
    y = np.empty_like(x)
    job = np.array([x.ctypes.data, y.ctypes.data, x.size], np.int64)
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(job.ctypes.data) == 0
    return y


def test_fast_is_less_accurate_by_as_much_as_is_written():
    assert 2.0 < ulps(each("fast_tanh32", SPAN), np.tanh(SPAN.astype(np.longdouble))) <= 8.0


def test_the_tanh_of_a_rate_errs_little_beside_one():
    both = np.concatenate([-SPAN, SPAN])
    rate = functools.partial(each, "tanh_absolute32")
    np.testing.assert_allclose(rate(both), np.tanh(both.astype(np.longdouble)), rtol=0, atol=1.8e-7)
    np.testing.assert_allclose(rate(SPECIAL), np.tanh(SPECIAL), rtol=0, atol=1.8e-7)


def test_the_logarithm_of_a_uniform_number_is_that_of_any():
    x = np.concatenate([np.linspace(2.0**-32, 1.0, 200_001), 2.0 ** -np.arange(33.0)]).astype(np.float32)
    np.testing.assert_array_equal(each("log_of_uniform32", x), each("log32", x))


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1.3e-7), ("float64", 2.3e-16)])
def test_a_rate_of_powers_of_two_errs_little(dtype, within):
    x = np.concatenate([-SPAN, SPAN, SPECIAL, [-1e4, -200, -126.5, -0.5, 0.5, 126.5, 200, 1e4]]).astype(dtype)
    found = each(f"logistic2_{x.dtype.itemsize * 8}", x)
    wanted = 1 / (1 + np.exp2(x.astype(np.longdouble)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=within)


FUNCTIONS = {
    "arithmetic": lambda x, y: (x + y, x - y, x * y, x / y, -x, x % y, x**3, x**-2, jnp.abs(x) ** y),
    "comparisons": lambda x, y: (
        jnp.where(x > y, x, y), jnp.where((x <= y) & (x != 0.5), 1.0, y), jnp.sign(x), lax.clamp(-0.5, x, y),
        jnp.maximum(x, y), jnp.minimum(x, y), jnp.where(jnp.isfinite(x / (x - x)), 1.0, 2.0), jnp.abs(x),
        jnp.where(~(x > y) ^ (y < 0), x, 0.0), jnp.floor(x), jnp.ceil(x), jnp.round(x),
    ),
    "functions": lambda x, y: (
        jnp.exp(x), lax.exp2(x), jnp.log1p(jnp.abs(x)), jnp.expm1(x), jnp.tanh(x), jax.nn.sigmoid(x), jnp.sin(x),
        jnp.cos(x), jnp.sqrt(jnp.abs(x)), lax.rsqrt(jnp.abs(y)), lax.erf(x), lax.erfc(x), jnp.arctan2(x, y),
        jnp.arctan(x), jnp.sinh(x), jnp.arcsinh(x), lax.cbrt(x), jnp.log(jnp.abs(y)),
    ),
    "integers": lambda x, y: tuple(
        n.astype(x.dtype) for a in [(x * 100).astype(jnp.int32)] for b in [(y * 100).astype(jnp.int32)]
        for n in (
            a + b, a * b, a - b, a & b, a | b, a ^ b, ~a, a << 3, lax.shift_right_logical(a, jnp.int32(25)), a >> 2,
            lax.div(a, b), lax.rem(a, b), lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF,
            jnp.float32), jnp.abs(a),
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("group", FUNCTIONS)
def test_every_primitive_compiled_is_what_jax_computes(group):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.uniform(0.2, 2.0, 200) * rng.choice([-1, 1], 200), jnp.float32) for _ in range(2))
    fun = FUNCTIONS[group]
    step = Program(lambda x, y: (x, y), [FLOAT, FLOAT])
    loop = Loop(step, Program(fun, [FLOAT, FLOAT]), 0, 2, 0, 0, Schedule(1))
    got = backend.Numba().forward(loop, Operands(()), Carry((x, y))).records
    for k, (a, b) in enumerate(zip(got, jax.jit(fun)(x, y), strict=True)):
        np.testing.assert_allclose(a[0], b, rtol=4e-6, atol=4e-6, err_msg=f"{group} {k}")


def test_one_loop_or_three_have_the_same_bits(monkeypatch):
    step = Program(lambda x, y: (jnp.tanh(y) + 0.1 * x * y, jnp.exp(-x * x) + jnp.sin(y)), [FLOAT, FLOAT])
    loop = Loop(step, Program(lambda x, y: (x, y), [FLOAT, FLOAT]), 0, 2, 0, 0, Schedule(20))
    state = tuple(jnp.asarray(np.random.default_rng(k).normal(size=100), jnp.float32) for k in (0, 1))
    found = []
    for wide in (False, True):
        monkeypatch.setattr(lanes, "wide_vectors", lambda wide=wide: wide)
        found.append(backend.Numba().forward(loop, Operands(()), Carry(state)).records)
    np.testing.assert_array_equal(*found)


def test_the_noise_is_that_of_every_backend():
    """The normals themselves, as one step of a walk that starts at zero adds them."""
    step = Program(lambda x, y, z, w: (x + z, y + w), [FLOAT] * 4)
    loop = Loop(step, Program(lambda x, y: (x, y), [FLOAT] * 2), 0, 2, 0, 2, Schedule(1))
    seeds = noise.lane_seeds(jax.random.key(3), (10_000,))
    got = backend.Numba().forward(loop, Operands((), (), seeds), Carry((jnp.zeros(10_000),) * 2)).records
    for a, b in zip(got, jax.jit(noise.normals, static_argnums=(1, 2))(seeds, 0, 2)):
        np.testing.assert_allclose(a[0], b, rtol=2e-6, atol=2e-7)


def test_replay_has_the_bits_of_the_run():
    """A gradient does not depend on where the checkpoints lie, but by the rounding of its own sums."""
    case = Case(steps=60, lanes=5)
    suite = TestNumba()
    theta = suite.single(case)

    def grad(every):
        more = {"checkpoint_every": every}
        return jax.jit(jax.grad(lambda t: suite.simulate(case, t, **more)["eeg"].mantissa.sum()))(theta)

    once, often = grad(60), grad(7)
    jax.tree.map(np.testing.assert_array_equal, once["initial"], often["initial"])


@pytest.mark.parametrize("regions", [32, 40])
def test_the_gradient_by_an_input_of_all_regions(regions):
    """Of a network that fills the lanes of its block, and of one that does not."""

    def loss(wave, implementation):
        C = jnp.full((3, regions), 135.0)
        weights = jnp.full((regions, regions), 1 / regions)
        network = bk.Network(bk.JansenRit(C=C), weights, source="eeg", target="E_inp", k=0.1 * u.Hz / u.mV)
        run = bk.simulate(network, 30, 1 * u.ms, inputs={"E_inp": wave * u.Hz}, every=10, implementation=implementation)
        return jnp.mean((run["eeg"] / u.mV) ** 2)

    got, want = (jax.grad(loss)(jnp.full(30, 220.0), name) for name in ("numba", "scan"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(want))))


# Calls --------------------------------------------------------------------------------------------------------------


def eeg(C, steps=50, every=10):
    run = bk.simulate(bk.JansenRit(C=C), steps, 0.1 * u.ms, every=every, implementation="numba")
    return run["eeg"] / u.mV


def test_large_arrays_under_jit():
    """Four million lanes: no callback into Python that could wait for XLA."""
    C = jnp.linspace(100.0, 160.0, 4_000_000)
    seen = jax.jit(lambda C: eeg(C * 1.0, 20, 20) + 1.0)(C)
    np.testing.assert_allclose(seen[:, ::400_000] - 1.0, eeg(C[::400_000], 20, 20), rtol=1e-5, atol=1e-6)


def test_called_from_several_threads_at_once():
    C = [jnp.linspace(100.0 + k, 160.0, 3000) for k in range(8)]
    alone = [np.asarray(eeg(x, 400)) for x in C]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: np.asarray(eeg(x, 400)), C))
    for a, b in zip(alone, together):
        np.testing.assert_array_equal(a, b)


def test_python_goes_on_while_a_kernel_runs():
    C = jnp.linspace(100.0, 160.0, 20_000)
    run = jax.jit(lambda C: eeg(C, 4000, 4000))
    run(C).block_until_ready()
    ticks = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: run(C).block_until_ready())
        while not done.done():
            time.sleep(0.002)
            ticks.append(time.perf_counter())
    assert len(ticks) > 10


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    C = jnp.linspace(100.0, 160.0, 1000)
    many = eeg(C, 2000)
    monkeypatch.setattr(backend.call, "WORTH_A_THREAD", 2**62)
    jax.clear_caches()
    np.testing.assert_array_equal(eeg(C, 2000), many)


# What is chosen -----------------------------------------------------------------------------------------------------


def plan(lanes, steps):
    return bk.explain(bk.JansenRit(C=jnp.linspace(100.0, 160.0, lanes)), steps, 0.1 * u.ms)


def test_it_is_chosen_where_there_is_work():
    assert plan(64, 1000).implementation == "numba"
    small = plan(1, 100)
    assert small.implementation == "scan"
    assert "as long as scan" in small.passed_over["numba"]


def test_without_numba_scan_runs_and_says_what_would_help(monkeypatch):
    monkeypatch.setattr(backend, "installed", lambda: False)
    chosen = plan(64, 1000)
    assert chosen.implementation == "scan"
    assert "pip install 'brainmass-kernels[cpu]'" in chosen.passed_over["numba"]
    assert "brainmass-kernels[cpu]" in bk.implementations()["numba"]
    with pytest.raises(bk.Unsupported, match=r"brainmass-kernels\[cpu\]"):
        eeg(jnp.ones(3))


def test_what_only_the_adjoint_would_need_is_seen_before_it_runs():
    program = Program(lambda x: (lax.erf_inv(x),), [FLOAT])
    assert "'erf_inv'" in str(lacking(NUMBA.lacks, program))


# Disk ---------------------------------------------------------------------------------------------------------------

AGAIN = """
import time, jax, jax.numpy as jnp, brainunit as u, brainmass_kernels as bk
from brainmass_kernels.backends import numba as backend
from brainmass_kernels.backends.numba.machine import Machine
compiled = []
original = Machine.compile
Machine.compile = lambda *a: (compiled.append(a), original(*a))[1]
run = bk.simulate(bk.JansenRit(C=jnp.linspace(100.0, 160.0, 8)), 50, 0.1 * u.ms, implementation="numba")
print(len(compiled), float(jnp.sum(run["eeg"].mantissa)))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    env = {**os.environ, "BRAINMASS_KERNELS_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    said = [
        subprocess.run(
            [sys.executable, "-c", AGAIN], env=env, cwd=Path(__file__).parents[1], text=True, capture_output=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    (first, value), (second, again) = said
    assert int(first) > 0
    assert int(second) == 0
    assert value == again
    assert not list(tmp_path.glob("*.part"))


KINDS = """
import sys, jax, jax.numpy as jnp, brainunit as u, brainmass_kernels as bk
jax.config.update("jax_enable_x64", True)
for dtype in sys.argv[1:]:
    C = jnp.linspace(100.0, 160.0, 5, dtype=dtype)
    def power(C, implementation):
        res = bk.simulate(bk.JansenRit(C=C), 40, jnp.asarray(0.1, dtype) * u.ms, implementation=implementation)
        return jnp.sum(res["eeg"].mantissa ** 2)
    ours, wanted = (jax.grad(power)(C, name) for name in ("numba", "scan"))
    assert ours.dtype == dtype
    assert float(jnp.max(jnp.abs(ours - wanted))) < 1e-3 * float(jnp.max(jnp.abs(wanted))), (ours, wanted)
"""


@pytest.mark.slow
def test_kernels_that_two_processes_compiled_do_not_take_each_others_functions(tmp_path):
    env = {**os.environ, "BRAINMASS_KERNELS_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    for dtypes in (["float64"], ["float32"], ["float64", "float32"]):
        command = [sys.executable, "-c", KINDS, *dtypes]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_results_lie_in_large_pages():
    """Those of 64 MB, which are new memory at each call."""
    result = bk.simulate(bk.JansenRit(C=jnp.linspace(100.0, 160.0, 1024)), 16_000, 0.1 * u.ms, implementation="numba")
    eeg = jax.block_until_ready(result["eeg"].mantissa)
    assert "hg" in flags_of(eeg.unsafe_buffer_pointer() + eeg.nbytes // 2)


def flags_of(address: int) -> list[str]:
    """What Linux knows of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            first, last = (int(x, 16) for x in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no memory at {address:x}")
