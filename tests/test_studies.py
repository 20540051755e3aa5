"""The studies find what their data were made of, on less of it; their page shows their own code and figures."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "docs" / "figures" / "studies", (ROOT / "docs" / "studies.md").read_text()
STUDIES = ("evoked", "resting", "balance", "control")
LARGEST = 80_000  # bytes of a figure


@pytest.fixture
def study(request):
    """The module of a study, run with the promotion that users have."""
    name = request.param
    for package in ("optax", *(("tvb_data",) if name in ("resting", "balance") else ())):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module(f"examples.studies.{name}")


def of(name: str):
    return pytest.mark.parametrize("study", [name], indirect=True, ids=[name])


def draws(found, study, folder) -> None:
    """The figure of what was found is written."""
    pytest.importorskip("matplotlib", reason="figures are in the extra `fit`").use("agg")
    from examples.studies import figures

    name = study.__name__.rpartition(".")[2]
    getattr(figures, name)(found, folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 10_000


# What they find -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@of("evoked")
def test_an_evoked_response(study, tmp_path):
    found = study.study(sensors=24)
    for name, true in study.TRUTH.items():
        value, error = np.asarray(found["found"][name]), np.asarray(found["errors"][name])
        assert (np.abs(value - true) < 3.5 * error).all(), name
        assert (error < 0.05 * np.max(true)).all(), name
    # What is left is the noise of the sensors.
    away = (found["seen"] - found["shown"]) / study.NOISE
    assert np.mean(away**2) == pytest.approx(1.0, abs=4 * np.sqrt(2 / away.size))
    draws(found, study, tmp_path)


@of("evoked")
def test_sensors_see_potentials_against_their_mean(study):
    """And a source is seen most by the sensor that is nearest to it."""
    matrix = np.asarray(study.lead_field(32).matrix)
    np.testing.assert_allclose(matrix.sum(0), 0.0, atol=1e-5)
    seen = matrix.argmax(0)
    assert len(set(seen)) == 4


@pytest.mark.slow
@of("resting")
def test_resting_state(study, tmp_path):
    found = study.study(regions=20, minutes=15, subjects=8, steps=30, grid=(5, 4))
    np.testing.assert_allclose(found["found"], [*study.TRUTH.values()], rtol=0.3)
    (wrong, fitted, truth) = found["away"].T
    # On noise that it has not seen, the fit is as near as the truth, to the spread between such runs.
    assert (fitted < 0.4 * wrong).all()
    assert (fitted < 1.5 * truth + 0.01).all()
    draws(found, study, tmp_path)


@pytest.mark.slow
@of("balance")
def test_inhibition_finds_the_set_point(study, tmp_path):
    found = study.study(couplings=(0.2, 0.5, 1.0, 1.4), seconds=60)
    stable = slice(0, 3)
    strength, before, after = found["strength"], found["before"][stable], found["after"][stable]
    # Without plasticity what reaches a region sets its rate; with it, none.
    assert all(np.corrcoef(strength, each)[0, 1] > 0.9 for each in before)
    assert (before.max(1) > [6.0, 30.0, 70.0]).all()
    np.testing.assert_allclose(after, study.SET_POINT, rtol=0.01)
    for G, weights in zip(found["G"][stable], found["J"][stable], strict=True):
        np.testing.assert_allclose(weights, feedback_inhibition(G, strength), atol=0.005)
    # Where the set point is not stable, rates do not rest at it.
    assert [largest_growth(G, study) < 0 for G in found["G"]] == [True, True, True, False]
    spread = found["course"][-400:].std(0).max(-1)
    assert (spread[stable] < 0.2).all()
    assert spread[3] > 1.0
    draws(found, study, tmp_path)


def transfer(x, d):
    return x / -np.expm1(-d * x)


def rest():
    """The gates at 3 Hz, of excitation and of inhibition, by bisection and by iteration, in float64."""
    S = 0.0641 * 3.0 / (1 + 0.0641 * 3.0)
    low, high = 0.0, 1.0
    for _ in range(60):
        S_i = (low + high) / 2
        above = 0.01 * transfer(615 * (0.7 * 0.382 + 0.15 * S - S_i) - 177, 0.087) > S_i
        low, high = (S_i, high) if above else (low, S_i)
    return S, low


def feedback_inhibition(G, strength):
    """The weight of inhibition of each region at which all of them rest at 3 Hz."""
    S, S_i = rest()
    low, high = -100.0, 50.0
    for _ in range(60):
        x = (low + high) / 2
        low, high = (x, high) if transfer(x, 0.16) < 3.0 else (low, x)
    return (0.382 + 0.15 * S * (1.4 + G * strength) - (low + 125) / 310) / S_i


def largest_growth(G, study) -> float:
    """The largest real part of the eigenvalues about that rest, with these weights of inhibition, in 1/s."""
    weights = np.array(study.bk.load_connectome(76).weights)
    np.fill_diagonal(weights, 0.0)
    weights /= weights.sum(1).mean()
    S, S_i = rest()
    J = feedback_inhibition(G, weights.sum(1))

    def flow(z):
        e, i = z.reshape(2, -1)
        r_e = transfer(310 * (0.382 + 0.15 * (1.4 * e + G * weights @ e) - J * i) - 125, 0.16)
        r_i = transfer(615 * (0.7 * 0.382 + 0.15 * e - i) - 177, 0.087)
        return np.concatenate([0.641 * (1 - e) * r_e - e / 0.1, r_i - i / 0.01])

    at = np.repeat([S, S_i], 76)
    assert np.abs(flow(at)).max() < 1e-6
    steps = 1e-6 * np.eye(152)
    return np.linalg.eigvals(np.stack([flow(at + h) - flow(at - h) for h in steps], 1) / 2e-6).real.max()


@pytest.mark.slow
@of("control")
def test_the_least_input_that_switches(study, tmp_path):
    found = study.study(deadlines=(40.0, 160.0), steps=200)
    _, saddle, high = found["rest"]
    assert (found["costs"] < 0.95 * found["pulses"]).all()
    assert found["costs"][1] < found["costs"][0]  # who has time needs less
    np.testing.assert_allclose(found["rE"][-1], high[0], rtol=0.02)
    # It ends where the flow takes over: next to the saddle, if there is time.
    assert found["near"][1] < 0.01 < found["near"][0]
    for k, switches in enumerate(found["course"].T):
        np.testing.assert_allclose(wilson_cowan(np.asarray(switches, float)), found["rE"][:, k], atol=1e-3)
        assert wilson_cowan(0.9 * np.asarray(switches, float))[-1] < 0.5 * saddle[0]  # nothing is left over
    draws(found, study, tmp_path)


def wilson_cowan(course) -> np.ndarray:
    """The excitatory rate under an input, one value a step of 0.1 ms, by Heun's steps in float64."""

    def response(x, a, theta):
        return 1 / (1 + np.exp(-a * (x - theta))) - 1 / (1 + np.exp(a * theta))

    def flow(z, u):
        E, I = z
        return np.array([
            (1 - E) * response(12 * E - 4 * I + u, 1.2, 2.8) - E,
            (1 - I) * response(13 * E - 11 * I, 1.0, 4.0) - I,
        ]) / 10.0  # fmt: skip

    z, rates = np.zeros(2), []
    for u in course:
        first = flow(z, u)
        z = z + 0.05 * (first + flow(z + 0.1 * first, u))
        rates.append(z[0])
    return np.array(rates)


# Their page ---------------------------------------------------------------------------------------------------------


def test_figures_are_there_and_small():
    shown = re.findall(r"\]\(figures/studies/(\w+)\.png\)", PAGE)
    assert tuple(shown) == STUDIES
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.png" for name in shown}
    assert all(path.stat().st_size < LARGEST for path in FOLDER.iterdir())


def test_what_the_page_shows_is_in_the_scripts():
    code = "\n".join((ROOT / "examples" / "studies" / f"{name}.py").read_text() for name in STUDIES)
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) >= len(STUDIES)
    assert not [block for block in blocks if block not in code]


def test_an_unknown_study(capsys):
    pytest.importorskip("matplotlib", reason="figures are in the extra `fit`")
    from examples.studies import __main__ as command

    with pytest.raises(SystemExit):
        command.main(["rest"])
    assert "no study 'rest', but evoked, resting, balance, control" in capsys.readouterr().err
