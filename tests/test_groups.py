"""Networks whose regions are of different models: units, names, fits, results (the numbers: network_suite.py)."""

from __future__ import annotations

import re
import types

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_couplings import _float64  # noqa: F401

import brainmass_kernels as bk
from brainmass_kernels import routing
from brainmass_kernels.pointwise import Program, specialized

N, STEPS, DT = 6, 40, 0.1 * u.ms
rng = np.random.default_rng(0)
WEIGHTS, DELAYS = rng.uniform(0.0, 0.4, (N, N)), rng.integers(0, 9, (N, N))
CORTEX, SEIZING = np.array([0, 2, 4, 5]), np.array([1, 3])
X, Y = np.linspace(-0.4, 0.5, N), np.linspace(0.3, -0.2, N)
START = {"cortex.x": X[CORTEX], "cortex.y": Y[CORTEX], "seizing.x": X[SEIZING], "seizing.y": Y[SEIZING]}


def network(k=0.2, a=0.1, mu=0.5, w=WEIGHTS, cortex=CORTEX, seizing=SEIZING, delays=DELAYS):
    groups = {"cortex": (bk.Hopf(a=a, w=0.3), cortex), "seizing": (bk.VanDerPol(mu=mu), seizing)}
    both = {"source": {"cortex": "x", "seizing": "y"}, "target": {"cortex": "x_inp", "seizing": "y_inp"}}
    back = bk.Coupling(w.T, kind="diffusive", source="cortex.y", target="seizing.x_inp", k=0.1, name="back")
    return bk.Network(groups, couplings=[bk.Coupling(w, k=k, delays=delays * DT, **both), back])


def simulated(net, implementation, steps=STEPS, **options):
    settings = {"initial": START, "scheme": "euler", "record": ["cortex.x", "seizing.y"]} | options
    return bk.simulate(net, steps * DT, DT, implementation=implementation, **settings)


def test_a_target_of_one_group_is_a_name_or_a_dict():
    """What arrives, and the input that it is added to, count once in both forms."""
    groups = {"cortex": (bk.Hopf(a=0.1, w=0.3), CORTEX), "seizing": (bk.VanDerPol(mu=0.5), SEIZING)}
    nets = [
        bk.Network(groups, couplings=[bk.Coupling(WEIGHTS, source=source, target=target, k=0.2)])
        for source, target in (("cortex.y", "seizing.x_inp"), ({"cortex": "y"}, {"seizing": "x_inp"}))
    ]
    named, dicts = (simulated(net, "scan", 12, inputs={"seizing.x_inp": 0.3}) for net in nets)
    np.testing.assert_array_equal(dicts["seizing.y"], named["seizing.y"])


def test_regions_by_count_and_permuted():
    plain = simulated(network(), "scan")
    order = np.concatenate([CORTEX, SEIZING])
    net = network(w=WEIGHTS[order][:, order], delays=DELAYS[order][:, order], cortex=4, seizing=2)
    moved = simulated(net, "scan")
    for name in plain:
        np.testing.assert_allclose(moved[name], plain[name], rtol=0, atol=1e-14)


def test_models_of_other_units_of_time_and_of_blocks():
    """Seconds beside milliseconds; positions and velocities beside neither."""
    w = np.zeros((4, 4))
    couplings = [bk.Coupling(w, source={"a": "eeg"}, target={"b": "x_inp"}, k=0.1 / u.mV)]
    options = {"duration": 0.05 * u.second, "dt": 0.1 * u.ms, "scheme": "heun", "implementation": "scan"}
    for groups in ({"a": (bk.JansenRit(), 2), "b": (bk.Hopf(a=0.1, w=0.3), 2)},
                   {"b": (bk.Hopf(a=0.1, w=0.3), [2, 3]), "a": (bk.JansenRit(), [0, 1])}):  # fmt: skip
        net = bk.Network(groups, couplings=couplings)
        found = bk.simulate(net, initial={"b.x": 0.3}, inputs={"a.E_inp": 120 * u.Hz}, **options)
        assert {*found} == {"a.eeg", "b.x", "b.y"}
        mass = bk.simulate(bk.JansenRit(), inputs={"E_inp": 120 * u.Hz}, **options)
        phase = bk.simulate(bk.Hopf(a=0.1, w=0.3), initial={"x": 0.3}, **options)
        np.testing.assert_allclose(found["a.eeg"].mantissa[:, 0], mass["eeg"].mantissa, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found["b.x"][:, 1], phase["x"], rtol=1e-10, atol=1e-12)
    net = bk.Network({"a": (bk.JansenRit(), 2), "b": (bk.Wendling(), 2)}, couplings=[
        bk.Coupling(w, source={"a": "eeg", "b": "eeg"}, target={"a": "E_inp", "b": "E_inp"}, k=1 * u.Hz / u.mV)
    ])  # fmt: skip
    assert net.model.scheme == "strang"
    found = bk.simulate(net, inputs={"a.E_inp": 120 * u.Hz}, **(options | {"scheme": None}))
    mass = bk.simulate(bk.JansenRit(), inputs={"E_inp": 120 * u.Hz}, **(options | {"scheme": "strang"}))
    np.testing.assert_allclose(found["a.eeg"].mantissa[:, 1], mass["eeg"].mantissa, rtol=1e-10, atol=1e-12)


def test_joint_units_are_converted():
    """Hz beside kHz: what a group sends and gets is in the units of the joint source and target."""

    def of(unit):
        @bk.model
        class Rate(bk.Model):
            states = {"r": unit}
            inputs = {"push": 0.0 * unit}
            time_unit = u.ms

            @staticmethod
            def drift(s, p, i):
                return {"r": -0.1 * s.r + 0.1 * i.push}

        return Rate()

    w = np.array([[0.0, 1.0], [1.0, 0.0]])
    both = {"source": {"slow": "r", "fast": "r"}, "target": {"slow": "push", "fast": "push"}}
    results = []
    for fast in (u.Hz, u.kHz):
        net = bk.Network({"slow": (of(u.Hz), 1), "fast": (of(fast), 1)}, couplings=[bk.Coupling(w, k=0.5, **both)])
        start = {"slow.r": 20.0 * u.Hz, "fast.r": 50.0 * u.Hz}
        found = bk.simulate(net, 2 * u.ms, DT, initial=start, scheme="euler", implementation="scan")
        results.append([found[name].to_decimal(u.Hz) for name in ("slow.r", "fast.r")])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)
    assert results[0][0][-1] > 20.0 * 0.99**20 + 1


def test_fits_and_sweeps_name_what_is_of_a_group():
    net = network()
    known = routing.places(net)
    assert {"cortex.a", "seizing.mu", "seizing.x_inp", "coupling.back.k", "noise.cortex.x"} < {*known}
    assert not any(name.startswith("_") or "+" in name for name in known)
    grid = bk.sweep(net, {"seizing.mu": np.array([0.5, 0.8])}, 12 * DT, DT, record="seizing.y", scheme="euler",
                    initial=START, implementation="scan")  # fmt: skip
    for i, mu in enumerate((0.5, 0.8)):
        alone = simulated(network(mu=mu), "scan", 12)["seizing.y"]
        np.testing.assert_allclose(np.asarray(grid["seizing.y"])[..., i, :], alone, rtol=0, atol=1e-12)


def test_a_sweep_of_groups_on_disk(tmp_path):
    settings = {"record": "seizing.y", "scheme": "euler", "initial": START, "implementation": "scan", "chunk": 1}
    run = network(), {"seizing.mu": np.array([0.5, 0.8])}, 12 * DT, DT
    bk.sweep(*run, out=tmp_path / "grid.npz", **settings)
    found = (
        bk.Sweep.load(tmp_path / "grid.npz")
        if hasattr(bk, "Sweep")
        else bk.sweep(*run, out=tmp_path / "grid.npz", **settings)
    )
    assert np.shape(found["seizing.y"]) == (12, 2, 2)
    with pytest.raises(ValueError, match=r"takes an \.npz"):
        bk.sweep(*run, out=tmp_path / "grid.zarr", **settings)


def test_a_table_and_a_picture_are_of_one_group():
    result = simulated(network(), "scan", 12)
    with pytest.raises(ValueError, match=r"groups \(cortex, seizing\).*result.of\('cortex'\)"):
        result.to_xarray()
    one = result.of("cortex")
    assert [*one] == ["x"]
    assert one.to_xarray()["x"].dims == ("time", "region")
    assert one.to_dataframe().shape == (12, len(CORTEX))
    assert one.plot().axes
    np.testing.assert_array_equal(one["x"], result["cortex.x"])
    with pytest.raises(ValueError, match="unknown group 'thalamus'"):
        result.of("thalamus")
    with pytest.raises(ValueError, match="this result has no groups"):
        one.of("cortex")


def test_noise_on_a_state_moves_its_group_alone():
    for group, lanes in (("cortex", CORTEX), ("seizing", SEIZING)):
        noise, key = {f"{group}.x": 0.1 / u.ms**0.5}, jax.random.key(0)
        model = type(network().model)
        member = types.SimpleNamespace(
            _group=network().model.member(), **{n: 1.0 for n in model.parameters() if "." in n}
        )
        factors = model.diffusion(types.SimpleNamespace(**dict.fromkeys(model.states, jnp.zeros(N))), member)
        expected = np.isin(np.arange(N), lanes)
        np.testing.assert_array_equal(np.asarray(factors[f"{group}.x"]) == 1.0, expected)
        plain, noisy = (simulated(network(), "scan", 12, **more) for more in ({}, {"noise": noise, "key": key}))
        moved = np.abs(np.asarray(noisy.final[f"{group}.x"] - plain.final[f"{group}.x"]))
        assert (moved > 1e-3).all()


def test_a_fit_finds_what_is_of_a_group_and_of_its_coupling(tmp_path):
    settings = {"inputs": {"cortex.x_inp": 0.1, "seizing.x_inp": 0.2}, "dt": DT, "scheme": "euler"}
    net = network(k=0.3, mu=0.7)
    true = bk.simulate(network(), duration=6 * u.ms, record="seizing.y", implementation="scan", **settings)
    target = bk.TimeSeries(np.asarray(true["seizing.y"]))
    free = {"seizing.mu": (0.3, 0.9), "coupling.additive.k": (0.05, 0.5)}
    found = bk.fit(
        net, target, free, duration=6 * u.ms, transient=0 * u.ms, every=1, steps=60,
        starts=2, realisations=1, key=jax.random.key(0), record="seizing.y", implementation="scan", **settings,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(found.parameters["seizing.mu"]).ravel()[0], 0.5, rtol=0.05)
    found.save(tmp_path / "fit.json")
    assert {*bk.Fit.load(tmp_path / "fit.json", model=net).parameters} == {*free}


@pytest.mark.parametrize("optimiser", [None, "levenberg_marquardt"])
def test_each_region_of_a_group_has_a_value_of_its_own(optimiser):
    """As many values as the group has regions, of which none is another group's."""
    settings = {"inputs": {"seizing.x_inp": 0.2}, "dt": DT, "scheme": "euler", "record": "seizing.y"}
    truth = np.array([0.4, 0.7])
    true = bk.simulate(network(mu=truth), duration=6 * u.ms, **settings)
    target = bk.TimeSeries(np.asarray(true["seizing.y"]), scale=False, offset=False)
    found = bk.fit(
        network(), target, {"seizing.mu": (0.3, 0.9)}, duration=6 * u.ms, transient=0 * u.ms, every=1, steps=60,
        starts={"seizing.mu": np.array([[[0.5, 0.6]]])}, regional=("seizing.mu",), optimiser=optimiser, **settings,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(found.parameters["seizing.mu"]), truth[None], rtol=0.02)
    with pytest.raises(ValueError, match=r"\(1, starts, 2\) of the regional seizing.mu"):
        bk.fit(
            network(), target, {"seizing.mu": (0.3, 0.9)}, duration=6 * u.ms, transient=0 * u.ms, every=1, steps=1,
            starts={"seizing.mu": np.full((1, 1, N), 0.5)}, regional=("seizing.mu",), **settings,
        )  # fmt: skip


def test_a_network_of_groups_is_a_pytree():
    net = network(a=jnp.full(4, 0.1))

    def loss(net):
        return jnp.sum(simulated(net, "scan", 12)["seizing.y"] ** 2)

    gradient = jax.jit(jax.grad(loss))(net.as_arrays())
    assert gradient.model.groups["cortex"].model.a.shape == (4,)
    again = jax.tree.unflatten(jax.tree.structure(net), jax.tree.leaves(net))
    np.testing.assert_array_equal(simulated(again, "scan", 12)["cortex.x"], simulated(net, "scan", 12)["cortex.x"])
    other = net.replace(model=net.model.replace(**{"seizing.mu": 0.8}))
    alone = simulated(network(mu=0.8), "scan", 12)["seizing.y"]
    np.testing.assert_allclose(simulated(other, "scan", 12)["seizing.y"], alone, rtol=0, atol=1e-12)


def test_each_fault_is_named():
    hopf, w, one = bk.Hopf(), WEIGHTS, bk.Coupling(WEIGHTS, source="a.x", target="a.x_inp", k=1.0)
    faults = [
        (ValueError, "region 1 is in the groups a and b", {"a": (hopf, [0, 1]), "b": (hopf, [1, 2, 3, 4, 5])}, one),
        (ValueError, "region 2 is in no group", {"a": (hopf, [0, 1]), "b": (hopf, [3, 4, 5])}, one),
        (ValueError, "'weights' has 6 regions, but the groups have 5", {"a": (hopf, 2), "b": (hopf, 3)}, one),
        (ValueError, "takes at least one", {"a": (hopf, 0), "b": (hopf, 3)}, one),
        (ValueError, "words such as 'cortex'", {"a b": (hopf, 6)}, one),
        (TypeError, r"takes \(model, number or indices", {"a": hopf}, one),
        (TypeError, "takes a model such as", {"a": (3, 6)}, one),
        (ValueError, "unknown source of the group 'a' 'eeg'", {"a": (hopf, 6)},
         bk.Coupling(w, source={"a": "eeg"}, target="a.x_inp")),
        (ValueError, "unknown group of a source 'c'", {"a": (hopf, 6)},
         bk.Coupling(w, source={"c": "x"}, target="a.x_inp")),
        (ValueError, "unknown target", {"a": (hopf, 6)}, bk.Coupling(w, source="a.x", target="a.z")),
        (ValueError, "quantities of one kind", {"a": (hopf, 3), "b": (bk.JansenRit(), 3)},
         bk.Coupling(w, source={"a": "x", "b": "eeg"}, target="a.x_inp")),
    ]  # fmt: skip
    faults.append((
        ValueError, r"a of the group 'a' got shape \(6,\), but takes one value, or one for each of its 2 regions",
        {"a": (bk.Hopf(a=np.zeros(6)), 2), "b": (hopf, 4)}, one,
    ))  # fmt: skip
    for kind, words, groups, coupling in faults:
        with pytest.raises(kind, match=words):
            bk.Network(groups, couplings=[coupling])
    with pytest.raises(ValueError, match="'source' is needed in a network of groups, such as source='a"):
        bk.Network({"a": (hopf, 6)}, couplings=[bk.Coupling(w, target="a.x_inp")])
    with pytest.raises(TypeError, match="takes a name, or a dict of names by group"):
        bk.Coupling(w, source=3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"unknown record 'cortex.z'"):
        simulated(network(), "scan", record="cortex.z")
    with pytest.raises(ValueError, match=r"unknown state 'cortex.z'"):
        simulated(network(), "scan", initial={"cortex.z": 1.0})


def test_a_region_runs_the_equations_of_its_own_group_alone():
    every, own = (str(bk.explain(network(), STEPS * DT, DT, implementation=name)) for name in ("scan", "numba"))
    assert "a region runs the equations of all groups" in every
    ((first, second),) = re.findall(r"of its own group alone, of (\d+), (\d+) operations", own)
    together = int(re.search(r"(\d+) operations a step and lane", own)[1])
    assert max(int(first), int(second)) < 0.7 * together


@pytest.mark.parametrize("place", [4.0, 1.0, 0.0])
def test_a_program_of_lanes_that_are_known(place):
    """What comparisons with the number rule out is neither computed nor spread: 0 times infinity is left out."""

    def step(member, x, y):
        grown = jnp.where(member == 1.0, jnp.exp(x), 0.0) + y
        return jnp.where((member >= 1.0) & ~(member == 4.0), grown, x), y - jnp.where(member == 0.0, x, 0.0) * jnp.inf

    whole = Program(step, [jax.ShapeDtypeStruct((), np.float64)] * 3)
    part = specialized(whole, 0, place)
    names = [eqn.primitive.name for eqn in part.jaxpr.jaxpr.eqns]
    assert names == {4.0: [], 1.0: ["exp", "add"], 0.0: ["mul", "sub"]}[place]
    np.testing.assert_array_equal(part(0.0, 0.5, 2.0), whole(place, 0.5, 2.0) if place == 0 else
                                  {4.0: (0.5, 2.0), 1.0: (np.exp(0.5) + 2.0, 2.0)}[place])  # fmt: skip


def test_the_place_of_a_region_does_not_change_its_bits():
    """Vectors of one group, of both, and a group within another."""
    many = 40
    weights = np.random.default_rng(2).integers(0, 3, (many, many)) / 64.0
    # Of these no sum is rounded, in whatever order.
    start = np.random.default_rng(3).integers(-32, 32, many) / 64.0

    def run(order, front):
        groups = {"cortex": (bk.Hopf(w=0.3), front), "seizing": (bk.VanDerPol(), np.setdiff1d(np.arange(many), front))}
        both = {"source": {"cortex": "x", "seizing": "y"}, "target": {"cortex": "x_inp", "seizing": "y_inp"}}
        net = bk.Network(groups, couplings=[bk.Coupling(weights[np.ix_(order, order)], k=2.0**-4, **both)])
        own = {name: start[order][group.lanes].astype(np.float32) for name, group in net.model.groups.items()}
        initial = {f"{name}.{n}": x for name, x in own.items() for n in ("x", "y")}
        options = {"scheme": "euler", "record": ["cortex.x", "seizing.y"], "implementation": "numba"}
        result = bk.simulate(net, DT, DT, initial=initial, **options)
        found = np.zeros(many, np.float32)
        for name, state in (("cortex", "x"), ("seizing", "y")):
            found[order[net.model.groups[name].lanes]] = result[f"{name}.{state}"][0]
        return found

    every, front = np.arange(many), np.arange(20)
    shuffled = np.random.default_rng(4).permutation(many)
    inside = np.r_[every[20:30], front, every[30:]]
    expected = run(every, front)
    np.testing.assert_array_equal(run(shuffled, np.flatnonzero(shuffled < 20)), expected)
    np.testing.assert_array_equal(run(inside, np.arange(10, 30)), expected)
