"""What was published of Jansen and Rit's model, by the equations and by the simulator, as docs/evidence.md says."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks import evidence

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "evidence.md").read_text()
# Grimbert and Faugeras 2006 at C = 135, to the digits that their equations have.
SADDLE_NODES, HOPF = (113.586, -41.301), {-12.148: 7.24, 89.829: 10.38, 315.696: 11.16}


def by_kind(points):
    folds = [p for p in points if p.kind == "saddle-node"]
    return folds, [p for p in points if p.kind == "Hopf"]


def test_bifurcations_by_the_jacobian():
    folds, births = by_kind(evidence.bifurcations_of_equations())
    np.testing.assert_allclose([p.E_inp for p in folds], SADDLE_NODES, atol=0.001)
    np.testing.assert_allclose([p.E_inp for p in births], list(HOPF), atol=0.001)
    np.testing.assert_allclose([p.frequency for p in births], list(HOPF.values()), atol=0.005)


@pytest.mark.slow
def test_bifurcations_by_the_simulator():
    """Runs of strang at 0.1 ms know nothing of the Jacobian; their step moves a bifurcation by a few millihertz."""
    equations, simulator = by_kind(evidence.bifurcations_of_equations()), by_kind(evidence.bifurcations_of_simulator())
    for wanted, found in zip(equations, simulator, strict=True):
        np.testing.assert_allclose([p.E_inp for p in found], [p.E_inp for p in wanted], atol=0.02)
    np.testing.assert_allclose([p.frequency for p in simulator[1]], list(HOPF.values()), atol=0.01)


@pytest.mark.slow
def test_silence_ends_at_the_saddle_node():
    low, high = evidence.silence_ends(rounds=2)
    assert high - low < 0.1
    assert low - 0.05 < SADDLE_NODES[0] < high + 0.05


def test_alpha_over_the_drive():
    found = evidence.cycles(np.arange(140.0, 311.0, 34.0), settle=8.0, seconds=4.0)
    assert (found.frequency >= 10.0).all()
    assert (found.frequency <= 11.2).all()


def test_slow_spikes_from_rest():
    """Below about 137 Hz the start decides."""
    found = evidence.cycles(np.array([120.0, 140.0]), settle=8.0, seconds=4.0)
    assert found.frequency[0] == pytest.approx(2.385, abs=0.005)
    assert found.high[0] - found.low[0] > 8.0
    assert found.frequency[1] > 10.0


@pytest.mark.slow
def test_waveforms_over_the_number_of_synapses():
    """Jansen and Rit's figure 3: noise, alpha at 128 and 135, large waves at 270, spikes at 675, noise again."""
    found = evidence.waveforms(2, 12)
    peak, share, height, skewness = (
        dict(zip(evidence.SYNAPSES, getattr(found, n))) for n in ("peak", "share", "height", "skewness")
    )
    for C in (128.0, 135.0):
        assert 9.0 < peak[C] < 12.0
        assert share[C] > 0.4
    assert 4.0 < peak[270.0] < 6.5
    assert height[270.0] > 4 * height[135.0]
    assert height[675.0] > 100.0
    assert skewness[675.0] < -1.0
    for C in (68.0, 1350.0):
        assert share[C] < 0.4
        assert height[C] < 4.0


def test_the_page_has_the_numbers_of_the_result():
    numbers = json.loads(evidence.RESULT.read_text())
    assert evidence.table(numbers) in PAGE
    assert evidence.waveform_table(numbers) in PAGE
    for name in ("bifurcations", "rhythms", "waveforms"):
        assert f"figures/jansen_rit_{name}.png" in PAGE
        assert (evidence.FIGURES / f"jansen_rit_{name}.png").exists()
