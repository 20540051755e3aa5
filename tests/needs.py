"""What a test needs that may not be here, as marks: a test that is skipped could run on another machine."""

import importlib.util

import pytest

from brainmass_kernels._jax import MOSAIC_GPU


def _installed(*packages: str):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


libtpu = _installed("libtpu")
triton = _installed("triton")
# Triton's interpreter keeps its tensors with torch.
interpreter = _installed("triton", "torch")
# The CPU backend compiles by LLVM.
numba = _installed("llvmlite")
# Schedulers for the parts of a sweep, and the store of large ones.
dask = _installed("distributed")
submitit = _installed("submitit")
zarr = _installed("zarr", "xarray")
mosaic_gpu = pytest.mark.skipif(not MOSAIC_GPU, reason="Mosaic GPU needs jax 0.11 or newer")
gpu_compiler = _installed("jax_cuda13_plugin", "triton") if MOSAIC_GPU else mosaic_gpu
