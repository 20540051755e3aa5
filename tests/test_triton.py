"""The Triton backend, in Triton's interpreter against float64 references, and compiled for GPUs that are not there."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from backend_suite import BackendSuite, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from kernel_suite import KernelSuite
from test_emit import SMOOTH, follow, numbers, recipes
from test_numba import FUNCTIONS

import brainmass_kernels as bk
from brainmass_kernels import _jax, dispatch, noise
from brainmass_kernels.backends import mosaic_gpu, triton
from brainmass_kernels.backends.base import Carry, Loop, Operands
from brainmass_kernels.backends.triton import versions
from brainmass_kernels.backends.triton.optable import TRITON, TRITON_AMD, TRITON_FAST
from brainmass_kernels.pointwise import ELEMENTWISE, Program, logistic2, pullback, tanh_absolute
from brainmass_kernels.schedule import Schedule

FLOAT = jax.ShapeDtypeStruct((), "float32")


@needs.interpreter
class TestKernels(KernelSuite):
    backend = triton.Triton()
    interpret = "plain"


@needs.interpreter
class TestTriton(BackendSuite):
    implementation = "triton"
    runs = "triton"
    context = staticmethod(bk.testing.interpret)
    accuracy = Case(steps=1000, every=10, lanes=8)
    bounded = None
    loop = "custom-call"
    long = (
        "test_vmap", "test_two_devices", "test_noise[lane rows]", "test_inputs[rows]", "test_batches[0]",
        "test_batches[2]", "test_schedules[transient and every do not divide T]", "test_accuracy_of_the_state[strang]",
    )  # fmt: skip

    @pytest.mark.slow
    @pytest.mark.parametrize("scheme", ["strang", "exp_euler", "heun"])
    def test_accuracy_of_the_gradient(self, scheme):
        super().test_accuracy_of_the_gradient(scheme)

    @pytest.mark.slow
    def test_float64(self, x64):
        super().test_float64(x64)


# Numbers of the emitted source --------------------------------------------------------------------------------------


def observed(program: Program, *arguments, precision="exact"):
    """A program of numbers run by a kernel that records it."""
    avals = program.in_avals
    carried = Program(lambda *x: x, avals)
    loop = Loop(carried, program, 0, len(avals), 0, 0, Schedule(1), precision, "plain")
    state = tuple(jnp.asarray(x, a.dtype).reshape(-1) for x, a in zip(arguments, avals))
    return [np.asarray(r[0]) for r in triton.Triton().forward(loop, Operands(()), Carry(state)).records]


@needs.interpreter
@settings(max_examples=25, deadline=None)
@given(recipes(), st.tuples(numbers, numbers, numbers))
def test_random_programs_mean_what_jax_means(recipe, arguments):
    program = Program(follow(recipe), [FLOAT] * 3)
    for a, b in zip(observed(program, *arguments), jax.jit(program)(*map(np.float32, arguments)), strict=True):
        np.testing.assert_allclose(a, [b], rtol=3e-4, atol=3e-4)


@needs.interpreter
@settings(max_examples=15, deadline=None)
@given(recipes(SMOOTH), st.tuples(numbers, numbers, numbers))
def test_and_their_pullbacks(recipe, arguments):
    program = pullback(Program(follow(recipe), [FLOAT] * 3), [True] * 3)
    arguments = (*arguments, 1.0, 1.0)
    for a, b in zip(observed(program, *arguments), jax.jit(program)(*map(np.float32, arguments)), strict=True):
        np.testing.assert_allclose(a, [b], rtol=3e-3, atol=3e-3 * (1 + abs(float(b))))


X = np.array([-7.5, -2.5, -1.0, -0.6, -0.0, 0.3, 0.5, 0.9, 1.5, 3.25, 12.0], np.float32)


@needs.interpreter
@pytest.mark.parametrize("group", FUNCTIONS)
def test_every_function(group):
    program = Program(FUNCTIONS[group], [FLOAT, FLOAT])
    y = X[::-1] * np.float32(0.7)
    with np.errstate(all="ignore"):
        for a, b in zip(observed(program, X, y), jax.jit(program)(X, y), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@needs.interpreter
def test_noise_has_the_bits_of_every_other_implementation():
    def bits(x):
        word = lax.bitcast_convert_type(x, jnp.int32)
        words = noise.threefry(word, word ^ jnp.int32(-5), word + jnp.int32(9), jnp.int32(1))
        return tuple(lax.bitcast_convert_type(w & 0x3FFFFFFF, jnp.float32) for w in words)

    program = Program(bits, [FLOAT])
    for a, b in zip(observed(program, X), jax.jit(program)(X), strict=True):
        np.testing.assert_array_equal(a.view(np.int32), np.asarray(b).view(np.int32))


@needs.interpreter
def test_not_a_number_stays_one_and_infinity_saturates():
    program = Program(
        lambda x: (jnp.tanh(x), lax.logistic(x), jnp.maximum(x, 0.0), tanh_absolute.bind(x), logistic2.bind(x)),
        [FLOAT],
    )
    tanh, logistic, larger, absolute, base_two = observed(program, [np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(tanh, [np.nan, 1.0, -1.0])
    np.testing.assert_array_equal(logistic, [np.nan, 1.0, 0.0])
    np.testing.assert_array_equal(larger, [np.nan, np.inf, 0.0])
    np.testing.assert_allclose(absolute, [np.nan, 1.0, -1.0], atol=4e-7)
    np.testing.assert_allclose(base_two, [np.nan, 0.0, 1.0], atol=3e-7)


def test_every_elementwise_primitive_is_spelled_or_known_to_be_missing():
    for optable in (TRITON, TRITON_FAST, TRITON_AMD):
        assert set(optable.operations) | {"erf_inv"} >= ELEMENTWISE | {"tanh_absolute", "logistic2"}
        assert "erf_inv" not in optable.operations


# Compiled for GPUs that are not here --------------------------------------------------------------------------------

LANES = jax.ShapeDtypeStruct((1024,), "float32")


def power(C, **options):
    options = {"precision": "fast", "scheme": "strang", "steps": 1000} | options
    steps = options.pop("steps")
    result = bk.simulate(
        bk.JansenRit(C=C), steps, 0.1 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=10, implementation="triton",
        **options,
    )  # fmt: skip
    return jnp.mean((result["eeg"] / u.mV) ** 2)


@needs.triton
@pytest.mark.parametrize("chip", ["sm_80", "sm_89"])
def test_a_run_is_one_kernel_within_its_instructions(chip):
    compiled = bk.testing.compile_for(chip, power, LANES)
    (kernel,) = compiled.kernels.values()
    assert list(compiled.kernels) == ["brainmass_kernels_triton_forward"]
    assert compiled.cost["spill_bytes"] == 0
    inner = max(kernel.loops, key=lambda loop: loop.total)
    assert inner.instructions["MUFU.TANH"] == 60  # twenty steps written out
    assert inner.total / 20 <= 30
    assert inner.kinds()["barrier"] == 0


@needs.triton
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_gradient_is_two_kernels_without_spills(precision):
    compiled = bk.testing.compile_for("sm_80", jax.grad(lambda C: power(C, precision=precision)), LANES)
    assert sorted(compiled.kernels) == ["brainmass_kernels_triton_adjoint", "brainmass_kernels_triton_forward"]
    assert compiled.cost["spill_bytes"] == 0
    fast = sum(loop.instructions["MUFU.TANH"] for k in compiled.kernels.values() for loop in k.loops)
    assert (fast > 0) == (precision == "fast")


@needs.triton
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_function_compiles(dtype):
    groups = [f for name, f in FUNCTIONS.items() if dtype == "float32" or name != "integers"]

    @bk.model
    class Everything(bk.Model):
        a: float = 0.3
        states = {"x": u.UNITLESS, "y": u.UNITLESS}
        inputs = {"push": 0.0}

        @staticmethod
        def drift(s, p, i):
            made = [f for group in groups for f in group(s.x * p.a, s.y + i.push)]
            total = sum(jnp.asarray(f, s.x.dtype) for f in made)
            return {"x": total, "y": lax.logistic(s.x)}

    def run(x):
        noisy = {"push": 0.1 * u.second**0.5}
        result = bk.simulate(
            Everything(), 4, 1.0 * u.ms, initial={"x": x}, noise=noisy, key=jax.random.key(0), implementation="triton"
        )
        return jnp.mean(result.final["x"])

    with jax.enable_x64(dtype == "float64"):
        compiled = bk.testing.compile_for("sm_80", run, jax.ShapeDtypeStruct((64,), dtype))
    assert compiled.cost["registers"] > 0


@needs.triton
def test_a_function_that_calls_no_kernel_is_refused():
    with pytest.raises(bk.Unsupported, match='implementation="triton"'):
        bk.testing.compile_for("sm_80", lambda C: C + 1, LANES)


# Through jax-triton -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a machine whose platform is a GPU."""
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")


def test_jax_triton_lowers_a_gradient_to_two_calls(on_gpu, monkeypatch):
    try:
        from jax_triton import triton_lib
    except ImportError as error:
        pytest.skip(f"jax-triton needs JAX's plugin for CUDA: {str(error).splitlines()[0]}")
    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "get_compute_capability", lambda device: 80)
    traced = jax.jit(jax.grad(lambda C: power(C, steps=100))).trace(LANES)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @triton_kernel_call") == 2


def test_it_is_chosen_on_a_gpu_that_mosaic_does_not_reach(on_gpu, monkeypatch):
    monkeypatch.setattr(_jax, "compute_capability", lambda: 8.0)
    monkeypatch.setattr(mosaic_gpu, "compute_capability", lambda: 8.0)
    monkeypatch.setattr(versions, "version_of", {"jax-triton": "0.3.1", "triton": "3.9.0"}.get)
    plan = bk.explain(bk.JansenRit(), 1000, 0.1 * u.ms)
    assert plan.implementation == "triton"
    monkeypatch.setattr(versions, "version_of", lambda name: None)
    plan = bk.explain(bk.JansenRit(), 1000, 0.1 * u.ms)
    assert plan.implementation == "scan"
    assert "brainmass-kernels[triton]" in plan.passed_over["triton"]
    monkeypatch.setattr(versions, "version_of", {"jax-triton": "0.3.1", "triton": "3.9.0"}.get)
    monkeypatch.setattr(_jax, "compute_capability", lambda: 7.5)
    with pytest.raises(bk.Unsupported, match=r"8\.0 \(Ampere\)"):
        bk.simulate(bk.JansenRit(), 10, 0.1 * u.ms, implementation="triton")


def test_a_machine_without_a_gpu_is_told_of_the_interpreter():
    with pytest.raises(bk.Unsupported, match=r"testing\.interpret"):
        bk.simulate(bk.JansenRit(), 10, 0.1 * u.ms, implementation="triton")


SIZES = [(1, 4, 1, 1), (1000, 4, 1, 1), (70_000, 4, 4, 1), (10**6, 4, 4, 4), (10**6, 1, 4, 1)]


@pytest.mark.parametrize(("lanes", "most", "warps", "vec"), SIZES)
def test_lanes_fill_the_multiprocessors_first(lanes, most, warps, vec):
    layout = triton.Layout.choose(lanes, most)
    assert (layout.warps, layout.vec) == (warps, vec)
    assert layout.blocks * layout.width >= lanes > (layout.blocks - 1) * layout.width


@needs.triton
def test_random_words_in_assembly():
    """The instructions of the hardware's `threefry`, one by one, on Python integers."""
    from brainmass_kernels.backends.triton.runtime import _threefry_ptx

    mask, rng = 0xFFFFFFFF, np.random.default_rng(3)
    words = rng.integers(-(2**31), 2**31, (4, 20), dtype=np.int64).astype(np.int32)
    want = np.stack(noise.threefry(*map(jnp.asarray, words)))
    for lane in range(20):
        registers = {f"${k + 2}": int(x) & mask for k, x in enumerate(words[:, lane])}
        declaration, *instructions, _ = _threefry_ptx().strip("{} ").split(";")
        assert declaration.startswith(".reg .b32")
        for line in instructions:
            name, target, *operands = line.replace(",", " ").split()
            a, *more = [registers[x] if x in registers else int(x) & mask for x in operands]
            registers[target] = {
                "mov.b32": lambda a: a,
                "xor.b32": lambda a, b: a ^ b,
                "add.s32": lambda a, b: (a + b) & mask,
                "shf.l.wrap.b32": lambda a, b, by: ((b << by) | (a >> (32 - by))) & mask,
            }[name](a, *more)
        assert [registers["$0"], registers["$1"]] == [int(x) & mask for x in want[:, lane]]
