"""Networks on TPUs: by their suite in Pallas's interpreter, and compiled for a chip that is not there."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from backend_suite import assert_close
from network_suite import NetworkSuite, expected, loops_but, one

import brainmass_kernels as bk
from benchmarks.ledger import libtpu_lock
from brainmass_kernels import _context
from brainmass_kernels.arguments import connections_of
from brainmass_kernels.backends.base import Coupling
from brainmass_kernels.backends.mosaic_tpu.connections import Exchange, Form

DT = 0.1 * u.ms
STEPS = 20


class TestMosaicTPU(NetworkSuite):
    implementation = "mosaic_tpu"
    context = staticmethod(bk.testing.interpret)
    double = False
    live = False
    most = 12
    largest = 192
    long = (
        *loops_but("one region that waits"), "test_permuted_regions_and_couplings_permute_the_result",
        "test_a_history_in_each_form", "test_a_run_continues_exactly_from_its_histories[three couplings]",
        "test_vmap[a batch of weights]", "test_a_chain_is_masses_that_are_driven_by_what_was_sent",
        "test_statistics_are_those_of_what_is_recorded", "test_groups_without_connections_are_each_model_alone",
        "test_sizes[68]",
    )  # fmt: skip

    def test_fast_products(self):
        case = one("diffusive", "", networks=3)
        assert_close(self.forward(case, precision="fast"), expected(case), 1e-4)

    def test_more_networks_than_lanes(self):
        case = one("diffusive", "", networks=130, steps=4)
        assert_close(self.forward(case), expected(case), 1e-5)

    @pytest.mark.slow
    def test_a_connectome(self):
        case = one("diffusive", "beyond the run", n=76, steps=6, networks=3, density=0.06)
        # What is not there costs nothing where the weights are known.
        assert_close(self.seen(case, self.given(case)), expected(case), 1e-5)

    @pytest.mark.slow
    def test_what_was_sent_is_moved_back(self):
        """Every 64 steps or more."""
        self.check(one("diffusive", "one step", n=3, steps=70))


# Plans --------------------------------------------------------------------------------------------------------------


def network(regions, delays=None, density=1.0):
    """Of Hopf regions, with the delays of a name in steps of 0.1 ms."""
    random = np.random.default_rng(regions)
    weights = random.random((regions, regions)) * (random.random((regions, regions)) < density) / regions
    steps = {
        "one step": np.ones((regions, regions)),
        "one": np.full((regions, regions), 11),
        "all different": random.permutation(regions**2).reshape(regions, regions),
        "longer than the run": random.integers(0, STEPS + 10, (regions, regions)),
    }
    given = {"delays": steps[delays] * DT} if delays else {}
    return bk.Network(bk.Hopf(a=0.1), np.float32(weights), coupling="diffusive", source="x", k=np.float32(0.2), **given)


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
