"""Which implementation of one step runs, by counted bytes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from benchmarks import op_bytes
from benchmarks.timing import RESULTS
from brainmass_kernels import _context, one_step

STEP = {"A": 3.25, "a": 100.0, "vmax": 5.0, "v0": 6.0, "r": 0.56, "dt": 5e-4}
WIDE = np.dtype("float64")


def target(platform, capability=None):
    return _context.setting(_context.TARGET, _context.Target(platform, 132, capability))


def test_the_table_is_what_was_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(op_bytes, "TABLE", tmp_path / "table.json")
    op_bytes.write_table(json.loads((RESULTS / "op_bytes.json").read_text())["results"])
    assert json.loads((tmp_path / "table.json").read_text()) == one_step.counts()


@pytest.mark.parametrize(("platform", "capability", "runs"), [("tpu", None, "mosaic_tpu"), ("cpu", None, "scan")])
def test_auto_goes_by_the_device(platform, capability, runs):
    with target(platform, capability):
        assert one_step.choose("auto", np.dtype("float32"))[0] == runs
        # jnp is the default everywhere, and what computes in float64.
        assert one_step.choose(None, np.dtype("float32"))[0] == "scan"
        assert one_step.choose("auto", WIDE)[0] == "scan"


def test_no_kernel_that_auto_takes_moves_over_a_tenth_more():
    for kernel, chip in one_step.KERNELS.values():
        table = one_step.counts()[chip]
        assert all(table[kernel][what] <= 1.1 * table["scan"][what] for what in table["scan"])
        assert table[kernel][one_step.IN_PARAMETERS] < 0.7 * table["scan"][one_step.IN_PARAMETERS]


def test_a_plan_says_what_moves():
    with target("tpu"):
        plan = bk.explain_step((1024, 2048), wrt=["A", "r"], implementation="auto")
        assert plan.implementation == "mosaic_tpu"
        assert plan.bytes == {"scan": 2 * 160 * 2**20, "mosaic_tpu": round(2 * 41.25 * 2**20)}
        assert "in parameters" in str(plan)
        assert bk.explain_step((3,), wrt=["x", "A"]).bytes["scan"] == (280 * 3)
        # By default `sigmoid_sys2nd` is jnp, on a TPU too.
        assert bk.explain_step((3,)).implementation == "scan"
    assert bk.explain_step((3,)).implementation == "scan"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"wrt": ["speed"]}, ValueError, "unknown argument in 'wrt' 'speed'"),
        ({"wrt": "speed"}, ValueError, "unknown argument in 'wrt' 'speed'"),
        ({"shape": (-3,)}, ValueError, r"'shape' got \(-3,\)"),
        ({"shape": (2.5,)}, ValueError, r"'shape' got \(2.5,\)"),
        ({"dtype": "mV"}, TypeError, "'dtype' got 'mV'"),
        ({"dtype": "int32"}, TypeError, "'dtype' got 'int32'"),
        ({"implementation": "fastest"}, ValueError, "implementation got 'fastest', but takes"),
        ({"implementation": "mosaic_tpu"}, bk.Unsupported, "'mosaic_tpu' cannot run this"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bk.explain_step(**{"shape": (3,), **arguments})


def test_auto_is_jnp_where_there_is_no_kernel():
    values = jnp.linspace(-1.0, 1.0, 5), jnp.zeros(5), jnp.linspace(0.0, 8.0, 5)
    for a, b in zip(
        bk.sigmoid_sys2nd(*values, **STEP, implementation="auto"), bk.sigmoid_sys2nd(*values, **STEP), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_an_unknown_implementation_of_a_step_is_told_of_auto():
    with pytest.raises(ValueError, match="implementation got 'fast', but takes None or one of auto, mosaic_tpu"):
        bk.sigmoid_sys2nd(1.0, 0.0, 3.0, **STEP, implementation="fast")
