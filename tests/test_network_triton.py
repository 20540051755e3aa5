"""Networks through Triton, by their suite in its interpreter, and compiled for GPUs that are not there."""

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from network_suite import NetworkSuite, loops_but, one

import brainmass_kernels as bk
from brainmass_kernels.backends import triton
from brainmass_kernels.backends.triton.networks import AT_ONCE, FAR, FAR_FORWARD

DT = 0.1 * u.ms


@needs.interpreter
class TestTriton(NetworkSuite):
    implementation = "triton"
    context = staticmethod(bk.testing.interpret)
    most = 14
    long = (
        *loops_but("every kind", "groups", "between steps", "live speeds", "a batch of weights", "noise"),
        "test_vmap[live speeds]", "test_sizes[68]",
    )  # fmt: skip

    @pytest.mark.parametrize(
        ("networks", "n", "delays"), [(5, 5, "several"), (6, 9, ""), (9, 4, "beyond the run"), (6, 5, "long")]
    )
    def test_networks_that_share_a_program(self, monkeypatch, networks, n, delays):
        """As many networks as multiprocessors take: four or eight a program, the last of which is not full."""
        monkeypatch.setattr(triton._jax, "multiprocessors", lambda: 1)
        layout = triton.Layout.of_networks(networks * n, n)
        assert layout.together == (8 if networks >= 6 else 4)
        assert layout.blocks == -(-networks // layout.together)
        self.check(one("diffusive", delays, networks=networks, n=n))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("n", "delays"), [(7, "beyond the run"), (8, "zero"), (33, "zero"), (33, "several"), (6, "long")]
    )
    def test_regions_more_and_fewer_than_are_read_at_once(self, n, delays):
        self.check(one("additive", delays, n=n))


@pytest.mark.parametrize(
    ("networks", "regions", "depth", "alike", "together"),
    [(64, 76, 360, True, 1), (198, 76, 360, True, 2), (1024, 76, 360, True, 8), (1024, 76, 360, False, 1),
     (1024, 200, 360, True, 4), (1024, 600, 9, True, 1), (1024, 128, 2**21, True, 2)],
)  # fmt: skip
def test_networks_share_a_program_once_all_multiprocessors_have_one(networks, regions, depth, alike, together):
    layout = triton.Layout.of_networks(networks * regions, regions, depth, alike)
    assert layout.together == together
    assert together * regions <= layout.width
    assert (together - 1) * layout.blocks < networks <= together * layout.blocks


@needs.interpreter
def test_too_many_regions_are_told_what_runs_them():
    network = bk.Network(bk.Hopf(a=0.1), np.ones((triton.REGIONS + 1,) * 2, np.float32), source="x", k=0.2)
    with bk.testing.interpret(), pytest.raises(bk.Unsupported, match=r"up to 1,024 regions.* 1,025.*'scan' runs it"):
        bk.simulate(network, 10, DT, implementation="triton")


@pytest.mark.parametrize(("regions", "warps", "vec"), [(1, 1, 1), (33, 2, 1), (76, 4, 1), (512, 16, 1), (1000, 16, 2)])
def test_a_network_has_one_program(regions, warps, vec):
    layout = triton.Layout.of_networks(3 * regions, regions)
    assert (layout.warps, layout.vec, layout.blocks) == (warps, vec, 3)
    assert layout.width >= regions


# Compiled for GPUs that are not here --------------------------------------------------------------------------------

REGIONS = 76


@needs.interpreter
@needs.numba
def test_what_a_gradient_keeps_is_told():
    """Beside what every implementation keeps: the sums of each step, and for weights two values more."""
    network, steps = bk.Network(bk.Hopf(), np.ones((5, 5)), source="x", k=0.1), 200
    with bk.testing.interpret():
        held = {n: bk.explain(network, steps, DT, implementation=n).bytes_gradient for n in ("numba", "triton")}
    assert held["triton"] - held["numba"] == 2 * 4 * steps * 5


def power(k, weights, precision="fast", delayed=True):
    lengths = np.random.default_rng(0).uniform(1.0, 100.0, (REGIONS, REGIONS))
    network = bk.Network(
        bk.JansenRit(), weights, coupling="sigmoidal_jansen_rit", target="E_inp", k=k * u.Hz,
        **({"distances": lengths, "speed": 5.0} if delayed else {}),
    )  # fmt: skip
    result = bk.simulate(
        network, 1000, DT, inputs={"E_inp": 220.0 * u.Hz}, every=10, scheme="strang", precision=precision,
        implementation="triton",
    )  # fmt: skip
    return jnp.mean((result["eeg"] / u.mV) ** 2)


@needs.triton
@pytest.mark.parametrize("delayed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("chip", "precision"), [("sm_80", "exact"), ("sm_80", "fast"), ("sm_90", "exact")])
def test_a_network_is_one_kernel_each_way(chip, precision, delayed):
    arguments = jax.ShapeDtypeStruct((8, 1), "float32"), jax.ShapeDtypeStruct((REGIONS, REGIONS), "float32")
    fun = functools.partial(power, precision=precision, delayed=delayed)
    compiled = bk.testing.compile_for(chip, jax.grad(fun, (0, 1)), *arguments)
    assert sorted(compiled.kernels) == ["brainmass_kernels_triton_adjoint", "brainmass_kernels_triton_forward"]
    for name, kernel in compiled.kernels.items():
        assert kernel.registers <= 128
        sums = [loop for loop in kernel.loops if sums_up(loop)]
        steps = [loop for loop in kernel.loops if loop.kinds()["barrier"] and inside(loop, sums) == loop.inner > 0]
        # With delays the sums of several steps, of eight written out four times and once, and those of one.
        assert sum(loop.inner for loop in steps) == len(sums)
        assert {loop.inner for loop in steps} == {1 if not delayed else 2 if name.endswith("forward") else 3}
        for loop in sums:
            # Of several steps a weight and a place serve eight products or sixteen, of one step each its own.
            products, loads = loop.instructions["FFMA"], loop.instructions["LDG"]
            assert loop.total / products <= (4 if loads < 2 * products else 8)
        # One in each step, one where sums of several steps were stored; none to move numbers between threads.
        for loop in steps:
            assert loop.kinds()["barrier"] == (2 if delayed else 1)
        # What the compiler puts aside it puts aside outside of steps.
        for loop in [*sums, *steps]:
            assert not {"LDL", "STL"} & set(loop.instructions)
    assert compiled.cost["spill_bytes"] <= 112


def sums_up(loop) -> bool:
    """Whether a loop does nothing but sum over connections."""
    products = loop.instructions["FFMA"]
    return not loop.inner and products == loop.kinds()["fp32"] and products in (AT_ONCE, FAR, 4 * FAR, FAR_FORWARD)


def inside(outer, loops) -> int:
    """How many of the loops are within another."""
    return sum(within(loop, outer) for loop in loops)


def within(loop, outer) -> bool:
    return outer.first < loop.first and loop.last < outer.last
