"""The package's docstrings as the documentation's tools read them: ``name : what it is`` is a name and its text.

NumPy's style, which they expect, has a type behind the colon. The types are in the signatures.
"""

import re
from collections.abc import Iterator, Mapping

import griffe

_NAMED = ("Parameters", "Attributes", "Raises")
_NAME = r"\*{0,2}[A-Za-z_][\w.]*"
_NAMES = re.compile(rf"{_NAME}(, {_NAME})*")


def rewritten(text: str, types: Mapping[str, str]) -> str:
    """A docstring whose lists have one name an entry, each text below its name, and end where a paragraph begins.

    ``types`` are those of names that no signature shows.
    """
    new, section = [], ""
    for block in _blocks(text.splitlines()):
        if len(block) > 1 and re.fullmatch("-{3,}", block[1]):
            section = block[0]
            new += ["", *block[:2], *_entries(section, block[2:], types)]
        elif section in (*_NAMED, "Returns") and not block[0].startswith(" "):
            section = ""
            new += ["", "Notes", "-----", *block]
        else:
            new += ["", *block]
    return "\n".join(new[1:])


def _blocks(lines: list[str]) -> list[list[str]]:
    """The paragraphs of a text, without the blank lines between them."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        blocks[-1].append(line) if line.strip() else blocks.append([])
    return [block for block in blocks if block]


def _entries(
    section: str, lines: list[str], types: Mapping[str, str]
) -> list[str]:
    if section in _NAMED:
        return [
            line
            for entry in _split(lines)
            for line in _one_a_name(entry, types)
        ]
    return _returned(lines) if section == "Returns" else lines


def _split(lines: list[str]) -> list[list[str]]:
    """Entries of a list: a line that is not indented, and the indented ones below it."""
    entries: list[list[str]] = []
    for line in lines:
        entries[-1].append(line) if line.startswith(
            " "
        ) and entries else entries.append([line])
    return entries


def _one_a_name(entry: list[str], types: Mapping[str, str]) -> list[str]:
    names, colon, meaning = entry[0].partition(" : ")
    if not _NAMES.fullmatch(names):
        return entry
    text = [*([f"    {meaning}"] if colon else []), *entry[1:]]
    return [
        line
        for name in names.split(", ")
        for line in (name + types.get(name, ""), *text)
    ]


def _returned(lines: list[str]) -> list[str]:
    """Names with their texts, a type with its text, or a text alone, whose type is that of the signature."""
    entries = _split(lines)
    if all(
        _NAMES.fullmatch(entry[0].partition(" : ")[0]) and " : " in entry[0]
        for entry in entries
    ):
        names = [
            name
            for entry in entries
            for name in entry[0].partition(" : ")[0].split(", ")
        ]
        return [
            line
            for entry in entries
            for line in _one_a_name(entry, dict.fromkeys(names, " :"))
        ]
    if len(entries) == 1 and re.fullmatch(rf"`?{_NAME}`?", lines[0]):
        return [lines[0].strip("`"), *lines[1:]]
    return [":", *(f"    {line}" for line in lines)]


def _fields(kind: griffe.Class) -> dict[str, str]:
    """Type and default of each field of a model, which the decorator gives it and no signature shows."""
    owners = (
        [kind, *kind.mro()]
        if "model" in {str(d.value).rpartition(".")[2] for d in kind.decorators}
        else []
    )
    defaults = {
        name: str(member.value)
        for owner in reversed(owners)
        for name, member in owner.attributes.items()
        if member.annotation is not None and member.value is not None
    }
    return {
        name: f" : {'Quantity' if 'u.' in default else 'ArrayLike'}, default {default}"
        for name, default in defaults.items()
    }


def _described(obj: griffe.Object) -> Iterator[griffe.Object]:
    if obj.docstring:
        yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _described(member)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        for obj in _described(pkg):
            types = _fields(obj) if isinstance(obj, griffe.Class) else {}
            obj.docstring.value = rewritten(obj.docstring.value, types)
