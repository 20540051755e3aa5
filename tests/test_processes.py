"""One run over the devices of two processes, as on a cluster: each has its shards, with the bits of a single run."""

import socket
import subprocess
import sys

import pytest

TWO_DEVICES = "--xla_force_host_platform_device_count=2"
SOURCE = """
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


@pytest.mark.parametrize(("name", "rtol"), [("numba", 0), ("scan", 1e-4)])
def test_two_processes(name, rtol):
    if name == "numba":
        pytest.importorskip("llvmlite")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    source = SOURCE.format(port=port, name=name, rtol=rtol, flags=TWO_DEVICES)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(k)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            assert out.split() == ["right"]
    finally:
        for process in processes:
            process.kill()
