"""What the TPU kernels cost, in VLIW bundles, as the chips' own compiler schedules them; no chip is needed.

``python -m benchmarks.ledger`` compiles Jansen-Rit for each chip, counts the bundles of the unrolled loop
body for each step of 1,024 masses, and writes `ledger.json`. ``--chip v5e --kernel gradient`` prints rows only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from brainmass_kernels._jax import Literal
from brainmass_kernels.backends.base import Loop, Pullbacks, Schedule, Wanted
from brainmass_kernels.backends.mosaic_tpu import MosaicTPU, WayBack, plan_run
from brainmass_kernels.models.jansen_rit import JansenRit
from brainmass_kernels.pointwise import pullback
from brainmass_kernels.step import StepSpec, build
from brainmass_kernels.testing import TPU_TOPOLOGIES, compile_for

LEDGER = Path(__file__).with_name("ledger.json")
SCHEMES = ("strang", "exp_euler")
KERNELS = ("forward", "forward_per_lane", "gradient")
# Lets a process load libtpu while one outside our lock has it; harmless, for no chip is touched.
TOGETHER = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
UNIT = "VLIW bundles of the unrolled loop, for each step of 1,024 masses; gradient is replay + reverse"
LANES, STEPS, EVERY, SEGMENT = 65_536, 10_000, 10, 100


def jansen_rit_loop(scheme: str):
    """The Jansen-Rit loop that is measured, and which of its coefficients three per-mass parameters reach.

    Returns
    -------
    loop : Loop, recording the EEG every 10th step
    per_mass : a flag for each coefficient, whether it depends on Ae, be or C
    """
    spec = StepSpec(JansenRit, scheme, tuple(JansenRit.inputs), (), (), ("eeg",), np.dtype("float32"))
    step = build(spec)
    per_mass = reached(step.setup, [name in ("Ae", "be", "C") for name in spec.hoisted])
    schedule = Schedule(STEPS, 0, EVERY)
    return Loop(step.advance, step.observe, len(per_mass), len(JansenRit.states), 0, 0, schedule), per_mass


def reached(program, flags) -> tuple[bool, ...]:
    """For each output of a program, whether it depends on any flagged argument."""
    jaxpr = program.jaxpr.jaxpr
    live = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for eqn in jaxpr.eqns:
        if any(v in live for v in eqn.invars if not isinstance(v, Literal)):
            live.update(eqn.outvars)
    return tuple(not isinstance(v, Literal) and v in live for v in jaxpr.outvars)


def measured_function(kernel: str, scheme: str):
    """What a row compiles, its arguments' shapes, and the layout that the backend chose."""
    loop, per_mass = jansen_rit_loop(scheme)
    shape = jax.ShapeDtypeStruct
    coefs = tuple(shape((LANES,) if kernel != "forward" and lane else (), "float32") for lane in per_mass)
    state = (shape((LANES,), "float32"),) * loop.n_state
    layout = {"lanes": LANES, "every": EVERY}
    if kernel != "gradient":
        plan = plan_run(loop, coefs, (), LANES)
        layout |= {"rows": plan.rows, "chunk": plan.cut.size, "unrolled": plan.cut.body}
        return lambda coefs, state: MosaicTPU().forward(loop, coefs, state, (), None), (coefs, state), layout

    wanted = Wanted(per_mass, ())
    pullbacks = pullbacks_of(loop, wanted)
    way = WayBack.of(loop, pullbacks, wanted, coefs, (), LANES, SEGMENT)
    cut = way.plan.cut
    layout |= {"rows": way.plan.rows, "chunk": cut.size, "unrolled": cut.body, "turn": way.turn}
    layout["coefs_wanted"] = sum(per_mass)

    def gradient(coefs, state, ct_records):
        out = MosaicTPU().forward(loop, coefs, state, (), None, SEGMENT)
        return MosaicTPU().adjoint(
            loop, pullbacks, wanted, coefs, out.saved, (), None, (ct_records,), out.final, SEGMENT
        )

    return gradient, (coefs, state, shape((STEPS // EVERY, LANES), "float32")), layout


def pullbacks_of(loop, wanted) -> Pullbacks:
    """The adjoint programs of a loop without inputs and normals."""
    flags = (*wanted.coefs, *[True] * loop.n_state)
    return Pullbacks(pullback(loop.advance, flags), pullback(loop.observe, flags))


def libtpu_lock():
    """libtpu admits one process at a time: hold this open file while one runs."""
    file = open(Path(tempfile.gettempdir()) / "brainmass_kernels_libtpu.lock", "w")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def compile_row(chip: str, kernel: str, scheme: str) -> dict:
    """Compile in a fresh process, for the compiler's dump is set before it starts, and count."""
    with tempfile.TemporaryDirectory() as dump, libtpu_lock():
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.ledger", "--compile", chip, kernel, scheme]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags, **TOGETHER}
        done = subprocess.run(command, env=env, cwd=LEDGER.parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling {kernel} {scheme} for {chip} failed:\n{done.stderr[-3000:]}")
        layout = json.loads(done.stdout.splitlines()[-1])
        names = ("adjoint",) if kernel == "gradient" else ("forward",)
        counts = {}
        for name in names:
            counts |= _count(Path(dump), name, layout)
        if keep := os.environ.get("BRAINMASS_KERNELS_LLO"):
            subprocess.run(["cp", "-r", dump, keep], check=True)
    figure = counts["replay"] + counts["reverse"] if kernel == "gradient" else counts["forward"]
    parts = {k: round(v, 2) for k, v in counts.items()}
    return {"chip": chip, "kernel": kernel, "scheme": scheme, "bundles_per_step": round(figure, 2), **parts, **layout}


def _count(dump: Path, kernel: str, layout: dict) -> dict:
    """Bundles a step of 1,024 masses of each unrolled loop of a kernel."""
    (file,) = dump.glob(f"*brainmass_kernels_tpu_{kernel}*[0-9]-final_bundles.txt")
    names = ("replay", "reverse") if kernel == "adjoint" else ("forward",)
    spans = _inner_loops(file.read_text())
    # The other inner loops take the single steps at the ends of a chunk.
    unrolled = sorted(sorted(spans, key=lambda span: span[0] - span[1])[: len(names)])
    rows = (layout["rows"], layout.get("turn"))
    return {
        name: (last - first + 1) / layout["unrolled"] / (r / 8) for name, (first, last), r in zip(names, unrolled, rows)
    }


def _inner_loops(text: str) -> list[tuple[int, int]]:
    """The first and last bundle of each loop without a loop in it; `>` marks a bundle for each loop around it."""
    marked = re.findall(r"^ *(0x[0-9a-f]+|0) +([A-Z, ]*): +(>*)", text, re.MULTILINE)
    spans, open_at = [], None
    for address, label, depth in [*marked, ("0", "", "")]:
        if open_at is not None and (len(depth) < open_at[1] or "LB" in label):
            if len(depth) <= open_at[1]:
                spans.append(open_at[0])
            open_at = None
        if "LB" in label:
            open_at = [int(address, 16)] * 2, len(depth)
        elif open_at is not None and len(depth) == open_at[1]:
            open_at[0][1] = int(address, 16)
    return [(first, last) for first, last in spans]


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", choices=TPU_TOPOLOGIES, help="print this chip's rows only")
    parser.add_argument("--kernel", choices=KERNELS, help="print this kernel's rows only")
    parser.add_argument("--scheme", choices=SCHEMES, help="print this scheme's rows only")
    parser.add_argument("--compile", nargs=3, metavar=("CHIP", "KERNEL", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        chip, kernel, scheme = options.compile
        fn, args, layout = measured_function(kernel, scheme)
        compile_for(chip, fn, *args)
        print(json.dumps(layout))
        return
    rows = []
    for chip in [options.chip] if options.chip else TPU_TOPOLOGIES:
        for kernel in [options.kernel] if options.kernel else KERNELS:
            for scheme in [options.scheme] if options.scheme else SCHEMES:
                rows.append(compile_row(chip, kernel, scheme))
                print(rows[-1], flush=True)
    if not (options.chip or options.kernel or options.scheme):
        text = {**versions(), "command": "python -m benchmarks.ledger", "unit": UNIT, "rows": rows}
        LEDGER.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
