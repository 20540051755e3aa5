"""What someone who writes a model gets wrong: one sentence that names the model, the method and the thing."""

import math
from typing import Any, ClassVar

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk


def made(*bases, **body):
    base = {
        "states": {"r": u.UNITLESS, "w": u.UNITLESS}, "inputs": {"push": 0.5}, "observables": {"out": u.UNITLESS},
        "__annotations__": {"tau": Any, "gain": Any}, "tau": 10.0, "gain": 2.0,
        "drift": staticmethod(lambda s, p, i: {"r": (i.push - s.r) / p.tau, "w": s.r - s.w}),
        "observe": staticmethod(lambda s, p: {"out": s.r}),
    }  # fmt: skip
    body["__annotations__"] = base["__annotations__"] | body.get("__annotations__", {})
    methods = {n: staticmethod(x) if callable(x) and not isinstance(x, type) else x for n, x in body.items()}
    return bk.model(type("Mine", bases or (bk.Model,), {**base, **methods}))


def run(cls, **arguments):
    return bk.simulate(cls(), 5, 0.5 * u.ms, implementation="scan", **arguments)


def test_the_model_that_the_others_are_made_from_runs():
    assert run(made())["out"].shape == (5,)


def branching(s, p, i):
    return {"r": -s.r if s.r > 0 else s.r, "w": s.w}


DRIFTS = {
    "a key that is no state": (lambda s, p, i: {"r": -s.r, "w": s.w, "z": s.r}, ValueError,
        "Mine.drift returned 'z', but 'z' is no state. Known: r, w"),
    "a misspelt key": (lambda s, p, i: {"rr": -s.r, "w": s.w}, ValueError, "'rr' is no state; did you mean 'r'?"),
    "a key too few": (lambda s, p, i: {"r": -s.r}, ValueError,
        "Mine.drift returned no 'w': it returns a rate for each of r, w"),
    "a tuple": (lambda s, p, i: (-s.r, s.w), TypeError, "Mine.drift returned tuple, but returns a dict"),
    "nothing": (lambda s, p, i: None, TypeError, "Mine.drift returned None: has it a `return`?"),
    "None for a state": (lambda s, p, i: {"r": None, "w": s.w}, TypeError, "returned None for 'r', but returns a real"),
    "a list for a state": (lambda s, p, i: {"r": [s.r], "w": s.w}, TypeError, "returned list for 'r'"),
    "a boolean": (lambda s, p, i: {"r": s.r > 0, "w": s.w}, TypeError, "returned 'r' of dtype bool"),
    "a complex number": (lambda s, p, i: {"r": s.r.astype("complex64"), "w": s.w}, TypeError,
        "returned 'r' of dtype complex64"),
    "an axis more": (lambda s, p, i: {"r": -s.r, "w": jnp.stack([s.w, s.w])}, ValueError,
        "the drift of Mine under 'heun'"),
    "a constant array": (lambda s, p, i: {"r": -s.r, "w": jnp.zeros(3)}, ValueError, r"returned shape \(3,\) for 'w'"),
    "an unknown parameter": (lambda s, p, i: {"r": -s.r / p.tua, "w": s.w}, ValueError,
        r"Mine.drift reads p.tua, but Mine has no parameter 'tua'; did you mean 'tau'\? Known: tau, gain \(test_mod"),
    "an unknown state": (lambda s, p, i: {"r": -s.v, "w": s.w}, ValueError, "reads s.v, but Mine has no state 'v'"),
    "an unknown input": (lambda s, p, i: {"r": i.pusch, "w": s.w}, ValueError, "no input 'pusch'; did you mean 'push'"),
    "the wrong letter": (lambda s, p, i: {"r": -s.r / s.tau, "w": s.w}, ValueError,
        "Mine.drift reads s.tau, but 'tau' is a parameter: p.tau"),
    "NumPy": (lambda s, p, i: {"r": np.exp(s.r), "w": s.w}, TypeError,
        r"Mine.drift calls a function of NumPy, .* \(test_model_authors.py:\d+\): take the one of jax.numpy"),
    "math": (lambda s, p, i: {"r": math.exp(s.r), "w": s.w}, TypeError, "calls a function of NumPy, of math or of"),
    "a branch": (branching, TypeError,
        r"Mine.drift decides by a number .* \(test_model_authors.py:\d+\): .* jnp.where"),
    "a unit returned": (lambda s, p, i: {"r": -s.r / (10 * u.ms), "w": s.w}, ValueError,
        "Mine.drift returned 'r' with the unit kHz, but inside a model all values are plain numbers"),
    "a unit added": (lambda s, p, i: {"r": s.r + 3 * u.mV, "w": s.w}, ValueError,
        r"Mine.drift computes with a unit \(test_model_authors.py:\d+\)"),
    "shapes that do not fit": (lambda s, p, i: {"r": s.r + jnp.ones(3), "w": s.w}, TypeError,
        r"Mine.drift cannot be computed with one value a lane \(test_model_authors.py:\d+\): "),
    "a method of self": (lambda self, s, p, i: {"r": s.r, "w": s.w}, TypeError,
        r"Mine.drift takes \(self, s, p, i\), but is called as drift\(s, p, i\): write it as a @staticmethod"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRIFTS)
def test_a_drift(name):
    drift, kind, message = DRIFTS[name]
    with pytest.raises(kind, match=message):
        run(made(drift=drift))


def test_other_methods():
    with pytest.raises(ValueError, match=r"Mine.observe returned 'x', but 'x' is no observable. Known: out"):
        run(made(observe=lambda s, p: {"x": s.r}))
    with pytest.raises(ValueError, match=r"Mine.observe returned no 'out': it returns a number for each of out"):
        run(made(observe=lambda s, p: {}))
    with pytest.raises(ValueError, match=r"Mine.observe reads p.a, but Mine has no parameter 'a'"):
        run(made(observe=lambda s, p: {"out": p.a}))
    noise = {"noise": {"r": 0.1 * u.second**-0.5}, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"Mine.diffusion returned 'q', but 'q' is no state"):
        run(made(diffusion=lambda s, p: {"q": s.r}), **noise)
    with pytest.raises(TypeError, match=r"Mine.step returned tuple, but returns a dict"):
        run(made(step=lambda s, p, i: (s.r, s.w), scheme="given"))
    with pytest.raises(TypeError, match=r"Mine has no method drift\(s, p, i\)"):
        run(made(drift=bk.Model.drift))


def test_an_error_of_the_authors_own_stays_and_says_where():
    with pytest.raises(ZeroDivisionError) as raised:
        run(made(drift=lambda s, p, i: {"r": 1 / 0, "w": s.w}))
    assert any("raised in Mine.drift (test_model_authors.py" in note for note in raised.value.__notes__)


def test_a_default_for_what_may_be_missing_is_taken():
    cls = made(drift=lambda s, p, i: {"r": getattr(p, "extra", -1.0) * s.r, "w": s.w})
    assert run(cls)["out"].shape == (5,)


def test_blocks():
    body = {
        "states": {"E": u.mV, "Ev": u.mV / u.second}, "inputs": {"push": 1.0 * u.Hz}, "observables": {},
        "__annotations__": {"A": Any, "a": Any}, "A": 3.0 * u.mV, "a": 100.0 * u.Hz, "observe": lambda s, p: {},
        "blocks": (bk.Block("E", "Ev", "A", "a"),), "drift": bk.SecondOrderModel.__dict__["drift"],
    }  # fmt: skip
    assert run(made(bk.SecondOrderModel, **body, drive=lambda s, p, i: {"E": i.push}))["E"].shape == (5,)
    with pytest.raises(ValueError, match=r"Mine.drive returned 'F', but 'F' is no position of a block"):
        run(made(bk.SecondOrderModel, **body, drive=lambda s, p, i: {"E": i.push, "F": i.push}))
    with pytest.raises(ValueError, match=r"Mine.drive returned no 'E': it returns a drive for each of E"):
        run(made(bk.SecondOrderModel, **body, drive=lambda s, p, i: {}))
    with pytest.raises(TypeError, match=r"Mine has no method drive\(s, p, i\)"):
        run(made(bk.SecondOrderModel, **body))
    with pytest.raises(ValueError, match=r"unknown parameter in Mine.blocks 'b'"):
        made(bk.SecondOrderModel, **{**body, "blocks": (bk.Block("E", "Ev", "A", "b"),)})


CLASSES = {
    "no annotation": ({"tua": 3.0}, TypeError,
        r"Mine.tua has no annotation, so it is no parameter: write `tua: Any = 3.0`"),
    "no annotation, a unit": ({"v": 2.0 * u.mV}, TypeError, r"write `v: Any = 2.0 \* u.mV`"),
    "an array default": ({"tau": np.ones(3)}, ValueError,
        r"the default of Mine.tau got ndarray, but takes one number.*Mine\(tau=...\)"),
    "a quantity of several": ({"tau": np.ones(3) * u.mV}, ValueError, "the default of Mine.tau got"),
    "a list default": ({"tau": [1.0, 2.0]}, ValueError, "the default of Mine.tau got list"),
    "a dict default": ({"tau": {}}, ValueError, "the default of Mine.tau got dict"),
    "no states": ({"states": {}}, TypeError, "Mine.states is a dict of the unit of each state"),
    "misspelt states": ({"states": None, "state": {"r": u.mV}}, TypeError, "Mine.states .*; is 'state' meant"),
    "states without units": ({"states": {"r": 1.0}}, TypeError, r"Mine.states\['r'\] got float, but takes a unit"),
    "states, a list": ({"states": ["r"]}, TypeError, "Mine.states is a dict"),
    "a unit for an input": ({"inputs": {"push": u.mV}}, TypeError, r"Mine.inputs\['push'\] got a unit.*0.0 \* u.mV"),
    "a NaN input": ({"inputs": {"push": np.nan}}, ValueError, "got NaN"),
    "observables, a tuple": ({"observables": ("out",)}, TypeError, "Mine.observables got tuple, but takes a dict"),
    "a parameter and a state": ({"__annotations__": {"r": Any}, "r": 1.0}, ValueError,
        "Mine has 'r' as a parameter and as a state: give one of them another name"),
    "a parameter and an input": ({"inputs": {"tau": 1.0}}, ValueError, "'tau' as a parameter and as an input"),
    "an input and a state": ({"inputs": {"r": 1.0}}, ValueError, "'r' as an input and as a state"),
    "a parameter dt": ({"__annotations__": {"dt": Any}, "dt": 1.0}, ValueError, "'dt' as a parameter, but that is"),
    "an annotation of the model's": ({"__annotations__": {"states": dict}}, TypeError,
        "Mine.states has an annotation, which makes it a parameter: write `states = ...`"),
    "no unit of time": ({"time_unit": 1.0 * u.ms}, TypeError, "Mine.time_unit got .*, but takes a unit of time"),
    "a start of no state": ({"initial": {"q": 1.0}}, ValueError, "unknown state in Mine.initial 'q'"),
    "a start in another unit": ({"initial": {"r": 1.0 * u.mV}}, ValueError, r"'Mine.initial\['r'\]' got mV"),
    "pairs of no states": ({"pairs": (("r", "q"),)}, ValueError, "unknown state in Mine.pairs 'q'"),
    "also of no parameter": ({"also": {"q": u.mV}}, ValueError, "unknown parameter in Mine.also 'q'"),
    "as_declared of nothing": ({"as_declared": ("q",)}, ValueError, "unknown name in Mine.as_declared 'q'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_a_class(name):
    body, kind, message = CLASSES[name]
    with pytest.raises(kind, match=message):
        made(**body)


def test_constants_are_written_as_such():
    made(__annotations__={"SIZE": ClassVar[int]}, SIZE=3, drift=lambda s, p, i: {"r": -s.r, "w": s.w}, _hidden=2.0)


def test_no_decorator():
    class Mine(bk.Model):
        states = {"r": u.UNITLESS}

    with pytest.raises(TypeError, match=r"Mine has no decorator: write @bk.model above `class Mine`"):
        Mine()

    class Hotter(bk.JansenRit):
        Ae: Any = 5.0 * u.mV

    with pytest.raises(TypeError, match=r"Hotter has no decorator"):
        Hotter()
    with pytest.raises(TypeError, match=r"Hotter.Ae is no parameter of Hottest: write @bk.model above `class Hotter`"):

        @bk.model
        class Hottest(Hotter):
            pass

    with pytest.raises(TypeError, match=r"@bk.model got 'dict', but takes a subclass of bk.Model"):
        bk.model(dict)
