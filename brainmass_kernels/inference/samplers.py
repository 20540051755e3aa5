"""Samplers of BlackJAX, one small adapter each: all chains take a step at once, as lanes of one run.

Each has ``begin``, the state of chains at positions, and ``step``, one iteration of all chains, of the warm-up or a
draw. Both are traced; a state is a pytree of arrays. A chain's position is a vector ``(d,)`` in the order of the names.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..extras import needs
from .density import LogDensity
from .warmup import DRAW, END, FAST, Metric, Window, longest

_EXTRA = "bayes"


class Draw(NamedTuple):
    """One iteration of all chains; each ``(chains,)`` but z, ``(chains, d)``.

    Attributes
    ----------
    z : positions
    log_density : of these
    acceptance : mean probability of acceptance; NaN where a method accepts all
    divergent : whether the integrator left the posterior, or a run was not finite
    gradients : that were computed for it
    """

    z: Any
    log_density: Any
    acceptance: Any
    divergent: Any
    gradients: Any


class Sampler(Protocol):
    """What a sampler is: its fields decide the program."""

    name: ClassVar[str]

    def check(self, density: LogDensity, chains: int) -> None:
        """Raise ValueError if the method cannot sample this."""
        ...

    def begin(self, density: LogDensity, z, key) -> Any:
        """The state of chains at positions ``(chains, d)``."""
        ...

    def step(self, density: LogDensity, state, key, stage) -> tuple[Any, Draw]:
        """One iteration, for a stage of `warmup`."""
        ...

    def density_of(self, state) -> Any:
        """The log density of each chain."""
        ...


def flat(density: LogDensity):
    """The log density of a vector."""
    return lambda v: density(density.of_vectors(v))


class Dual(NamedTuple):
    """What chains with an acceptance adapt: a step size by dual averaging, and a metric."""

    dual: Any
    metric: Metric
    window: Window

    @classmethod
    def begin(cls, z, target: float) -> Dual:
        # A posterior is often narrower than its prior.
        dual = _averaging(target)[0](jnp.asarray(0.1, jnp.result_type(float)))
        return cls(_settled(dual), Metric.unit(z.shape[1]), Window.empty(z))

    def step_size(self, stage):
        return jnp.exp(jnp.where(stage == DRAW, self.dual.log_step_size_avg, self.dual.log_step_size))

    def adapted(self, z, acceptance, stage, target: float) -> Dual:
        """After an iteration: Hoffman and Gelman 2014, with the mean acceptance of the chains."""
        begin, update, final = _averaging(target)
        dual = _settled(update(self.dual, jnp.mean(jnp.nan_to_num(acceptance))))
        window = self.window.with_positions(z)

        def ended():
            metric = Metric.of(window)
            step = longest(final(dual), metric.stretch(self.metric))
            return Dual(_settled(begin(step)), metric, Window.empty(z))

        slow = Dual(dual, self.metric, window)
        choices = [lambda: Dual(dual, self.metric, self.window), lambda: slow, ended, lambda: self]
        return jax.lax.switch(stage, choices)


def _averaging(target: float):
    return needs("blackjax.adaptation.step_size", _EXTRA).dual_averaging_adaptation(target)


def _settled(dual):
    """With the types of a loop's carry."""
    return type(dual)(*(jnp.asarray(x, int if name == "step" else float) for name, x in dual._asdict().items()))


@dataclasses.dataclass(frozen=True)
class Nuts:
    """The no-U-turn sampler: Hoffman and Gelman 2014, Journal of Machine Learning Research 15:1593-1623."""

    target: float = 0.8
    depth: int = 10

    name: ClassVar[str] = "nuts"

    def check(self, density, chains):
        return

    def begin(self, density, z, key):
        init = needs("blackjax", _EXTRA).nuts.init
        return jax.vmap(lambda v: init(v, flat(density)))(z), Dual.begin(z, self.target)

    def density_of(self, state):
        return state[0].logdensity

    def step(self, density, state, key, stage):
        chains, tuned = state
        kernel, size = needs("blackjax", _EXTRA).nuts.build_kernel(), tuned.step_size(stage)

        def one(key, chain):
            return kernel(key, chain, flat(density), size, tuned.metric.covariance, self.depth)

        chains, info = jax.vmap(one)(jax.random.split(key, len(chains.position)), chains)
        tuned = tuned.adapted(chains.position, info.acceptance_rate, stage, self.target)
        draw = Draw(
            chains.position, chains.logdensity, info.acceptance_rate, info.is_divergent, info.num_integration_steps
        )
        return (chains, tuned), draw


class Length(NamedTuple):
    """What ChEES adapts: step size and length of a trajectory, and the metric."""

    state: Any
    metric: Metric
    window: Window


@dataclasses.dataclass(frozen=True)
class Chees:
    """HMC whose trajectories all chains adapt together, so that all lanes take the same number of steps.

    The length maximises the change of the squared distance: Hoffman, Radul and Sountsov 2021, AISTATS, PMLR 130.
    """

    target: float = 0.651
    most_steps: int = 256

    name: ClassVar[str] = "chees"
    #: Digits of the Halton sequence that varies the lengths.
    _DIGITS: ClassVar[int] = 16

    def check(self, density, chains):
        return

    def begin(self, density, z, key):
        init = needs("blackjax", _EXTRA).dhmc.init
        chains = jax.vmap(lambda v: init(v, flat(density), jnp.zeros((), int)))(z)
        start = self._criterion()[0](jnp.zeros((), int), jnp.asarray(0.1, jnp.result_type(float)))
        return chains, Length(_typed(start), Metric.unit(z.shape[1]), Window.empty(z))

    def density_of(self, state):
        return state[0].logdensity

    def step(self, density, state, key, stage):
        chains, tuned = state
        known, drawing = tuned.state, stage == DRAW
        size = jnp.where(drawing, jnp.exp(known.log_step_size_moving_average), known.step_size)
        length = jnp.where(drawing, jnp.exp(known.log_trajectory_length_moving_average), known.trajectory_length)
        steps = jnp.clip(length / size, 1.0, float(self.most_steps))
        kernel = needs("blackjax", _EXTRA).dhmc.build_kernel(
            next_random_arg_fn=lambda i: i + 1, integration_steps_fn=self._leapfrogs
        )

        def one(key, chain):
            return kernel(key, chain, flat(density), size, tuned.metric.covariance, (steps,))

        before = chains.position
        chains, info = jax.vmap(one)(jax.random.split(key, len(before)), chains)
        tuned = self._adapted(tuned, info, before, chains.position, stage)
        draw = Draw(
            chains.position, chains.logdensity, info.acceptance_rate, info.is_divergent, info.num_integration_steps
        )
        return (chains, tuned), draw

    def _adapted(self, tuned: Length, info, before, after, stage) -> Length:
        begin, update = self._criterion()
        proposed, momentum = info.proposal.position, info.proposal.momentum
        # Where the metric is the identity, so is the criterion's.
        white = (tuned.metric.whitened(proposed), momentum @ tuned.metric.root, tuned.metric.whitened(before))
        ones, acceptance = jnp.ones(after.shape[1], after.dtype), jnp.nan_to_num(info.acceptance_rate)
        state = _typed(update(tuned.state, *white, acceptance, info.is_divergent, ones))
        window = tuned.window.with_positions(after)

        def ended():
            metric = Metric.of(window)
            stretch = metric.stretch(tuned.metric)
            size = longest(jnp.exp(state.log_step_size_moving_average), stretch)
            fresh = begin(state.random_generator_arg, size)
            # A quarter of a turn in a Gaussian is the most that a trajectory needs.
            length = jnp.clip(state.trajectory_length * stretch, size, jnp.pi / 2)
            fresh = fresh._replace(optim_state=state.optim_state, trajectory_length=length)
            return Length(_typed(fresh), metric, Window.empty(after))

        slow = Length(state, tuned.metric, window)
        choices = [lambda: Length(state, tuned.metric, tuned.window), lambda: slow, ended, lambda: tuned]
        return jax.lax.switch(stage, choices)

    def _leapfrogs(self, number, steps):
        return jnp.ceil(self._jitter(number) * steps).astype(int)

    def _jitter(self, number):
        halton = needs("blackjax.mcmc.dynamic_hmc", _EXTRA).halton_sequence
        return halton(number % 2**self._DIGITS, self._DIGITS).astype(jnp.result_type(float))

    def _criterion(self):
        adam = needs("optax", _EXTRA).adam(0.05)
        base = needs("blackjax.adaptation.chees_adaptation", _EXTRA).base
        return base(self._jitter, lambda i: i + 1, adam, self.target, 0.5, self.most_steps)


def _typed(tree):
    """A pytree with the types of a loop's carry."""
    kinds = {"f": jnp.result_type(float), "i": jnp.result_type(int)}
    return jax.tree.map(lambda x: jnp.asarray(x, kinds.get(jnp.asarray(x).dtype.kind)), tree)


class Energy(NamedTuple):
    """What MCLMC adapts: a step size by the error of the energy, and the metric."""

    weight: Any
    mean: Any
    step: Any
    metric: Metric
    window: Window


@dataclasses.dataclass(frozen=True)
class Mclmc:
    """Microcanonical Langevin Monte Carlo, which accepts every step and keeps the error of the energy small.

    Robnik, De Luca, Silverstein and Seljak 2023, Journal of Machine Learning Research 24(311). A draw is as many steps
    as turn the direction around once.
    """

    #: Variance of the energy's error in a step, for each dimension.
    target: float = 5e-4
    most_steps: int = 64

    name: ClassVar[str] = "mclmc"
    #: Memory of the mean over iterations, and the trust in one of them.
    _DECAY: ClassVar[float] = 0.98
    _TRUST: ClassVar[float] = 1.5

    def check(self, density, chains):
        if density.size < 2:
            raise ValueError("'method' got 'mclmc', whose directions need two parameters or more: take 'nuts'")

    def begin(self, density, z, key):
        d, dtype = z.shape[1], jnp.result_type(float)
        init = needs("blackjax", _EXTRA).mclmc.init
        keys = jax.random.split(key, len(z))
        chains = jax.vmap(lambda v, key: init(v, flat(density), key))(z, keys)
        zero = jnp.zeros((), dtype)
        return chains, Energy(zero, zero, jnp.asarray(0.05 * d**0.5, dtype), Metric.unit(d), Window.empty(z))

    def density_of(self, state):
        return state[0].logdensity

    def step(self, density, state, key, stage):
        chains, tuned = state
        metric, d = tuned.metric, chains.position.shape[1]
        kernel, length = needs("blackjax", _EXTRA).mclmc.build_kernel(), jnp.asarray(d**0.5, tuned.step.dtype)
        of_z = flat(density)

        def of_white(y):
            return of_z(metric.centre + metric.root @ y)

        def one(key, chain):
            return kernel(key, chain, of_white, 1.0, length, tuned.step)

        steps = jnp.clip(jnp.ceil(length / tuned.step), 1, self.most_steps).astype(int)

        def further(k, carried):
            chains, squares, lost = carried
            keys = jax.random.split(jax.random.fold_in(key, k), len(chains.position))
            chains, info = jax.vmap(one)(keys, chains)
            return chains, squares + jnp.where(info.nonans, info.energy_change, 0.0) ** 2, lost + ~info.nonans

        zero = jnp.zeros(len(chains.position), tuned.step.dtype)
        chains, squares, lost = jax.lax.fori_loop(0, steps, further, (chains, zero, zero.astype(int)))
        z = metric.centre[None] + chains.position @ metric.root.T
        chains, tuned = self._adapted(chains, tuned, z, squares / steps, lost, stage)
        # Two gradients a step, of McLachlan's integrator.
        draw = Draw(z, chains.logdensity, zero + jnp.nan, lost > 0, jnp.broadcast_to(2 * steps, zero.shape))
        return (chains, tuned), draw

    def _adapted(self, chains, tuned: Energy, z, squares, lost, stage):
        """The error of the energy grows with the sixth power of the step; a run that was lost counts as a large one."""
        d = z.shape[1]
        error = jnp.mean(jnp.where(lost > 0, 1e3, squares / (d * self.target))) + 1e-8
        weight = jnp.exp(-0.5 * (jnp.log(error) / (6 * self._TRUST)) ** 2)
        mean = self._DECAY * tuned.mean + weight * error / tuned.step**6
        total = self._DECAY * tuned.weight + weight
        # At most by half in an iteration, and never longer than the turn.
        step = jnp.clip((mean / total) ** (-1 / 6), tuned.step / 2, jnp.minimum(tuned.step * 2, d**0.5))
        window = tuned.window.with_positions(z)

        def ended():
            metric = Metric.of(window)
            forth = jnp.linalg.solve(tuned.metric.root, metric.root)
            moved = chains._replace(position=metric.whitened(z), logdensity_grad=chains.logdensity_grad @ forth)
            size = jnp.minimum(step * metric.stretch(tuned.metric), 0.5 * d**0.5)
            return moved, Energy(0.0 * total, 0.0 * mean, size, metric, Window.empty(z))

        choices = [
            lambda: (chains, Energy(total, mean, step, tuned.metric, tuned.window)),
            lambda: (chains, Energy(total, mean, step, tuned.metric, window)),
            ended,
            lambda: (chains, tuned),
        ]
        return jax.lax.switch(stage, choices)


assert (FAST, END, DRAW) == (0, 2, 3), "the choices of `jax.lax.switch` are in this order"
