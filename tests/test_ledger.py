"""No kernel may get slower: what the TPU compilers schedule now, against benchmarks/ledger.json."""

import importlib.util
import json

import pytest

from benchmarks.ledger import KERNELS, LEDGER, SCHEMES, compile_row, reached, versions

# Most bundles a step of 1,024 masses on v5e that we settle for, whatever the ledger says.
GOALS = {
    ("forward", "strang"): 13.0,
    ("forward", "exp_euler"): 15.0,
    ("gradient", "strang"): 45.0,
    ("gradient", "exp_euler"): 45.0,
}


def rows() -> list[dict]:
    return json.loads(LEDGER.read_text())["rows"]


def test_the_ledger_meets_the_goals():
    found = {(r["kernel"], r["scheme"]): r["bundles_per_step"] for r in rows() if r["chip"] == "v5e"}
    assert set(found) == {(kernel, scheme) for kernel in KERNELS for scheme in SCHEMES}
    for row, goal in GOALS.items():
        assert found[row] <= goal, row


def test_reached_follows_an_argument():
    import jax

    from brainmass_kernels.pointwise import Program

    scalar = jax.ShapeDtypeStruct((), "float32")
    program = Program(lambda a, b: (a * 2.0, a + b, b, 1.0), [scalar, scalar])
    assert reached(program, (True, False)) == (True, True, False, False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['chip']}-{row['kernel']}-{row['scheme']}")
def test_no_kernel_takes_five_percent_more_bundles(row):
    kept = json.loads(LEDGER.read_text())
    if kept["libtpu"] != versions()["libtpu"]:
        pytest.skip(f"the ledger is libtpu {kept['libtpu']}'s, and here is {versions()['libtpu']}")
    now = compile_row(row["chip"], row["kernel"], row["scheme"])
    assert now["bundles_per_step"] <= 1.05 * row["bundles_per_step"]
