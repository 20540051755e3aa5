"""Cross-spectra in closed form: against matrices of all states written out, long simulations, and in fits."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_linear import Oscillator, plain

import brainmass_kernels as bk
from brainmass_kernels import identity
from brainmass_kernels.fitting import targets

FREQS = np.array([0.0, 0.5, 3.0, 9.0, 10.0, 11.0, 40.0])
WEIGHTS = np.array([[0.0, 1.0, 0.3], [0.7, 0.0, 0.0], [0.0, 0.5, 0.0]])
DELAYS = np.array([[0.0, 12.0, 5.0], [18.0, 0.0, 3.0], [1.0, 7.0, 0.0]])
ZETA, K = np.array([0.2, 0.3, 0.25]), 0.01
NOISE = {"x_inp": 2.0 * u.mV / u.ms * u.ms**0.5, "v": np.array([0.3, 0.1, 0.2]) * u.mV / u.ms / u.ms**0.5}
LEAD = np.array([[1.0, 0.5, 0.2], [0.0, 1.0, -1.0]])


def oscillators(k=K, zeta=ZETA, weights=WEIGHTS) -> bk.Network:
    return bk.Network(
        Oscillator(zeta=zeta), weights, delays=DELAYS * u.ms, source="x", target="x_inp", k=k * 1.0 / u.ms,
        coupling="additive",
    )  # fmt: skip


def written_out(k=K, zeta=ZETA):
    """``(F, 3, 3)`` of `oscillators`: one system of its six states, with a factor for each delay."""
    w, gain = 2 * np.pi * 10.0 / 1000.0, 1.0 / 1000.0
    found = []
    for hertz in FREQS:
        turning = 2j * np.pi * hertz / 1000.0
        matrix = np.zeros((6, 6), complex)
        matrix[:3, 3:] = np.eye(3)
        matrix[3:, :3] = -(w**2) * np.eye(3) + gain * k * WEIGHTS * np.exp(-turning * DELAYS)
        matrix[3:, 3:] = np.diag(-2 * zeta * w)
        drives = np.zeros((6, 6))
        drives[3:, :3], drives[3:, 3:] = gain * 2.0 * np.eye(3), np.diag([0.3, 0.1, 0.2])
        onto_shown = 3.0 * np.linalg.solve(turning * np.eye(6) - matrix, drives)[:3]
        found.append((2.0 if hertz else 1.0) * onto_shown.conj() @ onto_shown.T)
    return 1e-3 * np.array(found)


@pytest.mark.parametrize("wide", [True, False])
def test_it_is_that_of_all_states_written_out(wide):
    with jax.enable_x64(wide):
        found = bk.linear_cross_spectrum(oscillators(), FREQS, noise=NOISE)
        powers = bk.linear_spectrum(oscillators(), FREQS, noise=NOISE)
    assert found.unit == u.mV**2 / u.Hz
    want, tolerance = written_out(), 1e-10 if wide else 1e-4
    np.testing.assert_allclose(plain(found), want, rtol=0, atol=tolerance * np.abs(want).max())
    np.testing.assert_allclose(np.einsum("fii->fi", plain(found)), plain(powers), rtol=tolerance)


def test_sensors_see_it_through_their_gains():
    regions = plain(bk.linear_cross_spectrum(oscillators(), FREQS, noise=NOISE, of="x"))
    sensors = bk.linear_cross_spectrum(
        oscillators(), FREQS, noise=NOISE, of=bk.Readout(LEAD * u.uA / u.mV, of="x", unit=u.amp)
    )  # fmt: skip
    assert sensors.unit == u.amp**2 / u.Hz
    want = 1e-12 * LEAD @ regions @ LEAD.T
    np.testing.assert_allclose(plain(sensors), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_members_of_a_batch_are_those_alone_and_nan_where_nothing_is_stable():
    strengths = np.array([[0.01], [0.02], [50.0]])
    with pytest.warns(UserWarning, match="the state at rest is unstable in 1"):
        found = plain(bk.linear_cross_spectrum(oscillators(strengths), FREQS, noise=NOISE))
    assert found.shape == (7, 3, 3, 3)
    assert np.isnan(found[:, 2]).all()
    for k, member in ((0.01, 0), (0.02, 1)):
        alone = plain(bk.linear_cross_spectrum(oscillators(k), FREQS, noise=NOISE))
        np.testing.assert_allclose(found[:, member], alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())


def test_it_has_the_derivatives_of_differences(x64):
    def size(k):
        density = bk.linear_cross_spectrum(oscillators(k), FREQS, noise=NOISE, of=bk.Readout(LEAD, of="x"))
        return jnp.sum(jnp.imag(u.get_magnitude(density))[:, 0, 1])

    by_reverse, by_forward = jax.grad(size)(K), jax.jacfwd(size)(K)
    difference = (size(K + 1e-6) - size(K - 1e-6)) / 2e-6
    np.testing.assert_allclose([by_reverse, by_forward], difference, rtol=1e-6)


def test_regions_of_a_group_are_those_of_the_group():
    between = bk.Coupling([[0.0, 1.0, 0.0], [0.7, 0.0, 0.0], [0.0, 0.0, 0.0]], source="front.x", target="front.x_inp",
                          k=0.01 / u.ms)  # fmt: skip
    groups = {"front": (Oscillator(zeta=0.2), 2), "back": (bk.Hopf(a=-0.1, w=0.06), 1)}
    network, noise = bk.Network(groups, couplings={"c": between}), {"front.x_inp": NOISE["x_inp"]}
    density = plain(bk.linear_cross_spectrum(network, FREQS, noise=noise, of="front.shown"))
    power = plain(bk.linear_spectrum(network, FREQS, noise=noise, of="front.shown"))
    assert density.shape == (7, 2, 2)
    np.testing.assert_allclose(np.einsum("fii->fi", density), power, rtol=1e-5)
    of_one = bk.Readout([[1.0, -2.0]], of="front.shown")
    seen = plain(bk.linear_cross_spectrum(network, FREQS, noise=noise, of=of_one))[:, 0, 0]
    gains = np.array([1.0, -2.0])
    np.testing.assert_allclose(seen, np.einsum("i,fij,j->f", gains, density, gains), rtol=1e-4)


def test_a_long_simulation_has_it():
    drive, noise = {"E_inp": 60 * u.Hz}, {"E_inp": 2 * u.Hz * u.second**0.5}
    columns = bk.Network(
        bk.JansenRit(), WEIGHTS, delays=DELAYS * u.ms, source="eeg", target="E_inp", k=10 * u.Hz / u.mV
    )  # fmt: skip
    kept = np.arange(2.0, 40.0)
    run = bk.simulate(
        columns, 201 * u.second, 1 * u.ms, inputs=drive, noise=noise, key=jax.random.key(0), transient=1 * u.second,
        record={"csd": bk.CrossSpectralDensity(1 * u.second, (2.0, 39.0))},
    )  # fmt: skip
    estimate, closed = plain(run["csd"]), plain(bk.linear_cross_spectrum(columns, kept, inputs=drive, noise=noise))
    # 200 segments: each value is within a tenth.
    assert np.abs(estimate - closed).sum() < 0.12 * np.abs(closed).sum()
    # And the phases are those, not their opposites.
    assert np.abs(estimate.imag - closed.imag).sum() < 0.3 * np.abs(estimate.imag + closed.imag).sum()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            Oscillator(),
            {},
            TypeError,
            "'model' got Oscillator, but takes a bk.Network: one region has no cross-spectra",
        ),
        (oscillators(), {"noise": None}, ValueError, "'noise' names nothing"),
        (oscillators(), {"of": bk.Readout(np.eye(2))}, ValueError, "'of' got a Readout of 2 regions, but .* has 3"),
        (oscillators(), {"of": bk.Readout(np.eye(3), of="y")}, ValueError, "unknown observable or state in 'of' 'y'"),
        (oscillators(), {"of": 3}, TypeError, "'of' got int"),
        (oscillators(), {"freqs": "alpha"}, TypeError, "'freqs' got str, but takes a real number or an array of them"),
        (oscillators(), {"freqs": [-1.0]}, ValueError, "'freqs' got .*, none of them negative"),
    ],
)
def test_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        bk.linear_cross_spectrum(model, **({"freqs": FREQS, "noise": NOISE} | options))


# Fits ---------------------------------------------------------------------------------------------------------------

BAND = np.arange(4.0, 24.0)
FREE = {"coupling.k": (0.002, 0.1), "zeta": (0.1, 0.6)}
COMMON = {
    "noise": NOISE, "predict": "linear", "band": (4.0, 23.0), "dt": 1 * u.ms, "record": "x", "starts": 3,
    "key": jax.random.key(1),
}  # fmt: skip


def of_truth(lead=None, compare="coherency") -> bk.CrossSpectrum:
    with jax.enable_x64(True):
        values = plain(bk.linear_cross_spectrum(oscillators(0.03), BAND, noise=NOISE, of="x"))
    values = values if lead is None else lead @ values @ lead.T
    return bk.CrossSpectrum(BAND, values, compare=compare, lead_field=lead)


@pytest.mark.parametrize(("lead", "compare"), [(None, "coherency"), (LEAD, "density")])
def test_least_squares_find_a_strength_and_each_regions_damping(lead, compare):
    found = bk.fit(
        oscillators(zeta=0.3), of_truth(lead, compare), FREE, regional=("zeta",), optimiser="levenberg_marquardt",
        steps=25, **COMMON,
    )  # fmt: skip
    assert found.implementation == "linear"
    assert found.rms[0] < 1e-4
    np.testing.assert_allclose(plain(found.parameters["coupling.k"]), 0.03, rtol=2e-3)
    np.testing.assert_allclose(plain(found.parameters["zeta"])[0], ZETA, rtol=2e-3)
    errors = found.standard_errors()
    assert all((plain(errors[name]) < 1e-2).all() for name in FREE)


def test_gradients_lower_the_error_and_a_saved_fit_goes_on(tmp_path):
    first = bk.fit(oscillators(), of_truth(), {"coupling.k": (0.002, 0.1)}, steps=20, **COMMON)
    assert first.rms[0] < 0.5 * first.initial_rms[0]
    first.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", oscillators())
    assert loaded.settings["predict"] == "linear"
    more = bk.fit(oscillators(), of_truth(), {"coupling.k": (0.002, 0.1)}, steps=30, resume=loaded, **COMMON)
    assert more.rms[0] <= first.rms[0]
    with pytest.raises(ValueError, match="'resume' got a fit with"):
        bk.fit(
            oscillators(), of_truth(), {"coupling.k": (0.002, 0.1)}, resume=loaded,
            **(COMMON | {"predict": "simulation", "duration": 5 * u.second}),
        )  # fmt: skip


def test_a_power_spectrum_of_a_network_is_the_mean_of_its_regions():
    power = plain(bk.linear_spectrum(oscillators(0.03), BAND, noise=NOISE, of="x")).mean(-1)
    found = bk.fit(
        oscillators(), bk.PowerSpectrum(BAND, power), {"coupling.k": (0.002, 0.1)}, background=False, steps=15,
        optimiser="levenberg_marquardt", **COMMON,
    )  # fmt: skip
    assert found.rms[0] < 1e-3
    np.testing.assert_allclose(plain(found.parameters["coupling.k"]), 0.03, rtol=1e-2)


def test_joint_targets_are_those_of_each():
    """The spectrum of the regions and cross-spectra at sensors weigh as they do with runs, and find two parameters."""
    power = plain(bk.linear_spectrum(oscillators(0.03), BAND, noise=NOISE, of="x")).mean(-1)
    target = bk.Joint({"power": bk.PowerSpectrum(BAND, power), "sensors": of_truth(LEAD)}, weights={"sensors": 2.0})
    fits = {
        name: bk.fit(
            oscillators(zeta=0.3), each, FREE, regional=("zeta",), background=False, optimiser="levenberg_marquardt",
            steps=steps, **COMMON,
        )
        for name, each, steps in (("joint", target, 20), *((n, t, 5) for n, t in target.targets.items()))
    }  # fmt: skip
    assert fits["joint"].rms[0] < 1e-3
    np.testing.assert_allclose(plain(fits["joint"].parameters["coupling.k"]), 0.03, rtol=1e-2)
    alone = [fits[name].initial_rms[0] / sigma for name, sigma in (("power", 0.1), ("sensors", of_truth().sigma))]
    expected = np.sqrt((alone[0] ** 2 + 2.0 * alone[1] ** 2) / 3.0)
    np.testing.assert_allclose(fits["joint"].initial_rms[0], expected, rtol=1e-4)
    assert fits["joint"].prediction.targets["sensors"].values.shape == (1, len(BAND), 2, 2)


def test_a_saved_fit_of_joint_targets_goes_on(tmp_path):
    power = plain(bk.linear_spectrum(oscillators(0.03), BAND, noise=NOISE, of="x")).mean(-1)
    target = bk.Joint({"power": bk.PowerSpectrum(BAND, power), "sensors": of_truth(LEAD, "density")})
    free = {"coupling.k": (0.002, 0.1)}
    first = bk.fit(oscillators(), target, free, steps=3, **COMMON)
    first.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", oscillators())
    assert loaded.settings["predict"] == "linear"
    more = bk.fit(oscillators(), target, free, steps=6, resume=loaded, **COMMON)
    at_once = bk.fit(oscillators(), target, free, steps=9, **COMMON)
    # A file keeps five digits of the losses before.
    np.testing.assert_array_equal(more.losses[3:], at_once.losses[3:])
    assert more.implementation == "linear"


def test_the_density_of_joint_targets_is_the_product_of_each():
    power = plain(bk.linear_spectrum(oscillators(0.03), BAND, noise=NOISE, of="x")).mean(-1)
    joint = bk.Joint({"power": bk.PowerSpectrum(BAND, power), "sensors": bk.CrossSpectrum(BAND, measured())})
    likelihoods = {"power": bk.likelihoods.Whittle(20), "sensors": bk.likelihoods.ComplexWishart(SEGMENTS)}

    def density(target, likelihood):
        return bk.log_density(
            oscillators(0.02), target, {"coupling.k": (0.002, 0.1)}, likelihood=likelihood, noise=NOISE, record="x",
            predict="linear", band=(4.0, 23.0), dt=1 * u.ms, duration=1 * u.second,
        )  # fmt: skip

    at = {"coupling.k": jnp.array([-1.0, 0.5])}
    alone = [density(target, likelihoods[name]).log_likelihood(at) for name, target in joint.targets.items()]
    np.testing.assert_allclose(density(joint, likelihoods).log_likelihood(at), sum(alone), rtol=1e-6)


def test_programs_of_runs_and_of_linear_systems_are_told_apart():
    options = {"duration": 5 * u.second, "dt": 1 * u.ms, "every": 5, "transient": None}
    linear, runs = (
        targets.compare(of_truth(), oscillators(), "x", options, (4.0, 23.0), False, how)
        for how in ("linear", "simulation")
    )
    assert linear.read() != runs.read()
    assert linear.settings["predict"] == "linear"
    assert not linear.simulated
    assert runs.simulated


def test_one_mass_has_no_cross_spectrum_to_fit():
    with pytest.raises(ValueError, match="'values' of cross-spectrum has 3 regions, but what is fitted is one mass"):
        bk.fit(Oscillator(), of_truth(), {"zeta": (0.1, 0.6)}, **COMMON)


# Posteriors ---------------------------------------------------------------------------------------------------------

SEGMENTS = 4000.0


def measured(k=0.03, seed=0) -> np.ndarray:
    """Means of complex normal vectors with the cross-spectra of the network, ``(F, 3, 3)``."""
    with jax.enable_x64(True):
        density = plain(bk.linear_cross_spectrum(oscillators(k), BAND, noise=NOISE, of="x"))
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(2, len(BAND), 3, int(SEGMENTS))) * np.sqrt(0.5)
    drawn = np.linalg.cholesky(density) @ (normals[0] + 1j * normals[1])
    return drawn @ np.swapaxes(drawn, -1, -2).conj() / SEGMENTS


def posterior(values, segments=SEGMENTS, **more):
    arguments = {"noise": NOISE, "predict": "linear", "band": (4.0, 23.0), "record": "x", "dt": 1 * u.ms}
    likelihood = bk.likelihoods.ComplexWishart(segments, **more)
    return bk.log_density(
        oscillators(0.02), bk.CrossSpectrum(BAND, values), {"coupling.k": (0.002, 0.1)}, likelihood=likelihood,
        duration=1 * u.second, **arguments,
    )  # fmt: skip


def test_the_likelihood_is_the_complex_wishart_density(x64):
    """Of one sensor it is the gamma density of scipy; of three, written out with determinants."""
    from scipy import special

    values = measured()
    density = posterior(values)
    for z in (-1.0, 0.5):
        at = {"coupling.k": jnp.asarray(z)}
        k = float(plain(density.to_parameters(at)["coupling.k"]))
        model = plain(bk.linear_cross_spectrum(oscillators(k), BAND, noise=NOISE, of="x"))
        gammas = 3 * np.log(np.pi) + special.gammaln(SEGMENTS - np.arange(3)).sum()
        trace = np.einsum("fij,fji->f", np.linalg.inv(model), values).real
        dets = (SEGMENTS - 3) * np.log(np.linalg.det(values).real) - SEGMENTS * np.log(np.linalg.det(model).real)
        want = np.sum(3 * SEGMENTS * np.log(SEGMENTS) - gammas + dets - SEGMENTS * trace)
        np.testing.assert_allclose(density.log_likelihood(at), want, rtol=1e-9)


def test_it_is_highest_near_the_truth_and_has_a_gradient(x64):
    density = posterior(measured())
    z = jnp.linspace(-3.0, 3.0, 61)
    found = jax.vmap(lambda x: density.log_likelihood({"coupling.k": x}))(z)
    best = density.to_parameters({"coupling.k": z[jnp.nanargmax(found)]})["coupling.k"]
    assert abs(plain(best) / 0.03 - 1.0) < 0.15
    slope = jax.grad(lambda x: density.log_likelihood({"coupling.k": x}))(0.3)
    ends = [density.log_likelihood({"coupling.k": jnp.asarray(0.3 + h)}) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_new_data_have_the_mean_and_the_spread_of_segments(x64):
    comparison = targets.compare(of_truth(), oscillators(), "x", {}, (4.0, 23.0), False, "linear")
    likelihood = bk.likelihoods.ComplexWishart(SEGMENTS).resolved(comparison, "it")
    truth = measured(seed=1)[:, None]
    expected = jnp.asarray(
        likelihood.data(
            targets.compare(bk.CrossSpectrum(BAND, truth[:, 0]), oscillators(), "x", {}, (4.0, 23.0), False, "linear")
        )
    )
    lanes = jnp.broadcast_to(expected, (3000, expected.size))
    drawn = likelihood.noisy(jax.random.key(0), comparison, lanes, {"segments": SEGMENTS, "gain": 1.0, "noise": 0.0})
    matrices = np.asarray(comparison.matrices(drawn, jnp))
    scale = np.sqrt(np.einsum("fi,fj->fij", *[np.einsum("fii->fi", truth[:, 0]).real] * 2))
    assert (np.abs(matrices.mean(0) - truth[:, 0]) < 6 * scale / np.sqrt(SEGMENTS * 3000)).all()
    # The variance of the value [i, j] is S_ii S_jj / L.
    spread = np.mean(np.abs(matrices - truth[None, :, 0]) ** 2, 0)
    np.testing.assert_allclose(spread, scale**2 / SEGMENTS, rtol=0.15)


def test_of_what_no_density_is_known():
    lead = np.vstack([np.eye(3), np.ones(3)])
    dependent = lead @ measured() @ lead.T
    with pytest.raises(ValueError, match=r"'likelihood' is missing: .*ComplexWishart"):
        bk.log_density(
            oscillators(), of_truth(), {"coupling.k": (0.002, 0.1)}, noise=NOISE, predict="linear", record="x",
            band=(4.0, 23.0),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"'segments' of ComplexWishart .* got 2.0, but takes a number from 2"):
        posterior(measured(), segments=2.0)
    with pytest.raises(ValueError, match="is not positive definite at"):
        bk.log_density(
            oscillators(), bk.CrossSpectrum(BAND, dependent, lead_field=lead), {"coupling.k": (0.002, 0.1)},
            likelihood=bk.likelihoods.ComplexWishart(60.0), noise=NOISE, predict="linear", record="x", band=(4.0, 23.0),
        )  # fmt: skip


@pytest.mark.slow
def test_a_posterior_is_sampled_kept_and_drawn(tmp_path):
    arguments: dict = {"noise": NOISE, "predict": "linear", "band": (4.0, 23.0), "record": "x"}
    found = bk.sample(
        oscillators(0.02), bk.CrossSpectrum(BAND, measured()), {"coupling.k": (0.002, 0.1)}, chains=4, draws=200,
        warmup=150, likelihood=bk.likelihoods.ComplexWishart(SEGMENTS), key=jax.random.key(0), **arguments,
    )  # fmt: skip
    draws = plain(found.draws["coupling.k"])
    assert abs(draws.mean() - 0.03) < 3 * draws.std()
    assert found.predict(5, key=jax.random.key(1)).values.shape == (5, len(BAND), 3, 3)
    # The unit of the strength, 1 / ms, is printed otherwise after it was read.
    found.save(tmp_path / "posterior.npz")
    again = bk.Posterior.load(tmp_path / "posterior.npz")
    np.testing.assert_array_equal(plain(again.draws["coupling.k"]), draws)
    found.plot(tmp_path / "posterior.png")
    assert (tmp_path / "posterior.png").exists()


def test_a_checkpoint_is_of_one_target():
    """The frequencies, the lead field, and every target of a joint one tell it from others."""
    power = plain(bk.linear_spectrum(oscillators(0.03), BAND, noise=NOISE, of="x")).mean(-1)

    def joint(scale):
        spectra = {name: bk.PowerSpectrum(BAND, power * factor) for name, factor in (("a", 1), ("b", 1), ("c", scale))}
        return bk.Joint(spectra), dict.fromkeys("abc", bk.likelihoods.Whittle(20))

    def cross(freqs=BAND, lead=None):
        values = measured() if lead is None else lead @ measured() @ lead.T
        return bk.CrossSpectrum(freqs, values, lead_field=lead), bk.likelihoods.ComplexWishart(20)

    def told(target, likelihood):
        density = bk.log_density(
            oscillators(0.02), target, {"coupling.k": (0.002, 0.1)}, likelihood=likelihood, noise=NOISE, record="x",
            predict="linear", band=(3.0, 25.0), dt=1 * u.ms, duration=1 * u.second,
        )  # fmt: skip
        return density.identity(2)

    for one, other in (
        (joint(1), joint(50)),
        (cross(), cross(BAND + 1)),
        (cross(lead=LEAD[:, ::-1]), cross(lead=LEAD)),
    ):
        first = told(*one)
        assert told(*one) == first
        assert "'target'" in identity.difference(first, told(*other))
