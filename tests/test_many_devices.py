"""Runs over eight fake devices: shared by lanes, nothing gathered, the numbers of one device."""

import re

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import brainmass_kernels as bk
from brainmass_kernels._context import SHARES, TARGET, Target, setting

LANES, DEVICES, STEPS, REGIONS = 64, 8, 40, 3
GAINS = np.linspace(3.0, 4.0, LANES, dtype="float32")
COMMUNICATION = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
LEADING = PartitionSpec("lanes")


@pytest.fixture(params=["scan", "numba"])
def implementation(request):
    if request.param == "numba":
        pytest.importorskip("llvmlite")
    return request.param


def mesh_of(kind=AxisType.Auto, count=DEVICES):
    return jax.make_mesh((count,), ("lanes",), axis_types=(kind,), devices=jax.devices()[:count])


def spread(x, mesh, spec=LEADING):
    return jax.device_put(x, NamedSharding(mesh, spec))


def masses(implementation, key=None, record=("eeg",)):
    """``gains (B,) -> {name: array}``."""
    noise = {} if key is None else {"noise": {"E_inp": 3.0 * u.Hz * u.second**0.5}, "key": key}

    def run(gains):
        model = bk.JansenRit(Ae=gains * u.mV)
        result = bk.simulate(model, STEPS, 1.0 * u.ms, record=record, implementation=implementation, **noise)
        return {name: u.get_magnitude(x) for name, x in result.items()}

    return run


def networks(implementation):
    """Each gain is that of a network of three regions, with delays."""
    weights = np.random.default_rng(0).uniform(0.1, 1.0, (REGIONS, REGIONS))
    delays = np.arange(9).reshape(3, 3) % 4 * u.ms

    def run(gains):
        network = bk.Network(
            bk.JansenRit(Ae=gains[:, None] * u.mV), weights, k=10.0 * u.Hz / u.mV, source="eeg", target="E_inp",
            delays=delays,
        )  # fmt: skip
        result = bk.simulate(network, STEPS, 1.0 * u.ms, record=["eeg"], implementation=implementation)
        return {"eeg": u.get_magnitude(result["eeg"])}

    return run


def gradient(run):
    def loss(gains):
        return sum(jnp.sum(x**2) for x in run(gains).values())

    return lambda gains: {"gradient": jax.grad(loss)(gains)}


KEY = jax.random.key(4)
WORK = {
    "forward": masses,
    "noise": lambda name: masses(name, KEY),
    "gradient": lambda name: gradient(masses(name, KEY)),
    "statistics": lambda name: masses(name, KEY, {"mean": bk.Mean(of="eeg"), "variance": bk.Variance(of="eeg")}),
    "network": networks,
    "gradient of a network": lambda name: gradient(networks(name)),
}


def check(found, want, implementation, work):
    """The bits of one device, but of what XLA compiles anew for each shape: `scan`, and statistics."""
    for name, x in want.items():
        if implementation == "scan" or work == "statistics":
            np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5 * np.abs(x).max())
        else:
            np.testing.assert_array_equal(found[name], x)


def check_shares(run, *arguments):
    """No device tells another anything, and no call takes more than its share of the lanes."""
    text = jax.jit(run).lower(*arguments).compile().as_text()
    assert not COMMUNICATION.findall(text)
    calls = [line for line in text.splitlines() if "custom-call" in line and "brainmass_kernels" in line]
    for line in calls:
        sizes = re.findall(r"\d+", " ".join(re.findall(r"f32\[[\d,]+\]", line.split("custom-call(")[0])))
        assert not {str(LANES), str(LANES * REGIONS)} & set(sizes), line


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("work", WORK)
def test_in_jit(implementation, work, kind):
    run = WORK[work](implementation)
    want, gains = run(GAINS), spread(GAINS, mesh_of(kind))
    found = jax.jit(run)(gains)
    check(found, want, implementation, work)
    assert not any(x.sharding.is_fully_replicated for x in found.values())
    check_shares(run, gains)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_outside_of_jit(implementation, kind):
    run = masses(implementation, KEY)
    found = run(spread(GAINS, mesh_of(kind)))["eeg"]
    check({"eeg": found}, run(GAINS), implementation, "noise")
    assert found.sharding.spec == PartitionSpec(None, "lanes")


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("work", ["forward", "gradient", "statistics", "network", "gradient of a network"])
def test_in_shard_map(implementation, work, checked):
    """Each device is told of its own lanes only."""
    if work == "gradient":
        run = gradient(masses(implementation))
    else:
        run = masses(implementation, None, WORK_RECORDS) if work == "statistics" else WORK[work](implementation)
    axis = {"forward": PartitionSpec(None, "lanes"), "network": PartitionSpec(None, "lanes")}.get(work, LEADING)
    shared = jax.shard_map(run, mesh=mesh_of(), in_specs=LEADING, out_specs=axis, check_vma=checked)
    gains = spread(GAINS, mesh_of())
    check(jax.jit(shared)(gains), run(GAINS), implementation, work)
    check_shares(shared, gains)


WORK_RECORDS = {"mean": bk.Mean(of="eeg")}


def test_in_pmap(implementation):
    run = gradient(masses(implementation))
    found = jax.pmap(run)(GAINS.reshape(DEVICES, -1))["gradient"]
    check({"gradient": np.ravel(found)}, run(GAINS), implementation, "gradient")


def test_in_vmap(implementation):
    run = gradient(masses(implementation))
    gains = spread(GAINS, mesh_of())
    each = jax.vmap(lambda gain: run(gain[None]))
    check({"gradient": np.ravel(jax.jit(each)(gains)["gradient"])}, run(GAINS), implementation, "gradient")
    check_shares(each, gains)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_shared_parameter(implementation, kind):
    """Its cotangent is a sum over all devices, which is all that they tell each other."""
    mesh = mesh_of(kind)

    def loss(rate, gains):
        model = bk.JansenRit(Ae=gains * u.mV, be=rate * u.Hz)
        result = bk.simulate(model, STEPS, 1.0 * u.ms, record=["eeg"], implementation=implementation)
        return jnp.sum(u.get_magnitude(result["eeg"]) ** 2)

    slope = jax.jit(jax.grad(loss))
    want, (rate, gains) = (
        slope(np.float32(50.0), GAINS),
        (spread(np.float32(50.0), mesh, PartitionSpec()), spread(GAINS, mesh)),
    )
    np.testing.assert_allclose(slope(rate, gains), want, rtol=1e-4)
    assert "all-gather" not in slope.lower(rate, gains).compile().as_text()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_what_does_not_divide_is_still_right(implementation, kind):
    """A mesh of two axes whose second lies along the second axis of the batch: gathered."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    gains = GAINS.reshape(16, 4)
    run = masses(implementation)
    place = NamedSharding(mesh, PartitionSpec(None, "b"))
    found = jax.jit(run)(jax.device_put(gains, place))
    check(found, run(gains), implementation, "forward")
    plan = bk.explain(bk.JansenRit(Ae=jax.device_put(gains, place) * u.mV), STEPS, 1.0 * u.ms)
    assert plan.devices == "each of 8 runs all lanes: no argument is split along the leading axis of the batch"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device(implementation, kind):
    """So the script of a cluster runs on a laptop."""
    mesh, run = mesh_of(kind, 1), WORK["gradient"](implementation)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(spread(GAINS, mesh))
    check(found, run(GAINS), implementation, "gradient")


def test_explain_tells_of_the_split():
    mesh = mesh_of()
    plan = bk.explain(bk.JansenRit(Ae=spread(GAINS, mesh) * u.mV), STEPS, 1.0 * u.ms)
    assert plan.devices == "8 share the lanes, 8 lanes each, along 'lanes'"
    assert "devices" in str(plan)
    one = bk.explain(bk.JansenRit(Ae=GAINS * u.mV), STEPS, 1.0 * u.ms)
    assert one.devices == ""
    assert "devices" not in str(one)
    assert plan.bytes_recorded * DEVICES == one.bytes_recorded


def test_the_devices_of_a_process_share_its_threads(monkeypatch):
    pytest.importorskip("llvmlite")
    from brainmass_kernels.backends.numba.layout import threads

    monkeypatch.setenv("NUMBA_NUM_THREADS", "16")
    assert threads() == 16
    with setting(SHARES, 8):
        assert threads() == 2


@pytest.mark.parametrize("within", [jax.jit, lambda run: run], ids=["in jit", "outside"])
def test_each_share_has_its_threads(monkeypatch, within):
    """A kernel of one of eight devices plans with an eighth of the threads."""
    pytest.importorskip("llvmlite")
    from brainmass_kernels.backends.numba import call

    told, threads = [], call.threads
    monkeypatch.setenv("NUMBA_NUM_THREADS", "16")
    monkeypatch.setattr(call, "threads", lambda: told.append(threads()) or told[-1])
    bk.clear_caches()
    within(masses("numba"))(spread(GAINS, mesh_of()))
    assert told[-1] == 2, told


def test_sensitivities(implementation):
    def run(gains):
        model = bk.JansenRit(Ae=gains * u.mV)
        _, slopes = bk.sensitivities(
            model, STEPS, 1.0 * u.ms, wrt=["Ae"], record=["eeg"], implementation=implementation
        )  # fmt: skip
        return {"slope": u.get_magnitude(slopes["Ae"]["eeg"])}

    check(run(spread(GAINS, mesh_of())), run(GAINS), implementation, "forward")


class TestMemory:
    def test_of_each_device(self, monkeypatch):
        """Devices that have memory of their own need room for their shares only."""
        from brainmass_kernels import memory

        def run(gains):
            return bk.explain(bk.JansenRit(Ae=gains * u.mV), 1000, 1.0 * u.ms, implementation="scan")

        monkeypatch.setattr(memory, "available", lambda: 100_000)
        with pytest.raises(MemoryError, match="256,000 bytes"):
            bk.simulate(bk.JansenRit(Ae=GAINS * u.mV), 1000, 1.0 * u.ms, implementation="scan")
        assert run(spread(GAINS, mesh_of())).bytes_recorded == 256_000 // DEVICES

    def test_of_a_gradient(self, monkeypatch):
        pytest.importorskip("llvmlite")
        from brainmass_kernels import memory

        monkeypatch.setattr(memory, "available", lambda: 20_000)
        run = masses("numba")
        bk.clear_caches()
        run(GAINS)  # the records alone fit
        with pytest.raises(MemoryError, match="a gradient over 40 steps of 64 lanes needs"):
            gradient(run)(GAINS)


class TestCompiled:
    """For chips that are not here; each of eight has an eighth of the lanes."""

    def text(self, chip, implementation, work):
        lanes = 8 * 1024
        gains = jax.ShapeDtypeStruct((lanes,), "float32", sharding=NamedSharding(mesh_of(), LEADING))
        run = masses(implementation, KEY) if work == "forward" else gradient(masses(implementation, KEY))
        compiled = bk.testing.compile_for(chip, run, gains, devices=DEVICES)
        return compiled.executable.as_text()

    @pytest.mark.parametrize("work", ["forward", "gradient"])
    def test_for_tpus(self, work):
        pytest.importorskip("libtpu")
        text = self.text("v5e", "mosaic_tpu", work)
        assert not COMMUNICATION.findall(text)
        assert "f32[8,128]" in next(line for line in text.splitlines() if "brainmass_kernels_tpu_forward" in line)

    @pytest.mark.parametrize("work", ["forward", "gradient"])
    def test_for_gpus(self, work):
        pytest.importorskip("jax_cuda13_plugin")
        pytest.importorskip("triton")
        text = self.text("h200", "mosaic_gpu", work)
        assert not COMMUNICATION.findall(text)
        assert re.search(r"f32\[40,1024\].* custom-call\(", text)

    def test_a_program_of_several_tpus_names_set_mesh(self):
        """JAX tells nothing of how traced arguments lie on automatic axes, and splits no kernel of TPUs itself."""
        gains = jax.ShapeDtypeStruct((8 * 1024,), "float32", sharding=NamedSharding(mesh_of(), LEADING))
        with setting(TARGET, Target("tpu", 1)):
            traced = jax.jit(masses("mosaic_tpu")).trace(gains)
            with pytest.raises(bk.Unsupported, match=r"for 8 TPUs .* `jax.set_mesh\(mesh\)`"):
                traced.lower(lowering_platforms=("tpu",))

    @pytest.mark.parametrize("devices", [0, -1, 2.5, "8", True])
    def test_a_wrong_number_of_chips(self, devices):
        pytest.importorskip("libtpu")
        with pytest.raises(ValueError, match=r"'devices' got .*, but takes a number of chips, at least 1"):
            bk.testing.compile_for("v5e", masses("mosaic_tpu"), GAINS, devices=devices)

    def test_a_mesh_of_another_size(self):
        pytest.importorskip("libtpu")
        gains = jax.ShapeDtypeStruct((LANES,), "float32", sharding=NamedSharding(mesh_of(), LEADING))
        with pytest.raises(ValueError, match="'devices' got 4, but an argument lies on a mesh of 8"):
            bk.testing.compile_for("v5e", masses("mosaic_tpu"), gains, devices=4)
