"""Pairs of jax-triton and Triton: those that cannot work are named before a kernel is made, with what to install."""

import importlib.util
import re
import subprocess

import brainunit as u
import jax
import jax.numpy as jnp
import pytest

import brainmass_kernels as bk
from brainmass_kernels import _jax, assembly, dispatch
from brainmass_kernels.backends.triton import versions

CUDA_13 = 90
HOPPER, BLACKWELL, ADA = 9.0, 10.0, 8.9
# jax-triton, triton, capability, and what the reason says.
PAIRS = [
    (None, "3.9.0", ADA, r"jax-triton is not installed: pip install 'brainmass-kernels\[triton\]'"),
    ("0.3.0", "3.9.0", ADA, r"jax-triton 0\.3\.1 or newer, and this is 0\.3\.0"),
    ("0.4.0", "3.6.0", HOPPER, r"jax-triton 0\.4\.0 with triton 3\.6\.0 .*pip install 'jax-triton==0\.3\.1'"),
    ("0.4.1", "3.6.0", ADA, r"jax-triton 0\.4\.1 with triton 3\.6\.0 .*'triton>=3\.7'"),
    ("0.4.1", "3.6.0+git12", ADA, r"triton 3\.6\.0\+git12 "),
    ("0.3.1", "3.5.1", ADA, r"'triton>=3\.6'"),
    ("0.3.1", "3.9.0", HOPPER, r"writes PTX 9\.4 .*takes 9\.0 at most: pip install 'jax-triton>=0\.4'"),
    ("0.3.1", "3.8.0", BLACKWELL, r"writes PTX 9\.4 "),
    ("0.3.1", "3.6.0", ADA, None),
    ("0.3.1", "3.6.0", HOPPER, None),
    ("0.3.1", "3.8.0", HOPPER, None),
    ("0.3.1", "3.9.0", ADA, None),
    ("0.4.1", "3.7.0", HOPPER, None),
    ("0.4.1", "3.9.0", BLACKWELL, None),
    ("0.5.0", "3.10.0", HOPPER, None),
    ("0.3.1", None, 0.0, None),  # another GPU's build of Triton
]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")


@pytest.mark.parametrize(("ours", "theirs", "capability", "says"), PAIRS)
def test_a_pair_that_cannot_work_is_named(ours, theirs, capability, says, on_gpu, monkeypatch):
    # Triton's wheel with a ptxas of CUDA 13.4, and JAX with one of 13.0; that of Triton 3.6 is of 12.9.
    monkeypatch.setattr(versions, "version_of", {"jax-triton": ours, "triton": theirs}.get)
    monkeypatch.setattr(versions, "tool", lambda name: theirs)
    monkeypatch.setattr(versions, "_cuda_of", lambda path: (12, 9) if path == "3.6.0" else (13, 4))
    monkeypatch.setattr(versions, "newest_ptx", lambda: CUDA_13)
    monkeypatch.setattr(_jax, "compute_capability", lambda: capability)
    found = bk.implementations()["triton"]
    if says is None:
        assert found == "runs here"
    else:
        assert re.search(says, found), found


CUDAS = [((12, 0), 80), ((12, 5), 85), ((12, 6), 85), ((12, 9), 88), ((13, 0), 90), ((13, 4), 94), ((14, 1), 101)]


@pytest.mark.parametrize(("cuda", "ptx"), CUDAS)
def test_ptx_of_a_cuda_release(cuda, ptx):
    assert versions.ptx_of(cuda) == ptx


@pytest.mark.parametrize(
    ("built", "ptxas", "newest"),
    [((13, 0), (13, 4), 90), ((12, 9), (12, 4), 84), ((13, 0), None, 90), (None, None, None)],
)
def test_the_older_of_jax_and_its_ptxas_decides(built, ptxas, newest, monkeypatch):
    monkeypatch.setattr(_jax, "cuda_version", lambda: built)
    monkeypatch.setattr(versions, "_ptxas_of_jax", lambda: ptxas and "ptxas")
    monkeypatch.setattr(versions, "_cuda_of", lambda path: ptxas)
    assert versions.newest_ptx.__wrapped__() == newest


# With jax-triton -----------------------------------------------------------------------------------------------------


def power(C):
    result = bk.simulate(
        bk.JansenRit(C=C), 20, 0.1 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=10, implementation="triton",
        precision="fast",
    )  # fmt: skip
    return jnp.mean((result["eeg"] / u.mV) ** 2)


@pytest.mark.parametrize("capability", [80, 90])
def test_an_older_ptxas_assembles_what_is_written(capability, on_gpu, monkeypatch, tmp_path):
    """As a JAX whose CUDA is older than the newest that Triton's wheel brings: to a cubin, and not lowered alone."""
    if not importlib.util.find_spec("jax_triton"):
        pytest.skip("jax-triton is not installed")
    try:
        from jax_triton import triton_lib
    except ImportError as error:
        pytest.skip(f"jax-triton needs JAX's plugin for CUDA: {str(error).splitlines()[0]}")
    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "get_compute_capability", lambda device: capability)
    if reason := versions.unfit(capability / 10):
        pytest.skip(reason)
    written, original = [], triton_lib.compile_ttir_inplace

    def kept(*args, **options):
        written.append(original(*args, **options))
        return written[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", kept)
    ptxas = assembly.tool("ptxas")
    monkeypatch.setattr(versions, "newest_ptx", lambda: versions.ptx_of(versions._cuda_of(ptxas)))
    lanes = jax.ShapeDtypeStruct((64,), "float32")
    jax.jit(jax.grad(power)).trace(lanes).lower(lowering_platforms=("cuda",))
    assert len(written) == 2
    for k, kernel in enumerate(written):
        source, cubin = tmp_path / f"{k}.ptx", tmp_path / f"{k}.cubin"
        source.write_text(kernel.binary)
        architecture = {90: "sm_90a"}.get(capability, f"sm_{capability}")
        done = subprocess.run(
            [ptxas, f"-arch={architecture}", str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert cubin.stat().st_size > 1000
