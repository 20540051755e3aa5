"""The suite of networks that every implementation inherits which runs them, and the float64 loop it is held against.

The loop is Euler's and Heun's rule in plain numpy over all pairs of regions, apart from the package. Its gradients are
complex steps, ``f'(x) = Im f(x + ih) / h``, exact to rounding (Squire and Trapp 1998, SIAM Review 40:110), one for each
number that a run is made of. Only the noise is drawn from the package (tests/test_noise.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import assert_close, slow_but

import brainmass_kernels as bk
from brainmass_kernels import memory, noise

STEP = 0.1
DT = STEP * u.ms
# In steps: how long live delays may be, and how far past what a network was before a run is made up.
LONGEST, TINY = 12, 1e-30


# The kinds, once more -----------------------------------------------------------------------------------------------


def total(weights, sent):
    return np.sum(weights * sent, -1, keepdims=True)


def rate(lib, x, height, slope, midpoint):
    return height / (1.0 + lib.exp(slope * (midpoint - x)))


class Kind(NamedTuple):
    """Constants; what arrives, of ``late (..., to, from)`` and ``own (..., to, 1)``; what is sent, if not itself."""

    constants: dict[str, float]
    arrives: Callable
    sent: tuple[Callable, ...] = ()


def diffusive(w, late, own):
    return total(w, late - own)


KINDS = {
    "additive": Kind({"k": 0.2, "b": 0.05}, lambda p, w, late, own: p.k * total(w, late) + p.b),
    "diffusive": Kind({"k": 0.3}, lambda p, w, late, own: p.k * diffusive(w, late, own)),
    "laplacian": Kind({"k": 0.25, "b": 0.1}, lambda p, w, late, own: p.k * diffusive(w, late, own) + p.b),
    "sigmoidal": Kind(
        {"k": 0.2, "a": 1.5, "b": 0.1, "slope": 2.0, "midpoint": 0.3},
        lambda p, w, late, own: rate(np, p.a * total(w, late) + p.b, p.k, p.slope, p.midpoint),
    ),
    "tanh": Kind({"k": 0.4, "scale": 1.5}, lambda p, w, late, own: p.k * np.tanh(p.scale * total(w, late))),
    "sigmoidal_jansen_rit": Kind(
        {"k": 0.3, "cmin": 0.1, "cmax": 0.9, "midpoint": 0.2, "r": 3.0},
        lambda p, w, late, own: p.k * total(w, p.cmin + rate(np, late, p.cmax - p.cmin, p.r, p.midpoint)),
        (lambda lib, p, x: p.cmin + rate(lib, x, p.cmax - p.cmin, p.r, p.midpoint),),
    ),
    "kuramoto": Kind(
        {"k": 0.3}, lambda p, w, late, own: p.k * total(w, np.sin(late - own)),
        (lambda lib, p, x: lib.sin(x), lambda lib, p, x: lib.cos(x)),
    ),
    "cube": Kind(
        {"k": 0.8, "gain": 2.0, "leak": 0.05},
        lambda p, w, late, own: p.k * np.tanh(total(w, p.gain * late**3)) - p.leak * own,
        (lambda lib, p, x: p.gain * x**3,),
    ),
}  # fmt: skip
# A kind of the user's own.
CUBE = bk.CouplingKind(
    send=lambda x, p: p.gain * x**3, receive=lambda total, x, p: p.k * jnp.tanh(total) - p.leak * x,
    parameters={"k": 1.0, "gain": 2.0, "leak": 0.05},
)  # fmt: skip


# The cases ----------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One coupling of a case.

    Attributes
    ----------
    kind : in `KINDS`, and its name in the network
    delays : a pattern of `delays_of`; "" of none
    source, target : of all regions, ``"x"``, or by group, ``"cortex.x+seizing.y"``
    interpolate : as of `bk.Coupling`
    live : what the gradient of live delays is in, "delays" or "speed", with "distances"; "" where they are known
    """

    kind: str
    delays: str = ""
    source: str = "x"
    target: str = "x_inp"
    interpolate: bool = False
    live: str = ""


def delays_of(pattern: str, n: int, steps: int, seed: int = 2) -> np.ndarray:
    """In steps; that of a region to itself is the shortest."""
    made = np.random.default_rng(seed)
    found = {
        "zero": np.zeros((n, n), int),
        "one step": np.ones((n, n), int),
        "equal": np.full((n, n), 5),
        "several": made.integers(0, LONGEST, (n, n)),
        "different": made.permutation(n * n).reshape(n, n),
        "about a tile": made.integers(13, 20, (n, n)),
        "beyond the run": made.integers(steps - 2, steps + 10, (n, n)),
        "between": made.uniform(0.0, LONGEST - 0.1, (n, n)),
        "longest": np.full((n, n), LONGEST),
        "long": np.where(made.random((n, n)) < 0.3, 130, made.integers(13, 20, (n, n))),
    }[pattern]
    if pattern == "several":
        # Where it is easy to be a step early or late.
        found[0, 1:4], found[1, 0] = [0, 1, 2], LONGEST
    np.fill_diagonal(found, found.min())
    return found


class Case(NamedTuple):
    """A network and a run of it.

    Attributes
    ----------
    ways : its couplings
    n, steps : how many regions and steps
    networks : how many of them, each with its own strengths, states and inputs; 0 without a batch
    own_weights : whether each of those has its own weights
    groups : Hopf in the cortex, Van der Pol where it seizes; without, all regions are of the first
    itself : whether regions are connected to themselves
    past : whether it starts from what was sent before; without, from what the initial state sends
    order : of the regions, where they are permuted
    density : the share of connections that are there
    """

    ways: tuple[Way, ...]
    n: int = 5
    steps: int = 14
    networks: int = 0
    own_weights: bool = False
    groups: bool = False
    itself: bool = False
    scheme: str = "euler"
    noisy: bool = False
    past: bool = True
    order: tuple[int, ...] = ()
    density: float = 0.8

    @property
    def batch(self) -> tuple[int, ...]:
        return (self.networks,) if self.networks else ()

    @property
    def lanes(self) -> dict[str, np.ndarray]:
        """The regions of each group."""
        every = np.arange(self.n)
        return {"cortex": every[every % 3 != 1], "seizing": every[every % 3 == 1]} if self.groups else {"": every}

    def delays(self, way: Way) -> np.ndarray:
        return self.ordered(delays_of(way.delays or "zero", self.n, self.steps, seed=len(way.kind)), axes=2)

    def ordered(self, x: np.ndarray, axes: int) -> np.ndarray:
        """With its last axes in the order of the regions."""
        order = np.array(self.order or range(self.n))
        return x[..., order] if axes == 1 else x[..., order, :][..., order] if axes else x

    def depths(self) -> dict[str, int]:
        """Steps of the history of each quantity that is sent, by its name there."""
        found: dict[str, int] = {}
        for way in self.ways:
            depth = LONGEST if way.live else int(np.ceil(self.delays(way).max()))
            sent = len(KINDS[way.kind].sent)
            for label in [way.source] if not sent else [way.kind] if sent == 1 else [f"{way.kind}.{i}" for i in (0, 1)]:
                found[label] = max(depth, found.get(label, 0))
        return {label: depth for label, depth in found.items() if depth}

    def axes(self) -> dict[str, Any]:
        """The axis of the networks of each part of `theta`."""
        leading: dict[str, Any] = {"x": 0, "y": 0, "x_inp": 1, "past.x": 1, "past.y": 1}
        for way in self.ways:
            leading |= {f"{way.kind}.k": 0, f"{way.kind}.speed": 0}
            leading |= {f"{way.kind}.weights": 0} if self.own_weights else {}
        return {name: leading.get(name) if self.networks else None for name in self.theta()}

    def theta(self) -> dict[str, Any]:
        """Everything differentiable, as float64 numbers that float32 holds exactly; times in steps, lengths in mm."""
        made, (n, batch) = np.random.default_rng([self.n, self.steps]), (self.n, self.batch)
        theta: dict[str, Any] = {"a": made.uniform(0.05, 0.2, n)}
        theta |= {name: made.uniform(-0.5, 0.5, (*batch, n)) for name in "xy"}
        theta["x_inp"] = made.uniform(-0.2, 0.2, (self.steps, *batch, n))
        theta |= {"mu": made.uniform(0.5, 0.8, n)} if self.groups else {}
        theta |= {"sigma": 0.05} if self.noisy else {}
        for way in self.ways:
            weights = made.uniform(0.0, 2.0 / n, (*(batch if self.own_weights else ()), n, n))
            own = {"weights": weights * ((made.uniform(size=weights.shape) < self.density) | (n == 1))}
            own |= KINDS[way.kind].constants
            if batch:
                own["k"] += 0.1 * np.arange(self.networks)[:, None]
            if way.live == "delays":
                own["delays"] = self.delays(way)
            elif way.live:
                speeds = 3.0 + np.arange(self.networks)[:, None] if batch else 3.0
                own |= {"speed": speeds, "distances": self.delays(way) * STEP * 3.0}
            theta |= {f"{way.kind}.{name}": x for name, x in own.items()}
        if (depth := max([0, *self.depths().values()])) and self.past:
            theta |= {f"past.{name}": made.uniform(-0.5, 0.5, (depth, *batch, n)) for name in "xy"}
        for name, x in theta.items():
            axes = 2 if name.endswith(".weights") else name in ("a", "x", "y", "x_inp", "mu", "past.x", "past.y")
            theta[name] = self.ordered(x, axes)
        return {name: np.float64(np.float32(x)) for name, x in theta.items()}

    @property
    def fixed(self) -> set[str]:
        """What of `theta` has no gradient."""
        rounded = [way.kind for way in self.ways if way.live and not way.interpolate]
        return {f"{kind}.{name}" for kind in rounded for name in ("delays", "speed", "distances")}

    def normals(self) -> np.ndarray:
        """The package's own ``(steps, *batch, n)``."""
        if not self.noisy:
            return np.zeros((self.steps, *self.batch, self.n))
        with jax.ensure_compile_time_eval(), jax.enable_x64(False):
            seeds = noise.lane_seeds(jax.random.key(0), (*self.batch, self.n))
            made = jax.vmap(lambda n: noise.normals(seeds, n, 1)[0])(jnp.arange(self.steps, dtype=jnp.int32))
        return np.asarray(made, np.float64)


def one(kind: str, delays: str, **options) -> Case:
    return Case((Way(kind, delays),), **options)


THREE = Case((Way("additive", "several"), Way("kuramoto", "several", "y", "y_inp"), Way("cube", "several")))
CASES = {
    "three couplings": THREE,
    "three couplings without delays": THREE._replace(ways=tuple(way._replace(delays="") for way in THREE.ways)),
    "every kind": Case(
        (
            Way("additive", "several"), Way("diffusive", "one step"), Way("laplacian", "equal", "y"),
            Way("sigmoidal", "several"), Way("tanh", "", "y", "y_inp"), Way("sigmoidal_jansen_rit", "several", "y"),
            Way("kuramoto", "one step"), Way("cube", "equal", "y", "y_inp"),
        )
    ),
    "groups": Case(
        (
            Way("additive", "several", "cortex.x+seizing.y", "cortex.x_inp+seizing.y_inp"),
            Way("diffusive", "", "cortex.y", "seizing.x_inp"),
        ),
        groups=True,
    ),
    "noise in a group": Case(
        (Way("additive", "several", "cortex.x+seizing.y", "cortex.x_inp+seizing.y_inp"),), groups=True, noisy=True
    ),
    "zero delays": one("diffusive", "zero", scheme="heun"),
    "one step": one("diffusive", "one step"),
    "one step in a batch": one("diffusive", "one step", networks=2),
    "equal delays": one("diffusive", "equal"),
    "different delays": one("diffusive", "different", scheme="heun", itself=True, steps=30),
    "delays about a tile": one("additive", "about a tile", steps=40),
    "delays beyond the run": one("tanh", "beyond the run"),
    "one region": one("additive", "zero", n=1, itself=True),
    "one region that waits": one("additive", "one step", n=1, itself=True),
    "a batch": one("diffusive", "several", networks=3),
    "a batch of weights": one("diffusive", "several", networks=3, own_weights=True, itself=True),
    "a batch of weights without delays": one("additive", "", networks=3, own_weights=True),
    "noise": one("additive", "several", networks=2, noisy=True),
    "between steps": Case((Way("additive", "between", interpolate=True), Way("kuramoto", "several", "y", "y_inp"))),
    "fractions of steps": one("additive", "between"),
    "live delays": Case((Way("additive", "between", interpolate=True, live="delays"),)),
    "a live speed": Case((Way("additive", "between", interpolate=True, live="speed"),)),
    "live speeds": Case((Way("additive", "between", interpolate=True, live="speed"),), networks=2),
    "live speeds of rounded delays": Case((Way("additive", "between", live="speed"),), networks=2),
}  # fmt: skip


def loops_but(*quick: str) -> tuple[str, ...]:
    """The tests of all other cases, for `NetworkSuite.long`: each case is quick on some implementation, if on any."""
    assert set(quick) <= CASES.keys()
    return tuple(f"test_the_loop[{name}]" for name in CASES if name not in quick)


# The loop -----------------------------------------------------------------------------------------------------------


def by_group(case: Case, name: str, places: str) -> np.ndarray:
    """For each region whether a source or target, ``"x"`` or ``"cortex.x+seizing.y"``, names this."""
    named = np.zeros(case.n, bool)
    for place in places.split("+"):
        group, _, state = place.rpartition(".")
        named[case.lanes[group]] = state == name
    return named


def looped(case: Case, theta, normals) -> dict[str, np.ndarray]:
    """Every state, the last ones, and the last histories of one network; all of ``theta`` has an axis of variants."""
    x, y = theta["x"], theta["y"]
    depth = 1 + max([0, *case.depths().values()])
    held = {name: np.repeat(theta[name][:, None], depth + case.steps, axis=1) for name in "xy"}
    for name in "xy" if "past.x" in theta else ():
        held[name][:, depth - theta[f"past.{name}"].shape[1] : depth] = theta[f"past.{name}"]
    constants = {
        way.kind: SimpleNamespace(
            **{n: theta[f"{way.kind}.{n}"].reshape(len(x), -1, 1) for n in KINDS[way.kind].constants}
        )
        for way in case.ways
    }
    noisy = np.isin(np.arange(case.n), [*case.lanes.values()][-1])
    kick = theta["sigma"][:, None] / np.sqrt(STEP) * noisy if case.noisy else 0.0
    seen = []
    for t in range(case.steps):
        held["x"][:, depth + t], held["y"][:, depth + t] = x, y
        to = {"x_inp": theta["x_inp"][:, t] + kick * normals[t], "y_inp": 0.0 * y}
        for way in case.ways:
            came = arrived(case, way, theta, constants[way.kind], held, depth + t)
            for name in to:
                to[name] = to[name] + np.where(by_group(case, name, way.target), came, 0.0)
        dx, dy = drift(case, theta, x, y, to)
        if case.scheme == "heun":
            more = drift(case, theta, x + STEP * dx, y + STEP * dy, to)
            dx, dy = (dx + more[0]) / 2, (dy + more[1]) / 2
        x, y = x + STEP * dx, y + STEP * dy
        seen.append((x, y))
    found = {name: np.stack(each, axis=1) for name, each in zip("xy", zip(*seen))} | {"final x": x, "final y": y}
    return found | {f"history {n}": h for n, h in histories(np, case, constants, held).items()}


def arrived(case: Case, way: Way, theta, constants, held, now: int):
    """What a coupling brings to each region."""
    steps = theta.get(f"{way.kind}.delays", case.delays(way)[None])
    if way.live == "speed":
        steps = theta[f"{way.kind}.distances"] / theta[f"{way.kind}.speed"].reshape(-1, 1, 1) / STEP
    steps = steps if way.interpolate else np.ceil(np.real(steps) - 1e-5)
    before = np.floor(np.real(steps)).astype(int)
    variant, sender = np.arange(len(held["x"]))[:, None, None], np.arange(case.n)

    def read(times):
        return sum(held[name][variant, times, sender] * by_group(case, name, way.source) for name in "xy")

    late, own = read(now - before), np.swapaxes(read(now), 1, 2)
    if way.interpolate:
        late = late + (steps - before) * (read(now - before - 1) - late)
    weights = theta[f"{way.kind}.weights"] * (1.0 if case.itself else 1.0 - np.eye(case.n))
    return KINDS[way.kind].arrives(constants, weights, late, own)[..., 0]


def drift(case: Case, theta, x, y, to):
    growth = theta["a"] - (x**2 + y**2)
    hopf = growth * x - 0.3 * y + to["x_inp"], growth * y + 0.3 * x + to["y_inp"]
    if not case.groups:
        return hopf
    mu, in_cortex = theta["mu"], np.isin(np.arange(case.n), case.lanes["cortex"])
    pol = mu * (x - x**3 / 3 - y) + to["x_inp"], x / mu + to["y_inp"]
    return [np.where(in_cortex, one, other) for one, other in zip(hopf, pol)]


def histories(lib, case: Case, constants, held) -> dict[str, Any]:
    """What was sent in the last steps of ``held``, whose last axes are steps and regions."""
    found, depths = {}, case.depths()
    for way in case.ways:
        sent = sum(held[name] * by_group(case, name, way.source) for name in "xy")
        labels = [way.source], [way.kind], [f"{way.kind}.{i}" for i in (0, 1)]
        makes = KINDS[way.kind].sent or (lambda lib, p, x: x,)
        for label, make in zip(labels[len(KINDS[way.kind].sent)], makes):
            if label in depths:
                found[label] = make(lib, constants[way.kind], sent)[..., -depths[label] :, :]
    return found


def recorded(seen, axis: int = 0) -> dict[str, np.ndarray]:
    """What a run records of all steps: every third after the fourth."""
    return seen | {name: np.moveaxis(np.moveaxis(seen[name], axis, 0)[6::3], 0, axis) for name in "xy"}


def loss(seen):
    """A number that everything a run returns has its own part in; the first axis of complex numbers stays."""
    lib = np if isinstance(seen["x"], np.ndarray) else jnp
    terms = (lib.cos((2.0 + i) * seen[name] + 0.5 * i) for i, name in enumerate(sorted(seen)))
    return sum(lib.sum(x, axis=tuple(range(1, x.ndim)) if lib is np else None) for x in terms)


def each_network(case: Case, fun) -> list:
    """``fun`` of the case, theta and normals of each network alone."""
    theta, axes, alone = case.theta(), case.axes(), case._replace(networks=0, own_weights=False)
    if not case.networks:
        return [fun(case, theta, case.normals())]
    cut = [
        {n: x if axes[n] is None else np.take(x, b, axes[n]) for n, x in theta.items()} for b in range(case.networks)
    ]
    return [fun(alone, each, case.normals()[:, b]) for b, each in enumerate(cut)]


@functools.lru_cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """Everything that a run returns, of every step."""

    def of(alone, theta, normals):
        seen = looped(alone, {name: x[None] for name, x in theta.items()}, normals)
        return {name: x[0] for name, x in seen.items()}

    alone = each_network(case, of)
    return {n: np.stack([each[n] for each in alone], axis=-2) if case.networks else x for n, x in alone[0].items()}


@functools.lru_cache
def expected_gradient(case: Case) -> dict[str, Any]:
    """Of `loss` of what is recorded, in each number of theta."""

    def of(alone, theta, normals):
        wide, found = {name: x[None] + 0j for name, x in theta.items()}, {}
        for name in sorted(theta.keys() - alone.fixed):
            x = theta[name]
            moved = x + 1j * TINY * np.eye(x.size).reshape(x.size, *x.shape)
            every = {n: np.broadcast_to(v, (x.size, *v.shape[1:])) for n, v in (wide | {name: moved}).items()}
            found[name] = loss(recorded(looped(alone, every, normals), axis=1)).imag.reshape(x.shape) / TINY
        return found

    alone, axes = each_network(case, of), case.axes()
    return {
        n: sum(each[n] for each in alone) if axes[n] is None else np.stack([each[n] for each in alone], axes[n])
        for n in alone[0]
    }


# The suite ----------------------------------------------------------------------------------------------------------

LIVE: Any = pytest.mark.where(lambda suite: suite.live)


SIZES = [68] + [
    pytest.param(n, marks=[pytest.mark.slow, pytest.mark.where(lambda suite, n=n: suite.largest >= n)])
    for n in (192, 1000)
]  # fmt: skip


class NetworkSuite:
    """What an implementation that runs networks keeps.

    Attributes
    ----------
    implementation : the name asked for, or ``None``
    context : in which everything runs, such as `bk.testing.interpret`
    double : whether it is held to the loop in float64, within `exact`, or in float32 by the contract
    live : whether it takes live delays
    most : steps of a case
    largest : regions of a network with delays
    long : tests that are marked slow, as they take long here
    """

    implementation: str | None
    context: Callable = contextlib.nullcontext
    double = True
    live = True
    most = 40
    largest = 1000
    long: tuple[str, ...] = ()

    @pytest.fixture(autouse=True)
    def _context(self):
        with self.context(), jax.enable_x64(self.double):
            yield

    # How to run a case ----------------------------------------------------------------------------------------------

    def case(self, name: str) -> Case:
        return CASES[name]._replace(steps=min(CASES[name].steps, self.most))

    def given(self, case: Case) -> dict:
        return {n: jnp.asarray(x) for n, x in case.theta().items()}

    def coupling(self, case: Case, way: Way, theta) -> bk.Coupling:
        own = {n.partition(".")[2]: x for n, x in theta.items() if n.startswith(f"{way.kind}.")}
        if way.live == "speed":
            own |= {"speed": own["speed"] * u.mm / u.ms, "distances": own["distances"] * u.mm}
        elif way.delays:
            own["delays"] = own.get("delays", case.delays(way)) * DT
        if way.delays:
            own |= {"interpolate": way.interpolate, "max_delay": LONGEST * DT if way.live else None}
        source, target = (
            dict(x.split(".") for x in places.split("+")) if case.groups else places
            for places in (way.source, way.target)
        )
        kind = CUBE if way.kind == "cube" else way.kind
        return bk.Coupling(kind=kind, source=source, target=target, self_connection=case.itself, **own)

    def network(self, case: Case, theta) -> bk.Network:
        couplings, lanes = {way.kind: self.coupling(case, way, theta) for way in case.ways}, case.lanes
        if not case.groups:
            return bk.Network(bk.Hopf(a=theta["a"], w=0.3), couplings=couplings)
        hopf, pol = bk.Hopf(a=theta["a"][lanes["cortex"]], w=0.3), bk.VanDerPol(mu=theta["mu"][lanes["seizing"]])
        groups = {"cortex": (hopf, lanes["cortex"]), "seizing": (pol, lanes["seizing"])}
        return bk.Network(groups, couplings=couplings)

    def arguments(self, case: Case, theta) -> dict:
        """Of `bk.simulate`, which then records every step."""
        network, initial = self.network(case, theta), self.split(case, {n: theta[n] for n in "xy"})
        if "past.x" in theta:
            # Steps follow the networks there.
            held = {n: jnp.moveaxis(theta[f"past.{n}"], 0, -2) for n in "xy"}
            constants = {
                way.kind: SimpleNamespace(
                    **{n: jnp.asarray(theta[f"{way.kind}.{n}"])[..., None] for n in KINDS[way.kind].constants}
                )
                for way in case.ways
            }
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                past = {n: jnp.moveaxis(x, -2, 0) for n, x in histories(jnp, case, constants, held).items()}
            initial["history"] = past if len(network.sent()) > 1 else next(iter(past.values()))
        noisy = [*self.split(case, {"x_inp": theta["x_inp"]})][-1]
        noise = {"noise": {noisy: theta["sigma"] * u.ms**0.5}, "key": jax.random.key(0)} if case.noisy else {}
        return {
            "model": network, "duration": case.steps, "dt": DT, "initial": initial, "scheme": case.scheme,
            "inputs": self.split(case, {"x_inp": theta["x_inp"]}), "implementation": self.implementation,
            "record": [*self.split(case, {n: theta[n] for n in "xy"})], **noise,
        }  # fmt: skip

    def split(self, case: Case, values: dict) -> dict:
        """By the names that they have in groups."""
        named = {
            f"{group}.{n}" if group else n: x[..., at] for group, at in case.lanes.items() for n, x in values.items()
        }
        return named if case.groups else values

    def joined(self, case: Case, name: str, values):
        """What `split` has split."""
        if not case.groups:
            return values[name]
        places = np.argsort(np.concatenate([*case.lanes.values()]))
        return jnp.concatenate([values[f"{group}.{name}"] for group in case.lanes], axis=-1)[..., places]

    def seen(self, case: Case, theta, **more) -> dict:
        """As `expected` has it."""
        result = bk.simulate(**(self.arguments(case, theta) | more))
        seen = {n: self.joined(case, n, result) for n in "xy"}
        seen |= {f"final {n}": self.joined(case, n, result.final) for n in "xy"}
        past = result.final.get("history", {})
        past = past if isinstance(past, dict) else {next(iter(case.depths())): past}
        return seen | {f"history {n}": x for n, x in past.items()}

    def forward(self, case: Case, theta=None, **more) -> dict:
        return jax.jit(lambda theta: self.seen(case, theta, **more))(self.given(case) if theta is None else theta)

    def gradient(self, case: Case, theta):
        """In theta, and what is recorded."""
        fixed = {n: theta[n] for n in case.fixed & theta.keys()}

        def of(moved):
            seen = self.seen(case, moved | fixed, every=3, transient=4, checkpoint_every=7)
            return loss(seen), seen

        return jax.grad(of, has_aux=True)({n: x for n, x in theta.items() if n not in fixed})

    def check(self, case: Case):
        """Records, last states and last histories, and the gradient in everything."""
        gradient, seen = jax.jit(functools.partial(self.gradient, case))(self.given(case))
        self.agree(case, seen, gradient)
        for way in case.ways if not case.itself else ():
            np.testing.assert_array_equal(np.diagonal(gradient[f"{way.kind}.weights"], axis1=-2, axis2=-1), 0.0)

    def agree(self, case: Case, seen, gradient):
        state, slope = (1e-12, 1e-9) if seen["x"].dtype == np.float64 else (1e-5, 1e-4)
        # The normals of a kernel and of the package agree to float32.
        state, slope = (max(state, 1e-6), max(slope, 1e-6)) if case.noisy else (state, slope)
        assert_close(seen, recorded(expected(case)), state)
        assert_close(gradient, expected_gradient(case), slope)

    # Against the loop -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=LIVE if any(way.live for way in case.ways) else ()) for name, case in CASES.items()],
    )
    def test_the_loop(self, name):
        self.check(self.case(name))

    @pytest.mark.where(lambda suite: suite.double)
    def test_single_precision(self):
        with jax.enable_x64(False):
            self.check(self.case("different delays"))

    @pytest.mark.parametrize("n", SIZES)
    def test_sizes(self, n):
        """In float32, without a gradient and without a past."""
        case = one("additive", "several", n=n, steps=20, past=False)
        with jax.enable_x64(False):
            assert_close(self.forward(case), expected(case), 1e-5)

    @pytest.mark.parametrize("name", ["a batch of weights", pytest.param("live speeds", marks=LIVE)])
    def test_vmap(self, name):
        """Networks that are mapped, and their gradients, are those of a batch."""
        case = self.case(name)
        alone, axes = case._replace(networks=0, own_weights=False), case.axes()
        mapped = jax.vmap(functools.partial(self.gradient, alone), (axes,))
        gradient, seen = jax.jit(mapped)(self.given(case))
        seen = {n: jnp.moveaxis(x, 0, 0 if n.startswith("final") else 1) for n, x in seen.items()}
        for n, x in gradient.items():
            gradient[n] = jnp.sum(x, 0) if axes[n] is None else jnp.moveaxis(x, 0, axes[n])
        self.agree(case, seen, gradient)

    @LIVE
    @pytest.mark.parametrize("interpolate", [False, True], ids=["rounded", "interpolated"])
    def test_delays_of_exactly_the_longest(self, interpolate):
        """Peers act one step early or late here."""
        case = Case((Way("additive", "longest", interpolate=interpolate, live="delays"),))
        assert_close(self.forward(case), expected(case), 1e-9)

    @pytest.mark.slow
    @pytest.mark.where(lambda suite: suite.double)
    def test_a_long_run_is_cut(self, monkeypatch):
        monkeypatch.setattr(memory, "block", lambda run: 12)
        jax.clear_caches()
        self.check(self.case("different delays"))
        jax.clear_caches()

    # What is the same -----------------------------------------------------------------------------------------------

    def test_permuted_regions_and_couplings_permute_the_result(self):
        case = THREE._replace(past=False)
        plain, order = self.forward(case), (3, 0, 4, 1, 2)
        near = 1e-12 if self.double else 1e-5
        assert_close(plain, expected(case), near)
        moved = self.forward(case._replace(order=order))
        assert_close(moved, {n: x[..., np.array(order)] for n, x in plain.items()}, near)
        assert_close(self.forward(case._replace(ways=case.ways[::-1]), self.given(case)), plain, near)

    def test_couplings_of_weight_zero_are_a_batch_of_masses(self):
        case = one("diffusive", "", networks=2)._replace(ways=(Way("diffusive"), Way("kuramoto", source="y")))
        theta = {n: 0.0 * x if n.endswith("weights") else x for n, x in self.given(case).items()}
        found = self.seen(case, theta)
        alone = self.arguments(case, theta) | {"model": bk.Hopf(a=theta["a"], w=0.3)}
        for name, x in bk.simulate(**alone).records.items():
            np.testing.assert_array_equal(found[name], x, name)

    def test_groups_without_connections_are_each_model_alone(self):
        """Noise of a group moves that group alone."""
        case = CASES["noise in a group"]._replace(past=False)
        theta = {n: 0.0 * x if n.endswith(("weights", ".b")) else x for n, x in self.given(case).items()}
        found, lanes = self.seen(case, theta), case.lanes["cortex"]
        alone = bk.simulate(
            bk.Hopf(a=theta["a"][lanes], w=0.3), case.steps, DT, initial={n: theta[n][lanes] for n in "xy"},
            inputs={"x_inp": theta["x_inp"][:, lanes]}, scheme=case.scheme, implementation=self.implementation,
        )  # fmt: skip
        np.testing.assert_allclose(found["x"][:, lanes], alone["x"], rtol=0, atol=1e-15 if self.double else 1e-7)

    @pytest.mark.parametrize("name", slow_but({"three couplings"}, ["three couplings", "groups", "a batch"]))
    def test_a_run_continues_exactly_from_its_histories(self, name):
        case = self.case(name)._replace(past=False)
        arguments = self.arguments(case, self.given(case))
        del arguments["inputs"]
        half, record = case.steps // 2, arguments["record"][0]
        whole = bk.simulate(**arguments | {"duration": 2 * half})
        first = bk.simulate(**arguments | {"duration": half})
        second = bk.simulate(**arguments | {"duration": half, "initial": first.final})
        np.testing.assert_array_equal(whole[record], jnp.concatenate([first[record], second[record]]))
        jax.tree.map(np.testing.assert_array_equal, dict(whole.final), dict(second.final))
        assert whole.ok.all()

    def test_a_history_in_each_form(self):
        case = one("additive", "several", networks=2)
        theta = self.given(case)
        past, arguments = theta["past.x"], self.arguments(case, theta)

        def of(history):
            return bk.simulate(**arguments | {"initial": arguments["initial"] | {"history": history}})["x"]

        times = (np.arange(-len(past), 0) * STEP)[:, None]
        alike = jnp.asarray(np.broadcast_to(np.cos(times), past.shape[::2]), past.dtype)
        near = 1e-12 if self.double else 1e-6
        np.testing.assert_allclose(of(past), expected(case)["x"], atol=near)
        np.testing.assert_allclose(of(lambda t: jnp.cos(t.to_decimal(u.ms))), of(alike), atol=near)
        np.testing.assert_array_equal(of(0.25), of(jnp.full(past.shape[::2], 0.25)))
        np.testing.assert_array_equal(of(past[0, 0]), of(jnp.broadcast_to(past[0, 0], past.shape)))
        np.testing.assert_array_equal(of(past[:, 0])[:, 0], of(past)[:, 0])

    # Models of blocks, with units -----------------------------------------------------------------------------------

    def chain(self, steps: int, **more):
        """Jansen-Rit's regions of which the first sends to the second late, and to the third at once."""
        weights = np.zeros((2, 3, 3))
        weights[0, 1, 0] = weights[1, 2, 0] = 2.0
        late = bk.Coupling(weights[0], target="E_inp", k=2 * u.Hz / u.mV, delays=3 * DT)
        now = bk.Coupling(weights[1], kind="sigmoidal_jansen_rit", target="E_inp", k=20 * u.Hz, cmax=5.0)
        return bk.simulate(
            bk.Network(bk.JansenRit(), couplings=[late, now]), steps, DT, inputs={"E_inp": 120 * u.Hz},
            initial={"E": [5.0, 3.0, 1.0] * u.mV}, scheme="strang", implementation=self.implementation, **more,
        )  # fmt: skip

    def test_a_chain_is_masses_that_are_driven_by_what_was_sent(self):
        """In "strang" the state runs half a flow ahead of what it says; what is sent must not."""
        found = self.chain(14)["eeg"]
        assert found.unit == u.mV
        sent = np.concatenate([np.full(4, 5.0), np.asarray(found.mantissa)[:-1, 0]])
        drive = np.stack([2.0 * 2.0 * sent[:-3], 20.0 * 2.0 * rate(np, sent[3:], 5.0, 0.56, 6.0)], axis=1)
        masses = bk.simulate(
            bk.JansenRit(), 14, DT, inputs={"E_inp": jnp.asarray(120.0 + drive) * u.Hz},
            initial={"E": [3.0, 1.0] * u.mV}, scheme="strang", implementation=self.implementation,
        )  # fmt: skip
        near = 1e-12 if self.double else 1e-5
        np.testing.assert_allclose(found.mantissa[:, 1:], masses["eeg"].mantissa, rtol=near)

    def test_statistics_are_those_of_what_is_recorded(self):
        stored = self.chain(14, every=2, transient=4)["eeg"].mantissa
        found = self.chain(14, every=2, transient=4, record=[bk.Mean(), bk.Maximum(), "eeg"])
        assert stored.shape == (5, 3)
        np.testing.assert_allclose(found["eeg"].mantissa, stored, rtol=1e-6)
        np.testing.assert_allclose(found["eeg_mean"].mantissa, stored.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found["eeg_maximum"].mantissa, stored.max(0), rtol=1e-6)
