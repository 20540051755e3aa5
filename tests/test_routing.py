"""One table of names and units, whoever reads it."""

import json

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.commands import set_values
from brainmass_kernels.fitting.fit import fit
from brainmass_kernels.routing import places, put, quantities


@bk.model
class Slow(bk.Model):
    """A model whose unit of time is the millisecond."""

    rate: u.Quantity = 0.5 / u.ms
    gain: float = 1.0

    time_unit = u.ms
    states = {"x": u.mV}
    inputs = {"push": 0.0 * u.mV}

    @staticmethod
    def drift(s, p, i):
        return {"x": p.rate * (p.gain * i.push - s.x)}


def test_a_name_has_one_place_and_one_unit():
    known = places(Slow())
    assert {n: (p.kind, p.name) for n, p in known.items()} == {
        "rate": ("parameters", "rate"), "gain": ("parameters", "gain"), "push": ("inputs", "push"),
        "noise.push": ("noise", "push"), "noise.x": ("noise", "x"),
    }  # fmt: skip
    assert known["noise.push"].unit == u.mV * u.ms**0.5
    assert known["noise.x"].unit == u.mV / u.ms**0.5


def test_a_network_has_its_coupling_too():
    network = bk.Network(bk.JansenRit(), np.ones((2, 2)), source="eeg", target="E_inp", k=1 * u.Hz / u.mV)
    assert places(network)["coupling.k"].unit == u.Hz / u.mV
    swept, inputs, noise = put(network, {}, {}, {"coupling.k": 2 * u.Hz / u.mV, "C": 120.0, "noise.E_inp": 1.0})
    assert swept.parameters["k"] == 2 * u.Hz / u.mV
    assert (swept.model.C, inputs, noise) == (120.0, {}, {"E_inp": 1.0})


def test_plain_bounds_of_a_noise_are_in_the_models_unit_of_time():
    """Of a fit, as of a sweep and of the command line."""
    unit = u.mV * u.ms**0.5
    target = bk.TimeSeries(np.linspace(0.0, 1.0, 10) * u.mV)
    found = fit(
        Slow(), target, {"noise.push": (1.0, 3.0)}, noise={"push": 2.0 * unit}, duration=20 * u.ms, dt=1 * u.ms,
        every=2, transient=None, starts=1, steps=1, realisations=2, implementation="scan",
    )  # fmt: skip
    assert found.free[0].unit == unit
    assert 1.0 <= found.parameters["noise.push"].to_decimal(unit)[0] <= 3.0
    grid = bk.sweep(
        Slow(), {"noise.push": jnp.array([1.0, 3.0]) * unit}, 20 * u.ms, 1 * u.ms, record=[bk.Mean(of="x")],
        key=jax.random.key(0),
    )  # fmt: skip
    assert grid.axes["noise.push"].unit == unit
    assert set_values(Slow(), {"noise.push": 2.0})[2] == {"push": 2.0 * unit}


def test_noise_on_a_state_can_be_free():
    values = quantities(Slow(), {}, {"x": 2.0 * u.mV / u.ms**0.5})
    assert values["noise.x"] == (u.mV / u.ms**0.5, 2.0 * u.mV / u.ms**0.5)
    assert "noise.x" not in quantities(Slow(), {}, {})


def test_noise_on_what_has_no_unit_keeps_the_name_of_its_own():
    known = places(bk.Hopf())
    assert [str(known[name].unit) for name in ("noise.x_inp", "noise.x")] == ["ms^0.5", "1 / ms^0.5"]
    assert (known["noise.x_inp"].unit, known["noise.x"].unit) == (u.ms**0.5, u.ms**-0.5)


@pytest.mark.parametrize("name", ["noise.y", "coupling.k", "speed"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown name in 'free' '{name}'"):
        fit(Slow(), bk.TimeSeries(np.arange(10.0) * u.mV), {name: (1.0, 2.0)}, duration=10 * u.ms, dt=1 * u.ms)


def test_a_constant_of_the_coupling_is_offered_by_its_full_name():
    network = bk.Network(bk.Hopf(), np.ones((2, 2)), source="x", k=0.1)
    with pytest.raises(ValueError, match=r"unknown name in 'free' 'k'; did you mean 'coupling\.k'"):
        fit(network, bk.Connectivity(np.eye(2)), {"k": (0.1, 1.0)}, record="x", duration=10, dt=0.1 * u.ms)


def test_a_saved_fit_with_noise_per_root_of_a_second_is_read(tmp_path):
    """As earlier versions saved it, of a model in ms: the same numbers in the model's own unit."""
    unit = u.mV * u.ms**0.5
    target = bk.TimeSeries(np.linspace(0.0, 1.0, 10) * u.mV)
    arguments = {"free": {"noise.push": (1.0, 3.0), "gain": (0.5, 2.0)}, "noise": {"push": 2.0 * unit}}
    arguments |= {"duration": 20 * u.ms, "dt": 1 * u.ms, "every": 2, "transient": None, "starts": 1, "steps": 1}
    found = fit(Slow(), target, realisations=2, implementation="scan", **arguments)
    found.save(tmp_path / "fit.json")
    saved = json.loads((tmp_path / "fit.json").read_text())
    del saved["checksum"]
    for part in (saved["values"], saved["parameters"]):
        x = part["noise.push"]
        part["noise.push"] = {"value": (np.array(x["value"]) * 0.001**0.5).tolist(), "unit": "mV * s^0.5"}
    assert str(u.mV * u.second**0.5) == "mV * s^0.5"
    for entry in saved["free"]:
        if entry["name"] == "noise.push":
            entry["low"], entry["high"] = entry["low"] * 0.001**0.5, entry["high"] * 0.001**0.5
    (tmp_path / "earlier.json").write_text(json.dumps(saved))
    read = bk.Fit.load(tmp_path / "earlier.json", Slow())
    (free,) = [f for f in read.free if f.name == "noise.push"]
    np.testing.assert_allclose((free.low, free.high), (1.0, 3.0), rtol=1e-6)
    assert free.unit == unit
    for a, b in (
        (read.parameters, found.parameters),
        ({"noise.push": read.noise["push"]}, {"noise.push": found.noise["push"]}),
    ):
        np.testing.assert_allclose(a["noise.push"].to_decimal(unit), b["noise.push"].to_decimal(unit), rtol=1e-5)
