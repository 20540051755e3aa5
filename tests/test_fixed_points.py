"""Fixed points against scipy's, stability against NumPy's eigenvalues, of masses and of networks."""

from typing import Any

import brainunit as u
import jax
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import lambertw

import brainmass_kernels as bk
from brainmass_kernels import rest

AE, AI, BE, BI, C = 3.25, 22.0, 100.0, 50.0, 135.0


def rate(v):
    return 5.0 / (1.0 + np.exp(0.56 * (6.0 - v)))


def jansen_rit(x, drive):
    """The published equations."""
    M, E, I, Mv, Ev, Iv = x
    return np.array([
        Mv, Ev, Iv,
        AE * BE * rate(E - I) - 2 * BE * Mv - BE**2 * M,
        AE * BE * (drive + 0.8 * C * rate(C * M)) - 2 * BE * Ev - BE**2 * E,
        AI * BI * 0.25 * C * rate(0.25 * C * M) - 2 * BI * Iv - BI**2 * I,
    ])  # fmt: skip


def resting_potentials(drive):
    """All fixed points of ``E - I``: at rest the equations are one of one unknown."""

    def gap(y):
        M = AE / BE * rate(y)
        return AE / BE * (drive + 0.8 * C * rate(C * M)) - AI / BI * 0.25 * C * rate(0.25 * C * M) - y

    grid = np.linspace(-20.0, 40.0, 6001)
    values = gap(grid)
    root: Any = brentq
    return [root(gap, *grid[k : k + 2], xtol=1e-13) for k in np.flatnonzero(values[:-1] * values[1:] < 0)]


@bk.model
class Cubic(bk.Model):
    """x' = a x - x^3 + x_inp, which has three fixed points or one."""

    a: object = 1.0
    states = {"x": u.mV}
    inputs = {"x_inp": 0.0 * u.mV}
    observables = {"double": u.mV}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {"x": p.a * s.x - s.x**3 + i.x_inp}

    @staticmethod
    def observe(s, p):
        return {"double": 2.0 * s.x}


def plain(x):
    return np.asarray(u.get_magnitude(x))


@pytest.fixture(scope="module")
def columns():
    with jax.enable_x64(True):
        return bk.fixed_points(bk.JansenRit(), inputs={"E_inp": DRIVES * u.Hz})


DRIVES = np.array([60.0, 100.0, 150.0])


def test_all_fixed_points_of_jansen_and_rit(columns):
    assert columns.count.tolist() == [3, 3, 1]
    for k, drive in enumerate(DRIVES):
        expected = resting_potentials(drive)
        np.testing.assert_allclose(plain(columns.observables["eeg"])[: len(expected), k], expected, rtol=1e-9)
    assert np.isnan(plain(columns.states["M"])[1:, 2]).all()
    assert columns.states["M"].unit == u.mV
    assert columns.states["Mv"].unit == u.mV / u.second


def test_eigenvalues_of_the_published_equations(columns):
    for k, drive in enumerate(DRIVES):
        for point in range(columns.count[k]):
            x = np.array([plain(columns.states[n])[point, k] for n in bk.JansenRit.states])
            assert np.abs(jansen_rit(x, drive)).max() < 1e-8
            steps = 1e-6 * np.eye(6)
            jacobian = np.stack([(jansen_rit(x + h, drive) - jansen_rit(x - h, drive)) / 2e-6 for h in steps], 1)
            expected = np.sort_complex(np.linalg.eigvals(jacobian))
            found = np.sort_complex(plain(columns.eigenvalues)[point, k])
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
            assert columns.stable[point, k] == (expected.real.max() < 0)


def test_what_is_known_of_jansen_and_rit(columns):
    """Grimbert and Faugeras 2006: folds at 113.6 Hz, a Hopf bifurcation at 89.8 Hz on the upper branch."""
    assert columns.stable[:, :2].tolist() == [[True, True], [False, False], [True, False]]
    upper = plain(columns.frequencies)[2, :2]
    assert (upper > 9.5).all()
    assert (upper < 11.0).all()


def test_where_alpha_begins(x64):
    """The Hopf bifurcation of the upper branch, of the digits that Grimbert and Faugeras's equations have."""
    born = bk.fixed_points(bk.JansenRit(), inputs={"E_inp": 89.829 * u.Hz})
    assert abs(plain(born.rates)[2]) < 1e-4
    assert plain(born.frequencies)[2] == pytest.approx(10.38, abs=0.005)


def test_in_float32(columns):
    found = bk.fixed_points(bk.JansenRit(), inputs={"E_inp": DRIVES.astype(np.float32) * u.Hz})
    assert found.count.tolist() == columns.count.tolist()
    for name, x in columns.states.items():
        size = np.nanmax(np.abs(plain(x))) or 1.0
        np.testing.assert_allclose(plain(found.states[name]), plain(x), rtol=1e-4, atol=1e-3 * size)
    assert (found.stable == columns.stable).all()


def test_a_cubic_in_a_batch(x64):
    a, drive = np.array([[1.0], [4.0]]), np.array([-3.0, 0.0, 0.2])
    found = bk.fixed_points(Cubic(a=a), inputs={"x_inp": drive * u.mV})
    assert found.states["x"].shape == (3, 2, 3)
    assert found.stable.shape == (3, 2, 3)
    for i, j in np.ndindex(2, 3):
        roots = np.roots(np.array([-1.0, 0.0, a[i, 0], drive[j]]))
        roots = np.sort(roots[np.abs(roots.imag) < 1e-9].real)
        assert found.count[i, j] == len(roots)
        x = plain(found.states["x"])[: len(roots), i, j]
        np.testing.assert_allclose(x, roots, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(plain(found.observables["double"])[: len(roots), i, j], 2 * roots, atol=1e-11)
        # Per second, where the model counts milliseconds.
        np.testing.assert_allclose(plain(found.rates)[: len(roots), i, j], 1e3 * (a[i, 0] - 3 * roots**2), rtol=1e-8)
        assert (found.stable[: len(roots), i, j] == (a[i, 0] < 3 * roots**2)).all()


def test_of_two_coupled_regions(x64):
    """Nine points where the regions hardly see each other, three where they are as one."""
    weights = np.array([[0.0, 1.0], [1.0, 0.0]])
    for k, count in ((0.05, 9), (2.0, 3)):
        network = bk.Network(Cubic(), weights, coupling="diffusive", source="x", target="x_inp", k=k)
        found = bk.fixed_points(network, starts=128)
        assert found.count == count
        assert found.states["x"].shape == (count, 2)
        x = plain(found.states["x"])
        assert np.abs(x - x**3 + k * (x[:, ::-1] - x)).max() < 1e-10
        for point, rates in zip(x, plain(found.eigenvalues)):
            jacobian = np.diag(1 - 3 * point**2 - k) + k * weights
            expected = 1e3 * np.sort(np.linalg.eigvalsh(jacobian))[::-1]
            np.testing.assert_allclose(rates, expected, atol=1e-6)
    assert "9 fixed" not in str(found)
    assert "3 fixed points of Cubic, 2 stable" in str(found)


@bk.model
class Decay(bk.Model):
    """A leak without which a region has nothing but what arrives."""

    leak: object = 20.0 * u.Hz
    states = {"x": u.mV}
    inputs = {"x_inp": 0.0 * u.mV / u.second}

    @staticmethod
    def drift(s, p, i):
        return {"x": -p.leak * s.x + i.x_inp}


@pytest.mark.parametrize("delay", [5.0, 40.0, 200.0])
def test_eigenvalues_with_delays(x64, delay):
    """x' = -l x - k x(t - d): the roots are Lambert's (Corless et al. 1996, Adv. Comput. Math. 5:329)."""
    strength, leak, d = 40.0, 20.0, delay * 1e-3
    network = bk.Network(
        Decay(), np.ones((1, 1)), delays=np.full((1, 1), delay) * u.ms, k=-strength * u.Hz, self_connection=True
    )
    found = bk.fixed_points(network, starts=4)
    expected = max(lambertw(-strength * d * np.exp(leak * d), k) / d - leak for k in range(-3, 4))
    rightmost = plain(found.eigenvalues)[0, 0]
    np.testing.assert_allclose([rightmost.real, abs(rightmost.imag)], [expected.real, abs(expected.imag)], rtol=1e-6)
    assert found.stable.tolist() == [expected.real < 0]


def test_of_groups(x64):
    """Regions of two models that are not coupled have the points of each."""
    network = bk.Network(
        {"two": (Cubic(a=4.0), 1), "one": (Decay(), 2)},
        couplings=[bk.Coupling(np.zeros((3, 3)), source="two.x", target="two.x_inp", k=1.0)],
    )
    found = bk.fixed_points(network, inputs={"one.x_inp": 3.0 * u.mV / u.second})
    np.testing.assert_allclose(plain(found.states["two.x"]), [[-2.0], [0.0], [2.0]], atol=1e-10)
    np.testing.assert_allclose(plain(found.states["one.x"]), np.full((3, 2), 0.15), rtol=1e-10)
    expected = [[-20.0, -20.0, -8000.0], [4000.0, -20.0, -20.0], [-20.0, -20.0, -8000.0]]
    np.testing.assert_allclose(plain(found.eigenvalues), expected, rtol=1e-8)
    assert found.stable.tolist() == [True, False, True]


@bk.model
class Escaping(bk.Model):
    states = {"x": u.UNITLESS}
    inputs = {"x_inp": 1.0}

    @staticmethod
    def drift(s, p, i):
        return {"x": i.x_inp + s.x**2}


def test_without_a_fixed_point():
    found = bk.fixed_points(Escaping(), starts=64)
    assert len(found) == 0
    assert found.count == 0
    assert found.states["x"].shape == (0,)
    assert "no fixed points of Escaping from 64 starts" in str(found)


def test_within_bounds(x64):
    found = bk.fixed_points(Cubic(a=4.0), within={"x": (-0.5 * u.mV, None)})
    np.testing.assert_allclose(plain(found.states["x"]), [0.0, 2.0], atol=1e-10)


def test_a_point_is_where_a_run_begins_and_stays(x64):
    found = bk.fixed_points(Cubic(a=4.0))
    run = bk.simulate(Cubic(a=4.0), 50, 0.1 * u.ms, initial=found[2], record="x")
    np.testing.assert_allclose(plain(run["x"]), 2.0, rtol=1e-12)
    assert [float(plain(point["x"])) for point in found] == pytest.approx([-2.0, 0.0, 2.0], abs=1e-10)


def test_shown_as_a_table(columns):
    one = bk.fixed_points(Cubic(a=4.0))
    lines = str(one).splitlines()
    assert lines[0] == "3 fixed points of Cubic, 2 stable"
    assert len(lines) == 5
    assert "double (mV)" in lines[1]
    assert lines[3].split()[-3:] == ["unstable", "4000", "0"]
    assert "<td" in one._repr_html_()
    assert repr(one) == "FixedPoints(3 fixed points of Cubic, 2 stable)"
    assert str(columns).startswith("1 to 3 fixed points of JansenRit in 3 members of a batch")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"within": {"y": (0, 1)}}, ValueError, "unknown state in 'within' 'y'"),
        ({"within": {"x": 3.0}}, TypeError, "takes a pair"),
        ({"within": {"x": (2 * u.mV, 1 * u.mV)}}, ValueError, "takes low < high"),
        ({"within": {"x": (2 * u.Hz, None)}}, ValueError, "within: x.*takes mV"),
        ({"within": [1]}, TypeError, "'within' got list"),
        ({"inputs": {"y": 1.0}}, ValueError, "unknown input 'y'"),
        ({"starts": 0}, ValueError, "'starts' got 0"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        bk.fixed_points(Cubic(), **arguments)


def test_traced_arguments_are_refused():
    with pytest.raises(TypeError, match="traced by jit"):
        jax.jit(lambda a: bk.fixed_points(Cubic(a=a)).stable)(1.0)
    with pytest.raises(TypeError, match="class Cubic, but takes a model"):
        bk.fixed_points(Cubic)  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match="'point' got 5"):
        bk.fixed_points(Escaping(), inputs={"x_inp": -1.0}, starts=64)[5]


def test_is_stable_agrees_with_eigenvalues():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        matrices = rng.standard_normal((200, 6, 6))
        # The rightmost eigenvalue at -1e-9 to 1, near the border too.
        shifts = rng.choice([-1.0, 1.0], 200) * 10 ** rng.uniform(-9, 0, 200)
        rightmost = np.linalg.eigvals(matrices).real.max(1)
        matrices = matrices - (rightmost - shifts)[:, None, None] * np.eye(6)
        scales = 10 ** rng.uniform(-3, 3, (200, 1, 1))
        found = jax.jit(jax.vmap(rest.is_stable))(scales * matrices)
    assert (np.asarray(found) == (shifts < 0)).all()
    assert 80 < (shifts < 0).sum() < 120


def test_a_delay_inside_a_mass(x64):
    @bk.model
    class Late(bk.Model):
        """x' = -l x - k x(t - t0)."""

        k: object = 40.0 * u.Hz
        leak: object = 20.0 * u.Hz
        t0: object = 40.0 * u.ms
        states = {"x": u.mV}
        inputs = {"x_inp": 0.0 * u.mV / u.second}
        delayed = {"late": bk.Delayed("x", by="t0")}

        @staticmethod
        def drift(s, p, i):
            return {"x": -p.leak * s.x - p.k * i.late + i.x_inp}

    found = bk.fixed_points(Late(t0=np.array([5.0, 200.0]) * u.ms), inputs={"x_inp": 6.0 * u.mV / u.second}, starts=4)
    np.testing.assert_allclose(plain(found.states["x"]), [[0.1, 0.1]], rtol=1e-10)
    assert found.stable.tolist() == [[True, False]]
    expected = max(lambertw(-40 * 0.2 * np.exp(20 * 0.2), k) / 0.2 - 20 for k in range(-3, 4))
    np.testing.assert_allclose(plain(found.rates)[0, 1], expected.real, rtol=1e-6)
