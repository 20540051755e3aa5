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

LEDGER = Path(__file__).with_name("ledger.json")
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SCHEMES = ("strang", "exp_euler")
KERNELS = ("forward", "forward_per_lane", "gradient")
UNIT = "VLIW bundles of the unrolled loop, for each step of 1,024 masses; gradient is replay + reverse"
LANES, STEPS, EVERY, SEGMENT = 65_536, 10_000, 10, 100


def jansen_rit_loop(scheme: str):
    """The Jansen-Rit loop that is measured, and which of its coefficients three per-mass parameters reach.

    Returns
    -------
    loop : Loop, recording E - I every 10th step
    per_mass : a flag for each coefficient, whether it depends on Ae, be or C
    """
    import jax.numpy as jnp

    from brainmass_kernels.backends.base import Loop, Schedule
    from brainmass_kernels.pointwise import Program

    flow = 4 if scheme == "strang" else 3
    width = 4 + flow  # alpha, beta, k1, k0 and the flow of each block

    def blocks(coefs):
        return [coefs[i * width : (i + 1) * width] for i in range(3)]

    def advance(*args):
        coefs, state = args[: 3 * width], args[3 * width :]
        positions, velocities = state[:3], state[3:]
        m, e, i = positions
        new = []
        for (alpha, beta, k1, k0, *g), x, v, drive in zip(blocks(coefs), positions, velocities, (e - i, m, m)):
            kick = k1 * jnp.tanh(alpha * drive + beta) + k0
            if scheme == "strang":
                v = v + kick
                new.append((x + (g[0] * x + g[1] * v), v + (g[2] * x + g[3] * v)))
            else:
                new.append((x + g[0] * v, v + (g[1] * v + g[2] * x + kick)))
        return tuple(x for x, _ in new) + tuple(v for _, v in new)

    def observe(*args):
        coefs, state = args[: 3 * width], args[3 * width :]
        if scheme != "strang":
            return (state[1] - state[2],)
        (_, e), (_, i) = [(b, x + (b[4] * x + b[5] * v)) for b, x, v in list(zip(blocks(coefs), state, state[3:]))[1:]]
        return (e - i,)

    n = 3 * width
    loop = Loop(
        Program(advance, _scalars(n + 6)), Program(observe, _scalars(n + 6), "observer"),
        n_coefs=n, n_state=6, n_inputs=0, n_normals=0, schedule=Schedule(STEPS, 0, EVERY),
    )  # fmt: skip
    # M: k1, k0, flow; E: alpha, k1, k0, flow; I: alpha, k1, k0, but its flow is of Ai and bi.
    per_mass = (False, False, *[True] * (2 + flow)) + (True, False, *[True] * (2 + flow))
    per_mass += (True, False, True, True, *[False] * flow)
    return loop, per_mass


def _scalars(n: int) -> list:
    import jax

    return [jax.ShapeDtypeStruct((), "float32")] * n


def pullbacks(loop, wanted):
    """The adjoint programs of a loop without inputs and normals."""
    import jax

    from brainmass_kernels.backends.base import Pullbacks
    from brainmass_kernels.pointwise import Program

    def pullback(program):
        def back(*args):
            primals, cts = args[: loop.n_coefs + loop.n_state], args[loop.n_coefs + loop.n_state :]
            ct = jax.vjp(program.__call__, *primals)[1](tuple(cts))
            return (*(c for c, w in zip(ct, wanted.coefs) if w), *ct[loop.n_coefs :])

        return Program(back, _scalars(len(program.in_avals) + len(program.out_avals)), f"{program.label}'s pullback")

    return Pullbacks(pullback(loop.advance), pullback(loop.observe))


def measured_function(kernel: str, scheme: str):
    """What a row compiles, its arguments' shapes, and the layout that the backend chose."""
    import jax

    from brainmass_kernels.backends.base import Wanted
    from brainmass_kernels.backends.mosaic_tpu import MosaicTPU, WayBack, plan_run

    loop, per_mass = jansen_rit_loop(scheme)
    per_lane = per_mass if kernel != "forward" else (False,) * loop.n_coefs
    shape = jax.ShapeDtypeStruct
    coefs = tuple(shape((LANES,) if lane else (), "float32") for lane in per_lane)
    state = (shape((LANES,), "float32"),) * loop.n_state
    plan = plan_run(loop, coefs, (), LANES, SEGMENT if kernel == "gradient" else None)
    layout = {"rows": plan.rows, "unrolled": plan.cut.body, "chunk": plan.cut.size, "lanes": LANES, "every": EVERY}
    if kernel != "gradient":
        return lambda coefs, state: MosaicTPU().forward(loop, coefs, state, (), None), (coefs, state), layout

    wanted = Wanted(per_mass, ())
    backwards = pullbacks(loop, wanted)
    layout["turn"] = WayBack.of(loop, backwards, plan, wanted).turn

    def gradient(coefs, state, ct_records):
        out = MosaicTPU().forward(loop, coefs, state, (), None, SEGMENT)
        return MosaicTPU().adjoint(
            loop, backwards, wanted, coefs, out.saved, (), None, (ct_records,), out.final, SEGMENT
        )

    return gradient, (coefs, state, shape((STEPS // EVERY, LANES), "float32")), layout


def compile_for_tpu(chip: str, fn, *args):
    """Compile ``fn`` for a TPU that is not there."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    place = NamedSharding(Mesh(topology.devices[:1], ("x",)), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).compile()


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
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        done = subprocess.run(command, env=env, cwd=LEDGER.parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling {kernel} {scheme} for {chip} failed:\n{done.stderr[-3000:]}")
        layout = json.loads(done.stdout.splitlines()[-1])
        names = ("forward", "adjoint") if kernel == "gradient" else ("forward",)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", choices=TOPOLOGIES, help="print this chip's rows only")
    parser.add_argument("--kernel", choices=KERNELS, help="print this kernel's rows only")
    parser.add_argument("--scheme", choices=SCHEMES, help="print this scheme's rows only")
    parser.add_argument("--compile", nargs=3, metavar=("CHIP", "KERNEL", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        chip, kernel, scheme = options.compile
        fn, args, layout = measured_function(kernel, scheme)
        compile_for_tpu(chip, fn, *args)
        print(json.dumps(layout))
        return
    rows = []
    for chip in [options.chip] if options.chip else TOPOLOGIES:
        for kernel in [options.kernel] if options.kernel else KERNELS:
            for scheme in [options.scheme] if options.scheme else SCHEMES:
                rows.append(compile_row(chip, kernel, scheme))
                print(rows[-1], flush=True)
    if not (options.chip or options.kernel or options.scheme):
        versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
        text = {**versions, "command": "python -m benchmarks.ledger", "unit": UNIT, "rows": rows}
        LEDGER.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
