"""No kernel may get slower: what the chips' compilers make now, against benchmarks/ledger.json."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from benchmarks.ledger import CHIPS, LEDGER, NETWORKS, Row, all_rows, compile_row, read_rows, versions
from brainmass_kernels._jax import MOSAIC_GPU
from brainmass_kernels.assembly import launch_arguments, sass_loops
from brainmass_kernels.testing import GPUS, TPU_TOPOLOGIES, TRITON_GPUS

# Most bundles a step of 1,024 masses on v5e that we settle for, whatever the ledger says.
BUNDLES = {
    ("forward", "strang"): 13.0,
    ("forward", "exp_euler"): 15.0,
    ("gradient", "strang"): 45.0,
    ("gradient", "exp_euler"): 45.0,
}
# And most instructions a step and mass on Hopper, precision "fast".
INSTRUCTIONS = {
    ("forward", "strang"): 26.0,
    ("forward", "exp_euler"): 30.0,
    ("gradient", "strang"): 130.0,
    ("gradient", "exp_euler"): 130.0,
    ("inverse steps", "strang"): 130.0,
}
# And on Ampere, through Triton.
TRITON_INSTRUCTIONS = 30.0

# The chips whose kernels are compiled again, those of one mass a thread; the command does all of them.
HELD = ("v5e", "h200", "sm_80")


def rows() -> list[dict]:
    return read_rows()


def row_of(kept: dict) -> Row:
    return Row(*(kept[name] for name in Row._fields))


def test_every_row_is_there():
    assert [row_of(kept) for kept in rows()] == [row for chip in CHIPS for row in all_rows(chip)]


def test_the_ledger_meets_the_goals():
    plain = [r for r in rows() if r["arguments"] == "plain"]
    found = {(r["kernel"], r["scheme"]): r["bundles_per_step"] for r in plain if r["chip"] == "v5e"}
    assert set(found) == {(row.kernel, row.scheme) for row in all_rows("v5e") if row.arguments == "plain"}
    for row, goal in BUNDLES.items():
        assert found[row] <= goal, row
    for r in plain:
        if r["chip"] == "h200" and r["precision"] == "fast" and "instructions_per_step" in r:
            assert r["instructions_per_step"] <= INSTRUCTIONS[r["kernel"], r["scheme"]], r
        if r["chip"] == "sm_80" and r["precision"] == "fast" and r["kernel"] == "forward":
            assert r["instructions_per_step"] <= TRITON_INSTRUCTIONS, r


def test_no_loop_over_steps_or_connections_spills():
    of_networks = [kept for kept in rows() if kept["vec"] and kept["kernel"] in NETWORKS]
    assert {kept["spill_bytes"] for kept in rows() if kept["vec"] and kept not in of_networks} == {0}
    # The compiler puts some numbers aside, and takes them back once a segment, a step or a record, not where the step
    # sums its connections.
    assert max(kept["reloads"] for kept in of_networks) <= 8
    assert {kept["reloads_in_inner_loops"] for kept in of_networks} == {0}


def test_what_depends_on_an_argument():
    import jax

    from brainmass_kernels.pointwise import Program

    scalar = jax.ShapeDtypeStruct((), "float32")
    program = Program(lambda a, b: (a * 2.0, a + b, b, 1.0), [scalar, scalar])
    assert program.depends((True, False)) == [True, True, False, False]


def test_loops_of_a_disassembly():
    text = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_1:
        /*0020*/                   FFMA R2, R2, R3, R5 ;
        /*0030*/                   MUFU.TANH R2, R2 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E [R4], R2 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""
    outer, inner = sass_loops(text)
    assert (outer.inner, inner.inner) == (1, 0)
    assert dict(outer.instructions) == {"LDG": 1, "STG": 1, "BRA": 1}
    assert inner.kinds() == {"fp32": 1, "special": 1, "load": 0, "store": 0, "barrier": 0, "other": 1}
    assert inner.total == 3


def test_arguments_of_a_launch():
    """They are in the order of use, and what is not used is no argument."""
    text = """
  func.func @f(%a: !llvm.ptr, %b: !llvm.ptr) {
    gpu.launch_func async [%0] @k::@k blocks in (%c1) threads in (%c128) args(%9 : !llvm.ptr) loc(#loc1)
// -----// IR Dump Before GpuLaunchLoweringPass
  func.func @f(%a: !llvm.ptr loc("x"), %b: !llvm.ptr loc("x")) {
    %3 = llvm.load %b : !llvm.ptr -> !llvm.ptr loc(#loc1)
    %4 = llvm.getelementptr %b[2] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr loc(#loc1)
    %5 = llvm.load %4 : !llvm.ptr -> !llvm.ptr loc(#loc1)
    gpu.launch_func <%a : !llvm.ptr> @k::@k blocks in (%0) threads in (%2) : i64 args(%5 : !llvm.ptr, %3 : !llvm.ptr)
"""
    assert launch_arguments(text) == (2, 0)


def _reason_to_skip(kept: dict, chip: str) -> str | None:
    tools = ("jax_cuda13_plugin", "triton")
    tools = ("libtpu",) if chip in TPU_TOPOLOGIES else ("triton",) if chip in TRITON_GPUS else tools
    missing = [name for name in tools if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if chip in GPUS and not MOSAIC_GPU:
        return "Mosaic GPU needs jax 0.11"
    for name in (tool.replace("_", "-") for tool in tools):
        if kept["versions"].get(name) != versions()[name]:
            return f"the ledger is of {name} {kept['versions'].get(name)}, and here is {versions()[name]}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in map(row_of, rows()) if row.chip in HELD and row.vec < 2], ids=str)
def test_no_kernel_costs_five_percent_more(row):
    kept = json.loads(LEDGER.read_text())
    if reason := _reason_to_skip(kept, row.chip):
        pytest.skip(reason)
    (before,) = [r for r in rows() if row_of(r) == row]
    now = compile_row(row)
    for name in ("bundles_per_step", "instructions_per_step", "bundles", "instructions"):
        if name in before:
            assert now[name] <= 1.05 * before[name]
    assert now.get("spill_bytes", 0) <= before.get("spill_bytes", 0)


def test_an_earlier_ledger_is_read(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({"rows": [{"kernel": "retreat", "turn": 8, "chip": "h200"}]}))
    assert read_rows(path) == [{"kernel": "inverse steps", "rows_per_pass": 8, "chip": "h200"}]


# The tables of the docs ---------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text()
COLUMNS = {"`mosaic_gpu`, H200": "h200", "B200": "b200", "`triton`, sm_80": "sm_80"}
OF_NETWORKS = {"no delays": "undelayed", "delays": "delayed", "two couplings with delays": "two_couplings"}


def shown(heading: str):
    """Chip, label and number of every cell of the table after a heading; "the same" is that of the row above."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    table = list(
        itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda x: x[:1] != "|", lines))
    )
    head, above = [cell.strip() for cell in table[0].split("|")[2:-1]], ""
    for line in table[2:]:
        label, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        above = above if label.startswith("the same") else label
        for name, cell in zip(head, cells, strict=True):
            if cell != "-":
                yield COLUMNS.get(name, name), f"{above} {label}", float(cell.replace(",", ""))


def of_ledger(chip: str, label: str, networks: bool) -> float:
    kernel = label.partition(",")[0]
    kernel = "inverse steps" if label.endswith("inverse steps") else kernel
    arguments = "noise" if "noise" in label else "input" if "an input" in label else "plain"
    if networks:
        kernel = {"forward": "network", "gradient": "network_gradient"}[kernel]
        arguments = OF_NETWORKS[label.rpartition(", ")[2]]
    nvidia = chip[0] in "hbs"
    asked = {
        "chip": chip, "kernel": kernel, "arguments": arguments,
        "scheme": "exp_euler" if "exp_euler" in label else "strang",
        "precision": "exact" if networks or not nvidia or "exact" in label else "fast",
    }  # fmt: skip
    # Of several layouts the widest, which is what runs.
    found = max((row for row in rows() if asked.items() <= row.items()), key=lambda row: row["vec"])
    whole, each = ("instructions", "instructions_per_step") if nvidia else ("bundles", "bundles_per_step")
    return found[whole if networks else each]


@pytest.mark.parametrize("heading", ["TPU, VLIW bundles", "NVIDIA, SASS instructions", "Networks of 76 regions, all"])
def test_the_tables_of_the_docs_are_the_ledgers(heading):
    networks, cells = heading.startswith("Networks"), list(shown(heading))
    assert len(cells) > 15
    for chip, label, number in cells:
        assert number == pytest.approx(of_ledger(chip, label, networks), abs=0.5 if networks else 0.0501), (chip, label)
