"""Power spectra without simulating: the transfer function about a state at rest, from noise to an observable.

Near a state at rest a region is a linear filter, and a network is such filters in a loop of weights and delays. A delay
d is a factor ``exp(-i w d)``. Each region's own transfer functions are solved for alone; the loop then has as many
unknowns as there are quantities sent, not states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import rest, units
from ._jax import is_traced
from .models.base import Model
from .network import Network
from .notices import warn
from .programs import Programs
from .spectra import in_hertz
from .systems import Data, Prepared, System, linearised, matrices, prepare

#: Members of a batch at once: numbers in their matrices of all frequencies.
_AT_ONCE = 2**24


def linear_spectrum(
    model: Model | Network,
    freqs,
    *,
    inputs: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    of: str | None = None,
    initial: Mapping[str, Any] | None = None,
):
    """The power spectral density of an observable about a state at rest, in closed form: nothing is simulated.

    White noise drives the linear system near a stable fixed point, and the spectrum is that of its transfer function.
    A long run with weak noise has this spectrum (`Result.psd`, `bk.Spectrum`), within its sampling error; a run on a
    limit cycle, or one whose noise is so strong that the system is not linear within its fluctuations, has another.
    Delays of a network are exact, not rounded to steps. Differentiable in every parameter, in both modes and any order.

    Parameters
    ----------
    model : its fields broadcast to the batch; or a `Network`, whose regions are the last axis of the batch
    freqs : ``(F,)`` frequencies, from 0 on; plain numbers are Hz
    inputs : by name, constants that broadcast to the batch
    noise : by name, the intensity of white noise on an input or a state, as `simulate` takes it; of coloured noise,
        that on its state (`coloured`). Noise of different regions is independent
    of : the observable or state; ``None``, the model's first
    initial : by state, where the search for the fixed point begins: it follows the flow from there to where this
        settles. By default the model's initial state. One of `fixed_points` chooses that one

    Returns
    -------
    Quantity ``(F, *batch)``: the one-sided density, in the unit of the observable squared per Hz

    NaN in members of a batch without a stable fixed point

    Warns
    -----
    UserWarning
        some members have no stable fixed point; not where arguments are traced by jit, vmap or grad

    Raises
    ------
    ValueError, TypeError
        an argument's name, unit, shape or value; no noise; no member has a stable fixed point, which is said with the
        rate of growth

    Notes
    -----
    In float32 the density is good to about 1e-4, relatively, and its gradient to 1e-3, unless the fixed point is nearly
    unstable; ``jax.config.update("jax_enable_x64", True)`` gives 1e-10. Memory grows as the number of frequencies times
    the square of the regions, time as its cube.

    References
    ----------
    Moran, Kiebel, Stephan, Reilly, Daunizeau and Friston 2007, NeuroImage 37:706 (neural masses).
    Robinson, Rennie, Wright, Bahramali, Gordon and Rowe 2001, Physical Review E 63:021903 (with delays).
    """
    prepared = prepare(model, inputs, initial, noise, of)
    system, data, batch, _ = prepared
    if not system.noisy:
        raise ValueError(
            "'noise' names nothing, but without noise a state at rest has no spectrum: give the intensity of noise on "
            "an input or a state, such as noise={'E_inp': 2 * u.Hz * u.second**0.5}"
        )
    hertz = _frequencies(freqs)
    power, found, stable = _SPECTRA(system)(data, jnp.asarray(hertz, system.dtype))
    if not any(map(is_traced, (power, found, stable))):
        _say(prepared, np.asarray(found), np.asarray(stable), initial)
    power = jnp.moveaxis(power, 1, 0)
    power = power.reshape(len(hertz), *batch)
    if prepared.lanes is not None:
        power = power[..., prepared.lanes]
    return u.Quantity(power, unit=units.unit_of(1.0 * system.model.recordable()[system.of]) ** 2 / u.Hz)


def _frequencies(freqs) -> np.ndarray:
    if is_traced(u.get_mantissa(freqs)):
        raise TypeError("'freqs' is traced by jit, vmap or grad, but takes frequencies known beforehand")
    hertz = np.asarray(in_hertz(freqs, "freqs"), float)
    if hertz.ndim != 1 or not len(hertz) or not (np.isfinite(hertz).all() and (hertz >= 0).all()):
        raise ValueError(f"'freqs' got {freqs}, but takes one or several frequencies (F,), none of them negative")
    return hertz


def _compiled(system: System):
    def brainmass_kernels_linear(data: Data, hertz):
        return _batched(functools.partial(spectrum, system, hertz=hertz), system, data, len(hertz))

    return jax.jit(brainmass_kernels_linear)


_SPECTRA = Programs(_compiled, lambda system: system)


def _batched(one, system: System, data: Data, frequencies: int):
    """``one(data)`` of every member of a batch, so many at once that memory is bounded."""
    each = system.regions * system.states * (system.states + system.sums)
    each += (system.regions * system.quantities) ** 2
    count, most = len(data.start), max(1, _AT_ONCE // (each * frequencies))
    axes = data.axes(system)
    if count <= most:
        return jax.vmap(one, (axes,))(data)
    whole, parts = -(-count // most), most
    leaves, tree = jax.tree.flatten(data)
    flags = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
    batched = [x for x, axis in zip(leaves, flags) if axis == 0]
    batched = [jnp.concatenate([x, jnp.repeat(x[-1:], whole * parts - count, 0)]) for x in batched]
    batched = [x.reshape(whole, parts, *x.shape[1:]) for x in batched]

    def part(rows):
        rows = iter(rows)
        own = tree.unflatten([next(rows) if axis == 0 else x for x, axis in zip(leaves, flags)])
        return jax.vmap(one, (axes,))(own)

    found = jax.lax.map(jax.checkpoint(part), batched)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def spectrum(system: System, data: Data, hertz):
    """The density ``(F, N)`` of one member, whether there is a fixed point, and whether it is stable."""
    x, found = rest.fixed_point(system, data)
    held = jax.tree.map(jax.lax.stop_gradient, data)
    stable = rest.is_stable(rest.generator(system, held, jax.lax.stop_gradient(x)))
    near = linearised(system, data, x)
    angular = (2 * math.pi * system.seconds) * hertz
    power = jax.vmap(functools.partial(density, system, data, near))(angular)
    # As Welch's estimate has it, 0 Hz has no other side.
    sides = jnp.where(hertz > 0, 2.0, 1.0).astype(power.dtype) * system.seconds
    power = power * jnp.broadcast_to(sides[:, None], power.shape)
    return jnp.where(found & stable, power, jnp.nan), found, stable & found


def density(system: System, data: Data, near, angular):
    """The two-sided density ``(N,)`` at an angular frequency, per unit of the model's time."""
    kind = jnp.complex64 if system.dtype == np.float32 else jnp.complex128
    near = jax.tree.map(lambda x: x.astype(kind), near)
    turning = (1j * angular.astype(kind)) * jnp.eye(system.states, dtype=kind)
    local = jnp.broadcast_to(turning, near.own.shape) - near.own
    drives = jnp.concatenate([near.sums, near.noise], -1)
    responses = jnp.linalg.solve(local, drives)
    shown = jnp.einsum("ia,iac->ic", near.observed, responses, precision="highest")
    of_noise = shown[:, system.sums :]
    if not system.sums:
        return jnp.sum(_squared(of_noise), -1)
    sent = jnp.einsum("iqa,iac->iqc", near.sent, responses, precision="highest")
    n, quantities = system.regions, system.quantities
    # What one unit of each quantity, sent by region j, makes of the quantities and the observable of region i.
    around = jnp.zeros((n, quantities, n, quantities), kind)
    onto = jnp.zeros((n, n, quantities), kind)
    arriving, first = matrices(system, data, lambda d: jnp.exp(-1j * (angular * d).astype(kind))), 0
    for weights, path in zip(arriving, system.paths):
        weights = weights.astype(kind)
        for t, q in enumerate(path.reads, first):
            around = around.at[..., q].add(sent[:, :, t][..., None] * weights[:, None])
            onto = onto.at[..., q].add(shown[:, t][:, None] * weights)
        first += len(path.reads)
    size = n * quantities
    loop = jnp.eye(size, dtype=kind) - around.reshape(size, size)
    through = jnp.linalg.solve(loop.T, onto.reshape(n, size).T).T.reshape(n, n, quantities)
    gain = jnp.einsum("ijq,jqm->ijm", through, sent[:, :, system.sums :], precision="highest")
    gain = gain + jnp.einsum("ij,im->ijm", jnp.eye(n, dtype=kind), of_noise, precision="highest")
    return jnp.sum(_squared(gain), (1, 2))


def _squared(z):
    return jnp.square(z.real) + jnp.square(z.imag)


# What is said of members without a spectrum ---------------------------------------------------------------------------


def _say(prepared: Prepared, found: np.ndarray, stable: np.ndarray, initial) -> None:
    """Name the members that have no stable fixed point."""
    if stable.all():
        return
    system, data, batch, _ = prepared
    members = batch[: len(batch) - bool(system.links)]
    worst = int(np.argmin(stable))
    where = f" (first at {tuple(map(int, np.unravel_index(worst, members)))})" if stable.size > 1 else ""
    from_where = "the given 'initial'" if initial else "the model's initial state"
    none, loose = int((~found).sum()), int((found & ~stable).sum())
    said = []
    if none:
        said.append(
            f"no state at rest was found from {from_where} in {none:,}" if stable.size > 1 else
            f"no state at rest was found from {from_where}"
        )  # fmt: skip
    if loose:
        what = growth(system, data, int(np.argmax(found & ~stable)))
        of = f" in {loose:,}" if stable.size > 1 else ""
        said.append(f"the state at rest is unstable{of}: {what}")
    some = f" of the {stable.size:,} members of the batch{where}" if stable.size > 1 else ""
    text = (
        f"'model' of {system.model.__name__} has no linear spectrum{some}: {'; '.join(said)}. Take other parameters or "
        "inputs, another 'initial' (bk.fixed_points lists the fixed points), or simulate"
    )
    if not stable.any():
        raise ValueError(text)
    warn(text, UserWarning)


def growth(system: System, data: Data, member: int) -> str:
    """The fastest growth near the fixed point of a member, in words."""

    def matrix(data):
        return rest.generator(system, data, rest.fixed_point(system, data)[0])

    one = jax.tree.map(
        lambda x, axis: x if axis is None else x[member], data, data.axes(system), is_leaf=lambda x: x is None
    )
    rates = np.linalg.eigvals(np.asarray(jax.jit(matrix)(one), np.float64))
    rate = rates[np.argmax(rates.real)] / system.seconds
    turning = abs(rate.imag) / (2 * np.pi)
    return f"what is near it grows by {rate.real:.3g} 1/s" + (f" at {turning:.3g} Hz" if turning > 1e-9 else "")
