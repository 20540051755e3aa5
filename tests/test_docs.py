"""The pages' code runs, each page in its own namespace; what they show, name and link to is there."""

import html
import inspect
import json
import pathlib
import re
import subprocess
import sys
import types
import warnings

import jax
import pytest

import brainmass_kernels as bk
from benchmarks import emitted
from brainmass_kernels import spectra
from examples import gallery

ROOT = pathlib.Path(__file__).parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "brainmass_kernels"
PAGES = {str(p.relative_to(DOCS)): p.read_text() for p in sorted(DOCS.rglob("*.md"))}
# Pages whose code another test runs: tests/test_models_page.py, tests/test_gallery.py, tests/test_sweep_parts.py,
# tests/test_log_density.py, and below.
ELSEWHERE = {"models.md", "errors.md", "clusters.md", "posteriors.md", *gallery.PAGES}
WITH_CODE = [name for name, text in PAGES.items() if "```python" in text and name not in ELSEWHERE]
# What a guide shows; the pages on how the package works show emitted source, and text drawn in columns.
WIDTH = 80
INTERNALS = ["design.md", *(name for name in PAGES if name.startswith("internals/"))]
SLOW = {"brainmass.md", "fitting.md", "gradients.md", "linear.md", "networks.md"}
# What JAX asks of a tree's node.
OF_JAX = {"tree_flatten", "tree_unflatten"}


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in WITH_CODE])
def test_code_runs(page, tmp_path, monkeypatch):
    """With the promotion that users have, where the other tests have the strict one."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.S):
            exec(compile(block, page, "exec"), namespace)


def code(page: str, languages: str) -> list[str]:
    """The blocks of a page in these languages."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", PAGES[page], re.S | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("internals/")])
def test_code_fits_the_page(page):
    assert not [line for block in code(page, "python|bash") for line in block.splitlines() if len(line) > WIDTH]


# The errors ---------------------------------------------------------------------------------------------------------


def expected(message: str) -> re.Pattern:
    """What matches a message of the page, which is wrapped, and has ``...`` for what differs."""
    parts = " ".join(message.split()).split("...")
    return re.compile(".*".join(map(re.escape, parts)), re.S)


def raised(source: str, namespace: dict) -> list[str]:
    """The error that code ends with, or else its warnings, each as Python's last line would show it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(compile(source, "errors.md", "exec"), namespace)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
    return [f"{each.category.__name__}: {each.message}" for each in caught]


def test_code_raises_the_error_below_it():
    pytest.importorskip("llvmlite", reason="one error is that of numba's implementation")
    namespace: dict = {}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGES["errors.md"], re.S | re.M)
    assert [language for language, _ in blocks[1:]] == ["python", "text"] * (len(blocks) // 2)
    (_, start), *blocks = blocks
    assert not raised(start, namespace)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for (_, source), (_, message) in zip(blocks[::2], blocks[1::2]):
            found = raised(source, namespace)
            assert any(expected(message.strip()).fullmatch(" ".join(each.split())) for each in found), (source, found)


# The site -----------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not {page for page in PAGES if f": {page}\n" not in navigation}


@pytest.mark.parametrize("page", INTERNALS)
def test_files_that_are_named_are_there(page):
    named = re.findall(r"\b[a-z_\d/]+\.(?:py|json)\b|(?<=`)[\w/]+/(?=`)", PAGES[page])
    assert not {name for name in named if not any((place / name).exists() for place in (ROOT, PACKAGE))}


@pytest.mark.parametrize("page", INTERNALS)
def test_names_of_the_code_are_in_the_code(page):
    source = "\n".join(path.read_text() for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py"))
    named = set(re.findall(r"`(?:\w+\.)*([A-Z][\w]{3,}|_?[a-z]+(?:_[a-z]+)+)`", PAGES[page]))
    assert not named - set(re.findall(r"\w+", source))


# The API ------------------------------------------------------------------------------------------------------------


def is_ours(x) -> bool:
    return str(getattr(x, "__module__", "")).startswith("brainmass_kernels")


def public(module) -> dict:
    """Classes and functions by name; of `spectra`, those that are defined there."""
    found = {n: x for n, x in vars(module).items() if not n.startswith("_") and is_ours(x)}
    return {n: x for n, x in found.items() if module is bk or x.__module__ == module.__name__}


def test_every_public_name_is_in_the_api():
    pages = "".join(text for name, text in PAGES.items() if name.startswith("api/"))
    listed = set(re.findall(r"^::: brainmass_kernels\.(?:\w+\.)*(\w+)$", pages, re.M))
    assert {"spectra", *public(bk)} <= listed


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages, built strictly."""
    pytest.importorskip("mkdocstrings", reason="the documentation's tools are in the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("function", [bk.simulate, bk.fit, bk.log_density, bk.sweep, bk.sensitivities, spectra.welch])
def test_the_site_shows_signatures_and_parameters(site, function):
    pages = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    (name,) = {f"{module}.{function.__name__}" for module in ("brainmass_kernels", function.__module__)} & set(
        re.findall(r'<h\d id="([\w.]+)"', pages)
    )
    entry = pages[pages.index(f' id="{name}"') :].partition('<div class="doc doc-object ')[0]
    signature, _, lists = (html.unescape(re.sub(r"<[^>]+>", "", part)) for part in entry.partition("doc-section-title"))
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", signature)
        assert re.search(rf"^\W*{parameter}\s", lists, re.M), parameter


@pytest.mark.slow
def test_types_of_the_site_are_types(site):
    """No sentence stands for a type, and no markup is left raw."""
    for page in site.glob("api/*/index.html"):
        text = page.read_text()
        assert "``" not in text
        for item in re.findall(r'<li class="doc-section-item[^>]*>(.*?)<div class="doc-md-description">', text, re.S):
            kind = " ".join(html.unescape(re.sub(r"<[^>]+>|\N{EN DASH}", "", item)).split())
            for alternative in re.sub(r"\[[^]]*\]|\(.*\)", "", kind).split(" | "):
                words = [word for word in alternative.split() if word.isalpha()]
                assert len(words) <= 1, (page, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("coupling strength", "networks/"),
        ("levenberg_marquardt", "fitting/"),
        ("signalV", "coming_from/"),
        ("NotPointwise", "errors/"),
        ("checkpoint_every", "api/simulation/"),
        ("Epileptor", "api/library/"),
        ("PeakFrequency", "api/statistics/"),
    ],
)
def test_the_search_has(site, words, place):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    texts = [f"{entry['title']} {entry['text']}" for entry in entries if entry["location"].startswith(place)]
    assert all(any(word in text for text in texts) for word in words.split())


@pytest.mark.slow
def test_the_site_shows_every_public_name_and_method(site):
    shown = {name for page in site.glob("api/*/*.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())}
    shown |= {name.removeprefix("brainmass_kernels.") for name in shown}

    def is_shown(kind: type, method: str) -> bool:
        """Of the class itself, or of the base that says what the method does."""
        owners = [owner for owner in kind.__mro__ if is_ours(owner)]
        return any({f"{c.__name__}.{method}", f"{c.__module__}.{c.__name__}.{method}"} & shown for c in owners)

    missing = []
    for module in (bk, spectra):
        for name, x in public(module).items():
            missing += [] if {f"{module.__name__}.{name}", f"{x.__module__}.{x.__name__}"} & shown else [name]
            missing += [f"{name}.{n}" for n in methods(x) if not is_shown(x, n)]
    assert not missing


def methods(x) -> list[str]:
    """Public methods and properties of a class that are written in the package."""
    if not inspect.isclass(x):
        return []
    ours = {n: m for owner in x.__mro__ if is_ours(owner) for n, m in vars(owner).items()}
    kinds = (property, classmethod, staticmethod, types.FunctionType)
    return [n for n, m in ours.items() if isinstance(m, kinds) and not n.startswith("_") and n not in OF_JAX]


# What is emitted ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_source_that_is_shown_is_what_is_compiled():
    """If not, ``python -m benchmarks.emitted`` writes the pages anew."""
    pytest.importorskip("triton", reason="Triton's compiler is in the extra `ledger`")
    check = [sys.executable, "-m", "benchmarks.emitted", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lines_are_shortened_where_nothing_is_lost():
    assert emitted.shown("\n@a\nf(c0, c1, c2, c3)\nf(c0, c1, c3, c4)") == "@a\nf(c0, ..., c3)\nf(c0, c1, c3, c4)"
    assert emitted.shown("\n@a\nx1\nx2\nx3\nx4\ny\ny\ny\nx1\nx2\nx4\nx8").splitlines() == [
        "@a", "x1", "...  # 2 more", "x4", "y", "y", "y", "x1", "x2", "x4", "x8",
    ]  # fmt: skip
