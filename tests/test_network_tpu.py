"""Networks on TPUs: in Pallas's interpreter against scans, and compiled for a chip that is not there."""

import functools
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk
from benchmarks.ledger import libtpu_lock
from brainmass_kernels import _context
from brainmass_kernels.arguments import connections_of
from brainmass_kernels.backends.base import Coupling
from brainmass_kernels.backends.mosaic_tpu.connections import Exchange, Form

DT = 0.1 * u.ms
STEPS = 20


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(regions, delays=None, coupling="diffusive", density=1.0):
    """Of Hopf or Jansen-Rit regions, with the delays of a name in steps of 0.1 ms."""
    random = np.random.default_rng(regions)
    weights = random.random((regions, regions)) * (random.random((regions, regions)) < density) / regions
    steps = {
        "one step": np.ones((regions, regions)),
        "one": np.full((regions, regions), 11),
        "all different": random.permutation(regions**2).reshape(regions, regions),
        "longer than the run": random.integers(0, STEPS + 10, (regions, regions)),
    }
    given = {"delays": steps[delays] * DT} if delays else {}
    if coupling == "sigmoidal_jansen_rit":
        given |= {"source": "eeg", "target": "M_inp", "k": 50.0 * u.mV}
        return bk.Network(bk.JansenRit(), np.float32(weights), coupling=coupling, **given)
    return bk.Network(bk.Hopf(a=0.1), np.float32(weights), coupling=coupling, source="x", k=np.float32(0.2), **given)


def run(net, implementation, batch, steps=STEPS, **arguments):
    jansen_rit = isinstance(net.model, bk.JansenRit)
    start = draw(batch, net.regions)
    initial = {"M": start * u.mV} if jansen_rit else {"x": start, "y": np.float32(0.1)}
    found = bk.simulate(net, steps, DT, initial=initial, implementation=implementation, **arguments)
    return [np.asarray(u.get_magnitude(x)) for x in (*found.records.values(), *found.final.values())]


def check(net, batch, **arguments):
    with bk.testing.interpret():
        found = run(net, "mosaic_tpu", batch, **arguments)
    expected = run(net, "scan", batch, **arguments)
    near(found, expected, 1e-4 if arguments.get("precision") == "fast" else 1e-5)


def near(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-30


# Forward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delays", [None, "one step", "one", "all different", "longer than the run"])
def test_it_is_the_scan(delays):
    check(network(5, delays), 3, every=3, transient=5)


def test_fast_products():
    check(network(5), 3, precision="fast")


@pytest.mark.parametrize("delays", [None, "longer than the run"])
def test_one_region(delays):
    check(network(1, delays), 1)


@pytest.mark.parametrize("coupling", ["additive", "sigmoidal_jansen_rit"])
def test_couplings(coupling):
    check(network(9, "one", coupling), 1, steps=14, every=7)


@pytest.mark.slow
def test_a_connectome():
    check(network(76, "longer than the run", density=0.06), 3, steps=6, every=3)


def test_more_networks_than_lanes():
    check(network(5), 130, steps=12, every=1)


def test_noise_and_a_varying_input():
    arguments = {"noise": {"y": 0.1 * u.ms**-0.5}, "inputs": {"x_inp": draw(STEPS, 3, 5)}, "key": jax.random.key(0)}
    check(network(5, "longer than the run"), 3, every=4, **arguments)


def test_a_run_goes_on_from_its_history():
    net, final = network(2, "all different"), {"x": draw(2, 2), "y": np.float32(0.1)}
    with bk.testing.interpret():
        whole = bk.simulate(net, 6, DT, initial=final, every=6, implementation="mosaic_tpu").final
        for _ in range(2):
            final = bk.simulate(net, 3, DT, initial=final, every=3, implementation="mosaic_tpu").final
    for name in whole:
        np.testing.assert_array_equal(whole[name], final[name])


# Gradients ----------------------------------------------------------------------------------------------------------


def gradients(net, implementation, batch, every, checkpoint_every, own_weights=False, rows=(), steps=STEPS):
    regions, depth = net.regions, 0 if net.delays is None else int(net.delay_steps(1e-4).max())
    of_records, of_history = draw(steps // every, batch, regions, seed=1), draw(depth, batch, regions, seed=2)
    weights = jnp.asarray(net.weights)
    if own_weights:
        weights = jnp.stack([weights, 2 * weights])

    def loss(start, weights, k, a, history, drive):
        initial = {"x": start, "y": np.float32(0.1), **({"history": history} if depth else {})}
        found = bk.simulate(
            net.replace(model=bk.Hopf(a=a), weights=weights, k=k), steps, DT, initial=initial, record="x", every=every,
            inputs={"x_inp": drive}, checkpoint_every=checkpoint_every, implementation=implementation,
        )  # fmt: skip
        total = jnp.sum(found["x"] * of_records) + jnp.sum(found.final["y"] ** 2)
        return total + jnp.sum(found.final["history"] * of_history) if depth else total

    at = draw(batch, regions), weights, jnp.full((batch, 1), 0.2, jnp.float32), jnp.float32(0.1)
    at = (*at, draw(depth, batch, regions, seed=3), draw(steps, *rows, seed=4))
    found = jax.jit(jax.grad(loss, argnums=range(6)))(*at)
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize(
    ("regions", "delays", "every", "checkpoint_every", "more"),
    [
        (5, None, 3, 7, {"steps": 12}),
        # What was sent is moved back every 64 steps or more.
        pytest.param(2, "one step", 35, 40, {"steps": 70}, marks=pytest.mark.slow),
        (4, "all different", 3, None, {"own_weights": True, "steps": 12}),
        pytest.param(3, "longer than the run", 5, 4, {"rows": (2, 3), "steps": 12}, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_scan(regions, delays, every, checkpoint_every, more):
    net, common = network(regions, delays), {"batch": 2, "every": every, "checkpoint_every": checkpoint_every, **more}
    with bk.testing.interpret():
        found = gradients(net, "mosaic_tpu", **common)
    near(found, gradients(net, "scan", **common))


# Several couplings --------------------------------------------------------------------------------------------------


def several(delayed, weights=None, k: Any = 0.2, strength: Any = 0.3):
    """Two couplings, of which the second has two terms, and, with delays between steps, the first has two as well."""
    random = np.random.default_rng(5)
    both = (random.random((2, 5, 5)) * (random.random((2, 5, 5)) < 0.6)).astype(np.float32)
    first, second = both if weights is None else weights
    apart: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    if delayed:
        apart = {"delays": random.uniform(0, 14, (5, 5)) * DT, "interpolate": True}
        whole = {"delays": random.integers(0, 9, (5, 5)) * DT}
    couplings = [
        bk.Coupling(first, source="x", target="x_inp", k=k, **apart),
        bk.Coupling(second, kind="kuramoto", source="y", target="y_inp", k=strength, **whole),
    ]
    return bk.Network(bk.Hopf(a=0.1), couplings=couplings)


def of_several(net, steps, implementation, start, history, **arguments):
    initial = {"x": start, "y": draw(2, 5, seed=1)} | ({"history": history} if history else {})
    found = bk.simulate(net, steps, DT, initial=initial, implementation=implementation, **arguments)
    return {**found.records}, {**found.final}


def histories(delayed):
    net, scan = several(delayed), bk.simulate(several(delayed), 1, DT, implementation="scan")
    assert len(net.sent()) == 3
    depths = {name: len(x) for name, x in scan.final.get("history", {}).items()}
    assert not delayed or len({*depths.values()}) == 2, "of their own depths"
    return {name: draw(depth, 2, 5, seed=i) for i, (name, depth) in enumerate(depths.items())}


@pytest.mark.parametrize("delayed", [False, True])
def test_gradients_of_several_couplings_are_those_of_the_scan(delayed):
    def loss(weights, k, strength, start, history, implementation):
        net = several(delayed, weights, k, strength)
        records, final = of_several(net, 6, implementation, start, history, record="x", every=2, checkpoint_every=3)
        seen = jax.tree.leaves((records, final))
        return sum(jnp.sum(x * draw(*x.shape, seed=i)) for i, x in enumerate(seen)), seen

    def both(implementation):
        of = functools.partial(loss, implementation=implementation)
        at = (*draw(2, 5, 5),), jnp.full((2, 1), 0.2, jnp.float32), jnp.float32(0.3), draw(2, 5), histories(delayed)
        return [np.asarray(x) for x in jax.tree.leaves(jax.jit(jax.grad(of, range(5), has_aux=True))(*at))]

    with bk.testing.interpret():
        found = both("mosaic_tpu")
    assert len(found) == 8 + 6 * delayed
    near(found, both("scan"))


@pytest.mark.parametrize("delayed", [False, True])
def test_several_couplings_go_on_from_their_histories(delayed):
    net, start, history = several(delayed), draw(2, 5), histories(delayed)
    expected = of_several(net, 6, "scan", start, history, every=3)[1]
    with bk.testing.interpret():
        final = of_several(net, 3, "mosaic_tpu", start, history, every=3)[1]
        found = bk.simulate(net, 3, DT, initial=final, every=3, implementation="mosaic_tpu").final
    assert {*found.get("history", {})} == {*history}
    found, expected = ([np.asarray(x) for x in jax.tree.leaves({**final})] for final in (found, expected))
    near(found, expected)


# Plans --------------------------------------------------------------------------------------------------------------


def form(net, dt=1e-4) -> Form:
    _, terms, depths = connections_of(net, dt)
    (way,) = Exchange.of(Coupling(net.regions, depths, None, terms), backwards=False).ways  # pyright: ignore
    return way.form


def test_every_connection_is_in_one_sum():
    for regions, delays in [(1, None), (9, "one"), (9, "all different"), (76, "longer than the run"), (30, "one step")]:
        net = network(regions, delays)
        counts, found = connections_of(net, 1e-4)[1][0].delays, form(net)
        ends = [len(counts), *(tile.steps for tile in reversed(found.tiles))]
        assert [tile.below for tile in reversed(found.tiles)] == ends[:-1]
        begin = ends[-1]
        assert sum(counts[delay] for delay in found.products) + found.singles == sum(counts[:begin])
        assert found.store.stride > found.store.depth or not found.store.depth


def test_one_delay_is_one_product():
    assert form(network(76)).products == (0,)
    assert form(network(76, "one")).products == (11,)
    assert not form(network(76, "one")).tiles


def test_many_delays_are_summed_in_tiles():
    found = form(network(76, "all different"))
    assert found.tiles
    assert not found.products


def test_several_couplings_have_a_store_for_each_number_that_is_sent():
    net = several(True)
    _, terms, depths = connections_of(net, 1e-4)
    coupling = Coupling(net.regions, depths, None, terms)  # pyright: ignore
    forth, back = (Exchange.of(coupling, backwards) for backwards in (False, True))
    assert [(way.sent, way.got) for way in forth.ways] == [(way.got, way.sent) for way in back.ways]
    assert [store.depth for store in forth.stores] == [*depths]
    assert len(forth.stores) == len(back.stores) == 3
    assert len(forth.ways) == 4
    for term, way in zip(terms, forth.ways, strict=True):
        begin = way.form.tiles[0].steps if way.form.tiles else len(term.delays)
        assert sum(term.delays[delay] for delay in way.form.products) + way.form.singles == sum(term.delays[:begin])


def test_what_does_not_fit_says_so():
    net = network(200, "all different", density=0.5)
    with bk.testing.interpret(), pytest.raises(bk.Unsupported, match=r"128 networks of 200 regions .* bytes of VMEM"):
        bk.simulate(net, 10, DT, initial={"x": np.float32(0.1)}, implementation="mosaic_tpu")


def test_what_does_not_fit_takes_scan_and_says_why():
    def delayed(regions, networks=()):
        delays = np.random.default_rng(0).integers(0, 40, (regions, regions)) * DT
        return bk.Network(bk.Hopf(), np.full((*networks, regions, regions), 1e-3, np.float32), delays=delays)

    with _context.setting(_context.TARGET, _context.Target("tpu", 1)):
        assert bk.explain(delayed(128), 10, DT).implementation == "mosaic_tpu"
        for net, why in ((delayed(400), "400 regions"), (delayed(128, (2,)), "each with its own weights")):
            plan = bk.explain(net, 10, DT)
            assert plan.implementation == "scan"
            assert why in plan.passed_over["mosaic_tpu"]
            assert "implementation 'scan' runs it" in plan.passed_over["mosaic_tpu"]


def test_all_couplings_must_fit():
    def coupled(count):
        delays = np.random.default_rng(0).integers(0, 40, (128, 128)) * DT
        weights = np.full((128, 128), 1e-3, np.float32)
        return bk.Network(bk.Hopf(), couplings=[bk.Coupling(weights, delays=delays) for _ in range(count)])

    with _context.setting(_context.TARGET, _context.Target("tpu", 1)):
        assert bk.explain(coupled(2), 10, DT).implementation == "mosaic_tpu"
        assert "bytes of VMEM" in bk.explain(coupled(8), 10, DT).passed_over["mosaic_tpu"]


# Compiled -----------------------------------------------------------------------------------------------------------


@needs.libtpu
@pytest.mark.parametrize("delays", [None, "longer than the run"])
def test_a_gradient_is_two_kernels(delays):
    net = network(20, delays, density=0.5)

    def loss(k):
        found = bk.simulate(net.replace(k=k), 1000, DT, every=10, record="x", implementation="mosaic_tpu")
        return jnp.sum(found["x"] ** 2)

    with libtpu_lock():
        compiled = bk.testing.compile_for("v5e", jax.grad(loss), jax.ShapeDtypeStruct((256, 1), jnp.float32))
    text = compiled.executable.as_text()
    assert text.count("tpu_custom_call") == 2
    for kernel in ("brainmass_kernels_tpu_network_forward", "brainmass_kernels_tpu_network_adjoint"):
        assert kernel in text


@needs.libtpu
def test_several_couplings_compile_to_one_kernel_a_way():
    def loss(k, weights):
        net = several(True, weights, k)
        found = bk.simulate(net, 100, DT, every=10, record="x", implementation="mosaic_tpu")
        return jnp.sum(found["x"] ** 2)

    shapes = jax.ShapeDtypeStruct((256, 1), jnp.float32), (jax.ShapeDtypeStruct((5, 5), jnp.float32),) * 2
    for fun, count in ((loss, 1), (jax.grad(loss, (0, 1)), 2)):
        with libtpu_lock():
            compiled = bk.testing.compile_for("v5e", fun, *shapes)
        assert compiled.executable.as_text().count("tpu_custom_call") == count
