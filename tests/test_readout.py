"""Sensors: readouts of networks against numpy on the stored trajectory, and lead fields matched by name."""

import bz2
import re
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
import scipy.signal
from jax.sharding import NamedSharding, PartitionSpec

import brainmass_kernels as bk
from brainmass_kernels import recording

REGIONS, SENSORS = 4, 3
RNG = np.random.default_rng(0)
WEIGHTS = RNG.uniform(0.1, 1.0, (REGIONS, REGIONS))
GAIN = RNG.normal(0.0, 1.0, (SENSORS, REGIONS))
CHANNELS, LABELS = ("Fz", "Cz", "Pz"), ("a", "b", "c", "d")


def network(k=((0.1,), (0.2,))):
    w = jnp.asarray([0.3, 0.5, 0.6, 0.45], jnp.result_type(float))
    return bk.Network(bk.Hopf(w=w, a=0.1), WEIGHTS, source="x", k=jnp.asarray(k), target="x_inp")


def simulate(record, steps=120, model=None, **more):
    arguments = {"noise": {"x": 0.3 / u.ms**0.5}, "key": jax.random.key(0), "implementation": "scan"}
    model = network() if model is None else model
    return bk.simulate(model, steps, 1 * u.ms, record=record, **{**arguments, **more})


def assert_near(got, want, tolerance=1e-12):
    got, want = np.asarray(u.get_magnitude(got)), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * abs(want).max())


EEG = bk.Readout(GAIN, of="x", sensors=CHANNELS, regions=LABELS)
RECORD = {
    "x": "x",
    "eeg": EEG,
    "covariance": bk.Covariance(of=EEG),
    "power": bk.Spectrum([50.0, 100.0], of=EEG),
    "mean": bk.Mean(of=EEG.average_reference()),
    "slow": bk.Convolved([0.5, 0.5], of=EEG, tr=4 * u.ms),
}


@pytest.fixture(scope="module")
def run():
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(recording, "BLOCK", 1)
        assert bk.explain(network(), 120, 1 * u.ms, record=RECORD).block == 32
        return simulate(RECORD)


class TestAgainstTheTrajectory:
    def test_records_and_statistics(self, run):
        eeg = np.einsum("tai,si->tas", np.asarray(run["x"]), GAIN)
        assert_near(run["eeg"], eeg)
        assert_near(run["covariance"], [np.cov(eeg[:, i].T, bias=True) for i in range(2)])
        freqs, power = scipy.signal.periodogram(eeg, 1000.0, window="hann", axis=0)
        assert_near(run["power"], power[[6, 12]])
        assert freqs[6] == 50.0
        assert_near(run["mean"], (eeg - eeg.mean(-1, keepdims=True)).mean(0))
        slow = 0.5 * (eeg + np.concatenate([np.zeros_like(eeg[:1]), eeg[:-1]]))
        assert_near(run["slow"], slow[3::4])

    def test_it_is_a_record_over_time(self, run):
        with jax.enable_x64(True):
            _, power = run.psd("eeg", segment=40 * u.ms)
        x = np.asarray(run["eeg"])
        theirs = scipy.signal.welch(x, 1000.0, nperseg=40, axis=0)
        assert_near(power, theirs[1])
        np.testing.assert_array_equal(run.axes["eeg"] / u.ms, run.ts / u.ms)

    def test_tables_and_files(self, tmp_path, run):
        pytest.importorskip("xarray")
        data = run.to_xarray()
        assert data["eeg"].dims == ("time", "lane", "sensor")
        assert tuple(data["sensor"].values) == CHANNELS
        assert data["covariance"].dims == ("lane", "sensor", "sensor_2")
        assert data["power"].dims == ("frequency", "lane", "sensor")
        assert data["slow"].dims == ("slow_time", "lane", "sensor")
        table = run.to_dataframe("eeg")
        np.testing.assert_array_equal(table["eeg"][1]["Pz"], np.asarray(run["eeg"])[:, 1, 2])
        run.save(tmp_path / "r.npz")
        read = bk.Result.load(tmp_path / "r.npz")
        assert jax.tree.structure(read) == jax.tree.structure(run)
        np.testing.assert_array_equal(read["eeg"], run["eeg"])

    @pytest.mark.slow
    def test_a_figure(self, run):
        with jax.enable_x64(True):
            page = run.plot()
        legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in page.axes if ax.get_legend()]
        assert legends[0][:2] == ["lane 0, Fz", "lane 0, Cz"]

    def test_units(self):
        model = bk.Network(bk.JansenRit(), np.ones((3, 3)), source="eeg", k=1 * u.Hz / u.mV, target="E_inp")
        gain = np.eye(3)
        record = {
            "own": bk.Readout(gain),
            "named": bk.Readout(gain, unit=u.uvolt),
            "product": bk.Readout(gain * u.volt / u.second, of="M"),
            "converted": bk.Readout(gain * 1e-3, unit=u.uvolt, of="eeg"),
            "scaled": bk.Readout(2.0 * gain * u.uvolt / u.mV, unit=u.mV),
        }
        found = bk.simulate(model, 4, 1 * u.ms, record={"eeg": "eeg", **record}, implementation="scan")
        eeg = np.asarray(found["eeg"] / u.mV)
        assert found["own"].unit == u.mV
        assert found["named"].unit == u.uvolt
        np.testing.assert_allclose(found["own"] / u.mV, eeg, rtol=1e-6)
        assert found["product"].unit.has_same_dim(u.volt * u.mV / u.second)
        np.testing.assert_allclose(found["converted"] / u.uvolt, 1e-3 * eeg, rtol=1e-6)
        np.testing.assert_allclose(found["scaled"] / u.mV, 2e-3 * eeg, rtol=1e-6)
        with pytest.raises(ValueError, match=r"'unit' got T, but a matrix in Hz of a quantity in mV gives"):
            bk.simulate(model, 4, 1 * u.ms, record=bk.Readout(gain * u.Hz, unit=u.tesla))

    @pytest.mark.slow
    def test_gradients_in_the_matrix_and_the_network(self, monkeypatch, x64):
        monkeypatch.setattr(recording, "BLOCK", 1)

        def loss(gain, k):
            eeg = bk.Readout(gain, of="x")
            found = simulate({"eeg": eeg, "c": bk.Correlation(of=eeg)}, 72, network(k))
            return jnp.sum(jnp.sin(found["eeg"])) + jnp.sum(found["c"][:, 0, 1:])

        gain, k = jnp.asarray(GAIN), jnp.array([[0.1], [0.2]])
        loss = jax.jit(loss)
        slopes, e = jax.grad(loss, (0, 1))(gain, k), 1e-5
        by = e * np.random.default_rng(3).normal(0.0, 1.0, gain.shape)
        want = (loss(gain + by, k) - loss(gain - by, k)) / 2
        assert float(jnp.sum(slopes[0] * by)) == pytest.approx(float(want), rel=1e-6)
        want = (loss(gain, k + e) - loss(gain, k - e)) / 2
        assert float(jnp.sum(slopes[1]) * e) == pytest.approx(float(want), rel=1e-6)

    @pytest.mark.slow
    def test_nothing_of_all_regions_is_stored(self, monkeypatch):
        """A run of 16 networks of 64 regions, recorded at 2 sensors: less memory than one signal of all regions."""
        monkeypatch.setattr(recording, "BLOCK", 1)
        weights, gain = np.ones((64, 64)), np.ones((2, 64))
        steps = 20_000

        def fun(k):
            model = bk.Network(bk.Hopf(w=0.4), weights, source="x", k=k, target="x_inp")
            return bk.simulate(model, steps, 1 * u.ms, record=bk.Readout(gain), implementation="scan").records

        analysis = jax.jit(fun).lower(jnp.zeros((16, 1))).compile().memory_analysis()
        assert analysis.output_size_in_bytes == pytest.approx(4 * steps * 16 * 2, rel=0.01)
        assert analysis.temp_size_in_bytes < 0.2 * 4 * steps * 16 * 64

    @pytest.mark.slow
    def test_over_devices(self):
        def run(k):
            record = {"eeg": EEG, "fc": bk.Correlation(of=EEG)}
            return dict(simulate(record, 40, network(k)).records)

        k = jnp.linspace(0.1, 0.3, 16)[:, None]
        mesh = jax.make_mesh((8,), ("networks",), devices=jax.devices()[:8])
        spread, want = jax.device_put(k, NamedSharding(mesh, PartitionSpec("networks"))), run(k)
        for found in (run(spread), jax.jit(run)(spread)):
            for name, x in want.items():
                assert not found[name].sharding.is_fully_replicated
                assert_near(found[name], x, 1e-4)

    def test_of_a_group(self):
        model = bk.Network(
            {"relay": (bk.Hopf(), 1), "cortex": (bk.JansenRit(), 3)},
            couplings=[bk.Coupling(WEIGHTS, k=1.0 * u.Hz / u.mV, source="cortex.eeg", target="cortex.E_inp")],
        )  # fmt: skip
        record = {"all": "cortex.eeg", "eeg": bk.Readout(GAIN[:, :3], of="cortex.eeg")}
        found = bk.simulate(model, 20, 1 * u.ms, record=record, implementation="scan")
        assert_near(found["eeg"], np.asarray(found["all"].mantissa, float) @ GAIN[:, :3].T, 1e-5)

    def test_a_sweep(self, tmp_path):
        pytest.importorskip("xarray")
        model = bk.Network(bk.Hopf(w=0.4, a=0.1), WEIGHTS, source="x", k=0.1, target="x_inp")
        record = {"v": bk.Variance(of=EEG), "m": bk.Mean()}
        more: dict[str, Any] = {"initial": {"x": 0.3}, "record": record, "implementation": "scan"}
        over = {"coupling.k": np.array([0.1, 0.2, 0.3])}
        grid = bk.sweep(model, over, 40, 1 * u.ms, out=tmp_path / "s.nc", **more)
        one = bk.simulate(model, 40, 1 * u.ms, **more)
        assert_near(grid["v"][0], one["v"], 1e-5)
        assert grid["v"].shape == (3, SENSORS)


# Montages and names -------------------------------------------------------------------------------------------------


class TestMontages:
    def test_references(self):
        average = EEG.average_reference()
        np.testing.assert_allclose(average.matrix, GAIN - GAIN.mean(0), atol=1e-15)
        assert average.sensors == CHANNELS
        against = EEG.reference("Cz")
        np.testing.assert_allclose(against.matrix, GAIN[[0, 2]] - GAIN[1])
        assert against.sensors == ("Fz", "Pz")
        assert EEG.pick(["Pz", "Fz"]).sensors == ("Pz", "Fz")
        np.testing.assert_array_equal(EEG.pick([2]).matrix, GAIN[2:])

    def test_what_a_montage_leaves_without_gain(self):
        """Contacts each beside one region."""
        contacts = bk.Readout(np.eye(4) + 0.5 * np.eye(4, k=1), sensors=["A1", "A2", "A3", "A4"], regions=LABELS)
        assert contacts.pick(["A1", "A2"]).silent_regions == (3,)
        alike = bk.Readout(np.ones((2, 2)), sensors=["A1", "A2"]).bipolar()
        assert (alike.silent_sensors, alike.silent_regions) == ((0,), (0, 1))

    def test_bipolar(self):
        found = EEG.bipolar([("Fz", "Cz"), (2, 0)])
        assert found.sensors == ("Fz-Cz", "Pz-Fz")
        np.testing.assert_allclose(found.matrix, GAIN[[0, 2]] - GAIN[[1, 0]])
        gain = RNG.normal(0.0, 1.0, (6, REGIONS))
        shafts = bk.Readout(gain, sensors=["A'1", "B10", "A'2", "B09", "A'4", "B11"]).bipolar()
        assert shafts.sensors == ("A'1-A'2", "B10-B11", "B09-B10")
        np.testing.assert_allclose(shafts.matrix, gain[[0, 1, 3]] - gain[[2, 5, 1]])

    def test_of_a_traced_matrix(self, x64):
        def total(gain):
            return jnp.sum(bk.Readout(gain, sensors=CHANNELS).average_reference().bipolar([("Fz", "Cz")]).matrix)

        want = np.zeros_like(GAIN)
        want[:2] = [[1.0], [-1.0]]
        np.testing.assert_allclose(jax.grad(total)(jnp.asarray(GAIN)), want, atol=1e-15)

    def test_regions_by_name(self):
        found = EEG.matched(["d", "b", "a", "c"])
        np.testing.assert_array_equal(found.matrix, GAIN[:, [3, 1, 0, 2]])
        found = EEG.matched(["d", "thalamus", "a"], missing="zero", extra="drop")
        np.testing.assert_array_equal(found.matrix, np.stack([GAIN[:, 3], np.zeros(3), GAIN[:, 0]], 1))
        assert found.regions == ("d", "thalamus", "a")
        assert found.silent_regions == (1,)
        # And from there on, in whatever order.
        assert found.matched(["thalamus", "a", "d"]).silent_regions == (0,)
        assert found.bipolar([("Fz", "Cz")]).silent_regions == (1,)

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: EEG.matched(["a", "b", "thal", "c", "d"]), "'labels' has regions without a gain: thal. Subcort"),
            (lambda: EEG.matched(["a", "b"]), "'labels' lacks regions of the lead field: c, d; extra='drop'"),
            (lambda: EEG.matched(["a", "a", "b"]), "'labels' has a more than once"),
            (lambda: EEG.matched(["a"], missing="nan"), "'missing' got 'nan', but takes 'error' or 'zero'"),
            (lambda: bk.Readout(GAIN).matched(LABELS), "matched by name, but the regions of this Readout have none"),
            (lambda: EEG.reference("Oz"), "'sensor' got 'Oz', which is none of the sensors: Fz, Cz, Pz"),
            (lambda: EEG.pick([7]), "'sensors' got 7, but takes names, or numbers of the 3 sensors"),
            (lambda: EEG.bipolar(), "names of a shaft and a number, such as A1 and A2, but there is Fz"),
            (lambda: EEG.bipolar([]), "'pairs' got [], but takes pairs of sensors"),
            (lambda: bk.Readout(GAIN[0]), "'matrix' got shape (4,), but takes (S, N), sensors by regions"),
            (lambda: bk.Readout(GAIN, sensors=["Fz"]), "'sensors' got 1 names, but 'matrix' has 3"),
            (lambda: bk.Readout(GAIN, regions="abcd"), "'regions' got 'abcd', but takes 4 names"),
            (lambda: bk.Readout(GAIN, sensors=["A", "A", "B"]), "'sensors' has A more than once"),
            (lambda: bk.Readout(GAIN * np.nan, sensors=CHANNELS), "not finite, of the sensors 'Fz', 'Cz', 'Pz'"),
            (lambda: bk.Readout(GAIN, silent_sensors="Cz", sensors=CHANNELS), "'silent_sensors' got 'Cz', but 'matrix"),
        ],
    )
    def test_what_is_refused(self, call, says):
        with pytest.raises(ValueError, match=re.escape(says)):
            call()

    def test_zeros_are_named(self):
        gain = GAIN.copy()
        gain[1] = 0.0
        with pytest.raises(
            ValueError, match=r"zeros alone for the sensors 'Cz'. Of a reference electrode say so by sil"
        ):
            bk.Readout(gain, sensors=CHANNELS)
        assert bk.Readout(gain, sensors=CHANNELS, silent_sensors="Cz").average_reference().sensors == CHANNELS
        gain = GAIN.copy()
        gain[:, 2] = 0.0
        with pytest.raises(ValueError, match=r"zeros alone for the regions 'c'. Of a subcortical region say so by sil"):
            bk.Readout(gain, regions=LABELS)
        with pytest.raises(ValueError, match="zeros alone for the regions number 2"):
            bk.Readout(gain)
        bk.Readout(gain, silent_regions=2)

    def test_other_types(self):
        with pytest.raises(TypeError, match="'unit' got str, but takes a unit"):
            bk.Readout(GAIN, unit="mV")
        with pytest.raises(TypeError, match="'matrix' got str"):
            bk.Readout("gain.npy")

    def test_in_a_run(self):
        with pytest.raises(ValueError, match=r"'matrix' got shape \(3, 3\), of 3 regions, but the network has 4"):
            simulate(bk.Readout(GAIN[:, :3]))
        with pytest.raises(ValueError, match="a Readout of a model without a network"):
            bk.simulate(bk.Hopf(), 20, 1 * u.ms, record=bk.Readout(GAIN))
        with pytest.raises(ValueError, match="unknown record 'z'"):
            simulate(bk.Readout(GAIN, of="z"))


# Lead fields --------------------------------------------------------------------------------------------------------


class TestFiles:
    def test_npz(self, tmp_path):
        np.savez(tmp_path / "gain.npz", gain=GAIN, sensors=CHANNELS, regions=LABELS)
        found = bk.Readout.from_npz(tmp_path / "gain.npz", LABELS[::-1], of="x", unit=u.uvolt)
        np.testing.assert_array_equal(found.matrix, GAIN[:, ::-1])
        assert (found.sensors, found.of, found.unit) == (CHANNELS, "x", u.uvolt)
        np.savez(tmp_path / "bad.npz", gain=GAIN, sensors=CHANNELS)
        with pytest.raises(ValueError, match=r"bad\.npz: no array 'regions' .*it holds gain \(3, 4\), sensors \(3,\)"):
            bk.Readout.from_npz(tmp_path / "bad.npz", LABELS)
        (tmp_path / "cut.npz").write_bytes((tmp_path / "gain.npz").read_bytes()[:90])
        with pytest.raises(ValueError, match=r"cut\.npz"):
            bk.Readout.from_npz(tmp_path / "cut.npz", LABELS)
        with pytest.raises(FileNotFoundError, match="is no file"):
            bk.Readout.from_npz(tmp_path / "none.npz", LABELS)

    # Of ten vertices, none in region c.
    MAPPING = np.array([0, 1, 3, 3, 0, 1, 1, 3, 0, 1])
    SURFACE = RNG.normal(0.0, 1.0, (SENSORS, 10))
    PLACES = "\n".join(f"{name} {k} 0.5 1e-2" for k, name in enumerate(CHANNELS))

    def want(self, how="sum"):
        groups = [self.SURFACE[:, k == self.MAPPING] for k in range(REGIONS)]
        return np.stack([getattr(group, how)(1) if group.size else np.zeros(SENSORS) for group in groups], 1)

    @pytest.mark.parametrize("kind", ["npy", "mat", "brainstorm"])
    def test_tvb(self, tmp_path, kind):
        """The formats of tvb-data: a gain of vertices, places of sensors, the region of each vertex."""
        gain = tmp_path / f"projection.{'npy' if kind == 'npy' else 'mat'}"
        if kind == "npy":
            np.save(gain, self.SURFACE)
        elif kind == "mat":
            scipy.io.savemat(gain, {"ProjectionMatrix": self.SURFACE})
        else:
            normals = RNG.normal(0.0, 1.0, (10, 3))
            normals /= np.linalg.norm(normals, axis=1, keepdims=True)
            aside = np.cross(normals, RNG.normal(0.0, 1.0, (10, 3)))  # no gain along these
            three = self.SURFACE[:, :, None] * normals + aside
            scipy.io.savemat(gain, {"Gain": three.reshape(SENSORS, 30), "GridOrient": normals, "GridLoc": normals})
        sensors, mapping = tmp_path / "eeg.txt.bz2", tmp_path / "mapping.txt"
        sensors.write_bytes(bz2.compress(self.PLACES.encode()))
        mapping.write_text("\n".join(map(str, self.MAPPING)))
        found = bk.Readout.from_tvb(gain, sensors, mapping, LABELS, missing="zero", of="x")
        np.testing.assert_allclose(found.matrix, self.want(), atol=1e-12)
        assert (found.sensors, found.regions, found.silent_regions) == (CHANNELS, LABELS, (2,))

    def test_tvb_in_memory(self):
        call = bk.Readout.from_tvb
        found = call(self.SURFACE, CHANNELS, self.MAPPING, LABELS, combine="mean", missing="zero")
        np.testing.assert_allclose(found.matrix, self.want("mean"))
        np.testing.assert_array_equal(call(GAIN, CHANNELS, None, LABELS).matrix, GAIN)
        for arguments, says in (
            ((self.SURFACE, CHANNELS, self.MAPPING, LABELS), "'labels' has regions without a gain: c. Subcortical"),
            ((self.SURFACE, CHANNELS[:2], self.MAPPING, LABELS), "'gain' got shape (3, 10), but takes (S, V) of the 2"),
            ((self.SURFACE, CHANNELS, self.MAPPING[:9], LABELS), "'mapping' got shape (9,), but takes (10,)"),
            ((self.SURFACE, CHANNELS, self.MAPPING, LABELS[:3]), "'mapping' counts from 0 to 3, but 'labels' has 3"),
            ((self.SURFACE, CHANNELS, None, LABELS), "'mapping' got None, but 'gain' has 10 columns"),
        ):
            with pytest.raises(ValueError, match=re.escape(says)):
                call(*arguments)
        with pytest.raises(ValueError, match="'combine' got 'max', but takes 'mean' or 'sum'"):
            call(self.SURFACE, CHANNELS, self.MAPPING, LABELS, combine="max")


def forward(orientation: str) -> tuple[dict[str, Any], np.ndarray]:
    """A forward solution as MNE has it, of two hemispheres of four and three sources; and gains along the normals."""
    rng = np.random.default_rng(5)
    src = [{"vertno": np.array([1, 4, 6, 9]), "nn": rng.normal(0.0, 1.0, (12, 3))},
           {"vertno": np.array([0, 4, 8]), "nn": rng.normal(0.0, 1.0, (9, 3))}]  # fmt: skip
    three = rng.normal(0.0, 1.0, (4, 7, 3))
    normals = np.concatenate([each["nn"][each["vertno"]] for each in src])
    along = {"free": np.einsum("svk,vk->sv", three, normals), "surface": three[..., 2], "fixed": three[..., 0]}
    data = three[..., 0] if orientation == "fixed" else three.reshape(4, -1)
    channels = [("EEG 002", 2, 107), ("MEG 01", 1, 112), ("EEG 001", 2, 107), ("MEG 02", 1, 201)]
    chs = [{"ch_name": name, "kind": kind, "unit": unit} for name, kind, unit in channels]
    fwd = {
        "sol": {"data": data, "row_names": [name for name, *_ in channels]}, "src": src,
        "source_ori": 1 if orientation == "fixed" else 2, "surf_ori": orientation != "free",
        "info": {"chs": chs[::-1]},  # the names say which is which
    }  # fmt: skip
    return fwd, along[orientation]


class TestMNE:
    PARCELS = {"v-rh": (1, [4, 8, 11]), "u-lh": (0, [1, 2, 9]), "w-rh": (1, [0])}
    COLUMNS = [[5, 6], [0, 3], [4]]

    @pytest.mark.parametrize("orientation", ["fixed", "surface", "free"])
    def test_a_forward_solution(self, orientation):
        fwd, along = forward(orientation)
        found = bk.Readout.from_mne(fwd, self.PARCELS, of="x")
        want = np.stack([along[[0, 2]][:, each].mean(1) for each in self.COLUMNS], 1)
        np.testing.assert_allclose(found.matrix, want)
        assert found.sensors == ("EEG 002", "EEG 001")
        assert found.regions == ("v-rh", "u-lh", "w-rh")
        found = bk.Readout.from_mne(fwd, self.PARCELS, kind="grad", combine="sum", dipole=2e-9 * u.amp * u.meter / u.mV)
        want = np.stack([along[[3]][:, each].sum(1) for each in self.COLUMNS], 1)
        np.testing.assert_allclose((found.matrix * u.mV).to_decimal(u.tesla / u.meter), 2e-9 * want, rtol=1e-6)

    def test_what_is_refused(self):
        fwd, _ = forward("fixed")
        for labels, kind, says in (
            ({**self.PARCELS, "thalamus": (0, [3])}, "eeg", "'labels' has regions without a gain: thalamus. Subcort"),
            ({"x": (2, [3])}, "eeg", "'labels' has x in source space 2, but 'fwd' has 2"),
            ({"x": (0, [3])}, "eeg", "'labels' has no region with a source in the lead field"),
            (self.PARCELS, "ecog", "'kind' got 'ecog', but takes 'eeg', 'mag', 'grad'"),
        ):
            with pytest.raises(ValueError, match=re.escape(says)):
                bk.Readout.from_mne(fwd, labels, kind=kind)
        fwd["sol"]["row_names"] = [f"{name}x" for name in fwd["sol"]["row_names"]]
        with pytest.raises(ValueError, match="'fwd' has no information on the channels EEG 002x"):
            bk.Readout.from_mne(fwd, self.PARCELS)
        fwd["sol"]["data"] = fwd["sol"]["data"][:, :5]
        with pytest.raises(ValueError, match="'fwd' has 5 columns, but its 7 sources give 7"):
            bk.Readout.from_mne(fwd, self.PARCELS)

    @pytest.mark.slow
    def test_a_solution_of_mne(self, tmp_path):
        mne = pytest.importorskip("mne", reason="a forward solution is made by MNE, in the extra `eeg`")
        rng = np.random.default_rng(8)
        names = ["Fz", "Cz", "Pz", "Oz"]
        electrodes = dict(zip(names, 0.09 * np.array([[0, 0.6, 0.8], [0, 0, 1], [0, -0.6, 0.8], [0, -1, 0]])))
        montage = mne.channels.make_dig_montage(electrodes, coord_frame="head")
        info = mne.create_info(names, 100.0, "eeg").set_montage(montage)
        sphere = mne.make_sphere_model((0.0, 0.0, 0.0), 0.09, info, verbose="error")
        places = rng.normal(0.0, 1.0, (6, 3))
        nn = places / np.linalg.norm(places, axis=1, keepdims=True)
        pos = {"rr": sphere["r0"] + 0.05 * nn, "nn": nn}
        src = mne.setup_volume_source_space(pos=pos, sphere=sphere, verbose="error")
        fwd = mne.make_forward_solution(info, None, src, sphere, meg=False, eeg=True, verbose="error")
        parcels = {"b": (0, [5, 2]), "a": (0, [0, 1, 4])}
        found = bk.Readout.from_mne(fwd, parcels, dipole=1e-8 * u.amp * u.meter / u.mV, unit=u.uvolt, of="eeg")
        three = fwd["sol"]["data"].reshape(4, 6, 3)
        normal = np.einsum("svk,vk->sv", three, fwd["src"][0]["nn"][fwd["src"][0]["vertno"]])
        want = np.stack([normal[:, [2, 5]].mean(1), normal[:, [0, 1, 4]].mean(1)], 1)
        np.testing.assert_allclose(found.matrix / (u.volt / u.mV), 1e-8 * want, rtol=1e-6)
        fixed = mne.convert_forward_solution(fwd, force_fixed=True, use_cps=False, verbose="error")
        again = bk.Readout.from_mne(fixed, parcels, dipole=1e-8 * u.amp * u.meter / u.mV)
        np.testing.assert_allclose(again.matrix / (u.volt / u.mV), 1e-8 * want, rtol=1e-5)
        mne.write_forward_solution(tmp_path / "a-fwd.fif", fwd, verbose="error")
        read = bk.Readout.from_mne(tmp_path / "a-fwd.fif", parcels, dipole=1e-8 * u.amp * u.meter / u.mV)
        np.testing.assert_allclose(read.matrix / (u.volt / u.mV), 1e-8 * want, rtol=1e-4)
        label = mne.Label([0, 1], hemi="lh", name="one-lh", subject="x")
        np.testing.assert_allclose(bk.Readout.from_mne(fwd, [label]).matrix[:, 0], normal[:, :2].mean(1), rtol=1e-6)
