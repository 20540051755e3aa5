"""Programs are kept under what they read: whatever changes gives another key, and whatever does not gives the same."""

import dataclasses
import functools
import importlib
import sys
import textwrap
import types
from typing import NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.equations import key_of
from brainmass_kernels.fitting import fit as fitting
from brainmass_kernels.fitting.starts import starts_from
from brainmass_kernels.programs import Programs
from brainmass_kernels.step import build

GAIN = 1.0
SETTINGS = types.SimpleNamespace(gain=1.0)


def helper(x):
    return jnp.tanh(x)


def made(drift, **body):
    """A model of one state with this drift, as a notebook cell would make it again and again."""
    fields = {
        "rate": 100.0 * u.Hz,
        "__annotations__": {"rate": u.Quantity},
        "states": {"r": u.UNITLESS},
        "inputs": {"c": 0.3},
        "drift": staticmethod(drift),
    }
    return bk.model(type("Mine", (bk.Model,), {**fields, **body}))


def run(model, **more):
    return float(bk.simulate(model(), 20, 0.5 * u.ms, implementation="scan", **more)["r"][-1])


# What a key tells apart ----------------------------------------------------------------------------------------------


def of_constant(k):
    return lambda x: k * x


def of_default(k):
    def f(x, k=k):
        return k * x

    return f


def of_inner(k):
    inner = of_constant(k)
    return lambda x: inner(x)


class Fixed(NamedTuple):
    k: float


def of_named_tuple(k):
    class Constants(NamedTuple):
        x: float = 1.0

        def total(self):
            return k * self.x

    return Constants()


def of_dict(k):
    class Constants(dict):
        def total(self):
            return k

    return Constants(a=1.0)


def of_slots(k):
    @dataclasses.dataclass(slots=True)
    class Constants:
        k: float

    return Constants(k)


def of_slope(k):
    @jax.custom_jvp
    def f(x):
        return x

    f.defjvp(lambda primals, tangents: (primals[0], k * tangents[0]))
    return f


def of_way_back(k):
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, cotangent: (k * cotangent,))
    return f


class Scale:
    def __init__(self, k):
        self.k = k

    def __call__(self, x):
        return self.k * x


@pytest.mark.parametrize("make", [
    of_constant, of_default, of_inner, Scale,
    lambda k: functools.partial(lambda k, x: k * x, k),
    lambda k: jax.jit(of_constant(k)),
    lambda k: {"a": k, "b": [1, (2, k)]},
    lambda k: np.full(1000, k),
    lambda k: jnp.asarray([k, 1.0]),
    lambda k: k * u.mV,
    lambda k: types.SimpleNamespace(inner=types.SimpleNamespace(k=k)),
    lambda k: Scale(k).__call__,
    Fixed, of_named_tuple, of_dict, of_slots, of_slope, of_way_back,
], ids=range(18))  # fmt: skip
def test_a_key_tells_constants_apart(make):
    assert key_of(make(2.0)) == key_of(make(2.0))
    assert key_of(make(2.0)) != key_of(make(3.0))


def test_a_key_tells_kinds_and_signs_of_numbers_apart():
    numbers = [1, 1.0, True, np.float32(1), np.float64(1), "1", b"1", None, 0.0, -0.0, 1 + 0j, (1,), [1], {1: 1}]
    assert len({key_of(x) for x in numbers}) == len(numbers)
    assert key_of(float("nan")) == key_of(float("nan"))
    assert key_of(1.0 * u.mV) != key_of(1.0 * u.volt)
    assert key_of(1.0 * u.mV / u.ms) != key_of(1.0 * u.volt / u.second)
    assert key_of({"a": 1, "b": 2}) != key_of({"b": 2, "a": 1})  # states have an order


def test_a_key_tells_numbers_of_a_class_of_their_own_apart():
    class Count(int):
        pass

    assert key_of(Count(1)) != key_of(Count(2))


def test_a_global_with_the_name_of_an_attribute_is_not_read(monkeypatch):
    """As `V = result["V"]` in a notebook, beside equations that read `s.V`."""
    model = made(lambda s, p, i: {"r": s.SETTINGS.gain - helper(s.r)})
    before, here = key_of(model), sys.modules[__name__]
    monkeypatch.setattr(here, "SETTINGS", np.ones(10))
    assert key_of(model) == before
    monkeypatch.setattr(here, "helper", lambda x: jnp.tanh(2.0 * x))
    assert key_of(model) != before


def test_a_key_of_what_refers_to_itself_ends():
    loop = []
    loop.append(loop)

    def f(n):
        return f(n - 1) if n else loop

    assert key_of(f, loop) == key_of(f, loop)


def test_a_global_and_what_a_global_function_reads(monkeypatch):
    model = made(lambda s, p, i: {"r": GAIN * helper(i.c) - s.r})
    here = sys.modules[__name__]
    before = key_of(model)
    monkeypatch.setattr(here, "GAIN", 2.0)
    assert key_of(model) != before
    monkeypatch.setattr(here, "GAIN", 1.0)
    assert key_of(model) == before
    monkeypatch.setattr(here, "helper", lambda x: jnp.tanh(2.0 * x))
    assert key_of(model) != before


# What simulate sees --------------------------------------------------------------------------------------------------


def test_a_changed_global_is_seen(monkeypatch):
    model = made(lambda s, p, i: {"r": p.rate * (GAIN * helper(i.c) - s.r)})
    before = run(model)
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 2.0)
    assert run(model) == pytest.approx(2.0 * before, rel=1e-5)
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 1.0)
    assert run(model) == before


def test_a_changed_attribute_of_an_object_is_seen(monkeypatch):
    model = made(lambda s, p, i: {"r": p.rate * (SETTINGS.gain * jnp.tanh(i.c) - s.r)})
    before = run(model)
    monkeypatch.setattr(SETTINGS, "gain", 3.0)
    assert run(model) == pytest.approx(3.0 * before, rel=1e-5)


def test_a_replaced_drift_is_seen():
    model = made(lambda s, p, i: {"r": p.rate * (i.c - s.r)})
    before = run(model)
    model.drift = staticmethod(lambda s, p, i: {"r": p.rate * (2.0 * i.c - s.r)})
    assert run(model) == pytest.approx(2.0 * before, rel=1e-5)


def test_replaced_code_is_seen():
    """IPython's autoreload puts new code into the functions that are there."""
    model = made(lambda s, p, i: {"r": p.rate * (i.c - s.r)})
    before = run(model)
    model.drift.__code__ = (lambda s, p, i: {"r": p.rate * (2.0 * i.c - s.r)}).__code__
    assert run(model) == pytest.approx(2.0 * before, rel=1e-5)


def test_a_reloaded_module_is_seen(tmp_path, monkeypatch):
    source = textwrap.dedent("""
        def drive(x):
            return {gain} * x
    """)
    (tmp_path / "equations_of_a_user.py").write_text(source.format(gain=1.0))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    user = importlib.import_module("equations_of_a_user")
    model = made(lambda s, p, i: {"r": p.rate * (user.drive(i.c) - s.r)})
    before = run(model)
    (tmp_path / "equations_of_a_user.py").write_text(source.format(gain=20.0))
    importlib.reload(user)
    assert run(model) == pytest.approx(20.0 * before, rel=1e-5)


def test_a_model_of_a_model_sees_its_change():
    base = made(lambda s, p, i: {"r": p.rate * (i.c - s.r)})
    slow = bk.coloured(base(), "c", tau=1 * u.ms)

    def result():
        return float(bk.simulate(slow, 20, 0.5 * u.ms, implementation="scan")["r"][-1])

    before = result()
    base.drift = staticmethod(lambda s, p, i: {"r": p.rate * (2.0 * i.c - s.r)})
    assert result() == pytest.approx(2.0 * before, rel=1e-5)


def test_a_model_of_a_model_is_made_anew_where_that_has_other_states():
    base = made(lambda s, p, i: {"r": p.rate * (i.c - s.r)})
    first, again = (type(bk.coloured(base(), "c", tau=1 * u.ms)) for _ in range(2))
    assert first is again
    base.states = {"r": u.mV}
    assert type(bk.coloured(base(), "c", tau=1 * u.ms)).states["r"] == u.mV


def test_a_changed_statistic_is_seen():
    @dataclasses.dataclass(frozen=True)
    class Last(bk.Reduction):
        def start(self, like, sampling):
            return jnp.zeros_like(like)

        def add(self, held, x, first, sampling):
            return x[-1]

        def finish(self, held, sampling):
            return held

    def result():
        found = bk.simulate(
            bk.VanDerPol(), 20, 0.5 * u.ms, record=[Last(of="x")], initial={"x": 0.5}, implementation="scan"
        )
        return float(found["x_last"])

    before = result()
    Last.finish = lambda self, held, sampling: 2.0 * held
    assert result() == 2.0 * before


def test_switching_to_float64_is_seen():
    model = made(lambda s, p, i: {"r": p.rate * (i.c - s.r)})
    assert bk.simulate(model(), 20, 0.5 * u.ms, implementation="scan")["r"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert bk.simulate(model(), 20, 0.5 * u.ms, implementation="scan")["r"].dtype == jnp.float64


def test_clear_caches_forgets_what_python_does_not_show():
    box = {}

    class Hidden:
        __slots__ = ()

        def __mul__(self, x):
            return box["gain"] * x

    hidden = Hidden()
    model = made(lambda s, p, i: {"r": p.rate * ((hidden * i.c) - s.r)})
    box["gain"] = 1.0
    before = run(model)
    box["gain"] = 2.0
    bk.clear_caches()
    assert run(model) == pytest.approx(2.0 * before, rel=1e-5)


# What is kept --------------------------------------------------------------------------------------------------------


def test_a_cell_that_runs_again_compiles_nothing():
    from brainmass_kernels.run import RUNS

    compiled = []
    for _ in range(3):
        run(made(lambda s, p, i: {"r": p.rate * (i.c - 1.5 * s.r)}))
        compiled.append([program._cache_size() for program in RUNS.values()])
    assert compiled[0] == compiled[1] == compiled[2]


def test_generations_of_a_class_are_forgotten():
    models = [made(lambda s, p, i, k=k: {"r": p.rate * (k * i.c - s.r)}) for k in range(40)]
    sizes = []
    for model in models:
        run(model)
        sizes.append(sum(step.spec.model.__qualname__ == "Mine" for step in build.values()))
    assert sizes[30] == sizes[39] <= 16


def test_the_oldest_programs_are_forgotten():
    class Spec:
        def __init__(self, name):
            self.model, self.equations = type(name, (), {}), name

    made_of, specs = [], [Spec(f"M{k}") for k in range(5)]
    programs = Programs(lambda spec: made_of.append(spec) or spec, lambda spec: spec, most=3)
    for k in (0, 1, 2, 0, 3, 0, 1):  # 1 is the oldest when 3 comes
        programs(specs[k])
    assert made_of == [specs[k] for k in (0, 1, 2, 3, 1)]


# Fits ----------------------------------------------------------------------------------------------------------------

SIMPLE = {"free": {"be": (60.0, 140.0)}, "duration": 20, "dt": 1 * u.ms, "every": 5, "transient": None}


class _Begun(Exception):
    """Raised where a fit would simulate, with its problem."""


def problem(monkeypatch, target=None, **changes):
    def begun(problem, *_):
        raise _Begun(problem)

    monkeypatch.setattr(fitting, "starts_from", begun)
    arguments = {
        "model": bk.JansenRit(), "record": {"x": "eeg"}, "realisations": 1, "starts": 1, "steps": 1,
        "implementation": "scan", **SIMPLE, **changes,
    }  # fmt: skip
    with pytest.raises(_Begun) as raised:
        bk.fit(target=target or distance, **arguments)
    return raised.value.args[0]


def distance(result):
    return jnp.mean((u.get_magnitude(result["x"]) - 1.0) ** 2, axis=0)


def test_every_argument_of_a_fit_gives_another_program(monkeypatch):
    """But for the target's values, the starts and the key, which are data."""
    key = jax.random.key(3)
    noisy = {"noise": {"E_inp": 2 * u.Hz * u.second**0.5}, "key": key}
    first = problem(monkeypatch)
    changes = {
        "another record": {"record": {"x": "M"}},
        "a function that does something else": {"target": lambda r: 2.0 * distance(r)},
        "bounds": {"free": {"be": (60.0, 150.0)}},
        "another free name": {"free": {"Ae": (2.0, 5.0)}},
        "a fixed field": {"model": bk.JansenRit(Ae=3.3 * u.mV)},
        "an input": {"inputs": {"E_inp": 150 * u.Hz}},
        "noise": noisy,
        "noise on a state": {"noise": {"Mv": 2 * u.mV / u.second**1.5}, "key": key},
        "duration": {"duration": 25},
        "dt": {"dt": 0.5 * u.ms},
        "every": {"every": 4},
        "transient": {"transient": 5},
        "scheme": {"scheme": "exp_euler"},
        "realisations": {"realisations": 2},
        "priors": {"priors": {"be": (50.0, 5.0)}},
    }
    found = {name: problem(monkeypatch, **change).identity for name, change in changes.items()}
    assert first.identity not in found.values()
    assert len(set(found.values())) == len(changes)
    same = [{}, {"key": key}, {"starts": {"be": np.array([70.0, 80.0])}}, {"model": bk.JansenRit(be=70 * u.Hz)}]
    assert {problem(monkeypatch, **change).identity for change in same} == {first.identity}


def test_the_order_of_free_names_changes_no_start(monkeypatch):
    bounds = {"be": (40.0, 80.0), "Ae": (2.0, 5.0), "C": (100.0, 160.0)}
    draw, key = starts_from, jax.random.key(1)
    given = {"be": 50.0, "Ae": 3.25, "C": 135.0}
    orders = list(bounds), list(bounds)[::-1]
    found = [draw(problem(monkeypatch, free={n: bounds[n] for n in order}), 8, 0, given, key) for order in orders]
    for name in bounds:
        np.testing.assert_array_equal(found[0][name], found[1][name])
    assert not np.array_equal(found[0]["be"], found[0]["C"])


def test_a_fit_of_another_record_is_another_fit():
    arguments = {"starts": 1, "steps": 1, "realisations": 1, "implementation": "scan", **SIMPLE}
    fits = [bk.fit(bk.JansenRit(), distance, record={"x": name}, **arguments) for name in ("eeg", "M")]
    assert not np.allclose(fits[0].losses, fits[1].losses)
