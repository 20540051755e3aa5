"""The source of Jansen-Rit on CPUs and for Triton, for the documentation: ``python -m benchmarks.emitted``.

It rewrites the text between ``<!-- emitted: numba forward -->`` and ``<!-- end -->`` in docs/internals; a test holds
the pages against it. Needs llvmlite and triton, and no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import linecache
import re
from pathlib import Path
from unittest import mock

import brainunit as u
import jax
import jax.numpy as jnp

import brainmass_kernels as bk
from brainmass_kernels.backends.numba import lanes, layout
from brainmass_kernels.backends.numba.call import SOURCES

PAGES = Path(__file__).parents[1] / "docs" / "internals"
# In so many lanes a lane block is as wide as it gets, whatever the number of threads up to 64.
LANES = 16384
_LIST = re.compile(r"\b([a-z_]+)\d+(|_\d+)(?:, \1\d+\2\b)+")
_PLACE = re.compile(r"<!-- emitted: (\w+) (\w+) -->\n(?:```py\n.*?```\n)?<!-- end -->", re.S)


def sources() -> dict[tuple[str, str], str]:
    """The module that each implementation compiles, by its name and "forward" or "adjoint"."""

    def loss(C, implementation):
        run = bk.simulate(
            bk.JansenRit(C=C), 10_000, 0.1 * u.ms, inputs={"E_inp": 220 * u.Hz}, every=10,
            implementation=implementation,
        )  # fmt: skip
        return jnp.mean(run["eeg"].mantissa ** 2)

    C = jax.ShapeDtypeStruct((LANES,), jnp.float32)
    # As on a machine of vectors of 32 bytes and a second cache of 512 KiB, whatever this one is.
    with mock.patch.object(lanes, "wide_vectors", return_value=False), mock.patch.object(layout, "REPLAY", 256 * 1024):
        jax.jit(jax.grad(loss), static_argnums=1).lower(C, "numba")
    bk.testing.compile_for("sm_80", jax.grad(lambda C: loss(C, "triton")), C)
    return {(name, kind): _text(name, kind) for name in ("numba", "triton") for kind in ("forward", "adjoint")}


def _text(implementation: str, kind: str) -> str:
    named = re.compile(rf"<?brainmass_kernels_{implementation}_(runtime_)?{kind}_\w+>?")
    sources = SOURCES | {name: "".join(linecache.getlines(name)) for name in linecache.cache}
    texts = [text for name, text in sources.items() if named.fullmatch(name)]
    # Triton has a forward kernel with checkpoints as well.
    return min(texts, key=len)


def shown(text: str) -> str:
    """What a page shows of a module: its functions, without the entry that XLA calls, and without repetition."""
    functions = text[text.index("def task" if "def task" in text else "\n@") :].split("\n\n\ndef handler", 1)[0]
    return "\n".join(_shortened([_LIST.sub(_ends, line) for line in functions.strip().splitlines()]))


def _ends(names: re.Match) -> str:
    """A list of names as its first and last, if they are four or more and evenly numbered."""
    listed = names.group().split(", ")
    return f"{listed[0]}, ..., {listed[-1]}" if len(listed) > 3 and _even(listed) else names.group()


def _shortened(lines: list[str]) -> list[str]:
    """Lines of which four or more in a row are evenly numbered, as the first and the last; arithmetic as it is."""
    short, k = [], 0
    while k < len(lines):
        end = k + 1
        while end < len(lines) and "fma" not in lines[k] and _even(lines[k : end + 1]):
            end += 1
        end = end if end - k > 3 else k + 1
        group, indent = lines[k:end], " " * (len(lines[k]) - len(lines[k].lstrip()))
        if len(group) == 1:
            short += group
        elif group[0] == group[-1]:
            short += [group[0], f"{indent}...  # {len(group) - 1} more of the same"]
        else:
            short += [group[0], f"{indent}...  # {len(group) - 2} more", group[-1]]
        k = end
    return short


def _even(texts: list[str]) -> bool:
    """Whether texts differ in numbers alone, each of which grows by the same from one to the next."""
    numbers = [[int(n) for n in re.findall(r"\d+", text)] for text in texts]
    alike = {re.sub(r"\d+", "0", text) for text in texts}
    if len(alike) > 1:
        return False
    return len({tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(numbers)}) == 1


def updated(page: str, emitted: dict[tuple[str, str], str]) -> str:
    """A page with the sources that belong between its marks."""

    def place(mark: re.Match) -> str:
        implementation, kind = mark.groups()
        source = shown(emitted[implementation, kind])
        return f"<!-- emitted: {implementation} {kind} -->\n```py\n{source}\n```\n<!-- end -->"

    return _PLACE.sub(place, page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and say which pages are out of date")
    check = parser.parse_args(argv).check
    emitted, stale = sources(), 0
    for path in (PAGES / "numba.md", PAGES / "triton.md"):
        page = path.read_text()
        if updated(page, emitted) == page:
            continue
        stale += 1
        print(f"{path} {'is out of date' if check else 'written'}")
        if not check:
            path.write_text(updated(page, emitted))
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
