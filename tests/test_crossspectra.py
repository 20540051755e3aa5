"""Cross-spectra in the loop against scipy on the stored trajectory, and as a target of fits."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

import brainmass_kernels as bk
from brainmass_kernels import recording, spectra
from brainmass_kernels.fitting import targets
from brainmass_kernels.fitting.problem import Free, Problem
from brainmass_kernels.fitting.steps import normal_equations_at
from brainmass_kernels.recording import Sampling

N, DT, EVERY = 3, 1.0 * u.ms, 2
WEIGHTS = np.array([[0.0, 0.5, 0.2], [0.5, 0.0, 0.7], [0.2, 0.7, 0.0]])
LEAD = np.array([[1.0, 2.0, 0.5], [0.3, 0.1, 2.0]])
CALL = {"dt": DT, "every": EVERY, "noise": {"x_inp": 0.3 * u.ms**0.5}, "transient": 20 * u.ms}


def network(k=0.1, a=-0.15):
    return bk.Network(bk.Hopf(a=a, w=0.2), WEIGHTS, source="x", target="x_inp", k=k)


def scipys(x, samples: int, interval=EVERY * 1e-3):
    """``(T, N)`` to ``(F, N, N)``, one pair at a time."""
    pairs = [[scipy.signal.csd(a, b, fs=1 / interval, nperseg=samples)[1] for b in x.T] for a in x.T]
    return np.moveaxis(np.array(pairs), -1, 0)


def near(found, want, tolerance):
    found, want = u.get_mantissa(found), u.get_mantissa(want)
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("samples", [16, 17])
@pytest.mark.parametrize("block", [None, 1, 3])
def test_parts_and_blocks_are_scipys(samples, block, x64, monkeypatch):
    """Of one block, of blocks of a step, and of blocks in parts; the run ends within a segment."""
    monkeypatch.setattr("brainmass_kernels.crossspectra.TABLE", 2 * samples * 2 * N)
    x = np.random.default_rng(samples).normal(1e3, 1.0, (211, 2, N))
    what = bk.CrossSpectralDensity(samples * 0.5 * u.second)
    hop = what.multiple(Sampling(211, 0.5, 211, N))
    sampling = Sampling(211, 0.5, 211 if block is None else block * hop, N)
    what.check(sampling)
    flat = jnp.asarray(x.reshape(211, -1))
    carry, add = what.start(flat[0], sampling), jax.jit(lambda c, x, first: what.add(c, x, first, sampling))
    for first in range(0, 211, sampling.block):
        carry = add(carry, flat[first : first + sampling.block], first)
    found = np.asarray(what.finish(carry, sampling)).reshape(N, -1, 2, N)
    for k in range(2):
        near(np.moveaxis(found[:, :, k], 0, 1), scipys(x[:, k], samples, 0.5), 1e-10)


@pytest.fixture(scope="module")
def run():
    with jax.enable_x64(True):
        record = {"x": "x", "csd": bk.CrossSpectralDensity(64 * u.ms, of="x")}
        record["few"] = bk.CrossSpectralDensity(64 * u.ms, (20 * u.Hz, 60.0), of="x")
        record["sensors"] = bk.CrossSpectralDensity(
            64 * u.ms, of=bk.Readout(np.array([[1.0, 2.0, 0.5], [0.3, 0.1, 2.0]]), of="x")
        )
        ks = jnp.array([[0.02], [0.1]])
        return bk.simulate(network(ks), 800, record=record, key=jax.random.key(0), **CALL)


def test_in_a_run_it_is_scipys(run, x64):
    """Of two networks, of a band, and of sensors."""
    x = np.asarray(run["x"])
    assert run["csd"].shape == (17, 2, N, N)
    for k in range(2):
        near(run["csd"][:, k], scipys(x[:, k], 32), 1e-10)
        near(run["few"][:, k], scipys(x[:, k], 32)[2:4], 1e-10)
        near(run["sensors"][:, k], scipys(x[:, k] @ LEAD.T, 32), 1e-10)
    np.testing.assert_allclose(run.axes["few"].to_decimal(u.Hz), [31.25, 46.875])
    power = spectra.welch(x, EVERY * 1e-3, 32)[1]
    near(np.einsum("fnii->fni", np.asarray(run["csd"].mantissa)), power, 1e-10)


@pytest.mark.slow
def test_of_a_stored_signal(run, x64):
    x = np.asarray(run["x"])
    freqs, density = spectra.csd(x, EVERY * DT, 32)
    near(density, run["csd"], 1e-10)
    np.testing.assert_allclose(freqs, run.axes["csd"].to_decimal(u.Hz))
    coherency = np.asarray(spectra.coherency(density))[:, 0, 0, 1]
    _, coherence = scipy.signal.coherence(x[:, 0, 0], x[:, 0, 1], fs=500.0, nperseg=32)
    np.testing.assert_allclose(np.abs(coherency) ** 2, coherence, atol=1e-10)
    phase = np.angle(scipys(x[:, 0], 32)[:, 0, 1])
    np.testing.assert_allclose(np.angle(coherency), phase, atol=1e-8)


def test_tables_files_and_pictures(run, tmp_path, x64):
    for package in ("xarray", "matplotlib"):
        pytest.importorskip(package)
    dataset = run.to_xarray()
    assert dataset["csd"].dims == ("frequency", "lane", "region", "region_2")
    path = tmp_path / "run.npz"
    run.save(path)
    loaded = bk.Result.load(path)
    np.testing.assert_array_equal(loaded["few"].mantissa, run["few"].mantissa)
    assert loaded.statistics["few"][0] == run.statistics["few"][0]
    assert "csd" in run._repr_html_()
    assert len(run.plot().axes) >= 4


@pytest.mark.slow
def test_the_gradient_is_that_of_the_stored_trajectory(x64):
    """Memory is that of blocks; of the modulus and the phase."""
    keys = jax.random.split(jax.random.key(1), N)

    def loss(k, stored):
        record = {"x": "x"} if stored else {"s": bk.CrossSpectralDensity(64 * u.ms, of="x")}
        found = bk.simulate(network(k), 400, record=record, key=keys, **CALL)
        density = spectra.csd(found["x"], EVERY * DT, 32)[1] if stored else found["s"]
        one = spectra.coherency(density)[3, 0, 1]
        return jnp.abs(u.get_mantissa(density)[4, 1, 1]) + one.real + 2.0 * one.imag

    within, stored = (jax.grad(loss)(0.1, x) for x in (False, True))
    assert abs(float(stored)) > 1e-3
    assert float(within) == pytest.approx(float(stored), rel=1e-6)


def test_memory_does_not_grow_with_time():
    def planned(steps):
        record = bk.CrossSpectralDensity(64 * u.ms, of="x")
        return bk.explain(network(), steps, record=record, key=jax.random.key(0), **CALL)

    short, long = planned(2 * 10**8), planned(2 * 10**9)
    assert long.bytes_recorded == pytest.approx(short.bytes_recorded, rel=0.1)
    assert long.block * N <= 1.5 * recording.BLOCK


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: bk.CrossSpectralDensity(0 * u.ms), ValueError, "'segment' got"),
        (lambda: bk.CrossSpectralDensity(1.0), (ValueError, TypeError), "'segment' got"),
        (lambda: bk.CrossSpectralDensity(1 * u.second, 3.0), TypeError, "'band' got 3.0, but takes two frequencies"),
        (lambda: bk.CrossSpectralDensity(1 * u.second, (3.0, 2.0)), ValueError, "takes 0 <= low <= high"),
        (lambda: spectra.csd(np.ones(10), 1.0, 4), ValueError, r"'x' got shape \(10,\), but takes \(T, ..., N\)"),
        (lambda: spectra.csd(np.ones((10, 2)), 1.0, 40), ValueError, "'nperseg' got 40, but takes 4 to the 10 samples"),
    ],
)
def test_what_is_no_cross_spectrum_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("model", "what", "says"),
    [
        (bk.Hopf(), bk.CrossSpectralDensity(64 * u.ms, of="x"), "of a model without a network"),
        (network(), bk.CrossSpectralDensity(4 * u.ms, of="x"), "'segment' got 0.004 s, 2 records, but takes 4 or more"),
        (network(), bk.CrossSpectralDensity(9 * u.second, of="x"), "'segment' got 9 s, longer than"),
        (
            network(),
            bk.CrossSpectralDensity(64 * u.ms, (1.0, 2.0), of="x"),
            r"none of the frequencies.*15\.625 Hz apart",
        ),
    ],
)
def test_what_a_run_cannot_give_is_refused(model, what, says):
    with pytest.raises(ValueError, match=says):
        bk.simulate(model, 400, 1 * u.ms, every=2, record=what)


@pytest.mark.parametrize("ending", [".npz", pytest.param(".zarr", marks=pytest.mark.slow)])
def test_in_a_sweep(ending, tmp_path):
    for package in ("xarray", "zarr"):
        pytest.importorskip(package)
    record = {"cross": bk.CrossSpectralDensity(64 * u.ms, of="x")}
    call = {"record": record, "key": jax.random.key(0), **CALL}
    grid = bk.sweep(network(), {"coupling.k": [0.05, 0.1]}, 400, out=tmp_path / f"grid{ending}", **call)
    assert np.asarray(u.get_magnitude(grid["cross"])).shape == (17, 2, N, N)
    loaded = bk.Sweep.load(tmp_path / f"grid{ending}")
    np.testing.assert_array_equal(u.get_magnitude(loaded["cross"]), u.get_magnitude(grid["cross"]))
    with pytest.raises(ValueError, match=r"a \.nc holds no complex numbers, as of cross: take \.npz or \.zarr"):
        bk.sweep(network(), {"coupling.k": [0.05, 0.1]}, 400, out=tmp_path / "grid.nc", **call)


# --- as a target ---

SECOND = {"dt": 2 * u.ms, "every": 2, "noise": {"x_inp": 0.05 * u.ms**0.5}, "transient": None, "duration": 520}
FREQS = np.arange(10.0, 90.0, 4.0)
FREE = {"coupling.k": (0.02, 0.3), "a": (-0.3, -0.01)}
OPTIONS = {**{n: x for n, x in SECOND.items() if n != "noise"}, "scheme": None, "implementation": None}


def problem_of(target, record="x", realisations=1) -> Problem:
    comparison = targets.compare(target, network(), record, OPTIONS, (10.0, 90.0), False)
    frees = tuple(Free(name, *bounds, u.UNITLESS) for name, bounds in FREE.items())
    return Problem(network(), {}, SECOND["noise"], frees, comparison, realisations, comparison.recorded, OPTIONS)


def compared(band=(10.0, 90.0), predict="simulation", **options):
    return targets.compare(some(), network(), "x", OPTIONS | options, band, False, predict)


def some(n=1, regions=N, seed=0, **fields) -> bk.CrossSpectrum:
    """Hermitian and positive."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, len(FREQS), regions, regions)) + 1j * rng.normal(size=(n, len(FREQS), regions, regions))
    return bk.CrossSpectrum(FREQS, 1e-23 * np.einsum("nfik,nfjk->nfij", root, root.conj()), **fields)


def at(k=0.12, a=-0.2):
    z = {"coupling.k": k, "a": a}
    return {name: jnp.asarray(Free(name, *bounds, u.UNITLESS).z([[z[name]]], "z")) for name, bounds in FREE.items()}


@pytest.mark.parametrize("lead", [None, pytest.param(LEAD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("compare", ["coherency", "density"])
def test_residuals_are_those_of_the_stored_trajectory(lead, compare, x64):
    target = some(regions=N if lead is None else 2, compare=compare, lead_field=lead)
    problem = problem_of(target)
    keys, z = problem.keys(jax.random.key(3)), at()
    residuals, nuisances = problem.comparison.residuals(problem.predict(z, keys), problem.comparison.data)
    call = {**SECOND, "record": "x", "key": keys[None, None]}
    x = np.asarray(bk.simulate(network(jnp.full((1, 1, 1, 1), 0.12), jnp.full((1, 1, 1, 1), -0.2)), **call)["x"])
    x = x[:, 0, 0, 0] if lead is None else x[:, 0, 0, 0] @ lead.T
    density = scipys(x, 250, 4e-3)
    freqs = np.fft.rfftfreq(250, 4e-3)
    found = np.stack([[np.interp(FREQS, freqs, row) for row in rows] for rows in np.moveaxis(density, 0, -1)])
    found, want = np.moveaxis(found, -1, 0), target.values[0]
    if compare == "coherency":
        power = [np.sqrt(np.einsum("fii->fi", each).real) for each in (found, want)]
        found, want = (x / p[:, :, None] / p[:, None] for x, p in zip((found, want), power))
        square = (np.abs(found - want) ** 2).sum()
    else:
        size = np.sqrt(np.mean(np.abs(want) ** 2))
        gain = np.vdot(found, want).real / np.vdot(found, found).real
        square = (np.abs(gain * found - want) ** 2).sum() / size**2
        in_units = problem.comparison.nuisances_in_units({n: np.asarray(x) for n, x in nuisances.items()})
        assert float(in_units["log_scale"][0, 0]) == pytest.approx(np.log10(gain), abs=1e-6)
    assert residuals.dtype == float
    # Of coherency the real and the imaginary part of each pair, which the matrix has twice.
    assert float(jnp.sum(residuals**2)) == pytest.approx(square / (2 if compare == "coherency" else 1), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("compare", ["coherency", "density"])
def test_the_gradient_of_the_error(compare, x64):
    problem = problem_of(some(compare=compare))
    keys, data = problem.keys(jax.random.key(3)), problem.comparison.data

    @jax.jit
    def error(z):
        return problem.comparison.error(problem.predict(z, keys), data)[0].sum()

    z = at(0.1, -0.12)
    slope = jax.jit(jax.grad(error))(z)
    normal = normal_equations_at(problem, z, keys, data)
    for p, name in enumerate(FREE):
        ends = (error(z | {name: z[name] + h}) for h in (1e-5, -1e-5))
        want = float(np.subtract(*ends)) / 2e-5
        assert float(slope[name][0, 0]) == pytest.approx(want, rel=1e-4)
        assert float(2 * normal.slope[0, 0, p]) == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("compare", ["coherency", "density"])
def test_a_fit_finds_what_made_it_and_survives_json(compare, tmp_path):
    problem, key = problem_of(some(compare=compare), realisations=2), jax.random.key(3)
    prediction = problem.predict(at(), problem.keys(key))
    nuisances = problem.comparison.residuals(prediction, problem.comparison.data)[1]
    made = problem.comparison.like_target(np.asarray(prediction), nuisances, ([0], [0]))
    target = bk.CrossSpectrum(FREQS, made.values, compare)
    call = {"record": "x", "band": (10.0, 90.0), "realisations": 2, "starts": 1, "key": key, **SECOND}
    found = bk.fit(network(), target, FREE, optimiser="levenberg_marquardt", steps=7, **call)
    np.testing.assert_allclose(found.parameters["coupling.k"], 0.12, rtol=0.02)
    np.testing.assert_allclose(found.parameters["a"], -0.2, rtol=0.02)
    assert found.prediction.values.shape == (1, len(FREQS), N, N)
    path = tmp_path / "fit.json"
    found.save(path)
    loaded = bk.Fit.load(path, network())
    np.testing.assert_allclose(loaded.target.values, target.values, rtol=1e-12)
    np.testing.assert_allclose(loaded.standard_errors()["a"], found.standard_errors()["a"], rtol=1e-3)
    more = bk.fit(network(), resume=loaded, optimiser="levenberg_marquardt", steps=1, **{**call, "starts": None})
    assert len(more.losses) == 8
    assert len(found.plot().axes) >= 1
    found.report(tmp_path / "fit.html")
    assert "cross-spectrum" in (tmp_path / "fit.html").read_text()


@pytest.mark.slow
def test_several_at_once_and_with_others():
    """Of sensors, with functional connectivity, by gradients."""
    both = bk.Joint({"cross": some(2, regions=2, lead_field=LEAD), "fc": bk.Connectivity(np.stack([np.eye(N)] * 2))})
    found = bk.fit(
        network(),
        both,
        FREE,
        record="x",
        band=(10.0, 90.0),
        starts=2,
        steps=2,
        realisations=1,
        key=jax.random.key(3),
        **SECOND,
    )
    assert found.prediction.targets["cross"].values.shape == (2, len(FREQS), 2, 2)
    assert np.isfinite(found.losses).all()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: bk.CrossSpectrum(FREQS, np.ones((3, 2, 2))), ValueError, r"got shape \(3, 2, 2\) at 20 frequencies"),
        (lambda: bk.CrossSpectrum(FREQS, some().values * np.nan), ValueError, "values that are not finite"),
        (lambda: bk.CrossSpectrum(FREQS, some().values * 1j), ValueError, "is not Hermitian"),
        (lambda: bk.CrossSpectrum(FREQS, -some().values), ValueError, "powers are to be positive and finite"),
        (lambda: bk.CrossSpectrum(FREQS[::-1], some().values), ValueError, "frequencies are to increase"),
        (lambda: bk.CrossSpectrum(FREQS, [["a"]]), TypeError, "takes an array of complex numbers"),
        (lambda: some(compare="phase"), ValueError, "'compare' of cross-spectrum got 'phase', but takes 'coh"),
        (lambda: some(sigma=0.0), ValueError, "'sigma' of cross-spectrum got 0.0"),
        (lambda: some(lead_field=LEAD), ValueError, r"got shape \(2, 3\), but takes \(3, R\)"),
        (lambda: problem_of(some(regions=2)), ValueError, "'values' of cross-spectrum has 2 regions"),
        (lambda: problem_of(some(lead_field=np.eye(3)[:, :2])), ValueError, "'lead_field' of cross-spectrum has 2 reg"),
        (lambda: problem_of(some(), record=["x"]), TypeError, "'record' got .*cross-spectrum takes one name"),
        (lambda: compared(band=(200.0, 300.0)), ValueError, "'band' leaves"),
        (lambda: compared(duration=100), ValueError, "takes 1 s at least"),
    ],
)  # fmt: skip
def test_what_is_no_target_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
