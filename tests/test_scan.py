"""The reference implementation: as it is asked for by name, and with the adjoint that it has otherwise."""

from backend_suite import BackendSuite


class TestScan(BackendSuite):
    """By name: transparent to JAX."""

    implementation = "scan"
    runs = "scan"
    transparent = True


class TestScanAdjoint(BackendSuite):
    """As the fallback: with its own adjoint."""

    implementation = None
    runs = "scan"
