"""The examples run, on part of their data, and find what they look for."""

import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest
from scipy import signal

from brainmass_kernels import spectra

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def whole_brain():
    for package in ("tvb_data", "optax"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("whole_brain", EXAMPLES / "whole_brain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["whole_brain"] = module
    spec.loader.exec_module(module)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield module


@pytest.mark.slow
def test_a_whole_brain(whole_brain, capsys):
    found = whole_brain.main(["--regions", "8", "--seconds", "1.5", "--steps", "6"])
    assert found["means"].shape == (2, 5)
    # Without coupling, masses with noise of their own have no connectivity to speak of; with it they do.
    assert np.abs(found["means"][:, 0]).max() < 0.35
    assert found["losses"].min() < 0.9 * found["losses"][0]
    assert "fit: mean squared distance" in capsys.readouterr().out


def test_amplitudes_and_their_correlation():
    """The envelope against scipy's Hilbert transform of a filtered signal; the correlation against numpy's."""
    rng, dt = np.random.default_rng(0), 0.005
    t = np.arange(2000) * dt
    slow = 1.0 + 0.5 * np.sin(2 * np.pi * 0.3 * t + np.arange(3)[:, None])
    x = (slow * np.sin(2 * np.pi * 10 * t) + np.sin(2 * np.pi * 30 * t)).T.astype(np.float32)
    found = np.asarray(spectra.envelope(x, dt, (7.0, 13.0)))
    np.testing.assert_allclose(found[100:-100], slow.T[100:-100], atol=0.02)
    band = signal.butter(4, (7, 13), "bandpass", fs=1 / dt, output="sos")
    other = np.abs(signal.hilbert(signal.sosfiltfilt(band, x, axis=0), axis=0))
    np.testing.assert_allclose(found[200:-200], other[200:-200], atol=0.05)
    noise = rng.normal(size=(500, 4)).astype(np.float32)
    np.testing.assert_allclose(spectra.correlation(noise), np.corrcoef(noise.T), atol=1e-5)
    still = noise * np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    slope = jax.grad(lambda y: spectra.correlation(y)[0, 2])(still)
    assert np.isfinite(np.asarray(slope)).all()
    assert spectra.correlation(still)[1].tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="'band' got 13 to 7 Hz"):
        spectra.envelope(x, dt, (13.0, 7.0))
