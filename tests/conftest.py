"""Two fake CPU devices, strict promotion, and our own warnings as errors, before anything imports JAX."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two workers may compile for a TPU at once: no chip is touched.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import jax
import pytest


def pytest_configure(config):
    for module in (r"brainmass_kernels", r"tests", r"test_.*"):
        config.addinivalue_line("filterwarnings", f"error:::{module}")


# One case of many, mostly: the others of its test are quick.
SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text().splitlines())


def pytest_collection_modifyitems(items):
    """What slow.txt lists is marked slow, and what a class names as `long` of the tests that it inherits."""
    for item in items:
        listed = item.nodeid.rpartition("tests/")[2] in SLOW
        if listed:
            item.add_marker(pytest.mark.listed)
        if listed or item.name in getattr(item.cls, "long", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _strict():
    """Nothing in the package leans on implicit dtype or rank promotion, whatever mode a user sets."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _kernels(tmp_path_factory):
    """Nothing is found compiled by an earlier run; what one process compiled, the others find."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ.setdefault("BRAINMASS_KERNELS_CACHE", str(base / "kernels"))


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
