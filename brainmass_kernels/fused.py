"""One step of a sigmoid into a second-order block, for the user's loops."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import _context, derivatives, dispatch, one_step, units
from .arguments import PerLane, prepare
from .functional import bounded_input, check_bound, sigmoid
from .models.base import Block, SecondOrderModel, check_name, model
from .pointwise import Program
from .programs import Programs
from .run import Data, Run
from .schemes import SCHEMES
from .simulation import simulate
from .step import StepSpec, build


@model
class _SigmoidBlock(SecondOrderModel):
    """One block driven by the sigmoid of a potential, which is constant over the step; plain numbers throughout."""

    A: Any = 1.0
    a: Any = 1.0
    vmax: Any = 1.0
    v0: Any = 0.0
    r: Any = 1.0
    gain: Any = 1.0
    offset: Any = 0.0

    states = {"x": units.UNITLESS, "v": units.UNITLESS}
    inputs = {"potential": 0.0}
    blocks = (Block("x", "v", "A", "a"),)

    @staticmethod
    def drive(s, p, i):
        return {"x": p.offset + p.gain * sigmoid(i.potential, p.vmax, p.v0, p.r)}


@model
class _BoundedSigmoidBlock(_SigmoidBlock):
    """The block with its drive bounded by tanh."""

    bound: Any = 500.0

    @staticmethod
    def drive(s, p, i):
        return {"x": bounded_input(_SigmoidBlock.drive(s, p, i)["x"], p.bound)}


def sigmoid_sys2nd(
    x, v, potential, *, A, a, vmax, v0, r, dt, gain=1.0, offset=0.0, bound=None, scheme="exact", implementation=None
):
    """One fused step of ``x'' = A a u - 2 a x' - a^2 x`` with ``u = offset + gain sigmoid(potential)``.

    All arguments broadcast to one batch. The potential is constant over the step; ``"exact"`` is the closed-form flow.

    Parameters
    ----------
    x, v : position and velocity; ``v`` in the unit of ``x`` per time
    potential : argument of `sigmoid`, with ``vmax``, ``v0`` and ``r``; ``r`` per unit of potential, or a plain number
    A : gain, in the unit of ``x`` where ``vmax`` is a rate (``A a u`` is an acceleration of ``x``)
    a : rate constant, 1/time
    dt : the time of the step; if ``a`` and ``dt`` are plain numbers, in one unit of time
    gain, offset : of the drive; ``gain`` dimensionless, ``offset`` in the unit of ``vmax``
    bound : with it, ``u`` becomes ``bound tanh(u / bound)``
    scheme : a name in `schemes.SCHEMES`
    implementation : ``None`` is jnp, which has every derivative and moves the fewest bytes, except for gradients by
        parameters. "mosaic_tpu" and "mosaic_gpu" are one Pallas kernel each way, in float32 and reverse mode, which
        moves the fewest bytes for these too (docs/benchmarks.md); "auto" is the kernel of the device where that
        was counted to move fewer (`explain_step`), else jnp; "numba" and "triton" run a loop of one step

    Returns
    -------
    x, v : after the step, in the unit of ``x`` and of ``x`` per time

    Raises
    ------
    ValueError, TypeError : a unit, shape or value that does not fit, by the argument's name
    """
    check_name(scheme, SCHEMES, "scheme")
    position, rate, volt = map(units.unit_of, (x, vmax, potential))
    time = u.second if _has_unit(dt) else units.UNITLESS
    plain = {
        "A": units.strip(A, position / (rate * time), "A"),
        "a": units.strip(a, time**-1, "a"),
        "vmax": units.strip(vmax, rate, "vmax"),
        "v0": units.strip(v0, volt, "v0"),
        "r": units.strip(r, units.UNITLESS, "r", also=volt**-1),
        "gain": units.strip(gain, units.UNITLESS, "gain"),
        "offset": units.strip(offset, rate, "offset") if _has_unit(offset) or offset != 0.0 else 0.0,
    }
    if bound is None:
        block = _SigmoidBlock(**plain)
    else:
        limit = units.strip(bound, rate, "bound")
        check_bound(limit, bound)
        block = _BoundedSigmoidBlock(**plain, bound=limit)
    state = {"x": units.strip(x, position, "x"), "v": units.strip(v, position / time, "v")}
    step = units.strip(dt, time, "dt") * u.second
    drive = PerLane(units.strip(potential, volt, "potential"))
    call: dict[str, Any] = {"inputs": {"potential": drive}, "initial": state, "record": (), "scheme": scheme}
    stepped = _step(block, step, call, implementation)
    return units.attach(stepped["x"], position), units.attach(stepped["v"], position / time)


def _step(block, dt, call: dict[str, Any], implementation: str | None) -> dict[str, Any]:
    """The state after a step, by name; ``call`` are the arguments of a run that do not depend on who runs it."""
    dispatch.check_known(implementation, "auto")
    if implementation == "auto" or one_step.is_kernel(implementation):
        run, data = prepare(block, 1, dt, **call, implementation="scan")
        implementation, _ = one_step.choose(implementation, run.spec.dtype)
        if one_step.is_kernel(implementation):
            return _one_kernel(run, data, implementation)
    return simulate(block, 1, dt, **call, implementation=implementation or "scan").final


def _one_kernel(run: Run, data: Data, implementation: str) -> dict[str, Any]:
    """The step by a kernel that reads each array once, and computes the coefficients of the scheme itself."""
    from .backends import elementwise

    one_step.check(implementation, run.spec.dtype)
    # A single element is an array of one; a number for all elements stays a number.
    values = [jnp.asarray(x, jnp.float32) for x in (*data.hoisted, *data.state)]
    values = [jnp.broadcast_to(x, run.batch or (1,)) if np.ndim(x) or not run.batch else x for x in values]
    values = derivatives.in_reverse(
        values, f"forward-mode differentiation (jvp, jacfwd, linearize, hessian) of sigmoid_sys2nd() on "
        f"'{implementation}': leave implementation out, for jnp has every derivative",
    )  # fmt: skip
    stepped = elementwise.call(_step_program(run.spec), values, implementation, _context.INTERPRETED.get())
    return dict(zip(run.spec.model.states, (x.reshape(run.batch) for x in stepped)))


def _build_program(spec: StepSpec) -> Program:
    """``(*parameters, potential, dt, x, v) -> (x, v)``, with nothing hoisted."""
    step, n = build(spec), len(spec.hoisted)

    def program(*values):
        hoisted, state = values[:n], values[n:]
        return step.exit(hoisted, step.written["advance"](*hoisted, *step.enter(hoisted, state)))

    avals = [jax.ShapeDtypeStruct((), "float32")] * (n + len(spec.model.states))
    return Program(program, avals, f"step of a sigmoid block under '{spec.scheme}'")


_step_program = Programs(_build_program, lambda spec: spec)


def _has_unit(value) -> bool:
    return isinstance(value, u.Quantity) and not value.unit.is_unitless
