"""The README's code prints what the README says, its two commands are whole, and it is short."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_code_prints_what_is_shown_below_it(capsys):
    for code, output in re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), {})
        assert capsys.readouterr().out == output
    assert len(code_blocks("python")) == 1


@pytest.mark.parametrize("part", ["brainmass-kernels fit", "pytest"])
def test_both_commands_are_one_line_and_make_their_own_environment(part):
    (command,) = [line for block in code_blocks("bash") for line in block.splitlines() if part in line]
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")


def test_it_fits_on_two_screens_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    assert not [link for link in re.findall(r"\]\(([\w./-]+)", README) if not (ROOT / link).exists()]


def test_the_version_to_cite_is_the_one_that_is_built():
    (built,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"\nversion: {built}\n" in (ROOT / "CITATION.cff").read_text()
