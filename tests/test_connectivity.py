"""Statistics of all regions of a network, and signals, against numpy and scipy on the stored trajectory."""

import re
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

import brainmass_kernels as bk
from brainmass_kernels import recording, signals, spectra

REGIONS, NETWORKS, INTERVAL = 4, 2, 1e-3
WEIGHTS = np.random.default_rng(0).uniform(0.1, 1.0, (REGIONS, REGIONS))
KERNEL = bk.HRF((1.2, -0.2), (6.0, 16.5), 2 * u.ms, 40 * u.ms)
RECORD = {
    "x": "x",
    "y": "y",
    "covariance": bk.Covariance(),
    "fc": bk.Correlation(of="y"),
    "fcd": bk.FCD(31 * u.ms, 7 * u.ms),
    "apart": bk.FCD(3 * u.ms, 7 * u.ms, of="y"),
    "even": bk.FCD(14 * u.ms, 7 * u.ms),
    "convolved": bk.Convolved(KERNEL),
    "bold": bk.Convolved(KERNEL, tr=5 * u.ms, before="first"),
    "fc_of_bold": bk.Correlation(of=bk.Convolved(KERNEL, tr=5 * u.ms)),
    "mean": bk.Mean(of=bk.Average(5 * u.ms)),
    "fir": bk.Convolved([0.5, 0.25, 0.25]),
}


def network(k=((0.1,), (0.2,)), w=(0.3, 0.5, 0.6, 0.45)):
    model = bk.Hopf(w=jnp.asarray(w, jnp.result_type(float)), a=0.1)
    return bk.Network(model, WEIGHTS, source="x", k=jnp.asarray(k), delays=2 * u.ms, target="x_inp")


def simulate(record, steps=333, model=None, **more):
    """By default 313 records of two networks, with a transient and noise."""
    arguments = {"noise": {"x": 0.3 / u.ms**0.5}, "key": jax.random.key(0), "transient": 20, "implementation": "scan"}
    model = network() if model is None else model
    return bk.simulate(model, steps, 1 * u.ms, record=record, **{**arguments, **more})


@pytest.fixture(scope="module")
def run():
    """All statistics, and what they are of, in blocks of 35 records."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        patch.setattr(recording, "BLOCK", 1)
        assert bk.explain(network(), 333, 1 * u.ms, record=RECORD, transient=20).block == 35
        return simulate(RECORD)


def dynamics(x, window: int, step: int):
    """Of one network, ``(T, N)``."""
    above = np.triu_indices(x.shape[1], 1)
    windows = [np.corrcoef(x[a : a + window].T)[above] for a in range(0, len(x) - window + 1, step)]
    return np.corrcoef(windows)


def convolved(x, taps):
    """Each lane of ``(T, ...)``."""
    return np.apply_along_axis(lambda lane: np.convolve(lane, taps)[: len(lane)], 0, x)


def assert_near(got, want, tolerance=1e-12):
    got, want = np.asarray(u.get_magnitude(got)), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * abs(want).max())


class TestAgainstTheTrajectory:
    def test_covariance_and_correlation(self, run):
        x, y = (np.asarray(run[name]) for name in "xy")
        assert_near(run["covariance"], [np.cov(x[:, i].T, bias=True) for i in range(NETWORKS)])
        assert_near(run["fc"], [np.corrcoef(y[:, i].T) for i in range(NETWORKS)])
        with jax.enable_x64(True):
            assert_near(run["fc"], spectra.correlation(y))

    @pytest.mark.parametrize(("name", "of", "window"), [("fcd", "x", 31), ("apart", "y", 3), ("even", "x", 14)])
    def test_dynamics(self, run, name, of, window):
        x = np.asarray(run[of])
        want = np.stack([dynamics(x[:, i], window, 7) for i in range(NETWORKS)])
        assert want.shape[1] == (313 - window) // 7 + 1
        assert_near(run[name], want, 1e-12 if window > 3 else 1e-10)  # the correlations of three records are nearly 1

    def test_dynamics_of_a_stored_signal(self, run, x64):
        assert_near(spectra.fcd(run["x"], 1 * u.ms, 31 * u.ms, 0.007), run["fcd"])

    def test_convolutions(self, run):
        x, taps = np.asarray(run["x"]), KERNEL.taps(INTERVAL)
        assert len(taps) == 40
        assert_near(run["convolved"], convolved(x, taps))
        held = convolved(np.concatenate([np.repeat(x[:1], 40, 0), x]), taps)[40:]
        assert_near(run["bold"], held[4::5])
        assert_near(run["fir"], convolved(x, [0.5, 0.25, 0.25]))
        np.testing.assert_allclose(run.axes["bold"] / u.ms, 20 + 5 * np.arange(1, 63))

    def test_statistics_of_signals(self, run):
        x = np.asarray(run["x"])
        bold = convolved(x, KERNEL.taps(INTERVAL))[4::5]
        assert_near(run["fc_of_bold"], [np.corrcoef(bold[:, i].T) for i in range(NETWORKS)])
        assert_near(run["mean"], x[:310].mean(0))

    def test_names_and_units(self):
        record = [
            bk.Covariance(of="eeg"), bk.Correlation(), bk.FCD(3 * u.ms, 1 * u.ms, of="M"),
            bk.Spectrum([100.0], of=bk.Average(2 * u.ms, of="Mv")), bk.Convolved(KERNEL),
        ]  # fmt: skip
        model = bk.Network(bk.JansenRit(), np.ones((3, 3)), source="eeg", k=1 * u.Hz / u.mV, target="E_inp")
        found = bk.simulate(model, 12, 1 * u.ms, record=record, implementation="scan")
        names = ["eeg_covariance", "eeg_correlation", "M_fcd", "Mv_average_spectrum", "eeg_convolved"]
        assert list(found) == names
        assert found["eeg_covariance"].unit.has_same_dim(u.mV**2)
        assert found["Mv_average_spectrum"].unit.has_same_dim((u.mV / u.second) ** 2 / u.Hz)
        assert found["eeg_convolved"].unit.has_same_dim(u.mV)
        assert not isinstance(found["M_fcd"], u.Quantity)

    @pytest.mark.slow
    @pytest.mark.parametrize("implementation", [pytest.param("numba", marks=needs.numba)])
    def test_on_another_implementation(self, monkeypatch, x64, implementation):
        monkeypatch.setattr(recording, "BLOCK", 1)
        record = {n: RECORD[n] for n in ("x", "covariance", "fc_of_bold")}
        found = simulate(record, implementation=implementation)
        x = np.asarray(found["x"])
        assert_near(found["covariance"], [np.cov(x[:, i].T, bias=True) for i in range(NETWORKS)])
        bold = convolved(x, KERNEL.taps(INTERVAL))[4::5]
        assert_near(found["fc_of_bold"], [np.corrcoef(bold[:, i].T) for i in range(NETWORKS)])

    @pytest.mark.slow
    @pytest.mark.parametrize("implementation", ["mosaic_tpu", pytest.param("triton", marks=needs.interpreter)])
    def test_within_a_kernel(self, monkeypatch, implementation):
        monkeypatch.setattr(recording, "BLOCK", 1)
        record = {n: RECORD[n] for n in ("covariance", "fc_of_bold")}
        with bk.testing.interpret():
            found = simulate(record, 90, implementation=implementation)
        for name, want in simulate(record, 90).records.items():
            assert_near(found[name], want, 1e-4)

    def test_of_a_group(self):
        model = bk.Network(
            {"relay": (bk.Hopf(), 1), "cortex": (bk.JansenRit(), 3)},
            couplings=[bk.Coupling(WEIGHTS, k=1.0 * u.Hz / u.mV, source="cortex.eeg", target="cortex.E_inp")],
        )  # fmt: skip
        record = {
            "eeg": "cortex.eeg", "fc": bk.Correlation(of="cortex.eeg"), "c": bk.Convolved([0.0, 1.0], of="cortex.eeg"),
        }  # fmt: skip
        more = {"key": jax.random.key(1), "noise": {"cortex.E_inp": 30.0 * u.Hz * u.second**0.5}}
        inputs = {"cortex.E_inp": 220.0 * u.Hz}
        found = bk.simulate(model, 60, 1 * u.ms, record=record, inputs=inputs, implementation="scan", **more)
        eeg = np.asarray(found["eeg"].mantissa, float)
        assert_near(found["fc"], np.corrcoef(eeg.T), 2e-5)
        assert_near(found["c"], np.concatenate([np.zeros((1, 3)), eeg[:-1]]), 1e-6)


class TestOnItsOwn:
    """Statistics of given records, without a run."""

    def of(self, what, x, block, unit=u.UNITLESS):
        """Of ``x`` ``(T, N)``, in blocks."""
        bound = signals.bind(what, {"x": unit}, lambda name: None, [])
        sampling = recording.Sampling(len(x), INTERVAL, block, x.shape[1])
        assert block % signals.check(bound, sampling) == 0

        def reduced(x):
            chain = signals.chain_of(bound, sampling)
            carries, stored = chain.start(x[0]), []
            for first in range(0, len(x), block):
                carries, values = chain.add(carries, x[first : first + block], first, ())
                stored.append(values)
            return jnp.concatenate(stored) if chain.last is None else chain.finish(carries)

        return jax.jit(reduced), reduced

    def test_a_large_offset_costs_no_digits(self):
        """In float32, of numbers whose squares are a million times their variance."""
        rng = np.random.default_rng(1)
        x = (1000.0 + rng.normal(0.0, 1.0, (4000, 3)) @ rng.normal(0.0, 1.0, (3, 3))).astype(np.float32)
        exact = x.astype(float)
        wants = {
            bk.Covariance(): np.cov(exact.T, bias=True),
            bk.Correlation(): np.corrcoef(exact.T),
            bk.FCD(900 * u.ms, 500 * u.ms): dynamics(exact, 900, 500),
        }
        for what, want in wants.items():
            assert_near(self.of(what, x, 1000)[0](jnp.asarray(x)), want, 2e-5)
        bold = self.of(bk.Correlation(of=bk.Convolved(KERNEL, tr=10 * u.ms)), x, 1000)[0](jnp.asarray(x))
        taps = KERNEL.taps(INTERVAL)
        assert_near(bold, np.corrcoef(convolved(exact, taps)[9::10].T), 1e-5)

    @pytest.mark.parametrize(
        "what",
        [
            pytest.param(bk.Covariance(), marks=pytest.mark.slow),
            bk.Correlation(),
            pytest.param(bk.FCD(20 * u.ms, 8 * u.ms), marks=pytest.mark.slow),
            bk.Convolved(KERNEL, tr=4 * u.ms, before="first"),
            pytest.param(bk.Correlation(of=bk.Convolved(KERNEL)), marks=pytest.mark.slow),
            bk.Variance(of=bk.Average(4 * u.ms)),
        ],
        ids=lambda what: f"{type(what).__name__} of {type(what.of).__name__}",
    )
    def test_gradients(self, x64, what):
        x = jnp.asarray(np.random.default_rng(2).normal(0.0, 1.0, (71, 3)).cumsum(0))
        fun = self.of(what, x, 24)[1]

        def total(x):
            values = fun(x)
            return jnp.sum(jnp.sin(jnp.arange(values.size, dtype=float)).reshape(values.shape) * values)

        total = jax.jit(total)
        slope, by = jax.grad(total)(x), 1e-5 * np.random.default_rng(3).normal(0.0, 1.0, x.shape)
        want = (total(x + by) - total(x - by)) / 2
        assert float(jnp.sum(slope * by)) == pytest.approx(float(want), rel=1e-6)

    @pytest.mark.slow
    def test_a_region_at_rest(self, x64):
        """Its correlations are 0, and so are their gradients; a window in which all rest is like no other."""
        x = np.random.default_rng(4).normal(0.0, 1.0, (40, 3))
        x[:, 1] = 0.1
        fun = self.of(bk.Correlation(), x, 10)[1]
        found = fun(jnp.asarray(x))
        assert_near(found, spectra.correlation(x))
        assert (np.asarray(found)[1] == 0).all()
        assert np.isfinite(jax.grad(lambda x: jnp.sum(fun(x)))(jnp.asarray(x))).all()
        x[:20] = 0.1
        found = np.asarray(self.of(bk.FCD(10 * u.ms, 10 * u.ms), x, 10)[0](jnp.asarray(x)))
        np.testing.assert_array_equal(found[:2], 0.0)
        assert found[2, 2] == pytest.approx(1.0)

    @pytest.mark.parametrize("per", [1, 3, 50])
    def test_a_convolution_in_parts(self, monkeypatch, x64, per):
        monkeypatch.setattr(recording, "TABLE", 400)
        x = np.random.default_rng(5).normal(3.0, 1.0, (407, 2))
        taps = np.random.default_rng(6).normal(0.0, 1.0, 29)
        found = self.of(bk.Convolved(taps, tr=per * u.ms), x, 300)[0](jnp.asarray(x))
        assert_near(found, convolved(x, taps)[per - 1 :: per], 1e-11)


class TestKernels:
    def test_densities(self):
        t = np.linspace(0.0, 40.0, 4001)
        inside = t < 32.0
        for kernel, want in {
            bk.HRF.canonical(): 1.2 * scipy.stats.gamma.pdf(t, 6) - 0.2 * scipy.stats.gamma.pdf(t, 16),
            bk.HRF.gamma(): scipy.stats.gamma.pdf(t, 3, scale=1.08),
            bk.HRF.gamma(1.0, 2 * u.second): scipy.stats.gamma.pdf(t, 1, scale=2.0),
            bk.HRF.mixture(): scipy.stats.gamma.pdf(t, 6) - 0.4 * scipy.stats.gamma.pdf(t, 13),
            bk.HRF((1.0, 2.0), (2.5, 3.0), [1.0, 0.5] * u.second): (
                scipy.stats.gamma.pdf(t, 2.5) + 2.0 * scipy.stats.gamma.pdf(t, 3, scale=0.5)
            ),
        }.items():
            np.testing.assert_allclose(kernel(t * u.second), np.where(inside, want, 0.0), rtol=1e-10, atol=1e-15)
        assert bk.HRF.canonical().taps(0.01).sum() == pytest.approx(1.0, abs=1e-3)
        assert bk.HRF.canonical()(-1.0) == 0.0

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: bk.HRF((1.0, 2.0), 3.0, 1 * u.second), "take one value for each gamma density"),
            (lambda: bk.HRF.gamma(0.5), "'shapes' got [0.5], but takes numbers from 1 on"),
            (lambda: bk.HRF.gamma(scale=0 * u.second), "'scales' got [0.] s, but takes positive times"),
            (lambda: bk.HRF.gamma(scale=1 * u.mV), "'scales' got mV, but takes s"),
            (lambda: bk.HRF.gamma(scale=1.0), "'scales' got a plain float (no unit), but takes s"),
            (lambda: bk.HRF.canonical(length=-1 * u.second), "'length' got -1 s, but takes a positive time"),
            (lambda: bk.HRF(np.nan, 3.0, 1 * u.second), "'weights' got [nan], but takes finite numbers"),
            (lambda: bk.Convolved([]), "'kernel' got weights of shape (0,), but takes (M,) finite ones"),
            (lambda: bk.Convolved(KERNEL, before="last"), "'before' got 'last', but takes 'zero' or 'first'"),
            (lambda: bk.Convolved(KERNEL, tr=5), "'tr' got a plain int (no unit), but takes s"),
            (lambda: bk.FCD(5, 1 * u.ms), "'window' got a plain int (no unit), but takes s"),
            (lambda: bk.FCD(5 * u.ms, 0 * u.ms), "'step' got 0 ms, but takes a positive time"),
        ],
    )
    def test_what_is_refused(self, make, says):
        with pytest.raises(ValueError, match=re.escape(says)):
            make()

    @pytest.mark.parametrize("kernel", ["hrf", [1.0] * u.mV, None])
    def test_no_kernel(self, kernel):
        with pytest.raises(TypeError, match=r"'kernel' got \w+, but takes a bk\.HRF, or weights of the records"):
            bk.Convolved(kernel)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (bk.FCD(400 * u.ms, 7 * u.ms), "'window' got 0.4 s, longer than the 0.313 s recorded"),
        (bk.FCD(30.5 * u.ms, 7 * u.ms), "'window' got 0.0305 s, but takes a whole multiple of the time between"),
        (bk.FCD(30 * u.ms, 0.5 * u.ms), "'step' got 0.0005 s, but takes a whole multiple of the time between records"),
        (bk.FCD(300 * u.ms, 50 * u.ms), "'step' got 0.05 s, which leaves one window of 0.3 s in the 0.313 s recorded"),
        (bk.FCD(1 * u.ms, 1 * u.ms), "'window' got 0.001 s, one record, but takes two or more"),
        (bk.Covariance(of="z"), "unknown record 'z'"),
        (bk.Correlation(of=bk.Convolved(KERNEL, of="z")), "unknown record 'z'"),
        (bk.Convolved(KERNEL, tr=2.5 * u.ms), "'tr' got 0.0025 s, but takes a whole multiple of the time between"),
        (bk.Convolved(KERNEL, tr=1 * u.second), "'tr' got 1 s, longer than the 0.313 s recorded"),
        (bk.Convolved(bk.HRF.canonical(length=0.5 * u.ms)), "shorter than the time between records, 0.001 s"),
        (bk.Correlation(of=bk.Average(300 * u.ms)), "Correlation needs two records or more, and this run has 1"),
        (bk.FCD(90 * u.ms, 20 * u.ms, of=bk.Average(30 * u.ms)), "'step' got 0.02 s, but takes a whole multiple"),
    ],
)
def test_what_a_run_cannot_give(record, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        simulate(record)


@pytest.mark.parametrize(
    ("what", "regions", "says"),
    [
        (bk.Covariance(), 0, "'record' got Covariance of a model without a network, but"),
        (bk.Correlation(), 1, "'record' got Correlation of a network of one region, but"),
        (bk.FCD(3 * u.ms, 1 * u.ms), 2, "'record' got FCD of a network of 2, but FCD takes three regions or more"),
        (bk.FCD(3 * u.ms, 1 * u.ms), 0, "'record' got FCD of a model without a network"),
    ],
)
def test_too_few_regions(what, regions, says):
    model = bk.Hopf()
    if regions:
        model = bk.Network(bk.Hopf(), np.ones((regions, regions)), source="x", k=0.1, target="x_inp")
    with pytest.raises(ValueError, match=re.escape(says)):
        bk.simulate(model, 20, 1 * u.ms, record=what)


def test_of_something_else():
    with pytest.raises(TypeError, match=r"'of' of Correlation got Mean, but takes a name, or a signal: bk\.Readout"):
        simulate(bk.Correlation(of=bk.Mean()))


# Within programs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gradient_through_a_run(monkeypatch, x64):
    monkeypatch.setattr(recording, "BLOCK", 1)
    record = {"fc": bk.Correlation(of=bk.Convolved(KERNEL, tr=5 * u.ms)), "fcd": bk.FCD(31 * u.ms, 7 * u.ms)}
    taps = jnp.asarray(KERNEL.taps(INTERVAL))
    signs = np.sign(np.sin(np.arange(16.0))).reshape(4, 4)

    def in_the_loop(k):
        found = simulate(record, 120, network(k))
        return jnp.sum(found["fc"][0] * signs) + jnp.sum(found["fcd"])

    def stored(k):
        x = simulate("x", 120, network(k))["x"]
        lanes = x.reshape(len(x), -1).T
        bold = jax.vmap(lambda lane: jnp.convolve(lane, taps)[: len(lane)])(lanes).T.reshape(x.shape)[4::5]
        fcd = spectra.fcd(x, 1 * u.ms, 31 * u.ms, 7 * u.ms)
        return jnp.sum(spectra.correlation(bold)[0] * signs) + jnp.sum(fcd)

    k = jnp.array([[0.1], [0.2]])
    (value, slope), (want, expected) = (jax.value_and_grad(fun)(k) for fun in (in_the_loop, stored))
    assert float(value) == pytest.approx(float(want), rel=1e-11)
    np.testing.assert_allclose(slope, expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["run", "gradient"])
def test_memory_does_not_grow_with_time(monkeypatch, gradient):
    monkeypatch.setattr(recording, "BLOCK", 1)
    record = [
        bk.Covariance(), bk.Correlation(of=bk.Convolved(KERNEL, tr=16 * u.ms)), bk.Variance(of=bk.Average(8 * u.ms)),
    ]  # fmt: skip
    networks = 256

    def temporary(steps):
        def fun(k):
            found = bk.simulate(network(k), steps, 1 * u.ms, record=record, implementation="scan", checkpoint_every=32)
            return sum(jnp.sum(x) for x in found.records.values())

        fun = jax.grad(fun) if gradient else fun
        return jax.jit(fun).lower(jnp.zeros((networks, 1))).compile().memory_analysis().temp_size_in_bytes

    # A hundredfold in time: the blocks that a gradient keeps the state of grow as its square root.
    few, many = temporary(640), temporary(64_000)
    assert many < (10.0 if gradient else 1.1) * few
    assert many < (0.2 if gradient else 0.05) * 4 * networks * REGIONS * 64_000


def test_explain_counts_them():
    def recorded(steps, record):
        return bk.explain(network(), steps, 1 * u.ms, record=record, implementation="scan").bytes_recorded

    for record in (bk.Correlation(), bk.Correlation(of=bk.Convolved(KERNEL, tr=16 * u.ms))):
        assert recorded(10**9, record) < 1.05 * recorded(10**8, record)
    # Of an FCD it is the windows that count, not how many records they have.
    at = recording.Sampling(10**8, INTERVAL, 10**6, REGIONS)
    often, longer, seldom = (
        bk.FCD(window * u.second, step * u.second).size(at) for window, step in ((20, 1), (40, 1), (20, 2))
    )
    assert longer == pytest.approx(often, rel=0.01)
    assert often == pytest.approx(2 * seldom, rel=0.01)


@pytest.mark.slow
def test_vmap_and_jit():
    record = [bk.Correlation(), bk.Convolved(KERNEL, tr=5 * u.ms)]
    gains = jnp.array([[[0.1], [0.2]], [[0.15], [0.3]]])

    def run(k):
        return simulate(record, 120, network(k)).records

    mapped = jax.jit(jax.vmap(run))(gains)
    for i in range(2):
        for name, want in run(gains[i]).items():
            assert_near(mapped[name][i], want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=needs.numba)])
def test_over_devices(implementation):
    """Networks lie on eight devices, and nothing is gathered."""
    record = [bk.Correlation(), bk.FCD(9 * u.ms, 4 * u.ms), bk.Convolved([0.5, 0.5], tr=2 * u.ms)]

    def run(k):
        found = bk.simulate(network(k), 40, 1 * u.ms, initial={"x": 0.3}, record=record, implementation=implementation)
        return dict(found.records)

    k = jnp.linspace(0.1, 0.3, 16)[:, None]
    mesh = jax.make_mesh((8,), ("networks",), devices=jax.devices()[:8])
    spread, want = jax.device_put(k, NamedSharding(mesh, PartitionSpec("networks"))), run(k)
    for found in (run(spread), jax.jit(run)(spread)):
        for name, x in want.items():
            assert not found[name].sharding.is_fully_replicated
            np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-4)
    text = jax.jit(run).lower(spread).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)


def test_a_network_that_diverged():
    found = simulate([bk.Covariance(), bk.Convolved(KERNEL, tr=5 * u.ms)], 90, network(k=[[0.1], [1e30]]))
    jax.block_until_ready(found.records)
    with pytest.warns(RuntimeWarning, match="did not stay finite"):
        assert np.isfinite(found["x_covariance"][0]).all()
    assert np.isnan(found["x_covariance"][1]).all()
    assert np.isnan(found["x_convolved"][:, 1]).any(0).all()


def test_no_networks():
    found = simulate([bk.Correlation(), bk.FCD(30 * u.ms, 10 * u.ms)], model=network(k=np.zeros((0, 1))))
    assert {name: x.shape for name, x in found.items()} == {"x_correlation": (0, 4, 4), "x_fcd": (0, 29, 29)}


# Tables, files, figures, sweeps -------------------------------------------------------------------------------------


def test_tables(run):
    pytest.importorskip("xarray")
    data = run.to_xarray(lanes={"k": [0.1, 0.2], "region": list("abcd")})
    assert data["fc"].dims == ("k", "region", "region_2")
    assert [*data["region_2"].values] == list("abcd")
    assert data["fcd"].dims == ("k", "window", "window_2")
    np.testing.assert_allclose(data["window"], 51.0 + 7 * np.arange(41))
    assert data["apart"].dims == ("k", "apart_window", "apart_window_2")
    assert data["bold"].dims == ("bold_time", "k", "region")
    table = run.to_dataframe("fc", lanes={"k": [0.1, 0.2], "region": list("abcd")})
    assert table.index.names == ["k", "region", "region_2"]
    assert table.loc[(0.2, "a", "c"), "fc"] == float(run["fc"][1, 0, 2])
    assert run.to_dataframe("bold").index.name == "bold_time (ms)"
    with pytest.raises(ValueError, match=r"several axes \(x by time, fcd by window and window_2\)"):
        run.to_dataframe(["x", "fcd"])


def test_to_disk_and_back(tmp_path, run):
    run.save(tmp_path / "r.npz")
    read = bk.Result.load(tmp_path / "r.npz")
    assert jax.tree.structure(read) == jax.tree.structure(run)
    for name, x in run.records.items():
        np.testing.assert_array_equal(read[name], x)


@pytest.mark.slow
def test_a_figure(tmp_path, run):
    with jax.enable_x64(True):
        page = run.plot(tmp_path / "r.png")
    images = [ax.images[0] for ax in page.axes if ax.images]
    assert len(images) == 6
    np.testing.assert_allclose(images[0].get_array(), run["covariance"][0])


@pytest.mark.parametrize("ending", ["npz", "zarr"])
def test_a_sweep(tmp_path, ending):
    pytest.importorskip("zarr" if ending == "zarr" else "xarray")
    model = bk.Network(bk.Hopf(w=0.4, a=0.1), WEIGHTS, source="x", k=0.1, target="x_inp")
    arguments = {"initial": {"x": [0.3, 0.2, 0.1, 0.4]}, "record": [bk.Correlation(), bk.Mean()]}
    strengths = np.array([0.1, 0.2, 0.3])
    out = tmp_path / f"sweep.{ending}"
    bk.sweep(model, {"coupling.k": strengths}, 40, 1 * u.ms, chunk=2, out=out, implementation="scan", **arguments)
    grid = bk.Sweep.load(out)
    together = bk.Network(bk.Hopf(w=0.4, a=0.1), WEIGHTS, source="x", k=strengths[:, None], target="x_inp")
    want = bk.simulate(together, 40, 1 * u.ms, implementation="scan", **arguments)
    for name in want:
        assert_near(grid[name], want[name], 1e-5)
    assert grid.to_xarray()["x_correlation"].dims == ("coupling.k", "x_correlation_region", "x_correlation_region_2")


# Functions ----------------------------------------------------------------------------------------------------------


class TestDistances:
    RNG = np.random.default_rng(7)
    # With ties, within one and between both.
    A, B = RNG.normal(0.0, 1.0, 30).round(1), RNG.normal(0.4, 1.3, 50).round(1)

    def test_as_scipy(self, x64):
        assert float(spectra.ks_distance(self.A, self.B)) == pytest.approx(
            scipy.stats.ks_2samp(self.A, self.B).statistic, rel=1e-14
        )
        found = spectra.wasserstein(self.A * u.mV, 1e-3 * self.B * u.volt)
        assert float(found / u.mV) == pytest.approx(scipy.stats.wasserstein_distance(self.A, self.B), rel=1e-13)

    def test_of_matrices_and_batches(self, x64):
        several = self.RNG.uniform(0.0, 1.0, (3, 5, 5))
        values = spectra.pairs(several)
        np.testing.assert_array_equal(values[1], several[1][np.triu_indices(5, 1)])
        for name, ours in (("ks_2samp", spectra.ks_distance), ("wasserstein_distance", spectra.wasserstein)):
            found: Any = [getattr(scipy.stats, name)(x, self.A) for x in values]
            want = [getattr(each, "statistic", each) for each in found]
            np.testing.assert_allclose(ours(values, self.A), np.asarray(want, float), rtol=1e-12)

    def test_gradients(self, x64):
        a, b = (jnp.asarray(self.RNG.normal(0.0, 1.0, n)) for n in (7, 4))
        slopes = jax.grad(spectra.wasserstein, (0, 1))(a, b)
        for k, (x, slope) in enumerate(zip((a, b), slopes)):
            by = 1e-7 * np.ones(len(x))
            moved = [(x + s * by, b) if k == 0 else (a, x + s * by) for s in (1, -1)]
            want = (spectra.wasserstein(*moved[0]) - spectra.wasserstein(*moved[1])) / 2
            assert float(jnp.sum(slope * by)) == pytest.approx(float(want), rel=1e-6)
        with pytest.raises(TypeError, match=r"ks_distance, which counts and has no derivative: spectra\.wasserstein"):
            jax.grad(spectra.ks_distance)(a, b)

    def test_numbers_that_are_none(self):
        broken = np.array([0.0, np.nan, 1.0])
        assert np.isnan(spectra.ks_distance(broken, self.A))
        assert np.isnan(spectra.wasserstein(broken, self.A))

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: spectra.pairs(np.zeros((3, 4))), "'matrix' got shape (3, 4), but takes (..., N, N)"),
            (lambda: spectra.ks_distance([], [1.0]), "'a' got shape (0,), but takes numbers (..., n)"),
            (lambda: spectra.wasserstein(1.0, [1.0]), "'a' got shape (), but takes numbers"),
            (lambda: spectra.wasserstein([1.0] * u.mV, [1.0] * u.Hz), "'b' got Hz, but takes mV"),
            (lambda: spectra.ks_distance(np.ones((2, 3)), np.ones((3, 3))), "whose leading axes do not broadcast"),
            (lambda: spectra.fcd(np.ones(9), 1.0, 3.0, 1.0), "'x' got shape (9,), but takes (T, ..., N)"),
            (lambda: spectra.fcd(np.ones((9, 2)), 1.0, 3.0, 1.0), "'x' got 2 regions, but fcd takes three or more"),
            (lambda: spectra.fcd(np.ones((9, 3)), 1.0, 10.0, 1.0), "'window' got 10 s, longer than the 9 s recorded"),
        ],
    )
    def test_what_is_refused(self, call, says):
        with pytest.raises(ValueError, match=re.escape(says)):
            call()
