"""What people expect of a result: a mapping, tables, figures, files, and what a notebook shows."""

import dataclasses
import pickle
import sys
import warnings
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import display, plots
from brainmass_kernels.spectra import welch

FREQS = np.arange(4.0, 20.0, 2.0)
RUN = {
    "duration": 1 * u.second,
    "dt": 1 * u.ms,
    "inputs": {"E_inp": 220 * u.Hz},
    "every": 5,
    "implementation": "scan",
}
RECORD = {"eeg": "eeg", "M": "M", "power": bk.Spectrum(FREQS), "mean": bk.Mean(), "scan": bk.Average(100 * u.ms)}


def run(record: Any = None, **fields) -> bk.Result:
    return bk.simulate(bk.JansenRit(**fields), record=record, **RUN)


@pytest.fixture(scope="module")
def one() -> bk.Result:
    """One mass."""
    return run(["eeg", "M"])


@pytest.fixture(scope="module")
def many() -> bk.Result:
    """2 x 3 masses, with statistics."""
    return run(RECORD, C=jnp.array([120.0, 135.0, 150.0]), Ae=jnp.array([[3.0], [3.25]]) * u.mV)


@pytest.fixture(scope="module")
def regions() -> bk.Result:
    """Two networks of three regions with delays."""
    network = bk.Network(
        bk.Hopf(w=0.6), np.ones((3, 3)), source="x", k=np.array([[0.1], [0.2]]), delays=2 * u.ms, target="x_inp"
    )
    return bk.simulate(network, 50, 0.5 * u.ms, record=["x", "y"], implementation="scan")


@pytest.fixture(scope="module")
def grid() -> bk.Sweep:
    return bk.sweep(bk.JansenRit(), {"C": np.array([120.0, 135.0])}, **RUN)


def only(result: bk.Result, *names: str) -> bk.Result:
    """The result as if it had these records alone."""
    return dataclasses.replace(result, records={n: result.records[n] for n in names})


# A mapping ----------------------------------------------------------------------------------------------------------


def test_a_result_is_a_mapping(many):
    assert [*many] == [*many.keys()] == [*dict(many)] == [*RECORD]
    assert len(many) == 5
    assert "eeg" in many
    assert "E" not in many
    assert many.get("E") is None
    assert all(x is many[name] for name, x in many.items())
    assert next(x.shape for x in many.values()) == (200, 2, 3)
    assert only(many)


def test_what_could_have_been_recorded_is_offered(many):
    with pytest.raises(
        ValueError, match=r"'E' was not recorded, only eeg, .*record='E', or record=\['eeg', 'M', 'E'\]"
    ):
        many["E"]
    with pytest.raises(KeyError, match="unknown record 'egg'; did you mean 'eeg'"):
        many["egg"]
    with pytest.raises(ValueError, match="only nothing: simulate takes record='eeg'"):
        only(many)["eeg"]


def test_it_stays_a_pytree(many):
    doubled = jax.tree.map(lambda x: 2 * x, many)
    np.testing.assert_array_equal(doubled["eeg"].mantissa, 2 * many["eeg"].mantissa)
    assert jax.tree.structure(jax.jit(lambda r: r)(many)) == jax.tree.structure(many)
    again = pickle.loads(pickle.dumps(many))
    assert jax.tree.structure(again) == jax.tree.structure(many)


def test_lanes_are_named_by_what_they_are(one, many, regions):
    assert one.lanes == ()
    assert many.lanes == ("lane_0", "lane_1")
    assert regions.lanes == ("lane", "region")
    _, slopes = bk.sensitivities(bk.Hopf(a=jnp.ones(2)), 5, 0.1 * u.ms, "a", record="x", implementation="scan")
    assert slopes["a"].lanes == ("lane",)
    assert slopes["a"].to_dataframe().shape == (5, 2)


# A spectrum ---------------------------------------------------------------------------------------------------------


def test_psd_is_welchs(many):
    freqs, power = many.psd("M", 0.5 * u.second)
    wanted_freqs, wanted = welch(many["M"], 5 * u.ms, 100)
    np.testing.assert_array_equal(freqs / u.Hz, wanted_freqs)
    np.testing.assert_array_equal(power / (u.mV**2 / u.Hz), np.asarray(wanted / (u.mV**2 / u.Hz)))
    assert power.shape == (51, 2, 3)
    freqs, power = many.psd()
    assert (freqs[1], power.unit) == (1.0 * u.Hz, u.mV**2 / u.Hz)  # all of a run that is shorter than 2 s
    assert abs(float(freqs[1:][np.argmax(power.mantissa[1:, 0, 1])] / u.Hz) - 10.0) < 1.5


def ringing(a) -> bk.Result:
    return bk.simulate(bk.Hopf(a=a, w=0.6), 100, 0.5 * u.ms, initial={"x": 1.0}, implementation="scan")


def test_psd_of_numbers_without_a_unit_under_vmap_and_grad():
    values = jnp.array([-0.1, 0.2])
    alone, mapped = ringing(values[1]), jax.vmap(ringing)(values)
    power, powers = alone.psd("x")[1], mapped.psd("x")[1]
    assert powers.shape == (2, 51)
    assert power.unit == 1 / u.Hz
    np.testing.assert_allclose(powers.mantissa[1], power.mantissa, rtol=1e-4, atol=1e-6)
    assert mapped.to_xarray()["x"].dims == ("mapped", "time")
    assert mapped.to_dataframe("x").shape == (100, 2)

    def total(x):
        return jnp.sum(dataclasses.replace(alone, records={"x": x}).psd()[1].mantissa)

    # Power grows with the square of a signal.
    slope = jax.grad(total)(alone["x"])
    np.testing.assert_allclose(jnp.vdot(slope, alone["x"]), 2 * total(alone["x"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("power",), ValueError, r"'name' got 'power', which is a statistic, but takes a record over time \(eeg, M\)"),
        (("E",), ValueError, "'E' was not recorded"),
        (("eeg", 2 * u.second), ValueError, "'segment' got 2 s, but takes 0.02 s to 1 s"),
        (("eeg", 2.0), ValueError, "'segment' got a plain float"),
    ],
)
def test_psd_refuses(many, arguments, error, says):
    with pytest.raises(error, match=says):
        many.psd(*arguments)


def test_a_spectrum_takes_four_records():
    short = bk.simulate(bk.Hopf(), 3, 0.1 * u.ms, implementation="scan")
    with pytest.raises(ValueError, match="'x' got 3 records, but psd takes 4 or more"):
        short.psd("x")


# Tables -------------------------------------------------------------------------------------------------------------


def test_xarray(many, regions):
    pytest.importorskip("xarray")
    data = many.to_xarray()
    assert data["eeg"].dims == ("time", "lane_0", "lane_1")
    assert data["power"].dims == ("frequency", "lane_0", "lane_1")
    assert data["mean"].dims == ("lane_0", "lane_1")
    assert data["scan"].dims == ("scan_time", "lane_0", "lane_1")
    assert (data["eeg"].attrs["units"], data["power"].attrs["units"]) == ("mV", "mV^2 / Hz")
    assert (data["time"].attrs["units"], data["frequency"].attrs["units"]) == ("ms", "Hz")
    np.testing.assert_array_equal(data["time"], many.ts / u.ms)
    np.testing.assert_array_equal(data["frequency"], FREQS)
    np.testing.assert_array_equal(data["eeg"], many["eeg"].mantissa)
    assert regions.to_xarray()["x"].dims == ("time", "lane", "region")
    named = many.to_xarray(lanes={"Ae": [3.0, 3.25] * u.mV, "C": [120.0, 135.0, 150.0]})
    assert named["eeg"].sel(Ae=3.25, C=135.0).shape == (200,)
    assert named["Ae"].attrs["units"] == "mV"
    assert "region" in regions.to_xarray(lanes={"k": [0.1, 0.2], "region": ["A", "B", "C"]})["x"].coords


def test_averages_alone_are_over_time(many):
    pytest.importorskip("xarray")
    assert only(many, "scan").to_xarray()["scan"].dims == ("time", "lane_0", "lane_1")


def test_a_table_of_one_mass(one):
    pytest.importorskip("pandas")
    table = one.to_dataframe()
    assert [*table.columns] == ["eeg (mV)", "M (mV)"]
    assert table.index.name == "time (ms)"
    np.testing.assert_array_equal(table.index, one.ts / u.ms)
    np.testing.assert_array_equal(table["M (mV)"], one["M"].mantissa)
    assert [*one.to_dataframe(long=True).columns] == ["time (ms)", "eeg (mV)", "M (mV)"]


def test_a_table_of_many_masses(many):
    pytest.importorskip("pandas")
    wide = many.to_dataframe(["eeg", "M"], lanes={"Ae": [3.0, 3.25] * u.mV, "C": [120.0, 135.0, 150.0]})
    assert wide.shape == (200, 12)
    assert wide.columns.names == ["record", "Ae (mV)", "C"]
    np.testing.assert_array_equal(wide["M (mV)"][3.25][150.0], many["M"][:, 1, 2].mantissa)
    long = many.to_dataframe("eeg", long=True)
    assert [*long.columns] == ["time (ms)", "lane_0", "lane_1", "eeg (mV)"]
    some = long[(long["lane_0"] == 1) & (long["lane_1"] == 2)]
    np.testing.assert_array_equal(some["eeg (mV)"], many["eeg"][:, 1, 2].mantissa)
    means = many.to_dataframe("mean")
    assert means.index.names == ["lane_0", "lane_1"]
    np.testing.assert_array_equal(means["mean (mV)"], many["mean"].mantissa.ravel())
    assert many.to_dataframe("power").index.name == "frequency (Hz)"
    alone = jax.tree.map(lambda x: x[0, 0], only(many, "mean"))
    assert dataclasses.replace(alone, lanes=()).to_dataframe().shape == (1, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: r.to_dataframe(), r"'names' got records of several axes \(eeg by time, .*mean by lane"),
        (lambda r: r.to_dataframe("egg"), "unknown record 'egg'; did you mean 'eeg'"),
        (lambda r: r.to_xarray(lanes=["C"]), r"'lanes' got C, but takes 2 names, of the axes of \(2, 3\)"),
        (lambda r: r.to_xarray(lanes=["C", "C"]), "'lanes' got C, C"),
        (lambda r: r.to_xarray(lanes=["time", "C"]), "share the name 'time'"),
        (lambda r: r.to_xarray(lanes=["eeg", "C"]), "share the name 'eeg'"),
        (
            lambda r: r.to_xarray(lanes={"Ae": [1.0], "C": [1, 2, 3]}),
            r"'lanes' got Ae of shape \(1,\), but takes \(2,\)",
        ),
    ],
)
def test_tables_refuse(many, call, says):
    pytest.importorskip("xarray")
    with pytest.raises(ValueError, match=says):
        call(many)


@pytest.mark.parametrize(("package", "method"), [("xarray", "to_xarray"), ("pandas", "to_dataframe")])
def test_without_a_package_its_extra_is_named(one, monkeypatch, package, method):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}.* pip install 'brainmass-kernels\[sweep\]'"):
        getattr(one, method)()


# Files --------------------------------------------------------------------------------------------------------------


class Range(bk.Reduction):
    """A statistic of the user's own, with an axis."""

    def start(self, like, sampling):
        return jnp.stack([like, like])

    def add(self, carry, x, first, sampling):
        return jnp.stack([jnp.minimum(carry[0], x.min(0)), jnp.maximum(carry[1], x.max(0))])

    def finish(self, carry, sampling):
        return carry

    def axis(self, ts, sampling):
        return np.array([0.0, 1.0])


def same_bits(got, want) -> bool:
    got, want = np.asarray(u.get_magnitude(got)), np.asarray(u.get_magnitude(want))
    return (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def test_to_disk_and_back(tmp_path, many, regions):
    statistics = run([bk.PeakFrequency(FREQS), bk.Crossings(6 * u.mV), Range(), bk.Variance(of="M")])
    for number, result in enumerate((many, regions, statistics)):
        path = tmp_path / f"{number}.npz"
        result.save(path)
        read = bk.Result.load(path)
        assert [*read] == [*result]
        for group in ("records", "final"):
            for name, x in getattr(result, group).items():
                assert same_bits(getattr(read, group)[name], x)
                assert u.get_unit(getattr(read, group)[name]) == u.get_unit(x)
        assert same_bits(read.ts, result.ts)
        for name, axis in result.axes.items():
            assert same_bits(read.axes[name], axis)
            assert u.get_unit(read.axes[name]) == u.get_unit(axis)
        assert read.lanes == result.lanes
        assert read.recordable == result.recordable
        if result is not statistics:
            assert jax.tree.structure(read) == jax.tree.structure(result)
    assert [*tmp_path.iterdir()] != []


def test_a_saved_run_continues_exactly(tmp_path, regions):
    regions.save(tmp_path / "r.npz")
    network = bk.Network(
        bk.Hopf(w=0.6), np.ones((3, 3)), source="x", k=np.array([[0.1], [0.2]]), delays=2 * u.ms, target="x_inp"
    )
    runs = [
        bk.simulate(network, 10, 0.5 * u.ms, initial=r.final, record="x", implementation="scan")
        for r in (regions, bk.Result.load(tmp_path / "r.npz"))
    ]
    assert same_bits(runs[0]["x"], runs[1]["x"])


def test_float64_stays_float64(tmp_path, x64):
    found = bk.simulate(bk.Hopf(), 5, 0.1 * u.ms, implementation="scan")
    found.save(tmp_path / "r.npz")
    with jax.enable_x64(False):
        read = bk.Result.load(tmp_path / "r.npz")
        assert read["x"].dtype == np.float64
        assert same_bits(read["x"], found["x"])


def test_what_is_no_saved_result_is_refused(tmp_path, one):
    one.save(tmp_path / "r.npz")
    whole = (tmp_path / "r.npz").read_bytes()
    place = whole.index(np.asarray(one["eeg"].mantissa).tobytes()[:64])
    for name, contents in {
        "cut": whole[: len(whole) // 2], "flipped": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        "empty": b"",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.npz").write_bytes(contents)
        with pytest.raises(
            ValueError, match=rf"{name}\.npz: not a result saved by .*damaged .*run the simulation again"
        ):
            bk.Result.load(tmp_path / f"{name}.npz")
    with np.load(tmp_path / "r.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "changed.npz", **{**arrays, "eeg_0": arrays["eeg_0"] + 1})
    with pytest.raises(ValueError, match=r"changed\.npz.*its checksum is that of other contents"):
        bk.Result.load(tmp_path / "changed.npz")
    with pytest.raises(FileNotFoundError, match="there is no file of that name"):
        bk.Result.load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"takes a name that ends in \.npz"):
        one.save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="there is no folder"):
        one.save(tmp_path / "absent" / "r.npz")
    bk.sweep(bk.Hopf(), {"a": np.array([0.1])}, 20, 0.1 * u.ms, implementation="scan").save(tmp_path / "sweep.npz")
    with pytest.raises(ValueError, match=r"it is a brainmass_kernels sweep"):
        bk.Result.load(tmp_path / "sweep.npz")
    with pytest.raises(ValueError, match=r"it is a brainmass_kernels result"):
        bk.Sweep.load(tmp_path / "r.npz")


# Figures ------------------------------------------------------------------------------------------------------------


def labels(page) -> list[tuple[str, str]]:
    return [(ax.get_xlabel(), ax.get_ylabel()) for ax in page.axes]


def test_a_figure_of_one_mass(one, tmp_path):
    page = one.plot(tmp_path / "one.png")
    assert labels(page) == [
        ("time (s)", "eeg (mV)"), ("time (s)", "M (mV)"), ("frequency (Hz)", "power of eeg (mV^2 / Hz)"),
        ("eeg (mV)", "M (mV)"),
    ]  # fmt: skip
    traces, _, spectrum, space = page.axes
    np.testing.assert_allclose(traces.get_lines()[0].get_ydata(), one["eeg"].mantissa)
    np.testing.assert_allclose(space.get_lines()[0].get_ydata(), one["M"].mantissa)
    assert spectrum.get_yscale() == "log"
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert not page.legends


def test_few_lanes_of_many_are_drawn(one):
    lanes = jax.tree.map(lambda x: jnp.stack([x] * 50, -1), only(one, "eeg"))
    found = dataclasses.replace(lanes, lanes=("lane",))
    page = found.plot()
    assert [len(ax.get_lines()) for ax in page.axes] == [plots.MAX_LANES] * 2
    assert "8 of 50 lanes" in page.get_suptitle()
    assert [text.get_text() for text in page.legends[0].get_texts()][::7] == ["lane 0", "lane 49"]
    np.testing.assert_allclose(page.axes[0].get_lines()[-1].get_ydata(), found["eeg"][:, -1].mantissa)


def test_a_figure_of_statistics(many, regions):
    shown = labels(many.plot())
    assert shown[2:5] == [("frequency (Hz)", "power (mV^2 / Hz)"), ("lane", "mean (mV)"), ("time (s)", "scan (mV)")]
    assert labels(only(many, "mean").plot()) == [("lane", "mean (mV)")]
    assert labels(many.plot(kind="states")) == [("eeg (mV)", "M (mV)")]
    assert labels(many.plot(kind="traces")) == [("time (s)", "eeg (mV)"), ("time (s)", "M (mV)")]
    assert [text.get_text() for text in regions.plot().legends[0].get_texts()][-1] == "lane 1, 2"


def test_a_mass_that_diverged_is_left_blank(one):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = jax.tree.map(lambda x: x * jnp.nan, one)
        assert len(broken.plot().axes) == 4


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("phase", "'kind' got 'phase', but takes 'traces', 'spectrum', 'states'"),
        ("states", "takes two records over time, but the run recorded eeg"),
    ],
)
def test_a_figure_refuses(one, kind, says):
    with pytest.raises(ValueError, match=says):
        only(one, "eeg").plot(kind=kind)


def test_sweeps_write_their_figure(tmp_path, grid):
    page = grid.plot(tmp_path / "grid.pdf")
    assert (tmp_path / "grid.pdf").stat().st_size > 1_000
    assert page.get_suptitle().startswith("JansenRit, 2 masses")


# Notebooks ----------------------------------------------------------------------------------------------------------


def test_tables_in_html(many, one, grid):
    for text in (many._repr_html_(), one._repr_html_()):
        assert "<td" in text
        assert ">eeg<" in text
        assert ">mV<" in text
    assert "(200, 2, 3)" in many._repr_html_()
    assert "120 to 135" in grid._repr_html_()
    assert "traced" not in grid._repr_html_()
    seen = []
    jax.jit(lambda C: seen.append(run(C=C)._repr_html_()))(135.0)
    assert ">eeg<" in seen[0]


def test_names_are_escaped(one):
    text = dataclasses.replace(one, records={"<script>alert(1)</script>": one["eeg"]})._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


@bk.model
class Odd(bk.Model):
    """A model whose parameter may be anything."""

    rate: Any = 2.0 * u.Hz

    states = {"x": u.mV}
    inputs = {"drive": 0.0 * u.mV}

    @staticmethod
    def drift(s, p, i):
        return {"x": p.rate * (i.drive - s.x)}


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (3.5 * u.Hz, "3.5"), (jnp.array([1.0, 4.0]) * u.Hz, "1 to 4"), (jnp.array([1.0, np.inf]) * u.Hz, "1 to inf"),
        (np.zeros(0) * u.Hz, "0 values"),
    ],
)  # fmt: skip
def test_models_in_html(rate, shown):
    text = Odd(rate=rate)._repr_html_()
    for part in (">Odd<", ">rate<", f">{shown}<", ">Hz<", "states x (mV); inputs drive (mV)"):
        assert part in text
    hollow = jax.tree.unflatten(jax.tree.structure(Odd()), [None] * len(jax.tree.leaves(Odd())))
    assert "NoneType" in display.model_table(hollow)


def test_networks_in_html():
    text = bk.Network(bk.Hopf(), np.ones((3, 3)), source="x", k=0.25)._repr_html_()
    for part in ("3 regions of Hopf", ">coupling.k<", ">0.25<", ">w<"):
        assert part in text


def test_a_figure_is_shown_without_pyplot(one):
    formatters = pytest.importorskip("IPython.core.formatters")
    data, about = formatters.DisplayFormatter().format(one.plot())
    assert data["image/png"].startswith(b"\x89PNG")
    assert about["image/png"]["width"] > 300


def test_a_line_that_is_rewritten(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def displayed(data, raw, display_id):
        shown.append(data["text/html"])
        return Handle()

    pytest.importorskip("IPython.display")
    monkeypatch.setattr("IPython.display.display", displayed)
    line = display.NotebookLine(1000)
    line(0, "<begins>")
    for step in range(1, 1001):
        line(step, f"step {step}")
    assert "&lt;begins&gt;" in shown[0]
    assert shown[-1] == "step 1000"
    assert len(shown) < 100


NOTEBOOK = [
    """
import brainunit as u, jax.numpy as jnp, brainmass_kernels as bk
fit = bk.fit(bk.Linear(gamma=-1.0), lambda r: (r["x"][-1] - 0.5) ** 2, {"gamma": (-2.0, -0.1)}, record="x", duration=20,
             dt=0.1 * u.ms, transient=None, starts=2, steps=12, realisations=1, implementation="scan",
             inputs={next(iter(bk.Linear.inputs)): 1.0}, progress=True)
""",
    "fit",
    "fit.plot()",
    'bk.simulate(bk.Hopf(), 50, 0.1 * u.ms, implementation="scan").plot()',
    "import matplotlib.pyplot as plt",
    "fit.plot()",
    "plt.get_fignums()",
    'bk.simulate(bk.Hopf(), 50, 0.1 * u.ms, implementation="scan")',
]


@pytest.mark.slow
def test_in_a_notebook(tmp_path):
    """Progress without widgets, a table for a fit, each figure once."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    sheet = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK])
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(sheet, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [cell.outputs for cell in sheet.cells]
    assert not [x for x in outputs[0] if x.output_type == "stream"]
    (progress,) = outputs[0]
    assert "step 12 of 12" in progress.data["text/plain"]
    assert "<progress" in progress.data["text/html"]
    assert ">gamma<" in outputs[1][0].data["text/html"]
    for shown in (outputs[2], outputs[3], outputs[5]):
        assert len(shown) == 1
        assert "image/png" in shown[0].data
    assert outputs[6][0].data["text/plain"] == "[]"
    assert ">x<" in outputs[7][0].data["text/html"]


def test_a_figure_of_an_unknown_kind_is_refused_by_its_name(tmp_path):
    result = bk.simulate(bk.Hopf(), 20, 0.1 * u.ms, implementation="scan", record="x")
    with pytest.raises(
        ValueError, match=r"'path' got .*run.xyz, but takes the name of a format of matplotlib: .*\.png"
    ):
        result.plot(tmp_path / "run.xyz")
    assert not list(tmp_path.iterdir())
