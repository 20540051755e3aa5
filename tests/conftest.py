"""Two fake CPU devices, strict promotion, and our own warnings as errors, before anything imports JAX."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two workers may compile for a TPU at once: no chip is touched.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

# Tracing makes many small objects that live as long as their program: looking through all of them costs a tenth.
gc.set_threshold(50_000, 20, 100)


def pytest_configure(config):
    for module in (r"brainmass_kernels", r"tests", r"test_.*"):
        config.addinivalue_line("filterwarnings", f"error:::{module}")


# One case of many, mostly: the others of its test are quick.
SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text().splitlines())


def pytest_collection_modifyitems(config, items):
    """What slow.txt lists is marked slow, and what a class names as `long` of the tests that it inherits.

    A test of a suite that asks for what its implementation cannot do is no test of it, and so none that is skipped.
    """
    config.hook.pytest_deselected(items=[item for item in items if not _applies(item)])
    items[:] = filter(_applies, items)
    for item in items:
        if item.nodeid.rpartition("tests/")[2] in SLOW or item.name in getattr(item.cls, "long", ()):
            item.add_marker(pytest.mark.slow)


def _applies(item) -> bool:
    """Whether the class of a test has all that its marks `where` ask for, and does not leave it to another class."""
    left = getattr(item.cls, "held_elsewhere", ())
    return not {item.originalname, item.name} & {*left} and all(
        mark.args[0](item.cls) for mark in item.iter_markers("where")
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbours share programs: each worker takes one stretch of the tests, and the first to end helps the other."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


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
