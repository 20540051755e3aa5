"""What the kernels cost on each chip, as the chip's own compiler makes them; no chip is needed.

``python -m benchmarks.ledger`` compiles Jansen-Rit for each chip and writes `ledger.json`: on TPUs the VLIW bundles of
the unrolled loop for each step of 1,024 masses, on GPUs the SASS instructions a step and mass by kind, registers and
spills: of `mosaic_gpu` for H200 and B200, of `triton` for sm_80 to sm_90. Of networks it has what their kernels
hold, each loop counted once, for how often a loop runs depends on the connections. ``--chip v5e --kernel gradient``
prints rows only, or puts them in place of those that are there with ``--write``. Needs the extra `ledger`, and JAX
0.11 for `mosaic_gpu`.
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
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels.backends import mosaic_gpu, triton
from brainmass_kernels.backends.base import Carry, Cotangents, Loop, Operands, Pullbacks, Wanted
from brainmass_kernels.backends.mosaic_tpu import MosaicTPU
from brainmass_kernels.backends.mosaic_tpu.layout import plan_run
from brainmass_kernels.backends.mosaic_tpu.masses import ReversePass
from brainmass_kernels.models.jansen_rit import JansenRit
from brainmass_kernels.schedule import Body, Schedule, SegmentGroup, nested_segments
from brainmass_kernels.step import StepSpec, build
from brainmass_kernels.testing import GPUS, TPU_TOPOLOGIES, TRITON_GPUS, compile_for

from . import timing

LEDGER = Path(__file__).with_name("ledger.json")
# Names that earlier ledgers have.
FORMER = {"retreat": "inverse steps", "turn": "rows_per_pass"}
SCHEMES = ("strang", "exp_euler")
KERNELS = ("forward", "forward_per_lane", "gradient", "inverse steps", "network", "network_gradient")
# Lets a process load libtpu while one outside our lock has it; harmless, for no chip is touched.
TOGETHER = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
LANES, STEPS, EVERY, SEGMENT = 65_536, 10_000, 10, 100
WAYS_BACK = ("gradient", "inverse steps", "network_gradient")
NETWORKS = KERNELS[-2:]
ARGUMENTS = ("plain", "noise", "input", "undelayed", "delayed", "two_couplings")
OF_MASSES, COUPLED = ARGUMENTS[:3], ARGUMENTS[3:]
# Chips whose network kernels are held, and the networks of a batch: as many as TPUs take at once.
OF_NETWORKS, REGIONS, BATCH = ("v5e", "sm_80", "sm_90"), 76, 128
CHIPS = (*TPU_TOPOLOGIES, *GPUS, *TRITON_GPUS)
# Multiprocessor throughput a clock: instructions of any kind, and of the special-function unit.
ISSUE, SPECIAL = 128, 16


class Card(NamedTuple):
    """A GPU of an architecture: its multiprocessors, clock in GHz, and float32 operations a clock of each."""

    name: str
    multiprocessors: int
    clock_ghz: float
    fp32: int = 128


CARDS = {
    "sm_80": Card("A100", 108, 1.41, 64), "sm_86": Card("RTX 3090", 82, 1.695), "sm_89": Card("L40S", 142, 2.52),
    "sm_90": Card("H200", 132, 1.98), **{chip: Card(chip, g.multiprocessors, g.clock_ghz) for chip, g in GPUS.items()},
}  # fmt: skip


class Row(NamedTuple):
    """One kernel to compile.

    Attributes
    ----------
    kernel : "forward", "forward_per_lane" (as with three per-mass parameters), "gradient", or "inverse steps", the
        gradient by them; "network" and "network_gradient" are those of 76 regions, all connected
    arguments : "plain", with "noise", or with one value a step of an "input"; of a network, "undelayed", "delayed", or
        the delayed one with "two_couplings", of two sources into two inputs
    precision : as in `simulate`; a TPU has one only
    vec : lanes a thread; 0 on a TPU
    """

    chip: str
    kernel: str
    scheme: str
    arguments: str = "plain"
    precision: str = "exact"
    vec: int = 0

    def __str__(self) -> str:
        return "-".join(str(x) for x in self if x)


def all_rows(chip: str) -> list[Row]:
    vec = int(chip not in TPU_TOPOLOGIES)
    networks = [Row(chip, kernel, "strang", kind, "exact", vec) for kernel in NETWORKS for kind in COUPLED]
    return _rows_of_masses(chip) + (networks if chip in OF_NETWORKS else [])


def _rows_of_masses(chip: str) -> list[Row]:
    if chip in TPU_TOPOLOGIES:
        rows = [Row(chip, kernel, scheme) for kernel in KERNELS[:3] for scheme in SCHEMES]
        return rows + [Row(chip, k, "strang", a) for k in ("forward", "gradient") for a in OF_MASSES[1:]]
    rows = [Row(chip, "forward", s, "plain", "fast", vec) for s in SCHEMES for vec in (1, 2)]
    rows += [Row(chip, "gradient", s, "plain", "fast", 1) for s in SCHEMES]
    rows += [Row(chip, k, "strang", a, "fast", 1) for k in ("forward", "gradient") for a in OF_MASSES[1:]]
    inverse_rows = [Row(chip, "inverse steps", "strang", a, "fast", 1) for a in OF_MASSES] if chip in GPUS else []
    kernels = ("forward", "gradient", *(["inverse steps"] if inverse_rows else []))
    return rows + inverse_rows + [Row(chip, kernel, "strang", "plain", "exact", 1) for kernel in kernels]


def jansen_rit_loop(
    scheme: str, arguments: str = "plain", precision: str = "exact", with_inverse: bool = False, base_two: bool = False
):
    """The Jansen-Rit loop that is measured, and which of its coefficients three per-mass parameters reach.

    Returns
    -------
    loop : Loop, recording the EEG every 10th step
    per_mass : a flag for each coefficient, whether it depends on Ae, be or C
    """
    varying, noisy = (("E_inp",) if arguments == kind else () for kind in ("input", "noise"))
    constant = tuple(name for name in JansenRit.inputs if name not in varying)
    spec = StepSpec(JansenRit, scheme, constant, varying, noisy, ("eeg",), np.dtype("float32"), base_two=base_two)
    step = build(spec, with_inverse)
    per_mass = step.setup.depends([name in ("Ae", "be", "C") for name in spec.hoisted])
    loop = Loop(
        step.advance, step.observe, len(per_mass), len(JansenRit.states), len(varying), len(noisy),
        Schedule(STEPS, 0, EVERY), precision, inverse=step.inverse,
    )  # fmt: skip
    return loop, per_mass


def _loop_of(row: Row):
    """The backend of a row's kernel, and as `jansen_rit_loop`."""
    backends = {**dict.fromkeys(TPU_TOPOLOGIES, MosaicTPU), **dict.fromkeys(TRITON_GPUS, triton.Triton)}
    backend: Any = backends.get(row.chip, mosaic_gpu.MosaicGPU)()
    base_two = backend.base_two(row.precision)
    return backend, *jansen_rit_loop(row.scheme, row.arguments, row.precision, row.kernel == "inverse steps", base_two)


def network_function(row: Row):
    """What a row of a network compiles, and its arguments' shapes: coupling strengths, and weights."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(1.0, 100.0, (2, REGIONS, REGIONS))

    def coupled(k, weights) -> list[bk.Coupling]:
        def wired(of: int):
            return {} if row.arguments == "undelayed" else {"distances": lengths[of], "speed": 5.0}

        first = bk.Coupling(weights, kind="sigmoidal_jansen_rit", target="E_inp", k=k * u.Hz, **wired(0))
        second = bk.Coupling(weights.T, kind="diffusive", source="M", target="M_inp", k=0.01, **wired(1))
        return [first, second] if row.arguments == "two_couplings" else [first]

    def records(k, weights):
        network = bk.Network(JansenRit(), couplings=coupled(k, weights))
        return bk.simulate(
            network, 1000, 0.1 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=EVERY, scheme=row.scheme,
            precision=row.precision, implementation="triton" if row.vec else "mosaic_tpu",
        )["eeg"].mantissa  # fmt: skip

    def gradient(k, weights):
        return jax.grad(lambda k: jnp.mean(records(k, weights) ** 2))(k)

    shapes = jax.ShapeDtypeStruct((BATCH, 1), "float32"), jax.ShapeDtypeStruct((REGIONS, REGIONS), "float32")
    return gradient if row.kernel == "network_gradient" else records, shapes


def measured_function(row: Row):
    """What a row compiles, its arguments' shapes, and the layout that the backend chose."""
    if row.kernel in NETWORKS:
        return *network_function(row), {}
    backend, loop, per_mass = _loop_of(row)
    shape = jax.ShapeDtypeStruct
    coefs = tuple(shape((LANES,) if row.kernel != "forward" and lane else (), "float32") for lane in per_mass)
    state = (shape((LANES,), "float32"),) * loop.n_state
    inputs = (shape((STEPS,), "float32"),) * loop.n_inputs
    operands = Operands(coefs, inputs, shape((2, LANES), "int32") if loop.n_normals else None)
    if row.kernel not in WAYS_BACK:
        layout = _forward_layout(row, loop, coefs, inputs)
        return lambda *args: backend.forward(loop, *args), (operands, Carry(state)), layout

    wanted = wanted_of(loop, per_mass)
    pullbacks = Pullbacks.of(loop, wanted)
    layout = _gradient_layout(row, loop, pullbacks, wanted, coefs, inputs)

    def gradient(operands, initial, ct_records):
        out = backend.forward(loop, operands, initial, SEGMENT)
        cotangents = Cotangents((ct_records,), out.final)
        return backend.adjoint(loop, pullbacks, wanted, operands, out.saved, cotangents, SEGMENT)

    return gradient, (operands, Carry(state), shape((STEPS // EVERY, LANES), "float32")), layout


def _forward_layout(row: Row, loop, coefs, inputs) -> dict:
    if row.vec:
        return {}
    plan = plan_run(loop, coefs, inputs, LANES)
    return {"rows": plan.rows, "chunk": plan.time.size, "unrolled": plan.time.body}


def _gradient_layout(row: Row, loop, pullbacks, wanted, coefs, inputs) -> dict:
    wants = {"coefs_wanted": sum(wanted.coefs)}
    if row.vec:
        return wants
    reverse = ReversePass.of(loop, pullbacks, wanted, coefs, inputs, LANES, SEGMENT)
    rows, time = {"rows": reverse.plan.rows, "rows_per_pass": reverse.rows_per_pass}, reverse.plan.time
    return wants | rows | {"chunk": time.size, "unrolled": time.body}


def wanted_of(loop, per_mass) -> Wanted:
    """The cotangents that a gradient in three per-mass parameters needs."""
    return Wanted(tuple(a and b for a, b in zip(per_mass, loop.read_coefs())), (False,) * loop.n_inputs)


def libtpu_lock():
    """libtpu admits one process at a time: hold this open file while one runs."""
    file = open(Path(tempfile.gettempdir()) / "brainmass_kernels_libtpu.lock", "w")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def compile_row(row: Row) -> dict:
    """Compile in a fresh process, for what the compilers dump is set before they start, and count."""
    with tempfile.TemporaryDirectory() as dump, libtpu_lock():
        command = [sys.executable, "-m", "benchmarks.ledger", "--compile", json.dumps(row)]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", **TOGETHER}
        env["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        done = subprocess.run(command, env=env, cwd=LEDGER.parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling {row} failed:\n{done.stderr[-3000:]}")
        counts = json.loads(done.stdout.splitlines()[-1])
        if not row.vec:
            counts = (_network_bundles if row.kernel in NETWORKS else _bundles)(row, Path(dump), counts)
        if keep := os.environ.get("BRAINMASS_KERNELS_LLO"):
            subprocess.run(["cp", "-r", dump, keep], check=True)
    return {**row._asdict(), **counts}


def _compile_here(row: Row) -> dict:
    """Compile in this process: the layout, and of a GPU's kernel its counts."""
    if row.vec and row.kernel not in NETWORKS:
        mosaic_gpu.Layout.choose = classmethod(lambda cls, lanes, most: cls(lanes, row.vec))
        triton.Layout.choose = classmethod(lambda cls, lanes, most, interpreted: cls(lanes, 4, row.vec))
    fn, args, layout = measured_function(row)
    kernels = compile_for(row.chip, fn, *args).kernels
    if not row.vec:
        return layout
    way = "adjoint" if row.kernel in WAYS_BACK else "forward" if row.kernel == "network" else row.kernel
    (kernel,) = [k for n, k in kernels.items() if n.endswith(way)]
    if row.kernel in NETWORKS:
        inner, outer = (sum(x.instructions["LDL"] for x in kernel.loops if bool(x.inner) == o) for o in (False, True))
        counts = {"reloads": inner + outer, "reloads_in_inner_loops": inner}
        return _resources(kernel) | counts | {"instructions": sum(loop.total for loop in kernel.loops)}
    return layout | _instructions(row, kernel)


def _resources(kernel) -> dict:
    return {"registers": kernel.registers, "spill_bytes": kernel.spill_bytes, "shared_bytes": kernel.shared_bytes}


def _instructions(row: Row, kernel) -> dict:
    """Instructions a step and mass, from how many steps a pass of each loop is for."""
    counts = _resources(kernel)
    steps = _steps_of_loops(row)
    total, pairs = Counter(), 0.0
    for loop, each in zip(sorted(kernel.loops, key=lambda loop: (loop.first, -loop.last)), steps, strict=True):
        for kind, n in loop.kinds().items():
            total[kind] += n / each / row.vec
        pairs += loop.pairs / each / row.vec
    slots, card = sum(total.values()), CARDS[row.chip]
    each = min(ISSUE / slots, SPECIAL / total["special"], card.fp32 / (total["fp32"] + pairs))
    rate = each * card.multiprocessors * card.clock_ghz * 1e9
    kinds = {kind: round(n, 2) for kind, n in total.items()}
    return counts | {"instructions_per_step": round(slots, 2), "kinds": kinds, "ceiling": float(f"{rate:.3g}")}


def _steps_of_loops(row: Row) -> list[int]:
    """Steps of one pass of each loop of a kernel, in the order in which they begin."""
    _, loop, per_mass = _loop_of(row)
    noisy, layout = loop.n_normals > 0, mosaic_gpu.Layout(LANES, row.vec)
    run, segment = (
        SegmentGroup(0, 1, STEPS // EVERY, EVERY, True),
        SegmentGroup(0, STEPS // SEGMENT, SEGMENT // EVERY, EVERY, True),
    )

    def of(piece: SegmentGroup, unroll: int) -> list[int]:
        body = Body.of(piece, unroll, noisy)
        inner = [] if piece.stride < 2 * body.steps else [body.steps]
        return ([] if piece.strides < 2 * body.strides else [body.steps]) if body.strides else [piece.stride, *inner]

    def in_parts(most: int) -> list[int]:
        """A segment is run for the states within it, and each part of it is written out, forth and back."""
        part = nested_segments(segment, most)[0].length
        return [SEGMENT, part, part]

    if row.chip in TRITON_GPUS:
        if row.kernel != "gradient":
            return [STEPS, *of(run, triton.unrolled(loop, row.vec))]
        return in_parts(triton.unrolled_back(loop, Pullbacks.of(loop, wanted_of(loop, per_mass))))
    forth = mosaic_gpu.unrolled(loop, layout, loop.advance)
    if row.kernel not in WAYS_BACK:
        return of(run, forth)
    pullbacks = Pullbacks.of(loop, wanted_of(loop, per_mass))
    if row.kernel == "inverse steps":
        return [SEGMENT, *of(segment, mosaic_gpu.unrolled(loop, layout, pullbacks.inverse))]
    return in_parts(mosaic_gpu.ReversePlan.of(loop, pullbacks, wanted_of(loop, per_mass)).most)


def _bundles(row: Row, dump: Path, layout: dict) -> dict:
    counts = _count(dump, "adjoint" if row.kernel == "gradient" else "forward", layout)
    parts = {k: round(v, 2) for k, v in counts.items()}
    return {"bundles_per_step": round(sum(counts.values()), 2), **parts, **layout}


def _network_bundles(row: Row, dump: Path, layout: dict) -> dict:
    """All bundles of a network's kernel."""
    way = "adjoint" if row.kernel == "network_gradient" else "forward"
    (file,) = dump.glob(f"*brainmass_kernels_tpu_network_{way}*[0-9]-final_bundles.txt")
    addresses = re.findall(r"^ *(0x[0-9a-f]+|0) +[A-Z, ]*: ", file.read_text(), re.MULTILINE)
    return {"bundles": max(int(address, 16) for address in addresses) + 1, **layout}


def _count(dump: Path, kernel: str, layout: dict) -> dict:
    """Bundles a step of 1,024 masses of each unrolled loop of a kernel."""
    (file,) = dump.glob(f"*brainmass_kernels_tpu_{kernel}*[0-9]-final_bundles.txt")
    names = ("replay", "reverse") if kernel == "adjoint" else ("forward",)
    spans = _inner_loops(file.read_text())
    # The other inner loops take the single steps at the ends of a chunk.
    unrolled = sorted(sorted(spans, key=lambda span: span[0] - span[1])[: len(names)])
    rows = (layout["rows"], layout.get("rows_per_pass"))
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
    """Those that the figures depend on."""
    return timing.versions(("jax", "libtpu", "jax-cuda13-plugin", "triton"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, help="print this chip's rows only")
    parser.add_argument("--kernel", choices=KERNELS, help="print this kernel's rows only")
    parser.add_argument("--scheme", choices=SCHEMES, help="print this scheme's rows only")
    parser.add_argument("--precision", choices=("exact", "fast"), help="print rows of this precision only")
    parser.add_argument("--arguments", choices=ARGUMENTS, help="print rows of these arguments only")
    parser.add_argument("--write", action="store_true", help="put the rows that are made into ledger.json")
    parser.add_argument("--compile", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(json.dumps(_compile_here(Row(*json.loads(options.compile)))))
        return
    picked = {n: x for n in ("chip", "kernel", "scheme", "precision", "arguments") if (x := getattr(options, n))}
    rows = []
    for row in (row for chip in CHIPS for row in all_rows(chip)):
        if all(getattr(row, name) == wanted for name, wanted in picked.items()):
            rows.append(compile_row(row))
            print(rows[-1], flush=True)
    if options.write or not picked:
        write(rows)


def read_rows(path: Path = LEDGER) -> list[dict]:
    """The rows of a ledger, an earlier one too."""
    rows = json.loads(path.read_text())["rows"]
    return [{FORMER.get(k, k): FORMER.get(x, x) if k == "kernel" else x for k, x in row.items()} for row in rows]


def write(rows: list[dict]) -> None:
    """Put rows in place of those of the same name, in the order of all rows."""

    def of(row: dict) -> Row:
        return Row(*(row[name] for name in Row._fields))

    known = {of(row): row for row in read_rows()} | {of(row): row for row in rows}
    kept = [known[row] for chip in CHIPS for row in all_rows(chip) if row in known]
    text = {"versions": versions(), "command": "python -m benchmarks.ledger", "rows": kept}
    LEDGER.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
