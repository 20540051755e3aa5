"""Statistics that are recorded without a trajectory, against those of a trajectory that is stored."""

import functools
import re

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import scipy.signal

import brainmass_kernels as bk
from brainmass_kernels import recording, testing

LANES, EVERY, DT = 3, 5, 0.5
FREQS = (1.0, 4.0, 10.0, 25.0, 100.0, 200.0)
STATISTICS = {
    "mean": bk.Mean(),
    "variance": bk.Variance(),
    "least": bk.Minimum(),
    "largest": bk.Maximum(),
    "average": bk.Average(50 * u.ms),
    "spectrum": bk.Spectrum(FREQS),
    "untapered": bk.Spectrum(FREQS, taper="boxcar"),
    "peak": bk.PeakFrequency(np.arange(2.0, 30.0)),
    "crossings": bk.Crossings(0.006 * u.volt),
}
SMOOTH = [n for n in STATISTICS if n != "crossings"]


@pytest.fixture
def few_records_a_block(monkeypatch):
    """Blocks of 50 records or so, whatever there is room for."""
    monkeypatch.setattr(recording, "BLOCK", 1)


def simulate(C=None, steps=2203, record=("eeg",), **more):
    """400 records, with a transient, noise, an input that varies, and 3 steps after the last record."""
    C = jnp.linspace(110.0, 150.0, LANES) if C is None else C
    drive = 200.0 + 40.0 * np.sin(np.arange(steps) / 100.0)
    return bk.simulate(
        bk.JansenRit(C=C), steps, DT * u.ms,
        **{
            "inputs": {"E_inp": jnp.asarray(drive, jnp.result_type(float)) * u.Hz},
            "noise": {"E_inp": 2.0 * u.Hz * u.second**0.5}, "key": jax.random.key(3), "transient": 100 * u.ms,
            "every": EVERY, "record": record, **more,
        },
    )  # fmt: skip


def of_trajectory(x) -> dict[str, np.ndarray]:
    """The same statistics of stored records (K, L), by numpy and scipy."""
    interval = EVERY * DT * 1e-3
    found = {"mean": x.mean(0), "variance": x.var(0), "least": x.min(0), "largest": x.max(0)}
    per = round(0.05 / interval)
    found["average"] = x[: len(x) // per * per].reshape(-1, per, x.shape[1]).mean(1)
    for name, taper in (("spectrum", "hann"), ("untapered", "boxcar")):
        freqs, power = scipy.signal.periodogram(x, 1 / interval, window=taper, axis=0)
        found[name] = power[[int(abs(freqs - f).argmin()) for f in FREQS]]
    found["crossings"] = ((x[:-1] < 6) & (x[1:] >= 6)).sum(0) / ((len(x) - 1) * interval)
    return found


def assert_near(got, want, tolerance):
    got, want = np.asarray(u.get_magnitude(got)), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * abs(want).max())


class TestAgainstTheTrajectory:
    # More records than the 400 of which blocks are equal, so that the last is shorter.
    @pytest.mark.parametrize("steps", [pytest.param(2203, marks=pytest.mark.slow), 2305])
    @pytest.mark.parametrize("implementation", ["scan", "numba"])
    def test_in_blocks(self, few_records_a_block, x64, implementation, steps):
        C = jnp.linspace(110.0, 150.0, LANES, dtype=jnp.float64)
        run = functools.partial(simulate, C, steps, implementation=implementation)
        stored, res = run(), run(record={"eeg": "eeg", **STATISTICS})
        np.testing.assert_array_equal(res["eeg"].mantissa, stored["eeg"].mantissa)
        for name, x in stored.final.items():
            np.testing.assert_array_equal(res.final[name].mantissa, x.mantissa)
        on_bins = steps == 2203  # where scipy has the power at these frequencies
        for name, want in of_trajectory(np.asarray(stored["eeg"] / u.mV)).items():
            if on_bins or name not in ("spectrum", "untapered"):
                assert_near(res[name], want, 1e-12)

    def test_at_once_in_float32(self):
        stored, res = simulate(), simulate(record=STATISTICS)
        for name, want in of_trajectory(np.asarray(stored["eeg"] / u.mV, np.float64)).items():
            assert_near(res[name], want, 2e-5)

    @pytest.mark.slow
    def test_the_number_of_blocks_changes_nothing(self, monkeypatch):
        at_once = simulate(record=STATISTICS)
        monkeypatch.setattr(recording, "BLOCK", 1)
        assert recording.Sampling.of(400, 1.0, LANES).block < 400
        for name, x in simulate(record=STATISTICS).records.items():
            assert_near(x, u.get_magnitude(at_once[name]), 2e-5)

    def test_the_peak_is_that_of_a_fine_grid(self):
        """And the first of the three, which has come to rest but for what is left of its transient, has none."""
        model = bk.JansenRit(C=jnp.linspace(110.0, 150.0, LANES))
        run = functools.partial(bk.simulate, model, 12_000, DT * u.ms, inputs={"E_inp": 220 * u.Hz}, transient=2000)
        fine = np.arange(6.0, 14.0, 0.01)
        got = run(record={"coarse": bk.PeakFrequency(np.arange(6.0, 14.0, 0.2)), "fine": bk.Spectrum(fine)})
        want = np.where([False, True, True], fine[np.asarray(got["fine"].mantissa).argmax(0)], np.nan)
        np.testing.assert_allclose(got["coarse"] / u.Hz, want, atol=0.05)  # a quarter of the grid's step


class TestInParts:
    """A block as long as the run, reduced part by part: no table of a statistic is as long."""

    COUNT, INTERVAL = 20_011, 1e-3
    FREQS = np.array([0.0, 0.37, 3.0, 10.0, 17.3, 499.0, 500.0])

    def records(self, dtype=np.float64):
        t = np.arange(self.COUNT) * self.INTERVAL
        waves = 5.0 + np.sin(2 * np.pi * 10.0 * t) + 0.3 * np.cos(2 * np.pi * 3.0 * t)
        noise = np.random.default_rng(0).normal(0.0, 0.5, (2, self.COUNT))
        return (waves + noise).T.astype(dtype)

    def of(self, what, x, block=10**6):
        what = what.bound("eeg", u.mV)
        sampling = recording.Sampling(len(x), self.INTERVAL, min(block, len(x)))

        @jax.jit
        def reduced(x):
            held = what.start(x[0], sampling)
            for first in range(0, len(x), sampling.block):
                held = what.add(held, x[first : first + sampling.block], first, sampling)
            return what.finish(held, sampling)

        return np.asarray(reduced(x))

    @pytest.mark.parametrize(
        ("taper", "block", "places"),
        [("hann", 10**6, 2**12), ("boxcar", 12_007, 2**12), ("hann", 12_007, 1), ("boxcar", 10**6, 1)],
    )
    def test_a_spectrum_has_the_phases_of_float64(self, monkeypatch, x64, taper, block, places):
        """Where parts begin they are of one table, or of many places products of those of digits."""
        for name, value in {"TABLE": 2000, "PLACES": places, "DIGITS": 7}.items():
            monkeypatch.setattr(recording, name, value)
        x, what = self.records(), bk.Spectrum(self.FREQS, taper=taper)
        assert what._part(recording.Sampling(self.COUNT, self.INTERVAL, self.COUNT)) == 142
        t = np.arange(self.COUNT)
        weights = np.ones(len(x)) if taper == "boxcar" else 0.5 - 0.5 * np.cos(2 * np.pi * t / len(x))
        turns = np.exp(-2j * np.pi * np.mod(np.outer(self.FREQS * self.INTERVAL, t), 1.0)) * weights
        sides = np.where((self.FREQS == 0) | (self.FREQS == 500.0), 1.0, 2.0)
        want = abs(turns @ (x - x.mean(0))) ** 2 * (sides * self.INTERVAL / (weights**2).sum())[:, None]
        np.testing.assert_allclose(self.of(what, jnp.asarray(x), block), want, rtol=1e-8, atol=1e-18)

    def test_a_spectrum_in_float32(self, monkeypatch):
        x = self.records(np.float32)
        freqs = np.arange(1.0, 40.5, 0.5)
        at_once = self.of(bk.Spectrum(freqs), jnp.asarray(x))
        peak = self.of(bk.PeakFrequency(freqs), jnp.asarray(x))
        monkeypatch.setattr(recording, "TABLE", 2000)
        np.testing.assert_allclose(self.of(bk.Spectrum(freqs), jnp.asarray(x)), at_once, rtol=1e-4)
        np.testing.assert_allclose(self.of(bk.PeakFrequency(freqs), jnp.asarray(x)), peak, rtol=1e-6)

    def test_of_many_places_in_float32(self, monkeypatch):
        x, freqs = self.records(np.float32), np.arange(1.0, 40.5, 0.5)
        monkeypatch.setattr(recording, "TABLE", 2000)
        of_one_table = self.of(bk.Spectrum(freqs), jnp.asarray(x))
        monkeypatch.setattr(recording, "PLACES", 1)
        monkeypatch.setattr(recording, "DIGITS", 11)
        np.testing.assert_allclose(self.of(bk.Spectrum(freqs), jnp.asarray(x)), of_one_table, rtol=1e-4)

    @pytest.mark.parametrize("per", [1, 7, 4000])
    def test_averages(self, monkeypatch, x64, per):
        monkeypatch.setattr(recording, "TABLE", 3000)
        x = self.records()
        want = x[: len(x) // per * per].reshape(-1, per, 2).mean(1)
        got = self.of(bk.Average(per * u.ms), jnp.asarray(x))
        np.testing.assert_allclose(got, want, rtol=1e-12)

    def test_a_gradient(self, monkeypatch, x64):
        monkeypatch.setattr(recording, "TABLE", 2000)
        x = jnp.asarray(self.records()[:1000])

        def total(x):
            what = bk.Spectrum(self.FREQS)
            sampling = recording.Sampling(len(x), self.INTERVAL, len(x))
            return jnp.sum(jnp.log1p(what.finish(what.add(what.start(x[0], sampling), x, 0, sampling), sampling)))

        slope, by = jax.grad(total)(x), 1e-5 * np.random.default_rng(1).normal(0.0, 1.0, x.shape)
        want = (total(x + by) - total(x - by)) / 2
        assert float(jnp.sum(slope * by)) == pytest.approx(float(want), rel=1e-6)

    def test_two_records(self, x64):
        x = jnp.asarray([[1.0], [4.0]])
        got = self.of(bk.Spectrum([100.0]), x)
        np.testing.assert_allclose(got, 2 * self.INTERVAL * 1.5**2)

    @pytest.mark.parametrize("what", [bk.PeakFrequency(np.arange(1.0, 40.5, 0.5)), bk.Average(100 * u.ms)])
    def test_tables_do_not_grow_with_time(self, what):
        """What a program holds for half an hour and for ten: copies of the records alone grow, which a block bounds."""

        def temporary(count):
            sampling = recording.Sampling(count, 5e-3, count)

            def fun(x):
                return what.finish(what.add(what.start(x[0], sampling), x, 0, sampling), sampling)

            lowered = jax.jit(fun).lower(jax.ShapeDtypeStruct((count, 1), jnp.float32))
            analysis = lowered.compile().memory_analysis()
            text = len(lowered.as_text())
            return analysis.temp_size_in_bytes + text, 4 * what.shared(sampling)

        (few, told), (many, told_of_many) = temporary(360_000), temporary(7_200_000)
        assert many < few + 3 * 4 * (7_200_000 - 360_000)
        assert told_of_many < 4 * told
        assert told_of_many > 2**20

    def test_explain_tells(self):
        call = {"every": 10, "record": bk.PeakFrequency(np.arange(1.0, 40.5, 0.5))}
        short, long = (bk.explain(bk.JansenRit(), t * u.second, 0.5 * u.ms, **call).bytes_recorded for t in (60, 1200))
        assert short < long < 16 * 2**20


class TestWithinAKernel:
    """Every implementation, in its interpreter where it needs one: blocks start late in the noise and the input."""

    CASES = [
        pytest.param("mosaic_tpu", marks=pytest.mark.slow),
        pytest.param("triton", marks=[pytest.mark.slow, needs.interpreter]),
        pytest.param("mosaic_gpu", marks=needs.mosaic_gpu),
    ]

    @pytest.mark.parametrize("implementation", CASES)
    def test_as_scan(self, monkeypatch, implementation):
        monkeypatch.setattr(recording, "BLOCK", 1)
        monkeypatch.setattr(recording, "FEWEST", 4)
        record = {"mean": bk.Mean(), "variance": bk.Variance(), "eeg": "eeg"}

        def run(C, name):
            res = simulate(C, 72, transient=10, record=record, implementation=name)
            return sum(jnp.sum(u.get_magnitude(x) ** 2) for x in res.records.values()), res

        C = jnp.linspace(110.0, 150.0, LANES)
        with testing.interpret():
            (_, got), slope = jax.value_and_grad(run, has_aux=True)(C, implementation)
        (_, want), expected = jax.value_and_grad(run, has_aux=True)(C, "scan")
        assert recording.Sampling.of(12, 1.0, LANES).block == 4
        for name in record:
            assert_near(got[name], u.get_magnitude(want[name]), 1e-5)
        assert_near(slope, expected, 1e-4)


class TestGradients:
    @pytest.mark.parametrize(
        "implementation", [pytest.param(name, marks=pytest.mark.slow) for name in ("scan", "numba")]
    )
    def test_are_those_of_the_trajectory(self, few_records_a_block, x64, implementation):
        weights = {n: 1.0 + k for k, n in enumerate(SMOOTH)}

        def total(records):
            return sum(w * jnp.sum(jnp.log(1 + abs(u.get_magnitude(records[n])))) for n, w in weights.items())

        def in_blocks(C):
            return total(simulate(C, record={n: STATISTICS[n] for n in SMOOTH}, implementation=implementation))

        def stored(C):
            eeg = simulate(C, implementation=implementation)["eeg"].mantissa
            sampling = recording.Sampling(len(eeg), EVERY * DT * 1e-3, len(eeg))
            reduce = {n: STATISTICS[n].bound("eeg", u.mV) for n in SMOOTH}
            return total({
                n: r.finish(r.add(r.start(eeg[0], sampling), eeg, 0, sampling), sampling) for n, r in reduce.items()
            })  # fmt: skip

        C = jnp.linspace(110.0, 150.0, LANES, dtype=jnp.float64)
        got, want = jax.grad(in_blocks)(C), jax.grad(stored)(C)
        assert_near(got, want, 1e-9)
        by = 1e-5
        slope = (stored(C + by) - stored(C - by)) / (2 * by)
        assert float(got.sum()) == pytest.approx(float(slope), rel=1e-5)

    def test_counting_has_none(self, few_records_a_block):
        def rate(C):
            return jnp.sum(simulate(C, record=STATISTICS)["crossings"] / u.Hz)

        with pytest.raises(TypeError, match=r"bk\.Crossings, which counts and has no derivative"):
            jax.grad(rate)(jnp.full(LANES, 135.0))

    @pytest.mark.slow
    def test_counting_beside_what_has_one(self, few_records_a_block):
        def mean(C, record):
            return jnp.sum(simulate(C, record=record)["mean"] / u.mV)

        C = jnp.full(LANES, 135.0)
        alone, beside = (jax.grad(mean)(C, {"mean": bk.Mean(), **more}) for more in ({}, {"n": bk.Crossings(6 * u.mV)}))
        np.testing.assert_array_equal(alone, beside)

    @pytest.mark.slow
    def test_forward_mode_through_scan(self, few_records_a_block, x64):
        def variance(scale):
            C = scale * jnp.linspace(110.0, 150.0, LANES, dtype=jnp.float64)
            return jnp.sum(simulate(C, record=bk.Variance(), implementation="scan")["eeg_variance"].mantissa)

        assert float(jax.jacfwd(variance)(1.0)) == pytest.approx(float(jax.grad(variance)(1.0)), rel=1e-9)


def test_vmap_and_jit(few_records_a_block):
    C = jnp.linspace(110.0, 150.0, 2 * LANES).reshape(2, LANES)
    keys = jax.random.split(jax.random.key(5), 2)

    def run(C, key):
        return simulate(C, record=[bk.Mean(), bk.Spectrum(FREQS)], key=key).records

    mapped = jax.jit(jax.vmap(run))(C, keys)
    for i in range(2):
        for name, want in run(C[i], keys[i]).items():
            assert_near(mapped[name][i], u.get_magnitude(want), 1e-5)


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["run", "gradient"])
def test_memory_does_not_grow_with_time(monkeypatch, gradient):
    monkeypatch.setattr(recording, "BLOCK", 1)
    record = [bk.Mean(), bk.Variance(), bk.Maximum(), bk.Spectrum(FREQS), bk.PeakFrequency(np.arange(2.0, 30.0))]
    lanes = 4096

    def temporary(steps):
        def fun(C):
            res = bk.simulate(
                bk.JansenRit(C=C), steps, DT * u.ms, every=4, record=record, implementation="scan", checkpoint_every=32
            )
            return sum(jnp.sum(u.get_magnitude(x)) for x in res.records.values())

        fun = jax.grad(fun) if gradient else fun
        return jax.jit(fun).lower(jnp.zeros(lanes)).compile().memory_analysis().temp_size_in_bytes

    # A hundredfold in time: the blocks that a gradient keeps the state of grow as its square root.
    few, many = temporary(4 * 320), temporary(4 * 32_000)
    assert many < (10.0 if gradient else 1.1) * few
    assert many < (0.1 if gradient else 0.01) * 4 * lanes * 32_000


class TestAsked:
    def test_names_units_and_axes(self):
        res = simulate(record=["eeg", bk.Variance(of="Mv"), bk.Spectrum(FREQS, of="M"), bk.Average(50 * u.ms)])
        assert list(res) == ["eeg", "Mv_variance", "M_spectrum", "eeg_average"]
        assert res["Mv_variance"].unit.has_same_dim((u.mV / u.second) ** 2)
        assert res["M_spectrum"].unit.has_same_dim(u.mV**2 / u.Hz)
        np.testing.assert_allclose(res.axes["M_spectrum"] / u.Hz, FREQS)
        np.testing.assert_allclose(res.axes["eeg_average"] / u.ms, 100 + 50 * np.arange(1, len(res["eeg_average"]) + 1))
        np.testing.assert_array_equal(res.axes["eeg"] / u.ms, res.ts / u.ms)
        assert "Mv_variance" not in res.axes

    def test_explain_says_how_many_at_a_time(self, few_records_a_block):
        plan = bk.explain(bk.JansenRit(), 4000, DT * u.ms, record=bk.Mean(), every=10)
        assert plan.block == 40
        assert re.search("records +400 a lane, .*, reduced 40 at a time", str(plan))

    def test_a_quantity_of_ones_own_name(self):
        res = simulate(record={"x": "eeg", "top": bk.Maximum(of="eeg")})
        np.testing.assert_array_equal(res["x"].mantissa.max(0), res["top"].mantissa)

    @pytest.mark.parametrize(
        ("record", "says"),
        [
            (bk.Mean(of="eg"), "unknown record 'eg'; did you mean 'eeg'?"),
            ([bk.Spectrum([1.0]), bk.Spectrum([2.0])], "two results named 'eeg_spectrum': give a dict"),
            (bk.Spectrum([300.0]), "'freqs' got 300 Hz, but takes at most 200 Hz"),
            (bk.Average(3 * u.ms), "'tr' got 0.003 s, but takes a whole multiple of the time between records"),
            (bk.Average(5 * u.second), "'tr' got 5 s, longer than the 1 s recorded"),
            (bk.PeakFrequency([5.0, 4.0, 8.0]), "takes three or more that increase"),
            (bk.Crossings(3 * u.Hz), "'level' got Hz, but takes mV"),
        ],
    )
    def test_what_cannot_be_is_refused(self, record, says):
        with pytest.raises(ValueError, match=re.escape(says)):
            simulate(record=record)

    def test_what_is_no_record(self):
        with pytest.raises(TypeError, match="'record' got int, but takes names, and statistics"):
            simulate(record=[3])

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: bk.Spectrum([-1.0]), "none of them negative"),
            (lambda: bk.Spectrum([1.0], taper="welch"), "'taper' got 'welch', but takes 'hann' or 'boxcar'"),
            (lambda: bk.Spectrum([1.0] * u.mV), "'freqs' got mV, but takes Hz"),
            (lambda: bk.Average(50), "'tr' got a plain int"),
        ],
    )
    def test_when_it_is_made(self, make, says):
        with pytest.raises(ValueError, match=re.escape(says)):
            make()

    def test_a_transient_that_leaves_nothing(self):
        with pytest.raises(ValueError, match="Mean needs a record, but the transient leaves none"):
            simulate(record=bk.Mean(), transient=2203)
