"""Networks through Triton, in its interpreter against `lax.scan`, and compiled for GPUs that are not there."""

import functools
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from backend_suite import slow_but

import brainmass_kernels as bk
from brainmass_kernels.backends import triton
from brainmass_kernels.backends.triton.networks import AT_ONCE

DT = 0.1 * u.ms
STEPS = 12
KINDS = ("none", "one step", "different", "beyond the run")


def delays_of(kind: str, n: int) -> np.ndarray:
    """In steps."""
    made = np.random.default_rng(2)
    return {
        "none": np.zeros((n, n), int),
        "one step": np.ones((n, n), int),
        "different": made.permutation(np.arange(n * n)).reshape(n, n) % 17,
        "beyond the run": made.integers(STEPS - 2, STEPS + 10, (n, n)),
    }[kind]


class Setting:
    """A network's parts that a gradient is taken in, and the run on them."""

    def __init__(self, n: int, kind: str, coupling: str = "diffusive", networks: int = 1, batched: bool = False):
        made, self.n, self.coupling = np.random.default_rng(0), n, coupling
        self.delays = delays_of(kind, n)
        batch = (networks, n) if networks > 1 else (n,)
        weights = made.uniform(0.0, 2.0 / n, (*(batch[:-1] if batched else ()), n, n))
        weights *= (made.uniform(size=weights.shape) < 0.7) | (n == 1)
        self.given = {
            "weights": weights,
            "k": 0.2 + 0.1 * np.arange(networks)[:, None] if networks > 1 else 0.2,
            "a": np.linspace(0.1, 0.2, n),
            "x": made.uniform(-0.5, 0.5, batch),
            "x_inp": made.uniform(-0.2, 0.2, (STEPS, *batch)),
        }
        if self.delays.max():
            self.given["history"] = made.uniform(-0.5, 0.5, (self.delays.max(), *batch))
        self.given = {name: jnp.asarray(x, jnp.float32) for name, x in self.given.items()}

    def run(self, implementation: str, **given):
        network = bk.Network(
            bk.Hopf(a=given["a"]), given["weights"], delays=self.delays * DT, coupling=self.coupling, source="x",
            target="y_inp", k=given["k"], self_connection=True,
        )  # fmt: skip
        past = {"history": given["history"]} if "history" in given else {}
        return bk.simulate(
            network, STEPS, DT, initial={"x": given["x"], "y": 0.1, **past}, inputs={"x_inp": given["x_inp"]},
            record=("x",), every=3, transient=4, checkpoint_every=7, implementation=implementation,
        )  # fmt: skip

    def loss(self, implementation: str, given):
        """A number that all records, the final state and the last history have a part in, and the result."""
        result = self.run(implementation, **given)
        seen = [result["x"], *result.final.values()]
        return sum(jnp.sum(jnp.sin((3.0 + i) * x + 0.5 * i)) for i, x in enumerate(seen)), result

    def gradient(self, implementation: str, given=None):
        return jax.jit(jax.grad(functools.partial(self.loss, implementation), has_aux=True))(given or self.given)


def agrees(setting: Setting):
    """Records, final state and gradients in everything."""
    with bk.testing.interpret():
        ours, found = setting.gradient("triton")
    theirs, wanted = setting.gradient("scan")
    assert set(found.final) == set(wanted.final)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    for name, want in theirs.items():
        distance = np.linalg.norm(np.asarray(ours[name] - want))
        assert distance <= 1e-4 * np.linalg.norm(np.asarray(want)), (name, distance)


@needs.interpreter
@pytest.mark.parametrize("kind", slow_but({"different", "none"}, KINDS))
def test_it_agrees_with_scan(kind):
    agrees(Setting(5, kind))


@needs.interpreter
@pytest.mark.parametrize("kind", ["none", "one step"])
def test_one_region(kind):
    agrees(Setting(1, kind, "additive"))


@needs.interpreter
@pytest.mark.parametrize(("n", "kind"), [(7, "beyond the run"), (8, "none"), (33, "none"), (33, "different")])
@pytest.mark.slow
def test_regions_more_and_fewer_than_are_read_at_once(n, kind):
    agrees(Setting(n, kind, "additive"))


@needs.interpreter
@pytest.mark.parametrize("batched", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", slow_but({"none"}, ["none", "different"]))
def test_a_batch_of_networks(batched, kind):
    agrees(Setting(5, kind, networks=3, batched=batched))


@needs.interpreter
@pytest.mark.parametrize(("networks", "n", "kind"), [(5, 5, "different"), (6, 9, "none"), (9, 3, "beyond the run")])
def test_networks_that_share_a_program(monkeypatch, networks, n, kind):
    """As many networks as multiprocessors take: four or eight a program, the last of which is not full."""
    monkeypatch.setattr(triton._jax, "multiprocessors", lambda: 1)
    layout = triton.Layout.of_networks(networks * n, n)
    assert layout.together == (8 if networks >= 6 else 4)
    assert layout.blocks == -(-networks // layout.together)
    agrees(Setting(n, kind, networks=networks))


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
@pytest.mark.parametrize("coupling", slow_but({"sigmoidal_jansen_rit"}, ["additive", "sigmoidal_jansen_rit"]))
def test_couplings(coupling):
    agrees(Setting(5, "different", coupling))


@needs.interpreter
def test_vmap_folds_into_one_kernel():
    setting = Setting(5, "different")
    many = {**setting.given, "k": jnp.array([0.1, 0.3, 0.2]), "weights": jnp.stack([setting.given["weights"]] * 3)}
    axes = {name: 0 if name in ("k", "weights") else None for name in many}
    with bk.testing.interpret():
        found, _ = jax.vmap(functools.partial(setting.gradient, "triton"), (axes,))(many)
        one, _ = setting.gradient("triton", {**setting.given, "k": many["k"][1]})
    for name, want in one.items():
        np.testing.assert_allclose(found[name][1], want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@needs.interpreter
def test_a_run_goes_on_exactly():
    setting = Setting(5, "different")
    network = bk.Network(bk.Hopf(a=0.1), setting.given["weights"], delays=setting.delays * DT, source="x", k=0.2)
    run: dict[str, Any] = {"record": "x", "implementation": "triton"}
    start = {"x": setting.given["x"], "y": 0.1}
    with bk.testing.interpret():
        whole = bk.simulate(network, 40, DT, initial=start, **run)
        first = bk.simulate(network, 13, DT, initial=start, **run)
        second = bk.simulate(network, 27, DT, initial=first.final, **run)
    np.testing.assert_array_equal(whole["x"], jnp.concatenate([first["x"], second["x"]]))
    for name, value in whole.final.items():
        np.testing.assert_array_equal(value, second.final[name], name)


@needs.interpreter
def test_noise_has_the_bits_of_every_other_implementation():
    setting = Setting(5, "different")
    network = bk.Network(bk.Hopf(a=0.1), setting.given["weights"], delays=setting.delays * DT, source="x", k=0.2)
    noisy: dict[str, Any] = {"noise": {"x_inp": 0.1 * u.ms**0.5}, "key": jax.random.key(0), "record": "x"}
    with bk.testing.interpret():
        found = bk.simulate(network, STEPS, DT, implementation="triton", **noisy)
    wanted = bk.simulate(network, STEPS, DT, implementation="scan", **noisy)
    np.testing.assert_allclose(found["x"], wanted["x"], atol=1e-5 * np.abs(wanted["x"]).max())


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
    for kernel in compiled.kernels.values():
        assert kernel.registers <= 128
        sums = [loop for loop in kernel.loops if sums_up(loop)]
        steps = [loop for loop in kernel.loops if loop.inner == 1 and any(within(x, loop) for x in sums)]
        assert len(steps) == len(sums) >= 2
        for loop in sums:
            assert loop.total / AT_ONCE <= (7.5 if delayed else 5)
        for loop in steps:
            assert loop.kinds()["barrier"] == 1
        # What the compiler puts aside it puts aside outside of steps.
        for loop in [*sums, *steps]:
            assert not {"LDL", "STL"} & set(loop.instructions)
    assert compiled.cost["spill_bytes"] <= 96


def sums_up(loop) -> bool:
    """Whether a loop does nothing but sum over connections."""
    return not loop.inner and loop.instructions["FFMA"] == loop.kinds()["fp32"] == AT_ONCE


def within(loop, outer) -> bool:
    return outer.first < loop.first and loop.last < outer.last
