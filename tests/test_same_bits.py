"""The same arguments, versions and machine: the same bits, whatever the process, the threads, and what is kept."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("llvmlite")

SCRIPT = pathlib.Path(__file__).with_name("same_bits.py")


def told(folder, number: int, threads: int, *more: str) -> dict[str, str]:
    """What a process of its own prints; the cache of kernels is shared, so that the first one finds it cold."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONHASHSEED": str(number), "BRAINMASS_KERNELS_CACHE": str(folder.parent / "kernels")}
    call = [sys.executable, SCRIPT, str(threads), *more]
    done = subprocess.run(call, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_same(found):
    different = {name for each in found for name in each if each[name] != found[0][name]}
    assert not different


def test_two_processes_have_the_same_bits(tmp_path):
    """One with a cold cache and all threads, one with a warm cache and one thread."""
    assert_same([told(tmp_path / "a", 0, 2), told(tmp_path / "b", 1, 1)])


LOWERED = """
import hashlib, json
import brainunit as u, jax, jax.numpy as jnp, numpy as np
import brainmass_kernels as bk

found, hits = {}, []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
for implementation in ("scan", "numba"):

    def power(C):
        network = bk.Network(
            bk.JansenRit(C=C), np.ones((3, 3)) - np.eye(3), delays=np.arange(9).reshape(3, 3) % 4 * u.ms, source="eeg",
            target="E_inp", k=1 * u.Hz / u.mV,
        )
        result = bk.simulate(
            network, 20, 1 * u.ms, noise={"E_inp": C / 60 * u.Hz * u.second**0.5, "M_inp": 0.1 * u.mV * u.second**0.5},
            key=jax.random.key(0), record={"mean": bk.Mean(of="eeg"), "eeg": "eeg"}, implementation=implementation,
        )
        return jnp.sum(result["eeg"].mantissa ** 2) + jnp.sum(result["mean"].mantissa)

    lowered = jax.jit(power).lower(np.float32([100.0, 135.0, 150.0]))
    found[implementation] = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    before = len(hits)
    lowered.compile()
    found[implementation + ", found compiled"] = len(hits) - before
print(json.dumps(found))
"""


def test_two_processes_have_the_same_programs_and_find_them_compiled(tmp_path):
    """The text that is lowered of a noisy network, and so the key in JAX's compilation cache."""

    def of_process(number: int):
        env = {
            **os.environ, "PYTHONHASHSEED": str(number), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", LOWERED], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    first, second = of_process(0), of_process(1)
    compiled = {name for name in first if name.endswith("found compiled")}
    assert {name: first[name] for name in compiled} == dict.fromkeys(compiled, 0)
    assert second == {**first, **dict.fromkeys(compiled, 1)}


@pytest.mark.slow
def test_four_processes_have_the_same_bits_and_fits(tmp_path):
    assert_same([told(tmp_path / str(k), k, 1 + k % 2, "more") for k in range(4)])
