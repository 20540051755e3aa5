"""Steps back: exact inverses, and walked only where rounding allows."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import testing
from brainmass_kernels.backends import mosaic_gpu
from brainmass_kernels.pointwise import pullback, pullback_after
from brainmass_kernels.step import StepSpec, build

MODELS = [entry.model for entry in bk.list_models() if getattr(entry.model, "blocks", ())]
STEPS, LANES = 60, 3


def step_of(model, scheme="strang", noisy=(), with_inverse=True):
    spec = StepSpec(model, scheme, tuple(model.inputs), (), noisy, tuple(model.states), np.dtype("float64"))
    with jax.enable_x64(True):
        return build(spec, with_inverse)


def numbers(step, rng):
    """Coefficients at the model's defaults and 0.1 ms, and a state."""
    spec = step.spec
    held = {n: float(u.get_magnitude(x)) for n, x in spec.model.inputs.items()}
    values = {
        **spec.model().magnitudes(),
        **held,
        "dt": 0.1 * float(u.get_magnitude((1 * u.ms) / spec.model.time_unit)),
    }
    coefs = step.setup(*[jnp.float64(values[n]) for n in spec.hoisted])
    return coefs, [jnp.asarray(rng.normal(size=LANES)) for _ in spec.model.states]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_a_step_back_undoes_a_step(model):
    with jax.enable_x64(True):
        step = step_of(model)
        coefs, state = numbers(step, np.random.default_rng(0))
        back = step.inverse(*coefs, *step.advance(*coefs, *state))
        for before, found in zip(state, back, strict=True):
            np.testing.assert_allclose(found, before, rtol=1e-10, atol=1e-10)


def test_one_program_steps_back_and_pulls_back():
    with jax.enable_x64(True):
        step = step_of(bk.JansenRit)
        coefs, state = numbers(step, np.random.default_rng(1))
        n, m = len(coefs), len(state)
        plain = pullback(step.advance, [True] * (n + m))
        both = pullback_after(step.inverse, plain, slice(n, n + m))
        cts = [jnp.cos(x) for x in state]
        after = step.advance(*coefs, *state)
        want, got = plain(*coefs, *state, *cts), both(*coefs, *after, *cts)
        for a, b in zip((*want, *state), got, strict=True):
            np.testing.assert_allclose(np.broadcast_to(b, LANES), np.broadcast_to(a, LANES), rtol=1e-9, atol=1e-9)
    # The rates are shared, not computed for each.
    assert [e.primitive.name for e in both.jaxpr.jaxpr.eqns].count("tanh_absolute") == 3


def test_a_state_beside_the_blocks_has_no_way_back():
    coloured = type(bk.coloured(bk.JansenRit(), "E_inp", 10 * u.ms))
    assert coloured.blocks == bk.JansenRit.blocks
    assert not step_of(coloured, with_inverse=False).invertible


@pytest.mark.parametrize(("scheme", "noisy"), [("exact", ()), ("heun", ()), ("strang", ("Mv",))])
def test_other_schemes_and_noise_on_states_have_no_way_back(scheme, noisy):
    assert not step_of(bk.JansenRit, scheme, noisy, with_inverse=False).invertible


def loss(model, **more):
    res = bk.simulate(
        model, STEPS, 0.1 * u.ms, inputs={"E_inp": 220 * u.Hz}, every=4, checkpoint_every=20,
        **{"implementation": "mosaic_gpu", **more},
    )  # fmt: skip
    return jnp.mean(res["eeg"].mantissa ** 2) + jnp.mean(res.final["Iv"].mantissa ** 2)


def of_rate(be, **more):
    return loss(bk.JansenRit(be=be * u.Hz, C=jnp.linspace(120.0, 140.0, LANES)), **more)


@needs.mosaic_gpu
class TestWhereRoundingAllows:
    @pytest.fixture
    def walked(self, monkeypatch):
        """Which way back each adjoint kernel that is built takes."""
        ways = []
        for name in ("by_inverse_steps", "by_replay"):
            original = getattr(mosaic_gpu.ReversePass, name)

            def watched(self, *args, name=name, original=original):
                ways.append(name)
                return original(self, *args)

            monkeypatch.setattr(mosaic_gpu.ReversePass, name, watched)
        jax.clear_caches()
        return ways

    @pytest.mark.parametrize(("rate", "way"), [(100.0, "by_inverse_steps"), (1500.0, "by_replay")])
    def test_known_rates_decide_beforehand(self, walked, rate, way):
        def of_gain(Ae, **more):
            return loss(bk.JansenRit(Ae=Ae * u.mV, be=rate * u.Hz, C=jnp.linspace(120.0, 140.0, LANES)), **more)

        with testing.interpret():
            got = jax.grad(of_gain)(3.25)
        assert set(walked) == {way}
        np.testing.assert_allclose(got, jax.grad(of_gain)(3.25, implementation="scan"), rtol=1e-5)

    @pytest.mark.parametrize("rate", [100.0, 1500.0])
    def test_traced_rates_decide_at_run_time(self, walked, rate):
        with testing.interpret():
            got = jax.jit(jax.grad(of_rate))(rate)
        assert set(walked) == {"by_inverse_steps", "by_replay"}
        np.testing.assert_allclose(got, jax.grad(of_rate)(rate, implementation="scan"), rtol=2e-5)

    def test_under_vmap(self, walked):
        rates = jnp.array([90.0, 100.0])
        with testing.interpret():
            got = jax.vmap(jax.grad(of_rate))(rates)
        want = jax.vmap(jax.grad(lambda x: of_rate(x, implementation="scan")))(rates)
        np.testing.assert_allclose(got, want, rtol=2e-5)

    def test_explain_says_so(self):
        with testing.interpret():
            plan = bk.explain(bk.JansenRit(), 1000, 0.1 * u.ms, implementation="mosaic_gpu")
            far = bk.explain(bk.JansenRit(be=900 * u.Hz), 1000, 0.1 * u.ms, implementation="mosaic_gpu")
        assert "reversed by inverse steps" in str(plan)
        assert "inverse" not in str(far)
