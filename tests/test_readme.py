"""The README's code runs, in order, in one namespace."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)


def test_python_blocks_run(capsys):
    namespace: dict = {}
    for block in code_blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "Result(eeg (200, 64)" in printed
    assert "implementation" in printed


@pytest.mark.parametrize("part", ["brainmass-kernels fit", "pytest"])
def test_both_commands_are_one_line_and_make_their_own_environment(part):
    (command,) = [line for block in code_blocks("bash") for line in block.splitlines() if part in line]
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
