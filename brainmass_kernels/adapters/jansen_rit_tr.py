"""`brainmass.JansenRitTR`: the steps of each repetition time as one kernel.

The model takes three delayed sums, by the weights of its `LaplacianConnectivity`, once a repetition time (TR) and holds
them. The steps until the next TR treat each region on its own, the Laplacian's diagonal included: they are fused. The
delay and the loop over TRs stay brainmass's. So do the sums, except that constants are computed once a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import brainunit as u
import jax.numpy as jnp
from jax import lax

# `run(model, update, steps, inputs)`: `steps` calls of `update(*inputs(i, t))`, fused, that change the model's states.
Run = Callable[..., object]


def trs_of(model) -> list:
    """The `brainmass.JansenRitTR`s of a model."""
    import brainmass

    return list(model.nodes(brainmass.JansenRitTR).values())


@contextlib.contextmanager
def fused_between_trs(trs, run: Run) -> Iterator[None]:
    """A context in which `JansenRitTR.update` is one fused run of its steps."""
    for tr in trs:
        vars(tr)["update"] = _update_of(tr, run, _sums_of(tr.conn))
    try:
        yield
    finally:
        for tr in trs:
            vars(tr).pop("update", None)


def _sums_of(conn) -> Callable:
    """`conn.update_tr`, but weights are normalised once a run, and delayed activity is read once for all three sums."""
    weights = [w.value()[0] for w in (conn.w_ll, conn.w_ff, conn.w_bb)]

    def sums():
        # Without the barrier, XLA reads the delays again for each sum.
        delayed = lax.optimization_barrier(u.get_magnitude(conn.delayed_x()))
        to_M, to_E, to_I = (u.math.sum(each * delayed, axis=1) for each in weights)
        return conn.g_l.value() * to_M, conn.g_f.value() * to_E, -conn.g_b.value() * to_I

    return sums


def _update_of(tr, run: Run, sums: Callable) -> Callable:
    def step(to_M, to_E, to_I):
        """One step, from the held sums and the Laplacian's diagonal."""
        own_M, own_E, own_I = tr.conn.update()
        tr.step.update((to_M + own_M) * u.mV, (to_E + own_E) * u.Hz, (to_I + own_I) * u.mV)

    def update(input, record_state=False, iter_input=False):
        import brainstate

        steps = int(tr.tr / brainstate.environ.get_dt())
        drive = tr.k.value() * jnp.asarray(input)
        if iter_input and len(drive) != steps:
            raise ValueError(f"'input' has {len(drive)} rows, and a repetition time has {steps} steps, a row for each")
        sum_M, sum_E, sum_I = sums()
        run(tr, step, steps, lambda i, t: (sum_M + (drive[i] if iter_input else drive), sum_E, sum_I))
        tr.delay.update(tr.step.M.value)
        activity = u.get_magnitude(tr.step.eeg())
        if record_state:
            return activity, {name: getattr(tr.step, name).value for name in "MEI"}
        return activity

    return update
