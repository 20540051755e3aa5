"""Tables of power spectra in text files: any common separator, decimal mark and encoding, columns in any order.

The names of the columns say what they are. A name of something else, or a column that could be row numbers, raises:
a fit would not reveal a wrong axis.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Sequence

import numpy as np

from .models.base import check_name

#: Fewest frequencies that determine the nuisances and a few parameters.
MIN_POINTS = 8
#: Names of an array or a column of frequencies, the likeliest first.
FREQ_NAMES = ("freqs_hz", "freqs", "freq", "frequencies", "frequency", "f", "hz")
_FREQ_WORDS = {*FREQ_NAMES, "hertz", "frequenz", "frequenzen", "fréquence", "fréquences", "frecuencia", "frecuencias",
               "frequenza", "frequenze", "frequência", "frequentie", "frekvens"}  # fmt: skip
_INDEX = re.compile(r"|unnamed: ?\d+|index|idx|level_\d|rows?|row\.?names?|rownum(ber)?|#|nr\.?|no\.?|n|id|obs|bins?")
#: First words in names of columns that hold no power.
_NO_POWER = {"time", "times", "lag", "latency", "period", "phase", "coherence", "coh", "plv", "omega", "sd", "std",
             "stdev", "sem", "stderr", "ci", "pvalue", "epoch", "trial", "sample", "samples"}  # fmt: skip
_LOGARITHM = re.compile(r"(^|[^a-z])(db|ln|log\d*)([^a-z]|$)")
_NUMBER = re.compile(r"[-+]?(\d+[.,]?\d*|[.,]\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_UNIT = re.compile(
    r"[\[(]?(-|%|[kmµμu]?hz|1/s|a\.?u\.?|db\S*"
    r"|[fpnuµμm]?[vt](olt)?s?([²2]|\^2|\*\*2)?( ?/ ?(hz|√hz|sqrt\(hz\)))?)?[\])]?",
    re.IGNORECASE,
)
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip

Row = tuple[int, list[str]]


def read(path: str, channel: str | Sequence[str] | None = None, encoding: str | None = None):
    """Frequencies (F,) in Hz, powers (n, F), and the names of the columns in ``channel``.

    Raises
    ------
    ValueError : naming the file, and the line or the column that is unreadable or ambiguous
    """
    rows = _rows(decode(path, encoding), path)
    names, rows = _names(rows, path)
    if not rows:
        raise ValueError(f"{path}: holds no numbers")
    # A column may have a name and no values.
    width = max(len(_trimmed(rows[0][1])), min(len(_trimmed(names or [])), *(len(row) for _, row in rows)))
    if width < 2:
        raise ValueError(f"{path}: {width} column, and two or more are needed: frequency, power, ...")
    columns = _columns(rows, width, path)
    names = None if names is None else _fitted(names, columns, path)
    axis = _frequencies(names, columns, path)
    chosen, asked = _powers(names, columns, axis, channel, path)
    values = _values([columns[i] for i in (axis, *chosen)], [_title(names, i) for i in (axis, *chosen)], rows, path)
    return values[0], values[1:], asked


def decode(path: str, encoding: str | None) -> str:
    """A file's text: in ``encoding``, else by its byte-order mark, else in UTF-8, else in Latin-1."""
    with open(path, "rb") as file:
        data = file.read()
    codec = encoding or next((codec for mark, codec in _BOMS if data.startswith(mark)), None)
    if codec is None and b"\0" in data:
        # ASCII in UTF-16 without a mark has each second byte zero.
        codec = "utf-16-le" if data[1:200:2].count(0) > data[:200:2].count(0) else "utf-16-be"
    try:
        text = data.decode(codec or "utf-8")
    except LookupError as error:
        raise ValueError(f"'encoding' got {encoding!r}, but takes one that Python has, such as 'latin1'") from error
    except UnicodeError as error:
        if codec is not None:
            raise ValueError(
                f"{path}: cannot be read as text in {codec} ({error}); 'encoding' takes another"
            ) from error
        text = data.decode("latin-1")
    return text.removeprefix("\ufeff")


def listed(channel: str | Sequence[str]) -> list[str]:
    """The named channels, each once."""
    names = [channel] if isinstance(channel, str) else list(channel) if isinstance(channel, Iterable) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'channel' got {channel!r}, but takes a name, or several")
    return list(dict.fromkeys(map(str, names)))


def is_frequency(name: str) -> bool:
    """Whether a column's name means frequencies in Hz: ``freq``, ``Frequency (Hz)``, ``f [Hz]``, ``Hz``, ..."""
    name = name.strip().lower()
    words = re.findall(r"[^\W_]+", name)
    if not words or "/" in name.replace("/hz", ""):
        return False
    return words[0] in _FREQ_WORDS and set(words[1:]) <= {"hz", "in", "hertz", "axis"}


def _rows(text: str, path: str) -> list[Row]:
    """The cells of each line that is not empty, with its number."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    separator = None
    if match := re.match(r'"?sep=(.)', lines[0], re.IGNORECASE):
        separator, lines[0] = match[1], ""
    separator = separator or _separator([line for line in lines if not _is_comment(line)])
    for i in (i for i, line in enumerate(lines) if _is_comment(line)):
        # NumPy and others write the names in a comment.
        bare = lines[i].strip().lstrip("#%").strip(" ")
        cells = bare.split(separator)
        lines[i] = bare if len(cells) > 1 and any(map(is_frequency, cells)) else ""
    if separator == " ":
        lines = [line.strip() for line in lines]
    try:
        reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error
    return [(number, row) for number, row in rows if any(row)]


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith(("#", "%"))


def _separator(lines: list[str]) -> str:
    """The separator in nearly all lines that begin with a number, else in the first line."""
    numbers = [line for line in lines if re.match(r"[\s\"',;]*[-+]?\.?\d", line)]
    numbers = numbers or [line for line in lines if line.strip()][:1]
    for separator in "\t;|,":
        if numbers and sum(separator in line for line in numbers) >= 0.9 * len(numbers):
            return separator
    return " " if any(re.search(r"\S\s+\S", line) for line in numbers) else ","


def _names(rows: list[Row], path: str) -> tuple[list[str] | None, list[Row]]:
    """The names of the columns, ``None`` if they have none, and the rows below them."""
    first = next((i for i, (_, row) in enumerate(rows) if all(_is_number(x) for x in row if x)), None)
    head = rows[: 1 if first is None else first]
    named = [i for i, (_, row) in enumerate(head) if len(row) > 1 and any(map(is_frequency, row))]
    if named:
        # Lines above the names describe the file; a line below them may have units.
        at = named[-1]
        fuller = next((number for number, row in head[:at] if sum(map(bool, row)) > sum(map(bool, head[at][1]))), None)
        if fuller is not None and at - 1 not in named:
            raise ValueError(
                f"{path}: line {fuller} names more columns than line {head[at][0]}; one line of names is taken"
            )
        if at - 1 in named and all(_UNIT.fullmatch(cell) for cell in head[at][1]):
            return head[at - 1][1], rows[at + 1 :]
        below = at + 1 < len(head) and all(_UNIT.fullmatch(cell) for cell in head[at + 1][1])
        return head[at][1], rows[at + 1 + below :]
    texts = [number for number, row in head if not any(map(_is_number, row))]
    if len(texts) > 1:
        raise ValueError(
            f"{path}: lines {texts[0]} to {texts[-1]} hold no numbers, and none of them names a column 'freq'"
        )
    return (head[0][1], rows[1:]) if texts and len(head) == 1 else (None, rows)


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


def _trimmed(row: list[str]) -> list[str]:
    """A row without the empty cells after trailing separators."""
    return row[: max((i + 1 for i, cell in enumerate(row) if cell), default=0)]


def _columns(rows: list[Row], width: int, path: str) -> list[list[str]]:
    for number, row in rows:
        if len(row) < width or len(_trimmed(row)) > width:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, and {width} in the lines before")
    return [[row[i] for _, row in rows] for i in range(width)]


def _fitted(names: list[str], columns: list[list[str]], path: str) -> list[str]:
    """The name of each column; R writes none for the column of row names."""
    width = len(columns)
    names = [name.strip("'\" ") for name in names]
    if len(names) == width - 1 and _counts(columns[0]):
        return ["", *names]
    if len(names) < width or any(names[width:]):
        count = len(_trimmed(names))
        hint = "; is a comma both the separator and the decimal mark?" if width == 2 * count else ""
        raise ValueError(f"{path}: {count} names ({', '.join(names)}) for {width} columns{hint}")
    return names[:width]


def _title(names, i: int) -> str:
    return f"column '{names[i]}'" if names and names[i] else f"column {i + 1}"


def _is_index(name: str) -> bool:
    return _INDEX.fullmatch(name.lower()) is not None


def _counts(cells: list[str]) -> bool:
    """Whether cells are increasing whole numbers, like row numbers."""
    return _are_whole(cells) and _rise(cells)


def _are_whole(cells: list[str]) -> bool:
    return all(_is_number(cell) and _number(cell).is_integer() for cell in cells)


def _rise(cells: list[str]) -> bool:
    return all(map(_is_number, cells)) and bool((np.diff([_number(cell) for cell in cells], prepend=-1e-9) > 0).all())


def _number(cell: str) -> float:
    return float(cell.replace(",", "."))


def _frequencies(names, columns, path: str) -> int:
    """The column of frequencies: the one of that name, or the first if its values can be nothing else."""
    takes = "name the column of frequencies 'freq'"
    if names is not None:
        named = [i for i, name in enumerate(names) if is_frequency(name)]
        if len(named) > 1:
            raise ValueError(f"{path}: {' and '.join(_title(names, i) for i in named)} are both named as frequencies")
        if named:
            return named[0]
        if not _is_index(names[0]):
            listing = ", ".join(map(repr, names))
            raise ValueError(f"{path}: no column is named as frequencies in Hz, only {listing}; {takes}")
    if len(columns[0]) < MIN_POINTS:
        return 0
    if _are_whole(columns[0]):
        raise ValueError(
            f"{path}: {_title(names, 0)} holds whole numbers, {columns[0][0]} to {columns[0][-1]}, which could be row "
            f"numbers as well as Hz; {takes}"
        )
    also = next((i for i in range(1, len(columns)) if _rise(columns[i])), None)
    if _rise(columns[0]) and also is not None:
        raise ValueError(f"{path}: {_title(names, 0)} and {_title(names, also)} both rise as frequencies do; {takes}")
    return 0


def _powers(names, columns, axis: int, channel, path: str) -> tuple[list[int], list[str]]:
    """The columns of powers, and their names if ``channel`` names them."""
    others = [i for i in range(len(columns)) if i != axis]
    if channel is not None:
        return _named(names, others, channel, path)
    powers = []
    for i in others:
        name, cells = names[i] if names else "", columns[i]
        if names and _is_index(name) and (_counts(cells) or not any(cells)):
            continue
        word = next(iter(re.findall(r"[^\W_]+", name.lower())), "")
        if word in _NO_POWER or (name and _is_index(name)):
            raise ValueError(f"{path}: {_title(names, i)} is no power by its name; name in 'channel' what is")
        if any(cells) or names is None:
            powers.append(i)
        elif name:
            raise ValueError(f"{path}: {_title(names, i)} is empty; name in 'channel' what is to be read")
    _refuse_logarithms(names, powers, path)
    if not powers:
        raise ValueError(f"{path}: no column of powers beside {_title(names, axis)}")
    return powers, []


def _named(names, others, channel, path: str):
    wanted = listed(channel)
    if names is None:
        raise ValueError(f"'channel' got {channel!r}, but {path} has no line of names")
    known = [names[i] for i in others if names[i]]
    for name in wanted:
        check_name(name, known, f"channel of {path}")
        if known.count(name) > 1:
            raise ValueError(f"'channel' got {name!r}, but {path} has {known.count(name)} columns of that name")
    columns = [next(i for i in others if names[i] == name) for name in wanted]
    _refuse_logarithms(names, columns, path)
    return columns, wanted


def _refuse_logarithms(names, columns, path: str):
    for i in columns:
        if names and _LOGARITHM.search(names[i].lower()):
            raise ValueError(f"{path}: {_title(names, i)} is a logarithm by its name; give the power itself")


def _values(columns: list[list[str]], titles: list[str], rows: list[Row], path: str) -> np.ndarray:
    """The numbers (columns, F) of cells that all have decimal points, or all decimal commas."""
    for cells, title in zip(columns, titles):
        for (number, _), cell in zip(rows, cells):
            if not _is_number(cell):
                raise ValueError(f"{path}, line {number}: {cell!r} is not a number ({title})")
    marks = {mark: [(n, x) for cells in columns for (n, _), x in zip(rows, cells) if mark in x] for mark in ",."}
    if marks[","] and marks["."]:
        (comma, a), (point, b) = marks[","][0], marks["."][0]
        raise ValueError(
            f"{path}: {a!r} in line {comma} has a comma and {b!r} in line {point} a point; one decimal mark is taken"
        )
    for cells, title in zip(columns, titles):
        grouped = [x for x in cells if "," in x]
        # 1,234 after 987 is probably a thousand more, not a thousandth.
        if 0 < len(grouped) < len(cells) and all(re.fullmatch(r"[1-9]\d{0,2},\d{3}", x) for x in grouped):
            raise ValueError(f"{path}: {grouped[0]!r} could have a decimal comma or one of thousands ({title})")
    return np.array([[_number(cell) for cell in cells] for cells in columns])
