"""An evoked response at 32 sensors, fitted: ``python -m examples.studies evoked``.

A sound reaches four regions, two of the primary auditory cortex and two of the superior temporal gyrus, which excite
each other forwards and backwards. What strength has the stimulus in each, how late does it come, how strong are the
connections, how fast are the synapses? The recording is made with known values, and noise at the sensors.
Needs ``pip install 'brainmass-kernels[fit]'``.

David, Kiebel, Harrison, Mattout, Kilner and Friston 2006, NeuroImage 30:1255-1272.
"""

from __future__ import annotations

import brainunit as u
import jax
import numpy as np

import brainmass_kernels as bk

REGIONS = ("A1 left", "A1 right", "STG left", "STG right")
FREE = {
    "E_inp.amplitude": (-100 * u.Hz, 600 * u.Hz), "E_inp.peak": (15 * u.ms, 80 * u.ms), "be": (70 * u.Hz, 130 * u.Hz),
    "coupling.forward.k": (0 * u.Hz, 500 * u.Hz), "coupling.backward.k": (0 * u.Hz, 500 * u.Hz),
}  # fmt: skip
TRUTH = {
    "E_inp.amplitude": np.array([260.0, 180.0, 0.0, 60.0]), "E_inp.peak": 32.0, "be": 90.0,
    "coupling.forward.k": 200.0, "coupling.backward.k": 100.0,
}  # fmt: skip
TIMES = {"duration": 700 * u.ms, "dt": 0.5 * u.ms, "every": 8, "transient": 300 * u.ms}
FORWARD = np.zeros((4, 4))
FORWARD[[2, 3], [0, 1]] = 1.0  # from A1 to STG of its side
NOISE = 3.0  # uV


def lead_field(sensors: int):
    """Radial dipoles below sensors on the upper half of a sphere of radius 1."""
    angle, height = np.pi * (1 + 5**0.5) * np.arange(sensors), np.linspace(0.1, 1.0, sensors)
    on = np.stack([np.sqrt(1 - height**2) * np.cos(angle), np.sqrt(1 - height**2) * np.sin(angle), height], 1)
    of = np.array([[-0.5, 0.2, 0.2], [0.5, 0.2, 0.2], [-0.5, -0.2, 0.1], [0.5, -0.2, 0.1]])
    between = on[:, None] - of
    gain = (between * of).sum(-1) / np.linalg.norm(of, axis=1) / np.linalg.norm(between, axis=-1) ** 3
    return bk.Readout(gain, of="eeg", unit=u.uvolt, regions=REGIONS).average_reference()


def brain(forward, backward, be):
    coupling = {"kind": "sigmoidal_jansen_rit", "target": "E_inp", "cmax": 1.0, "delays": 10 * u.ms}
    return bk.Network(bk.JansenRit(be=be * u.Hz), couplings={
        "forward": bk.Coupling(FORWARD, k=forward * u.Hz, **coupling),
        "backward": bk.Coupling(FORWARD.T, k=backward * u.Hz, **coupling),
    })  # fmt: skip


def stimulus(amplitude, peak):
    return {"E_inp": 20 * u.Hz + bk.GammaBump(300 * u.ms, peak * u.ms, amplitude * u.Hz)}


def response(values, readout):
    """What the sensors see, uV ``(K, sensors)``, with values of the free names in Hz and ms."""
    network = brain(values["coupling.forward.k"], values["coupling.backward.k"], values["be"])
    inputs = stimulus(values["E_inp.amplitude"], values["E_inp.peak"])
    return bk.simulate(network, inputs=inputs, record={"eeg": readout}, **TIMES)["eeg"].mantissa


def fit(seen, readout, starts: int, steps: int, refined: int) -> bk.Fit:
    """By gradients from many starts at once, then by least squares from the best."""
    target = bk.TimeSeries(seen * u.uvolt, sigma=NOISE * u.uvolt)
    call = {
        "regional": ("E_inp.amplitude",), "inputs": stimulus(150.0, 40.0), "record": {"eeg": readout},
        "realisations": 1, "key": jax.random.key(0), **TIMES,
    }  # fmt: skip
    model = brain(150.0, 150.0, 100.0)
    near = bk.fit(model, target, FREE, starts=starts, steps=steps, **call)
    return bk.fit(model, target, FREE, starts=near.places(1), steps=refined, optimiser="levenberg_marquardt", **call)


def study(sensors=32, starts=64, steps=200, refined=8) -> dict:
    readout = lead_field(sensors)
    clean = np.asarray(response(TRUTH, readout))
    seen = clean + NOISE * np.random.default_rng(0).standard_normal(clean.shape)
    fitted = fit(seen, readout, starts, steps, refined)
    found, errors = ({name: np.asarray(x[name][0].to_decimal(low.unit)) for name, (low, _) in FREE.items()}
                     for x in (fitted.parameters, fitted.standard_errors()))  # fmt: skip
    for name, true in TRUTH.items():
        for value, error, known in zip(*map(np.ravel, (found[name], errors[name], true)), strict=True):
            print(f"{name}: {value:.1f} +- {error:.1f}, in truth {known:.1f}")
    return {"found": found, "errors": errors, "seen": seen, "shown": np.asarray(fitted.prediction.values.mantissa[0])}
