"""Spectra and cross-spectra without simulating: transfer functions about a state at rest, from noise to an observable.

Near a state at rest a region is a linear filter, and a network is such filters in a loop of weights and delays. A delay
d is a factor ``exp(-i w d)``. Each region's own transfer functions are solved for alone; the loop then has as many
unknowns as there are quantities sent, not states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
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
from .readout import Readout
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
    prepared, hertz = _prepared(model, freqs, inputs, noise, of, initial)
    power = _found(_SPECTRA(prepared.system), prepared, initial, hertz)
    power = power.reshape(len(hertz), *prepared.batch)
    if prepared.lanes is not None:
        power = power[..., prepared.lanes]
    return u.Quantity(power, unit=_unit(prepared.system) ** 2 / u.Hz)


def linear_cross_spectrum(
    model: Network,
    freqs,
    *,
    inputs: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    of: str | Readout | None = None,
    initial: Mapping[str, Any] | None = None,
):
    """Cross-spectral densities of a network's regions, or of sensors, about a state at rest, in closed form.

    As `linear_spectrum`, whose densities are the diagonal. A long run with weak noise has these cross-spectra
    (`bk.CrossSpectralDensity`, `spectra.csd`), within its sampling error. A fit of a `CrossSpectrum` with them as the
    prediction (``bk.fit(..., predict="linear")``) is dynamic causal modelling of cross-spectra.

    Parameters
    ----------
    model : a `Network`
    freqs, inputs, noise, initial : as `linear_spectrum` takes them
    of : the observable or state; ``None``, the model's first; or a `Readout` of one, for the cross-spectra of sensors

    Returns
    -------
    complex Quantity ``(F, *members, N, N)`` for the N regions or sensors, where ``members`` is the batch without its
    regions: Hermitian, one-sided, in the unit of the observable or the readout squared per Hz. Of the value ``[i, j]``
    the angle is the phase by which j leads i

    NaN in members of a batch without a stable fixed point

    Warns
    -----
    UserWarning
        as `linear_spectrum`

    Raises
    ------
    ValueError, TypeError : as `linear_spectrum`; a model that is no network, a readout of other regions

    References
    ----------
    Friston, Bastos, Litvak, Stephan, Fries and Moran 2012, NeuroImage 59:439-455.
    """
    if not isinstance(model, Network):
        raise TypeError(f"'model' got {type(model).__name__}, but takes a bk.Network: one region has no cross-spectra")
    readout, of = (of, of.of or None) if isinstance(of, Readout) else (None, of)
    prepared, hertz = _prepared(model, freqs, inputs, noise, of, initial)
    matrix, unit = _seen(prepared, readout)
    density = _found(_CROSS(prepared.system), prepared, initial, hertz, matrix)
    density = density.reshape(len(hertz), *prepared.batch[:-1], *density.shape[2:])
    return u.Quantity(density, unit=unit**2 / u.Hz)


def _seen(prepared: Prepared, readout: Readout | None) -> tuple[Any, Any]:
    """The matrix ``(S, N)`` by which sensors, or the regions of a group, see all regions; ``None``, all as they are.

    And the unit of what is seen.
    """
    system, lanes, unit = prepared.system, prepared.lanes, _unit(prepared.system)
    seen = np.arange(system.regions) if lanes is None else lanes
    if readout is None:
        return (None if lanes is None else jnp.eye(system.regions, dtype=system.dtype)[seen]), unit
    if readout.shape[1] != len(seen):
        raise ValueError(
            f"'of' got a Readout of {readout.shape[1]} regions, but the network has {len(seen)}: "
            "Readout.matched(labels) puts its regions into the network's order"
        )
    sensors = readout.bound(system.of, unit)
    matrix = jnp.asarray(sensors.matrix, system.dtype)
    return jnp.zeros((len(matrix), system.regions), system.dtype).at[:, seen].set(matrix), sensors.result_unit


def _prepared(model, freqs, inputs, noise, of, initial) -> tuple[Prepared, np.ndarray]:
    prepared = prepare(model, inputs, initial, noise, of)
    if not prepared.system.noisy:
        raise ValueError(
            "'noise' names nothing, but without noise a state at rest has no spectrum: give the intensity of noise on "
            "an input or a state, such as noise={'E_inp': 2 * u.Hz * u.second**0.5}"
        )
    return prepared, _frequencies(freqs)


def _unit(system: System):
    return units.unit_of(1.0 * system.model.recordable()[system.of])


def _found(program, prepared: Prepared, initial, hertz: np.ndarray, *more):
    """What a program finds of all members, ``(F, L, ...)``; members without it are named where they are known."""
    system, data = prepared.system, prepared.data
    density, found, stable = program(data, jnp.asarray(hertz, system.dtype), *more)
    if not any(map(is_traced, (density, found, stable))):
        _say(prepared, np.asarray(found), np.asarray(stable), initial)
    return jnp.moveaxis(density, 1, 0)


def _frequencies(freqs) -> np.ndarray:
    if is_traced(u.get_mantissa(freqs)):
        raise TypeError("'freqs' is traced by jit, vmap or grad, but takes frequencies known beforehand")
    hertz = np.asarray(units.real(in_hertz(freqs, "freqs"), "freqs"), float)
    if hertz.ndim != 1 or not len(hertz) or not (np.isfinite(hertz).all() and (hertz >= 0).all()):
        raise ValueError(f"'freqs' got {freqs}, but takes one or several frequencies (F,), none of them negative")
    return hertz


def _compiled(system: System):
    def brainmass_kernels_linear(data: Data, hertz):
        return _batched(functools.partial(spectrum, system, hertz=hertz), system, data, len(hertz))

    return jax.jit(brainmass_kernels_linear)


def _compiled_cross(system: System):
    def brainmass_kernels_linear_cross(data: Data, hertz, matrix):
        one = functools.partial(spectrum, system, hertz=hertz, of_gains=functools.partial(cross_density, matrix))
        return _batched(one, system, data, len(hertz))

    return jax.jit(brainmass_kernels_linear_cross)


_SPECTRA = Programs(_compiled, lambda system: system)
_CROSS = Programs(_compiled_cross, lambda system: system)


def numbers(system: System) -> int:
    """Those in the matrices of one member at one frequency."""
    own = system.regions * system.states * (system.states + system.sums)
    return own + (system.regions * max(1, system.quantities)) ** 2


def _batched(one, system: System, data: Data, frequencies: int):
    """``one(data)`` of every member of a batch, so many at once that memory is bounded."""
    count, most = len(data.start), max(1, _AT_ONCE // (numbers(system) * frequencies))
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


def own_density(gain):
    """The two-sided density ``(N,)`` of each region, per unit of the model's time."""
    return jnp.sum(_squared(gain), (1, 2))


def cross_density(matrix, gain):
    """The two-sided cross-spectral densities ``(S, S)`` of regions, or of sensors that see them by a matrix."""
    if matrix is not None:
        gain = jnp.einsum("si,ijm->sjm", matrix.astype(gain.dtype), gain, precision="highest")
    return jnp.einsum("ajm,bjm->ab", jnp.conj(gain), gain, precision="highest")


def spectrum(system: System, data: Data, hertz, of_gains: Callable = own_density):
    """The density ``(F, N)`` of one member, whether there is a fixed point, and whether it is stable.

    ``of_gains`` takes the gains ``(N, N, M)`` and gives the density, each region's own by default.
    """
    x, found = rest.fixed_point(system, data)
    held = jax.tree.map(jax.lax.stop_gradient, data)
    stable = rest.is_stable(rest.generator(system, held, jax.lax.stop_gradient(x)))
    near = linearised(system, data, x)
    angular = (2 * math.pi * system.seconds) * hertz
    power = jax.vmap(lambda angular: of_gains(gains(system, data, near, angular)))(angular)
    # As Welch's estimate has it, 0 Hz has no other side.
    sides = jnp.where(hertz > 0, 2.0, 1.0).astype(system.dtype) * system.seconds
    power = power * jnp.broadcast_to(sides.reshape(-1, *[1] * (power.ndim - 1)), power.shape).astype(power.dtype)
    return jnp.where(found & stable, power, jnp.nan), found, stable & found


def gains(system: System, data: Data, near, angular):
    """What one unit of each noise of region j makes of the observable of region i, ``(N, N, M)``.

    At an angular frequency, per unit of the model's time.
    """
    kind = jnp.complex64 if system.dtype == np.float32 else jnp.complex128
    near = jax.tree.map(lambda x: x.astype(kind), near)
    turning = (1j * angular.astype(kind)) * jnp.eye(system.states, dtype=kind)
    local = jnp.broadcast_to(turning, near.own.shape) - near.own
    drives = jnp.concatenate([near.sums, near.noise], -1)
    responses = jnp.linalg.solve(local, drives)
    shown = jnp.einsum("ia,iac->ic", near.observed, responses, precision="highest")
    of_noise = shown[:, system.sums :]
    if not system.sums:
        return jnp.eye(system.regions, dtype=kind)[..., None] * of_noise[:, None]
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
    return gain + jnp.einsum("ij,im->ijm", jnp.eye(n, dtype=kind), of_noise, precision="highest")


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
