"""The package's docstrings as the documentation's tools read them: ``name : what it is`` is a name and its text.

NumPy's style, which they expect, has a type behind the colon. The types are in the signatures.
"""

import re

import griffe

_LISTS = ("Parameters", "Attributes", "Raises")


def rewritten(text: str) -> str:
    """A docstring whose lists have each text below its name, and end where a paragraph begins."""
    lines, section, new = text.splitlines(), "", []
    for k, line in enumerate(lines):
        if k + 1 < len(lines) and re.fullmatch("-{3,}", lines[k + 1]):
            section = line
        elif section in _LISTS and line[:1].strip("- "):
            names, colon, meaning = line.partition(" : ")
            if colon:
                line = f"{names}\n    {meaning}"
            elif not lines[k - 1].strip():
                section, line = "", f"Notes\n-----\n{line}"
        new.append(line)
    return "\n".join(new)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)
