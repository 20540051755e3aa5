"""One run, and one fit, over the devices of two processes, as on a cluster, with the bits of a single process."""

import socket
import subprocess
import sys

import pytest

TWO_DEVICES = "--xla_force_host_platform_device_count=2"
BEGIN = """
import os, sys
os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", "{flags}"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
import brainunit as u
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import brainmass_kernels as bk

mesh = jax.make_mesh((4,), ("lanes",), axis_types=(AxisType.Auto,))
place = NamedSharding(mesh, PartitionSpec("lanes"))
"""
SOURCE = (
    BEGIN
    + """
gains = np.linspace(3.0, 4.0, 16, dtype="float32")
noise = {{"E_inp": 3.0 * u.Hz * u.second**0.5}}


def run(gains):
    model = bk.JansenRit(Ae=gains * u.mV)
    result = bk.simulate(
        model, 40, 1.0 * u.ms, noise=noise, key=jax.random.key(0), record=["eeg"], implementation="{name}"
    )
    return result["eeg"].mantissa


def gradient(gains):
    return jax.grad(lambda gains: jnp.sum(run(gains) ** 2))(gains)


def check(found, want):
    assert len(found.addressable_shards) == 2
    for shard in found.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(want)[shard.index], rtol={rtol})


everywhere = jax.make_array_from_callback(gains.shape, place, lambda index: gains[index])
check(run(everywhere), run(gains))
check(jax.jit(gradient)(everywhere), gradient(gains))
bad = jax.make_array_from_callback(gains.shape, place, lambda index: np.full_like(gains[index], np.nan))
try:
    run(bad)
except ValueError as error:
    assert "'Ae' got NaN" in str(error)
    print("right")
"""
)
FIT = (
    BEGIN
    + """
from brainmass_kernels.fitting import saved

drive = {{"E_inp": np.random.default_rng(1).uniform(100, 300, 60).astype("float32") * u.Hz}}
gains = np.linspace(3.0, 4.0, 6, dtype="float32") * u.mV
run = bk.simulate(bk.JansenRit(Ae=gains), 60, 1.0 * u.ms, inputs=drive, record="eeg")
series = np.asarray(run["eeg"].mantissa).T
path = sys.argv[2]
# Every chunk is written, however long that takes.
saved._APART = 0.0


def fit(values, **more):
    return bk.fit(
        bk.JansenRit(), bk.TimeSeries(values * u.mV), {{"Ae": (2.6, 5.0), "be": (60.0, 150.0)}}, inputs=drive,
        duration=60, dt=1.0 * u.ms, every=1, transient=None, realisations=1, starts=3, steps=3,
        implementation="{name}", targets_at_once=4, **more,
    )


def check(found, want):
    for x, y in ((found.losses, want.losses), (found.rms, want.rms), (found.parameters["Ae"], want.parameters["Ae"])):
        np.testing.assert_allclose(u.get_magnitude(x), u.get_magnitude(y), rtol={rtol})
    assert isinstance(found.losses, np.ndarray)


# Each process on its own devices.
alone = fit(series)
with jax.set_mesh(mesh):
    check(fit(series), alone)
    # Stopped by both after two steps, and resumed from the file that the first has written.
    fit(series, checkpoint=path, progress=lambda report: report.step == 2)
    seen = []
    check(fit(series, checkpoint=path, progress=lambda report: seen.append(report.step)), alone)
    assert seen == [3]
    try:
        fit(series, checkpoint=path if jax.process_index() else path + ".other")
        raise AssertionError("each has read another file")
    except ValueError as error:
        assert "read [0, 3] steps, but takes one file" in str(error), error
    # Targets that the processes share.
    spread = NamedSharding(mesh, PartitionSpec(None, "lanes"))
    check(fit(jax.make_array_from_callback(series.shape, spread, lambda index: series[index])), alone)
print("right")
"""
)


def run_twice(source: str, *arguments: str, **values) -> list[str]:
    """What a source, filled with values, prints in each of two processes that know each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    source = source.format(port=port, flags=TWO_DEVICES, **values)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(k), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    try:
        printed = []
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            printed.append(out)
        return printed
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("name", "rtol"), [("numba", 0), ("scan", 1e-4)])
def test_two_processes(name, rtol):
    if name == "numba":
        pytest.importorskip("llvmlite")
    # Gloo would tell of the first word between the processes: there is none.
    assert [out.split() for out in run_twice(SOURCE, name=name, rtol=rtol)] == [["right"]] * 2


def test_a_fit_over_two_processes(tmp_path):
    """Each sees the same fit; one writes the checkpoint, and both resume from it."""
    pytest.importorskip("llvmlite")
    path = tmp_path / "fit.part.json"
    assert [out.split()[-1] for out in run_twice(FIT, str(path), name="numba", rtol=0)] == ["right"] * 2
    assert path.exists()
