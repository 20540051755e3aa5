"""Several couplings, kinds of the user's own, live delays: what they are made of (the numbers: network_suite.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from network_suite import CUBE

import brainmass_kernels as bk
from brainmass_kernels import arguments, routing

N, STEPS, DT = 5, 40, 0.1 * u.ms
rng = np.random.default_rng(0)
WEIGHTS = rng.uniform(0.0, 0.4, (3, N, N))
# Delays of no, one and two steps among them, and of exactly the longest.
DELAYS = rng.integers(0, 12, (3, N, N))
DELAYS[:, 0, 1:4] = [0, 1, 2]
LENGTHS = rng.uniform(1.0, 12.0, (N, N))
X, Y = np.linspace(-0.4, 0.5, N), np.linspace(0.3, -0.2, N)


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.jax_enable_x64  # pyright: ignore
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def simulated(network, implementation, steps=STEPS, **options):
    start = {"x": X, "y": Y} | options.pop("initial", {})
    return bk.simulate(
        network, steps * DT, DT, initial=start, scheme="euler", record="x", implementation=implementation, **options
    )


def network(k=0.2, w=WEIGHTS, gain=2.0, strength=0.3, delays=DELAYS):
    couplings = {
        "first": bk.Coupling(w[0], source="x", target="x_inp", k=k, delays=delays[0] * DT),
        "phase": bk.Coupling(w[1], kind="kuramoto", source="y", target="y_inp", k=strength, delays=delays[1] * DT),
        "cube": bk.Coupling(w[2], kind=CUBE, source="x", target="x_inp", gain=gain, delays=delays[2] * DT),
    }
    return bk.Network(bk.Hopf(a=0.1, w=0.3), couplings=couplings)


@needs.numba
def test_threads_that_share_a_network():
    n, made = 320, np.random.default_rng(1)
    weights = made.uniform(0, 0.02, (2, n, n))
    delays = made.integers(0, 30, (2, n, n))
    start = {"x": made.uniform(-0.5, 0.5, n), "y": made.uniform(-0.5, 0.5, n)}

    def loss(weights, k, delays, implementation):
        couplings = [
            bk.Coupling(weights[0], source="x", target="x_inp", k=k, delays=delays[0] * DT),
            bk.Coupling(weights[1], kind="kuramoto", source="y", target="y_inp", k=0.1, delays=delays[1] * DT),
        ]
        net = bk.Network(bk.Hopf(a=0.1, w=0.3), couplings=couplings)
        return jnp.sum(simulated(net, implementation, 40, initial=start)["x"] ** 2)

    for times in (delays, 0 * delays):
        gradient = jax.grad(loss, (0, 1))
        found, expected = (gradient(jnp.asarray(weights), 0.2, times, name) for name in ("numba", "scan"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)


# One coupling is the list of one ------------------------------------------------------------------------------------


def test_a_list_of_one_is_the_network_of_one():
    options = {"source": "x", "target": "x_inp", "k": 0.2, "delays": DELAYS[0] * DT}
    one = bk.Network(bk.Hopf(a=0.1, w=0.3), WEIGHTS[0], **options)
    listed = bk.Network(bk.Hopf(a=0.1, w=0.3), couplings=[bk.Coupling(WEIGHTS[0], **options)])
    assert repr(one) == repr(listed)
    assert jax.tree.structure(one) == jax.tree.structure(listed)
    for implementation in ("scan", *["numba"] * (not needs.numba.args[0])):
        runs = [arguments.prepare(net, 12, DT, implementation=implementation)[0] for net in (one, listed)]
        assert runs[0] == runs[1], "the key of the compiled program"
    one, listed = (simulated(net, "scan", 12) for net in (one, listed))
    np.testing.assert_array_equal(one["x"], listed["x"])
    np.testing.assert_array_equal(one.final["history"], listed.final["history"])


def test_couplings_of_one_source_share_its_history():
    couplings = [bk.Coupling(w, source="x", target="x_inp", k=0.2, delays=1 * u.ms) for w in WEIGHTS]
    net = bk.Network(bk.Hopf(), couplings=couplings)
    assert [*net.sent()] == ["x"]
    assert [*bk.Network(bk.Hopf(), couplings=couplings[:1] * 2).parameters][::2] == ["additive_0.k", "additive_1.k"]
    assert [*net.parameters] == [f"additive_{i}.{n}" for i in range(3) for n in ("k", "b")]
    assert np.shape(simulated(net, "scan", 12).final["history"]) == (10, N)


# Live delays ---------------------------------------------------------------------------------------------------------


def live(speed: Any = 3.0, k=0.2, **options):
    lengths = {"distances": LENGTHS, "speed": None if speed is None else speed * u.mm / u.ms} | options
    return bk.Network(bk.Hopf(a=0.1, w=0.3), WEIGHTS[0], source="x", target="x_inp", k=k, **lengths)


@needs.numba
def test_another_speed_compiles_nothing():
    def runs(speed):
        run, _ = arguments.prepare(
            live(speed, max_delay=4 * u.ms), 12, DT, initial={"x": X, "y": Y}, implementation="numba"
        )
        return run

    assert runs(3.0) == runs(3.7), "the key of the compiled program"
    simulated(live(3.0, max_delay=4 * u.ms), "numba", 12)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    simulated(live(3.7, max_delay=4 * u.ms), "numba", 12)
    assert not compiled


def test_sparse_weights_have_live_delays_too():
    from jax.experimental import sparse

    for implementation in ("scan", *(["numba"] if not needs.numba.args[0] else [])):
        for interpolate in (False, True):
            options = {"source": "x", "target": "x_inp", "k": 0.2, "interpolate": interpolate, "max_delay": 4 * u.ms}
            lengths = {"distances": LENGTHS * u.mm, "speed": np.array([[3.0], [4.5]]) * u.mm / u.ms}
            nets = (
                bk.Network(bk.Hopf(a=0.1, w=0.3), w, **options, **lengths)
                for w in (sparse.BCOO.fromdense(WEIGHTS[0]), WEIGHTS[0])
            )
            edges, dense = (simulated(net, implementation, 12)["x"] for net in nets)
            np.testing.assert_allclose(edges, dense, rtol=0, atol=1e-12)


def test_a_rounded_delay_has_no_gradient():
    def loss(speed):
        return jnp.sum(simulated(live(speed, max_delay=4 * u.ms), "scan", 12)["x"])

    with pytest.raises(TypeError, match=r"delays are rounded to whole steps.*interpolate=True"):
        jax.grad(loss)(3.0)


def test_a_traced_delay_beyond_the_longest_is_nan():
    found = jax.jit(lambda s: simulated(live(s, max_delay=1 * u.ms), "scan", 12)["x"])(3.0)
    assert np.isnan(np.asarray(found)).any()


def test_speed_is_a_constant_of_the_coupling():
    net = live(3.0, max_delay=8 * u.ms, interpolate=True)
    assert net.parameter_units()["speed"] == u.mm / u.ms
    other = net.replace(speed=4.5 * u.mm / u.ms)
    same = live(4.5, max_delay=8 * u.ms, interpolate=True)
    np.testing.assert_allclose(simulated(other, "scan")["x"], simulated(same, "scan")["x"], rtol=0, atol=1e-12)
    assert "coupling.speed" in routing.places(net)
    grid = bk.sweep(
        net, {"coupling.speed": np.array([3.0, 4.5, 7.0]) * u.mm / u.ms}, STEPS * DT, DT, record="x", scheme="euler",
        initial={"x": X, "y": Y}, implementation="scan", chunk=2,
    )  # fmt: skip
    for i, speed in enumerate((3.0, 4.5, 7.0)):
        alone = simulated(live(speed, max_delay=8 * u.ms, interpolate=True), "scan")["x"]
        np.testing.assert_allclose(np.asarray(grid["x"])[..., i, :], alone, rtol=0, atol=1e-12)


def test_a_fit_finds_the_speed_of_conduction(tmp_path):
    settings = {"inputs": {"x_inp": np.linspace(-0.1, 0.2, N)}, "dt": DT, "scheme": "euler", "implementation": "scan"}
    net = live(3.0, max_delay=8 * u.ms, interpolate=True)
    target = bk.simulate(net.replace(speed=4.5 * u.mm / u.ms), duration=8 * u.ms, record="x", **settings)["x"]
    found = bk.fit(
        net, bk.TimeSeries(np.asarray(target)), {"coupling.speed": (2.0, 7.0)}, duration=8 * u.ms, transient=0 * u.ms,
        every=1, steps=60, starts=2, realisations=1, key=jax.random.key(0), record="x", **settings,
    )  # fmt: skip
    np.testing.assert_allclose(found.parameters["coupling.speed"].to_decimal(u.mm / u.ms).ravel()[0], 4.5, rtol=0.05)
    found.save(tmp_path / "fit.json")
    assert {*bk.Fit.load(tmp_path / "fit.json", model=net).parameters} == {"coupling.speed"}


# Bad input -----------------------------------------------------------------------------------------------------------


def test_each_fault_is_named():
    hopf, w = bk.Hopf(), WEIGHTS[0]
    one = bk.Coupling(w, source="x", target="x_inp", k=0.2)
    faults = [
        (ValueError, "two of the name 'a'", [bk.Coupling(w, name="a"), bk.Coupling(w, name="a")]),
        (ValueError, "unknown source.*'z'", [one, bk.Coupling(w, source="z")]),
        (ValueError, "unknown target.*'z_inp'", [one, bk.Coupling(w, target="z_inp")]),
        (ValueError, "different numbers of regions", [one, bk.Coupling(w[:3, :3])]),
        (ValueError, "'couplings' is empty", []),
        (TypeError, "takes bk.Coupling", [one, w]),
        (TypeError, "takes a list or dict", one),
    ]
    for kind, words, couplings in faults:
        with pytest.raises(kind, match=words):
            bk.Network(hopf, couplings=couplings)
    with pytest.raises(TypeError, match="'weights' was given beside 'couplings'"):
        bk.Network(hopf, w, couplings=[one])
    for name, value in {"self_connection": True, "interpolate": True, "coupling": "tanh", "k": 2.0}.items():
        with pytest.raises(TypeError, match=f"'{name}' was given beside 'couplings'"):
            bk.Network(hopf, couplings=[one], **{name: value})
    with pytest.raises(ValueError, match="'interpolate' was given without 'delays'"):
        bk.Coupling(w, interpolate=True)
    with pytest.raises(ValueError, match="'weights' is needed"):
        bk.Network(hopf)
    with pytest.raises(ValueError, match="several couplings"):
        bk.Network(hopf, couplings=[one, bk.Coupling(w)]).weights  # noqa: B018
    for words, options in [
        ("ms, but takes at most max_delay, 1 ms", {"max_delay": 1 * u.ms}),
        ("positive time", {"max_delay": -1 * u.ms}),
        ("'speed' got -3.* takes positive", {"speed": -3.0}),
        ("negative or infinite", {"distances": None, "speed": None, "delays": -DELAYS[0] * u.ms}),
        ("negative or infinite", {"distances": None, "speed": None, "delays": np.nan * DELAYS[0] * u.ms}),
        ("got shape", {"distances": None, "speed": None, "delays": np.ones((3, 2)) * u.ms}),
    ]:
        with pytest.raises(ValueError, match=words):
            live(**({"speed": 2.0} | options))
    with pytest.raises(TypeError, match=r"'speed' is traced.*max_delay="):
        jax.jit(lambda s: simulated(live(s), "scan")["x"])(3.0)
    with pytest.raises(TypeError, match=r"takes a dict, as several quantities are sent: 'x', 'phase.0'"):
        simulated(network(), "scan", initial={"history": 0.1})
    with pytest.raises(ValueError, match="unknown quantity in 'history' 'z'"):
        simulated(network(), "scan", initial={"history": {"z": 0.1}})
    with pytest.raises(ValueError, match="up to"):
        live(3.0, max_delay=8 * u.ms).replace(speed=0.1 * u.mm / u.ms)


def test_kinds_are_checked():
    with pytest.raises(TypeError, match="'send' got 3, but takes a function"):
        bk.CouplingKind(send=3)  # pyright: ignore
    with pytest.raises(ValueError, match="takes one real number"):
        bk.CouplingKind(parameters={"k": np.ones(3)})
    with pytest.raises(ValueError, match="the name 'degree'"):
        bk.CouplingKind(parameters={"degree": 1.0})
    sums = bk.CouplingKind(send=lambda x, p: jnp.sum(x), receive=lambda total, x, p: total, parameters={})
    net = bk.Network(bk.Hopf(), WEIGHTS[0], coupling=sums, source="x", target="x_inp")
    with pytest.raises(bk.NotPointwise):
        simulated(net, "scan")


def test_a_kind_has_units():
    def kind_of(half):
        return bk.CouplingKind(
            receive=lambda total, x, p: p.k * total / (p.half + total), parameters={"k": 1.0, "half": half}
        )

    kind = kind_of(2 * u.mV)
    net = bk.Network(bk.JansenRit(), WEIGHTS[0], coupling=kind, source="eeg", target="E_inp")
    assert net.parameter_units() == {"k": u.Hz, "half": u.mV}
    assert SimpleNamespace(**net.magnitudes()).k == 1.0
    assert kind == kind_of(3 * u.mV), "values are data: both run by one program"
    assert kind != kind_of(3 * u.volt)
