"""Runs of more steps than 32 bits count: in parts with the bits of one run, whose noise goes on; or a clear refusal."""

import contextlib

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import memory, noise, recording, run
from brainmass_kernels.blocks import run_in_parts

INTERPRETED = ("triton", "mosaic_gpu", "mosaic_tpu")
EACH = [
    "scan",
    pytest.param("numba", marks=needs.numba),
    pytest.param("triton", marks=needs.interpreter),
    pytest.param("mosaic_gpu", marks=needs.mosaic_gpu),
    "mosaic_tpu",
]
LONG = 2**31 + 12_345
SIGMA = u.Hz * u.second**0.5


@bk.model
class Last(bk.Model):
    """By Euler's steps of 1 ms a state is what drove it in the last step."""

    a: object = 1000.0 * u.Hz

    states = {"x": u.UNITLESS}
    inputs = {"drive": 0.0 * u.Hz}

    @staticmethod
    def drift(s, p, i):
        return {"x": i.drive - p.a * s.x}


def interpreted(implementation: str):
    return bk.testing.interpret() if implementation in INTERPRETED else contextlib.nullcontext()


@pytest.fixture
def parted(monkeypatch):
    """Kernels count to 30, and a longer run is taken in parts of 16 steps."""

    @contextlib.contextmanager
    def shorten():
        bk.clear_caches()
        with monkeypatch.context() as changed:
            changed.setattr(run, "COUNTED", 30)
            changed.setattr(run, "PART", 16)
            yield
        bk.clear_caches()

    return shorten


def both(parted, call):
    """What a call returns of a run in one go, and of one in parts."""
    whole = call()
    with parted():
        return whole, call()


def values(result):
    return [*map(u.get_magnitude, (*result.values(), *result.final.values()))]


def jansen_rit(implementation, **arguments):
    steps = 75
    drive = np.linspace(80.0, 200.0, steps, dtype="float32")
    arguments = {"every": 4, "transient": 7, "record": ["eeg", "M"], **arguments}
    with interpreted(implementation):
        return bk.simulate(
            bk.JansenRit(C=jnp.asarray([120.0, 135.0, 150.0])), steps, 0.5 * u.ms, inputs={"E_inp": drive * u.Hz},
            noise={"E_inp": 3.0 * SIGMA}, key=jax.random.key(2), implementation=implementation, **arguments,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", EACH[:2])
@pytest.mark.parametrize("every", [4, 20])
def test_parts_have_the_bits_of_one_run(implementation, every, parted):
    """With a transient, inputs and noise; records lie within a part, and further apart than its ends."""
    whole, found = both(parted, lambda: values(jansen_rit(implementation, every=every)))
    for a, b in zip(found, whole, strict=True):
        if implementation == "scan":  # which XLA compiles anew
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
        else:
            np.testing.assert_array_equal(a, b)


@needs.numba
def test_statistics_in_parts(parted, monkeypatch):
    """A block of records is longer than a part."""
    monkeypatch.setattr(recording, "BLOCK", 1)
    record = {"mean": bk.Mean(of="eeg"), "eeg": "eeg"}
    whole, found = both(parted, lambda: values(jansen_rit("numba", record=record, every=1)))
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", EACH[:2])
def test_gradients_in_parts(implementation, parted):
    def slopes():
        def loss(rate, drive):
            result = bk.simulate(
                Last(a=rate * u.Hz), 75, 1.0 * u.ms, inputs={"drive": drive * u.Hz}, noise={"drive": 3.0 * SIGMA},
                key=jax.random.key(2), transient=3, every=5, record=["x"], implementation=implementation,
            )  # fmt: skip
            return jnp.sum(result["x"] ** 2) + jnp.sum(result.final["x"] ** 3)

        return jax.grad(loss, (0, 1))(jnp.asarray([30.0, 50.0]), jnp.linspace(1.0, 60.0, 75))

    for a, b in zip(*both(parted, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * np.abs(b).max())


@needs.numba
def test_sensitivities_and_networks_in_parts(parted):
    def slopes():
        arguments = {"noise": {"drive": 3.0 * SIGMA}, "key": jax.random.key(2), "record": ["x"], "every": 3}
        result, by = bk.sensitivities(
            Last(a=jnp.asarray([30.0, 50.0]) * u.Hz), 75, 1.0 * u.ms, "a", implementation="numba", **arguments
        )  # fmt: skip
        return [*values(result), *values(by["a"])]

    def coupled():
        network = bk.Network(
            bk.JansenRit(), np.ones((3, 3)) - np.eye(3), k=10.0 * u.Hz / u.mV, source="eeg", target="E_inp",
            delays=np.arange(9).reshape(3, 3) % 5 * u.ms,
        )  # fmt: skip
        result = bk.simulate(
            network, 75, 1.0 * u.ms, noise={"E_inp": 3.0 * SIGMA}, key=jax.random.key(2), implementation="numba"
        )
        return values(result)

    for call in (slopes, coupled):
        for a, b in zip(*both(parted, call), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


# Beyond 32 bits -----------------------------------------------------------------------------------------------------


def far_on(implementation: str, first: int, parts: int, monkeypatch):
    """The normals of 8 steps from the ``first`` on, as a run that is so far on draws them, in some parts."""

    def later(launch, most, rerun, schedule, carry, rows, _):
        return run_in_parts(launch, 8 // parts, rerun, schedule, carry, rows, noise.StepNumber.of(first))

    bk.clear_caches()
    with monkeypatch.context() as changed, interpreted(implementation):
        changed.setattr(run, "COUNTED", 7)
        changed.setattr(run, "run_in_parts", later)
        result = bk.simulate(
            Last(), 8, 1.0 * u.ms, noise={"drive": np.full(3, 1000.0**0.5, "float32") * SIGMA}, key=jax.random.key(9),
            record=["x"], scheme="euler", implementation=implementation,
        )  # fmt: skip
    bk.clear_caches()
    return np.asarray(result["x"])


@pytest.mark.parametrize("implementation", EACH[:4])  # in the interpreter for TPUs, kernel_suite's cases are enough
@pytest.mark.parametrize("first", [2**31 - 3, 2**32 - 3, 2**40 - 4], ids=["2^31", "2^32", "2^40"])
def test_noise_goes_on_across(implementation, first, monkeypatch):
    """As `noise.normals` has it of each step, and whatever the parts are."""
    seeds = noise.lane_seeds(jax.random.key(9), (3,))
    draw = jax.jit(lambda first: noise.normals(noise.numbered(seeds, first, wide=True), 0, 1)[0])
    want = np.stack([draw(noise.StepNumber.of(first + k)) for k in range(8)])
    found = far_on(implementation, first, 4, monkeypatch)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6)
    if implementation != "scan":
        np.testing.assert_array_equal(far_on(implementation, first, 2, monkeypatch), found)


@pytest.mark.parametrize("implementation", EACH)
@pytest.mark.parametrize("steps", [2**31 - 1, 2**31, LONG, 2**40])
def test_any_number_of_steps_is_planned_and_traced(implementation, steps):
    """No counter overflows, of however many steps, with noise, statistics and a transient."""
    arguments = {
        "noise": {"drive": 1.0 * SIGMA}, "key": jax.random.key(0), "every": steps // 8, "transient": 5,
        "record": {"x": "x", "mean": bk.Mean(of="x")}, "implementation": implementation,
    }  # fmt: skip
    with interpreted(implementation):
        assert bk.explain(Last(), steps, 1.0 * u.ms, **arguments).steps == steps
        shapes = jax.eval_shape(lambda a: dict(bk.simulate(Last(a=a * u.Hz), steps, 1.0 * u.ms, **arguments)), 20.0)
    assert u.get_magnitude(shapes["x"]).shape[0] == (steps - 5) // (steps // 8)


@pytest.mark.parametrize("implementation", EACH[:2])
def test_a_run_beyond_31_bits(implementation, x64):
    """A state that counts its steps."""

    @bk.model
    class Count(bk.Model):
        states = {"x": u.UNITLESS}
        inputs = {"drive": 0.0 * u.Hz}

        @staticmethod
        def drift(s, p, i):
            return {"x": i.drive}

    result = bk.simulate(
        Count(), LONG, 1.0 * u.ms, inputs={"drive": np.float64(1000.0) * u.Hz}, record=["x"], every=2**30, transient=7,
        scheme="euler", implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(result["x"], [7 + 2**30, 7 + 2**31])
    assert float(result.final["x"]) == LONG


def test_more_records_than_a_statistic_counts_are_refused():
    record = {"record": bk.Mean(of="x"), "implementation": "scan"}
    for call in (bk.explain, bk.simulate):
        with pytest.raises(ValueError, match=r"'record' got a statistic of 2,147,495,993 records, but takes at most "
                                             r"2,147,483,647: every=2 or more .*initial=result\.final"):  # fmt: skip
            call(Last(), LONG, 1.0 * u.ms, **record)
    assert bk.explain(Last(), LONG, 1.0 * u.ms, every=2, **record).records == LONG // 2


def test_noise_on_more_than_the_counter_has_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(noise, "STREAM_BITS", 0)
    arguments = {"noise": {"drive": 1.0 * SIGMA, "x": 1.0 / u.second**0.5}, "key": jax.random.key(0), "every": 2**30}
    assert bk.explain(Last(), 2**31 - 1, 1.0 * u.ms, **arguments).steps == 2**31 - 1
    with pytest.raises(
        ValueError, match=r"'noise' got 2 names, but takes at most 1 in a run of more than 2,147,483,647"
    ):
        bk.explain(Last(), 2**31, 1.0 * u.ms, **arguments)


@pytest.mark.parametrize("implementation", EACH[:2])
def test_records_and_gradients_beyond_memory_are_named_before_anything_runs(implementation, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**9)

    def simulate(a, **arguments):
        arguments = {"record": ["x"], "implementation": implementation, **arguments}
        return bk.simulate(Last(a=a * u.Hz), LONG, 1.0 * u.ms, **arguments)

    with pytest.raises(MemoryError, match=r"recording x needs .* bytes \(2,147,495,993 records .*every=\d+ or more"):
        simulate(20.0)
    if implementation != "scan":  # which JAX differentiates itself, if it is asked for by name
        with pytest.raises(MemoryError, match=r"a gradient over 2,147,495,993 steps .* bytes .*checkpoints every"):
            jax.grad(lambda a: jnp.sum(simulate(a, every=2**30)["x"]))(jnp.full(20_000, 20.0))
