"""Pages of fits and sweeps: what is on them, and how a browser shows them."""

import html.parser
import importlib.metadata
import importlib.util
import shutil
import sys

import brainunit as u
import numpy as np
import pytest
from matplotlib.image import imread

import brainmass_kernels as bk
from brainmass_kernels import cli, plots, report

NAME = "<b>evoked</b> & co"
RUN = {"duration": 200, "dt": 1 * u.ms, "every": 5, "implementation": "scan"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def evoked() -> bk.Fit:
    drive = {"E_inp": (60.0 + 200.0 * (np.arange(200) // 20 == 1).astype(np.float32)) * u.Hz}
    measured = bk.simulate(bk.JansenRit(Ae=3.6 * u.mV), RUN["duration"], RUN["dt"], inputs=drive, every=5)["eeg"]
    target = bk.TimeSeries(measured, name=NAME)
    settings = {**RUN, "transient": None, "realisations": 1, "starts": 2, "steps": 2, "inputs": drive}
    return bk.fit(bk.JansenRit(), target, {"Ae": (2.6, 5.0), "C": (100, 180)}, **settings)


@pytest.fixture(scope="module")
def grid() -> bk.Sweep:
    over = {"E_inp": np.linspace(100.0, 300.0, 3) * u.Hz, "C": np.linspace(120.0, 150.0, 4)}
    return bk.sweep(bk.JansenRit(Ae=3.5 * u.mV), over, 1 * u.second, 1 * u.ms, every=10, implementation="scan")


@pytest.fixture(scope="module")
def pages(evoked, grid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    evoked.report(folder / "fit.html")
    grid.report(folder / "sweep.html")
    return folder


class Read(html.parser.HTMLParser):
    """The rows of a page's tables, its headings, its text, and every address in it."""

    def __init__(self, text: str):
        super().__init__()
        self.tag, self.pictures = "", 0
        self.rows, self.headings, self.words, self.addresses = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        self.pictures += tag == "img"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        assert tag not in ("script", "iframe", "object", "embed", "b")

    def handle_data(self, data):
        self.words.append(data.strip())
        if self.tag in ("td", "th") and self.rows:
            self.rows[-1][-1] += data.strip()
        if self.tag in ("h1", "h2") and data.strip():
            self.headings.append(data)

    def row(self, name: str) -> list[str]:
        (row,) = [row[1:] for row in self.rows if row[0] == name]
        return row


def read(path) -> Read:
    page = Read(path.read_text(encoding="utf-8"))
    assert all(address.startswith("data:") for address in page.addresses)
    return page


def test_a_fit(evoked, pages):
    page = read(pages / "fit.html")
    assert page.headings[0] == f"JansenRit fitted to {NAME}"
    assert page.pictures == 2
    errors = evoked.standard_errors()
    error, value = (np.asarray(x["Ae"].to_decimal(u.mV))[0] for x in (errors, evoked.parameters))
    assert page.row("Ae (mV)") == [f"{value:.4g}", f"{error:.2g}", "2.6 to 5"]
    assert page.row("C")[1:] == [f"{np.asarray(errors['C'])[0]:.2g}", "100 to 180"]
    assert page.row("be") == ["100 Hz"]
    assert page.row("E_inp") == ["60 to 260 Hz"]
    assert page.row("duration") == ["0.2 s"]
    assert page.row("implementation") == ["scan"]
    assert page.row("reason") == [evoked.reason]
    assert page.row("computed with") == [f"brainmass-kernels {bk.__version__}, jax {_version('jax')}"]
    assert f"numpy {np.__version__}" in page.row("page written with")[0]
    assert "Command" not in page.headings


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def test_a_fit_of_several_targets_has_a_row_for_each(evoked, tmp_path):
    series = np.asarray(evoked.target.values.mantissa).ravel()
    several = bk.TimeSeries(np.stack([series, 0.5 * series, 0.2 * series]) * u.mV)
    settings = {**RUN, "transient": None, "realisations": 1, "starts": 1, "steps": 1, "inputs": evoked.inputs}
    fit = bk.fit(bk.JansenRit(), several, {"Ae": (2.6, 5.0)}, **settings)
    report.write_fit(fit, tmp_path / "fit.html", "brainmass-kernels fit --target 'a b.csv'")
    page = read(tmp_path / "fit.html")
    values = fit.parameters["Ae"].to_decimal(u.mV)
    errors = fit.standard_errors()["Ae"].to_decimal(u.mV)
    for i in range(3):
        assert page.row(str(i + 1)) == [f"{values[i]:.4g} ± {errors[i]:.2g}", f"{fit.rms[i]:.4g}"]
    assert page.headings[-1] == "Command"
    assert "brainmass-kernels fit --target 'a b.csv'" in page.words


def test_a_fit_without_standard_errors_says_why(evoked, tmp_path):
    def low(result):
        return result["eeg"].mantissa.mean(0) ** 2

    settings = {**RUN, "transient": None, "realisations": 1, "starts": 1, "steps": 1}
    bk.fit(bk.JansenRit(), low, {"Ae": (2.6, 5.0)}, **settings).report(tmp_path / "fit.html")
    page = read(tmp_path / "fit.html")
    assert page.pictures == 1
    assert page.row("Ae (mV)")[1] == ""
    assert any("There are no standard errors: " in text for text in page.words)


def test_what_the_target_does_not_determine_is_said(evoked, monkeypatch, tmp_path):
    nothing = {"Ae": np.array([np.nan]) * u.mV, "C": np.array([4.0])}
    monkeypatch.setattr(bk.Fit, "standard_errors", lambda self: nothing)
    evoked.report(tmp_path / "fit.html")
    page = read(tmp_path / "fit.html")
    assert page.row("Ae (mV)")[1] == "not determined"
    assert page.row("C")[1] == "4"
    assert any("does not determine" in text for text in page.words)


def test_a_sweep(grid, pages):
    page = read(pages / "sweep.html")
    assert page.headings[0] == "JansenRit over E_inp and C"
    assert page.pictures == 1
    assert page.row("Ae") == ["3.5 mV"]
    assert [row for row in page.rows if row[0] == "C"] == [["C", "120", "150", "", "4"]]
    assert [row for row in page.rows if row[0] == "E_inp"] == [["E_inp", "100", "300", "Hz", "3"]]
    low, high = (f"{x:.4g}" for x in (grid["eeg_mean"].mantissa.min(), grid["eeg_mean"].mantissa.max()))
    assert page.row("eeg_mean") == [f"{low} to {high}", "mV", "3 x 4"]
    assert page.row("every") == ["10 steps"]
    assert page.row("reason") == ["asked for by name"]
    assert page.row("seconds") == [f"{grid.seconds:.1f}, compilation included"]


def test_a_sweep_that_a_picture_cannot_show(tmp_path):
    over = {"Ae": np.linspace(3, 4, 2) * u.mV, "C": np.linspace(120.0, 150.0, 2), "r": np.linspace(0.5, 0.6, 2)}
    grid = bk.sweep(bk.JansenRit(), over, 20, 1 * u.ms, record=bk.Mean(), implementation="scan")
    ok = np.ones(grid.shape, bool)
    ok[0, 1, 0] = False
    grid.save(tmp_path / "sweep.npz")
    loaded = bk.Sweep.load(tmp_path / "sweep.npz")
    bk.Sweep(loaded.axes, loaded.records, {}, loaded.about, ok).report(tmp_path / "sweep.html")
    page = read(tmp_path / "sweep.html")
    assert page.pictures == 0
    assert "There is no figure, as the sweep has 3 parameters, and a picture shows one or two." in page.words
    assert "1 of 8 points did not stay finite, and are blank." in page.words
    assert page.row("reason") == ["asked for by name"]
    assert not [row for row in page.rows if row[0] == "seconds"]


def test_the_command_line_writes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["sweep", "--over", "C=100:150:3", "--duration", "0.2", "--transient", "0.1", "--implementation", "scan"]
    assert cli.main([*argv, "--report", "my page.html", "--quiet"]) == 0
    assert "wrote sweep.npz, sweep.png and my page.html" in capsys.readouterr().out
    page = read(tmp_path / "my page.html")
    assert f"brainmass-kernels {' '.join(argv)} --report 'my page.html' --quiet" in page.words


def test_what_is_refused(evoked, grid, tmp_path, monkeypatch):
    for what in (evoked, grid):
        with pytest.raises(ValueError, match=r"'path' got page.txt, but takes a name that ends in .html"):
            what.report("page.txt")
        with pytest.raises(ValueError, match=r"'path' got absent/page.html, but there is no folder"):
            what.report("absent/page.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for what, extra in ((evoked, "fit"), (grid, "sweep")):
        with pytest.raises(ImportError, match=rf"jinja2, which is not installed: pip install .*\[{extra}\]"):
            what.report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# In a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no browser drew the pages: playwright is not installed")
    if BROWSER is None:
        pytest.skip("no browser drew the pages: there is no Chromium, as of Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


def look(browser, path, width: int, media: str = "screen") -> tuple[np.ndarray, list[str]]:
    """A picture of a whole page at some width, and everything that went wrong in it."""
    wrong = []
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:80]}"))
    # A page needs nothing beside it: any request but for itself is wrong, whether or not its failure is told in time.
    own = (path.as_uri(), "data:")
    page.on("request", lambda request: wrong.extend([] if request.url.startswith(own) else [request.url]))
    page.emulate_media(media=media)
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    wrong += page.evaluate("[...document.images].filter(x => !x.naturalWidth).map(x => 'not drawn: ' + x.alt)")
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        wrong.append("wider than the window")
    page.screenshot(path=path.with_suffix(".png"), full_page=True)
    page.close()
    return imread(path.with_suffix(".png"))[..., :3], wrong


@pytest.mark.parametrize(("width", "media"), [(1000, "screen"), (390, "screen"), (700, "print")])
def test_a_browser_shows_it(browser, pages, width, media):
    for name in ("fit.html", "sweep.html"):
        drawn, wrong = look(browser, pages / name, width, media)
        assert wrong == []
        assert drawn.shape[1] == width
        # Text everywhere, and the colours of the figures: red of the fit, yellow of the map.
        dark = (drawn.max(-1) < 0.4).any(1)
        assert max(np.diff(np.flatnonzero(dark))) < 800
        red, green, blue = np.moveaxis(drawn, -1, 0)
        coloured = (red - blue > 0.35) & (red - green > 0.35 if name == "fit.html" else green > 0.7)
        assert coloured.sum() > 100


def test_a_browser_tells_what_is_wrong(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<p style='width: 2000px'>wide</p><img src='absent.png' alt='a figure'><script>console.error('oh')</script>"
    )
    _, wrong = look(browser, tmp_path / "bad.html", 390)
    assert {"oh", "not drawn: a figure", "wider than the window"} <= set(wrong)
    assert any("absent.png" in text for text in wrong)


def test_the_figure_of_steps(evoked):
    (ax,) = plots.steps_figure(evoked).axes
    np.testing.assert_array_equal(ax.get_lines()[-1].get_ydata(), evoked.losses[:, 0, evoked.best_start[0]])
