"""Networks against brainmass's own and against a dense float64 loop; their gradients against differences."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import memory

DT = 0.1 * u.ms
rng = np.random.default_rng(0)


@pytest.fixture(params=["scan", pytest.param("numba", marks=needs.numba)])
def implementation(request):
    return request.param


def connectome(n: int, seed: int = 0):
    made = np.random.default_rng(seed)
    weights = made.uniform(0.0, 2.0 / n, (n, n)) * (made.uniform(size=(n, n)) < 0.7)
    return weights, made.uniform(1.0, 30.0, (n, n))


def hopf(weights, source="x", **options):
    return bk.Network(bk.Hopf(a=0.1, w=0.3), weights, source=source, target="x_inp", **{"k": 0.2, **options})


def start(n: int):
    made = np.random.default_rng(1)
    return {"x": made.uniform(-0.5, 0.5, n), "y": made.uniform(-0.5, 0.5, n)}


# The oracle ---------------------------------------------------------------------------------------------------------


def dense(weights, steps, duration, coupling="additive", history=None, k=0.2, dt=0.1):
    """Euler's rule for coupled Hopf masses in float64, one connection after the other."""
    n = len(weights)
    weights = weights * (1 - np.eye(n))
    x, y = start(n).values()
    depth = int(steps.max())
    past = [x] * depth if history is None else list(history)
    seen = []
    for _ in range(duration):
        past.append(x)
        total = np.zeros(n)
        for i in range(n):
            for j in range(n):
                late = past[len(past) - 1 - steps[i, j]][j]
                total[i] += weights[i, j] * (late - x[i] if coupling == "diffusive" else late)
        radius = x**2 + y**2
        dx = (0.1 - 1.0 * radius) * x - 0.3 * y + k * total
        dy = (0.1 - 1.0 * radius) * y + 0.3 * x
        x, y = x + dt * dx, y + dt * dy
        seen.append(x)
    return np.array(seen)


def delays_of(kind: str, n: int) -> np.ndarray:
    """In steps."""
    made = np.random.default_rng(2)
    return {
        "none": np.zeros((n, n), int),
        "one step": np.ones((n, n), int),
        "equal": np.full((n, n), 20),
        "different": made.permutation(np.arange(n * n)).reshape(n, n),
        "about a tile": made.integers(13, 20, (n, n)),
        "beyond the run": made.integers(90, 130, (n, n)),
    }[kind]


KINDS = ("none", "one step", "equal", "different", "about a tile", "beyond the run")


@pytest.mark.parametrize(
    ("kind", "coupling"),
    [
        pytest.param(kind, coupling, marks=[pytest.mark.slow] * (coupling == "diffusive" and kind != "different"))
        for kind in KINDS
        for coupling in ("additive", "diffusive")
    ],
)
def test_against_a_dense_loop(x64, implementation, kind, coupling):
    n = 7
    weights, steps = connectome(n)[0], delays_of(kind, n)
    network = hopf(weights, delays=steps * DT, coupling=coupling)
    assert (network.delay_steps(1e-4) == steps).all()
    found = bk.simulate(network, 80, DT, initial=start(n), record="x", scheme="euler", implementation=implementation)
    np.testing.assert_allclose(found["x"], dense(weights, steps, 80, coupling), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "n", [1, 68, pytest.param(192, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_sizes(implementation, n):
    weights, steps = connectome(n)[0], np.random.default_rng(3).integers(0, 40, (n, n))
    run = {"initial": start(n), "record": "x", "scheme": "euler", "every": 5, "implementation": implementation}
    found = bk.simulate(hopf(weights, delays=steps * DT, self_connection=n == 1), 60, DT, **run)
    with jax.enable_x64(True):
        want = bk.simulate(
            hopf(weights, delays=steps * DT, self_connection=n == 1), 60, DT, **{**run, "implementation": "scan"}
        )
    np.testing.assert_allclose(found["x"], want["x"], atol=2e-5 * np.abs(want["x"]).max())


@pytest.mark.parametrize("delayed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "coupling",
    [
        "additive",
        "sigmoidal_jansen_rit",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("diffusive", "laplacian", "sigmoidal", "tanh")),
    ],
)
def test_as_brainmass_has_it(implementation, coupling, delayed):
    brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
    init = pytest.importorskip("braintools").init
    weights, lengths = connectome(6)
    wired = {"distances": lengths, "speed": 5.0} if delayed else {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), brainstate.environ.context(dt=DT):
        node = brainmass.HopfStep(6, a=0.1, init_x=init.Constant(0.3), init_y=init.Constant(0.1))
        theirs = brainmass.Network(
            node, conn=weights, coupling=coupling, coupled_var="x", k=0.2, delay_init=init.Constant(0.3),
            distance=wired.get("distances"), speed=wired.get("speed"),
        )  # fmt: skip
        want = brainmass.Simulator(theirs, dt=DT).run(20 * u.ms, monitors=lambda m: m.node.x.value)["output"]
    if coupling == "laplacian":
        # brainmass exponentiates the weights that its `LaplacianConnParam` is given, and multiplies with them.
        weights = np.exp(weights) * weights
    network = bk.Network(bk.Hopf(a=0.1), weights, coupling=coupling, source="x", k=0.2, **wired)
    run = {"initial": {"x": 0.3, "y": 0.1}, "record": "x", "scheme": "exp_euler", "implementation": implementation}
    found = bk.simulate(network, 20 * u.ms, DT, **run)
    np.testing.assert_allclose(found["x"], want, atol=1e-6)


def test_delays_are_rounded_up_as_in_brainmass():
    delays = np.array([[0.0, 0.3, 0.31], [0.05, 0.0, 0.1], [0.29999, 1.0, 0.0]])
    steps = hopf(np.ones((3, 3)), delays=delays * u.ms).delay_steps(1e-4)
    # 0.3 / 0.1 is 2.9999999999999996 in float64 and 3.0000002 in float32; it is three steps.
    assert steps.tolist() == [[0, 3, 4], [1, 0, 1], [3, 10, 0]]


# What a run is made of ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly(implementation):
    weights, lengths = connectome(6)
    network = hopf(weights, distances=lengths, speed=3.0, coupling="tanh")
    run = {"scheme": "heun", "implementation": implementation, "record": "x"}
    whole = bk.simulate(network, 250, DT, initial=start(6), **run)
    first = bk.simulate(network, 70, DT, initial=start(6), **run)
    assert first.final["history"].shape == (network.delay_steps(1e-4).max(), 6)
    second = bk.simulate(network, 180, DT, initial=first.final, **run)
    np.testing.assert_array_equal(whole["x"], jnp.concatenate([first["x"], second["x"]]))
    for name, value in whole.final.items():
        np.testing.assert_array_equal(value, second.final[name], name)


def test_a_history_in_each_form(implementation):
    steps = delays_of("different", 4)
    network = hopf(connectome(4)[0], delays=steps * DT)
    times = np.arange(-steps.max(), 0)[:, None] * 0.1
    waves = np.cos(times + np.arange(4))
    run = {"scheme": "euler", "record": "x", "implementation": implementation}

    def of(history, initial=None):
        return bk.simulate(network, 40, DT, initial={**(initial or start(4)), "history": history}, **run)["x"]

    want = dense(connectome(4)[0], steps, 40, history=waves)
    np.testing.assert_allclose(of(waves), want, atol=1e-5)
    alike = np.broadcast_to(np.cos(times), waves.shape)
    np.testing.assert_allclose(of(lambda t: jnp.cos(t.to_decimal(u.ms))), of(alike), atol=1e-6)
    np.testing.assert_array_equal(of(0.25), of(np.full(waves.shape, 0.25)))
    np.testing.assert_array_equal(of(waves[0]), of(np.broadcast_to(waves[0], waves.shape)))
    batch = np.stack([waves, -waves], axis=1)
    np.testing.assert_array_equal(of(batch)[:, 1], of(-waves))


def test_permuted_regions_give_permuted_results(implementation):
    (weights, lengths), order = connectome(8), np.random.default_rng(4).permutation(8)

    def run(weights, lengths, initial):
        network = hopf(weights, distances=lengths, speed=2.0, coupling="diffusive")
        return bk.simulate(network, 150, DT, initial=initial, record="x", implementation=implementation)["x"]

    found = run(weights[order][:, order], lengths[order][:, order], {n: x[order] for n, x in start(8).items()})
    np.testing.assert_allclose(found, run(weights, lengths, start(8))[:, order], atol=1e-5)


def test_a_batch_is_each_of_its_networks(implementation):
    weights, lengths = connectome(6)
    strengths, many = np.linspace(0.1, 0.4, 3), weights * np.array([1.0, 0.5, 2.0])[:, None, None]
    run = {"initial": start(6), "record": "x", "implementation": implementation}
    wired = {"distances": lengths, "speed": 3.0}
    swept = bk.simulate(hopf(weights, k=strengths[:, None], **wired), 100, DT, **run)["x"]
    varied = bk.simulate(hopf(many, **wired), 100, DT, **run)["x"]
    mapped = jax.vmap(lambda k: bk.simulate(hopf(weights, k=k, **wired), 100, DT, **run)["x"], out_axes=1)(strengths)
    over_weights = jax.vmap(lambda w: bk.simulate(hopf(w, **wired), 100, DT, **run)["x"], out_axes=1)(jnp.asarray(many))
    assert swept.shape == varied.shape == (100, 3, 6)
    for b in range(3):
        one = bk.simulate(hopf(weights, k=strengths[b], **wired), 100, DT, **run)["x"]
        for found in (swept, mapped):
            np.testing.assert_allclose(found[:, b], one, atol=1e-6)
        one = bk.simulate(hopf(many[b], **wired), 100, DT, **run)["x"]
        for found in (varied, over_weights):
            np.testing.assert_allclose(found[:, b], one, atol=1e-6)


def test_noise_is_of_each_region_and_the_same_everywhere(implementation):
    weights, lengths = connectome(5)
    run = {"initial": start(5), "noise": {"x_inp": 0.05 * u.ms**0.5}, "key": jax.random.key(0), "record": "x"}
    network = hopf(weights, distances=lengths, speed=3.0, k=np.array([[0.1], [0.2]]))
    found = bk.simulate(network, 100, DT, implementation=implementation, **run)["x"]
    np.testing.assert_allclose(found, bk.simulate(network, 100, DT, implementation="scan", **run)["x"], atol=1e-5)
    alone = bk.simulate(hopf(weights, k=0.0), 100, DT, implementation=implementation, **run)["x"]
    assert np.std(np.diff(np.asarray(alone), axis=0) - np.diff(np.asarray(alone[:, :1]), axis=0)) > 0.01


def test_statistics_and_a_model_of_blocks(implementation):
    weights, lengths = connectome(5)
    network = bk.Network(
        bk.JansenRit(), weights, distances=lengths, speed=3.0, coupling="sigmoidal_jansen_rit", target="E_inp",
        k=50 * u.Hz, cmax=5.0,
    )  # fmt: skip
    run = {"inputs": {"E_inp": 120 * u.Hz}, "transient": 100, "every": 5, "implementation": implementation}
    stored = bk.simulate(network, 1100, DT, **run)["eeg"]
    found = bk.simulate(network, 1100, DT, record=[bk.Mean(), bk.Maximum(), "eeg"], **run)
    assert stored.unit == u.mV
    assert stored.shape == (200, 5)
    np.testing.assert_allclose(found["eeg"].mantissa, stored.mantissa, rtol=1e-6)
    np.testing.assert_allclose(found["eeg_mean"].mantissa, stored.mantissa.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["eeg_maximum"].mantissa, stored.mantissa.max(0), rtol=1e-6)


def test_a_stiff_scheme_sends_what_is_observed(implementation, x64):
    """In "strang" the state runs half a flow ahead of what it says; what is sent must not."""
    weights, lengths = connectome(4)

    def run(scheme, dt):
        network = bk.Network(bk.JansenRit(), weights, distances=lengths, speed=3.0, target="E_inp", k=5 * u.Hz / u.mV)
        run = {"inputs": {"E_inp": 120 * u.Hz}, "implementation": implementation, "scheme": scheme}
        return bk.simulate(network, 200 * u.ms, dt * u.ms, every=round(1 / dt), **run)["eeg"].mantissa

    want = run("rk4", 0.0125)
    coarse, fine = (np.abs(run("strang", dt) - want).max() / np.abs(want).max() for dt in (0.1, 0.05))
    assert fine < 0.6 * coarse < 0.01


# Gradients ----------------------------------------------------------------------------------------------------------


def loss(values, implementation, coupling, delays, duration, **run):
    network = hopf(values["weights"], k=values["k"], coupling=coupling, delays=delays)
    network = network.replace(model=bk.Hopf(a=values["a"], w=0.3))
    initial = {"x": values["x"], "y": 0.1, **({"history": values["history"]} if "history" in values else {})}
    found = bk.simulate(
        network, duration, DT, inputs={"y_inp": values["input"]}, initial=initial, record=("x", "y"), every=3,
        transient=5, scheme="heun", implementation=implementation, **run,
    )  # fmt: skip
    late = found.final.get("history", jnp.zeros((1, 1)))
    weight = jnp.arange(1.0, 1.0 + len(late)).reshape(-1, *(1,) * (late.ndim - 1)).astype(late.dtype)
    return (
        jnp.sum(found["x"] ** 2) + jnp.sum(jnp.sin(found["y"])) + jnp.sum(found.final["x"]) + jnp.sum(weight * late**2)
    )


def values_for(n, steps, duration, batch=()):
    made = np.random.default_rng(5)
    values = {
        "weights": connectome(n)[0],
        "k": np.linspace(0.1, 0.3, *batch)[:, None] if batch else np.array(0.2),
        "a": np.full(n, 0.1),
        "x": made.normal(size=(*batch, n)) * 0.3,
        "input": made.normal(size=(duration, *batch, n)) * 0.1,
        "history": made.normal(size=(int(steps.max()), n)) * 0.3,
    }
    if not steps.any():
        del values["history"]
    return {name: jnp.asarray(x) for name, x in values.items()}


@pytest.mark.parametrize(
    ("kind", "coupling"),
    [
        ("different", "diffusive"),
        *(
            pytest.param(kind, coupling, marks=pytest.mark.slow)
            for kind in ("none", "different", "beyond the run")
            for coupling in ("sigmoidal_jansen_rit", "diffusive")
            if (kind, coupling) != ("different", "diffusive")
        ),
    ],
)
def test_gradients_against_finite_differences(x64, implementation, kind, coupling):
    n, duration = 5, 60
    steps = delays_of(kind, n)
    values = values_for(n, steps, duration)
    arguments = (implementation, coupling, steps * DT, duration)
    gradient = jax.grad(loss)(values, *arguments)
    made = np.random.default_rng(6)
    for name, x in values.items():
        direction = made.normal(size=x.shape)
        ahead, behind = (loss({**values, name: x + h * direction}, *arguments) for h in (1e-6, -1e-6))
        difference = float(ahead - behind) / 2e-6
        assert abs(float(jnp.vdot(gradient[name], direction)) - difference) < 1e-7 * (1 + abs(difference)), name


@pytest.mark.parametrize(
    ("batch", "shared"),
    [pytest.param((3,), True, marks=pytest.mark.slow), ((), True), pytest.param((3,), False, marks=pytest.mark.slow)],
    ids=["a batch", "one network", "weights of each"],
)
@needs.numba
def test_gradients_against_scan(x64, batch, shared):
    n, duration = 7, 150
    steps = delays_of("different", n)
    values = values_for(n, steps, duration, batch)
    values["weights"] = jnp.broadcast_to(values["weights"], (n, n) if shared else (*batch, n, n))
    noise = {"noise": {"x": 0.01 / u.ms**0.5}, "key": jax.random.key(0)}
    found, want = (jax.grad(loss)(values, name, "tanh", steps * DT, duration, **noise) for name in ("numba", "scan"))
    for name in values:
        # The normals of both agree to float32.
        np.testing.assert_allclose(found[name], want[name], atol=1e-6 * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.slow
def test_a_long_run_is_cut_and_its_gradient_the_same(x64, implementation, monkeypatch):
    steps, duration = delays_of("different", 4), 400
    values = values_for(4, steps, duration)
    arguments = (implementation, "additive", steps * DT, duration)
    noise = {"noise": {"x": 0.01 / u.ms**0.5}, "key": jax.random.key(0)}
    want = jax.grad(loss)(values, *arguments, **noise)
    monkeypatch.setattr(memory, "block", lambda run: 60)
    jax.clear_caches()
    found = jax.grad(loss)(values, *arguments, **noise)
    for name in values:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-10, atol=1e-12, err_msg=name)
    jax.clear_caches()


@pytest.mark.slow
def test_a_gradient_of_a_long_run_holds_no_trajectory():
    """What a gradient holds grows with the blocks of a run, and not with its steps."""
    network = bk.Network(bk.Hopf(a=0.1), connectome(20)[0], delays=delays_of("equal", 20) * DT, source="x", k=0.1)

    def held(duration):
        def square(k):
            found = bk.simulate(network.replace(k=k), duration, DT, initial={"x": 0.1}, every=duration, record="x")
            return jnp.sum(found["x"])

        return jax.jit(jax.grad(square)).lower(0.1).compile().memory_analysis().temp_size_in_bytes

    assert held(80_000) < 1.3 * held(20_000)


# Errors -------------------------------------------------------------------------------------------------------------


@bk.model
class Alone(bk.Model):
    """A model that nothing can be added to."""

    rate: float = 1.0
    states = {"x": u.UNITLESS}

    @staticmethod
    def drift(s, p, i):
        return {"x": -p.rate * s.x}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": np.ones((3, 2))}, r"'weights' got shape \(3, 2\), but takes \(N, N\)"),
        ({"weights": np.full((3, 3), np.nan)}, "'weights' got NaN"),
        ({"coupling": "difusive"}, "unknown coupling 'difusive'; did you mean 'diffusive'"),
        ({"source": "z"}, "unknown source"),
        ({"target": "z"}, r"unknown target, which is an input, 'z'\. Known: "),
        ({"speed": 3.0}, "'distances' is needed"),
        ({"distances": np.ones((3, 3)), "speed": -1.0}, "'speed' got -1.0"),
        ({"distances": np.ones((2, 2)), "speed": 1.0}, r"'distances' got shape \(2, 2\), but takes \(3, 3\)"),
        ({"delays": np.ones((3, 3))}, "'delays' got a plain ndarray"),
        ({"delays": -np.ones((3, 3)) * u.ms}, "negative"),
        ({"delays": 1 * u.ms, "distances": np.ones((3, 3)), "speed": 1.0}, "both given"),
        ({"k": 1 * u.mV}, "'k' got mV, but takes"),
    ],
)
def test_what_is_wrong_is_said(options, says):
    options = {"weights": np.ones((3, 3)), "k": 0.1, **options}
    with pytest.raises(ValueError, match=says):
        bk.Network(bk.Hopf(), **options)


def test_what_is_wrong_in_a_run_is_said():
    with pytest.raises(TypeError, match="unknown parameter of coupling 'tanh' 'slope'"):
        hopf(np.ones((3, 3)), coupling="tanh", slope=2.0)
    with pytest.raises(ValueError, match="'k' is needed: it turns eeg into E_inp"):
        bk.Network(bk.JansenRit(), np.ones((3, 3)), target="E_inp")
    with pytest.raises(ValueError, match="no input"):
        bk.Network(Alone(), np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"last axis of the batch \(5, 1, 3\)|do not broadcast"):
        bk.simulate(hopf(np.ones((3, 3)), k=np.ones(5)), 10, DT)
    with pytest.raises(ValueError, match=r"do not broadcast|last axis"):
        bk.simulate(hopf(np.ones((1, 1)), k=np.ones(5)), 10, DT)
    with pytest.raises(ValueError, match="has no delays"):
        bk.simulate(hopf(np.ones((3, 3))), 10, DT, initial={"history": 0.1})
    delayed = hopf(np.ones((3, 3)), delays=1 * u.ms)
    with pytest.raises(ValueError, match=r"'history' got shape \(4, 3\).*longest delay is 10 steps"):
        bk.simulate(delayed, 10, DT, initial={"history": np.ones((4, 3))})
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda d: bk.simulate(hopf(np.ones((3, 3)), delays=d * u.ms), 10, DT))(np.ones((3, 3)))
    with pytest.raises(bk.Unsupported, match="mosaic_gpu' cannot run this"):
        bk.simulate(delayed, 10, DT, implementation="mosaic_gpu")


def test_what_takes_no_network_says_what_does():
    network = hopf(np.ones((3, 3)))
    with pytest.raises(TypeError, match="a network has no derivatives carried in the loop: leave it out"):
        bk.fit(network, lambda run: 0.0, {"coupling.k": (0.1, 1.0)}, optimiser="levenberg_marquardt")
    with pytest.raises(TypeError, match="got a Network, but takes a model"):
        bk.sensitivities(network, 10, DT, wrt="a")
    with pytest.raises(ValueError, match=r"did you mean 'coupling\.k'\? It is of the network's coupling"):
        bk.sweep(network, {"k": [0.1, 0.2]}, 10, DT)


def test_it_says_what_it_is():
    network = hopf(np.ones((3, 3)), delays=1 * u.ms, coupling="tanh", scale=3.0)
    assert repr(network) == "Network(3 regions of Hopf, x -> x_inp, tanh, delays to 1 ms)"
    other = network.replace(k=0.7)
    assert other.parameters == {"k": 0.7, "scale": 3.0}
    assert other.link == network.link
    leaves, tree = jax.tree.flatten(network)
    assert jax.tree.unflatten(tree, leaves).parameters == network.parameters
    assert jax.tree.structure(other) == tree
    assert "checkpoints" in str(bk.explain(network, 100, DT))
