"""fuse() of masses that read their own past, against brainmass.Simulator's run of the same object."""

import warnings

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk

brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
init = pytest.importorskip("braintools").init

DT = 0.1 * u.ms
DELAYS = {"delay_EE": 2.0, "delay_IE": 1.0, "delay_EI": 1.5, "delay_II": 0.0}


@pytest.fixture(autouse=True)
def _strict():
    """In place of the suite's: brainmass leans on implicit promotion, and its steps are traced as they are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Called(brainstate.nn.Module):
    """A module that calls its mass, which writes the delays, as `brainmass.Simulator` does not."""

    def __init__(self, mass):
        super().__init__()
        self.mass = mass

    def update(self, *inputs):
        return self.mass(*inputs)


def mass(wEE=(10.0, 12.0, 13.0), n=3, **options):
    delays = {name: x * u.ms for name, x in DELAYS.items()} | options
    with brainstate.environ.context(dt=DT):
        start = {"rE_init": init.Constant(0.1), "rI_init": init.Constant(0.05)}
        return brainmass.WilsonCowanDelayedStep(n, wEE=jnp.asarray(wEE), **start, **delays)


def inputs(i, t):
    return 1.0 + 0.3 * jnp.sin(0.5 * t / u.ms), 0.2


def both(model, durations, rtol, implementation="scan", **arguments):
    """Runs one after the other: results, and all states with the entries of the delays, agree. Returns the results."""
    found = []
    for run in (brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation=implementation)):
        found.append([])
        for k, duration in enumerate(durations):
            result = run.run(duration, init_states=k == 0, inputs=inputs, **arguments)
            found[-1].append((result, {p: s.value for p, s in model.states(brainstate.ShortTermState).items()}))
    want, got = found
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-300))
    return [result for result, _ in got]


def test_in_float64_and_from_where_a_run_ended(x64):
    """The second run is shorter than the longest delay."""
    with brainstate.environ.context(precision=64):
        first, _ = both(Called(mass()), [6 * u.ms, 1.1 * u.ms], 1e-12)
    assert first["output"].shape == (60, 3)
    assert np.ptp(first["output"]) > 0.1


@needs.numba
def test_by_numba_in_float32_with_a_transient():
    both(Called(mass()), [6 * u.ms], 1e-5, "numba", transient=5, sample_every=3, monitors=lambda m: m.mass.rI.value)


def test_entries_that_nobody_reads():
    """The buffer is longer than the longest delay: the last steps are recorded one by one."""
    model = Called(mass())
    with brainstate.environ.context(dt=DT):
        model.mass.prefetch_delay("rE", 4.0 * u.ms)
    both(model, [6 * u.ms], 1e-5)


def test_a_gradient(x64):
    with brainstate.environ.context(precision=64):

        def loss(engine, wEE):
            run = engine(Called(mass(wEE)), DT).run(4 * u.ms, inputs=inputs)
            return jnp.sum(run["output"] ** 2)

        want, got = (
            jax.grad(lambda x, engine=engine: loss(engine, x))(jnp.array([10.0, 12.0, 13.0]))
            for engine in (brainmass.Simulator, lambda model, dt: bk.fuse(model, dt, implementation="scan"))
        )
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_as_the_simulator_runs_it():
    """It calls `update`, which writes no delay: what is late stays as it began, and this is said."""
    with pytest.warns(RuntimeWarning, match="reads the delay of 'rE' and 'rI', and writes nothing to it"):
        (run,) = both(mass(), [3 * u.ms], 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called = bk.fuse(Called(mass()), DT, implementation="scan").run(3 * u.ms, inputs=inputs)
    assert np.abs(np.asarray(called["output"]) - np.asarray(run["output"])).max() > 0.01


def test_what_is_refused():
    def late(model):
        return model.mass.delay_rE_to_E()

    with pytest.raises(bk.Unsupported, match=r"reads the delay '.*'"):
        bk.fuse(Called(mass()), DT).run(1 * u.ms, monitors=late)

    class Twice(Called):
        def update(self, *inputs):
            self.mass(*inputs)
            return self.mass(*inputs)

    with pytest.raises(bk.Unsupported, match=r"reads the delay of 'mass\.rE' after its update"):
        bk.fuse(Twice(mass()), DT).run(1 * u.ms)

    class ByIndex(Called):
        def __init__(self, mass):
            super().__init__(mass)
            with brainstate.environ.context(dt=DT):
                self.late = mass.prefetch_delay("rE", np.array([1.0, 2.0, 1.0]) * u.ms, np.arange(3))

        def update(self):
            return self.mass(self.late(), 0.0)

    with pytest.raises(bk.Unsupported, match=r"reads the delay '.*', and a fused step depends on the"):
        bk.fuse(ByIndex(mass()), DT).run(1 * u.ms)

    class Coupled(Called):
        def __init__(self, mass):
            super().__init__(mass)
            with brainstate.environ.context(dt=DT):
                far = mass.prefetch_delay("rE", (np.ones((3, 3)) * u.ms, np.tile(np.arange(3), (3, 1))))
            self.coupling = brainmass.AdditiveCoupling(far, np.ones((3, 3)))

        def update(self):
            return self.mass(self.coupling())

    with pytest.raises(bk.Unsupported, match=r"Coupled reads the delay '.*', and a fused step depends on the"):
        bk.fuse(Coupled(mass()), DT).run(1 * u.ms)
