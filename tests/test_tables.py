"""Tables of spectra as people keep them: read rightly, or refused with what is in the way."""

import warnings

import numpy as np
import pytest

from brainmass_kernels import cli
from brainmass_kernels.spectra import load_spectrum

F = np.arange(1.0, 45.5, 0.5)
P = 10 / F + 3 * np.exp(-((F - 10) ** 2) / 4)
Q = 2 / F
WHOLE = np.arange(1, 46)


def rows(*columns, names="", mark=".", separator=",", end="\n", index=False, row_end="", number=str):
    """A line of names, and one for each row, as most programs write them."""
    lines = [names] if names else []
    for i, row in enumerate(zip(*columns)):
        cells = [str(i)] * index + [number(float(x) if x % 1 else x).replace(".", mark) for x in row]
        lines.append(separator.join(cells) + row_end)
    return end.join(lines) + end


COMMA = {"mark": ",", "separator": ";"}
FORMS = {
    "plain": rows(F, P, names="freq,power"),
    "row numbers": rows(F, P, names=",freq,power", index=True),
    "row numbers with a name": rows(F, P, names="Unnamed: 0,freqs,psd", index=True),
    "row numbers in a column called row": rows(F, P, names="row,Frequency,psd", index=True),
    "power first": rows(np.sort(P), F, names="power,freq"),
    "row numbers last": rows(F, P, np.arange(len(F)), names="f,Pxx,index"),
    "frequencies as an index without a name": rows(F, P, names=",power"),
    "no names": rows(F, P),
    "German Excel": rows(F, P, names="Frequenz (Hz);Leistung (µV²/Hz)", end="\r\n", **COMMA).encode("cp1252"),
    "Excel with its separator": "sep=;\r\n" + rows(F, P, names="freq;power", separator=";", end="\r\n"),
    "byte-order mark": rows(F, P, names="freq,power").encode("utf-8-sig"),
    "UTF-16": rows(F, P, names="freq\tpower", separator="\t").encode("utf-16"),
    "UTF-16 without a mark": rows(F, P, names="freq\tpower", separator="\t").encode("utf-16-le"),
    "decimal commas, tabs": rows(F, P, names="freq\tpower", mark=",", separator="\t"),
    "decimal commas in quotes": rows(F, P, names='"freq","power"', mark=",", number=lambda x: f'"{x}"'),
    "quoted names": rows(F, P, names='"Frequency\n[Hz]","power"'),
    "a line of units": rows(F, P, names="freq,power\nHz,µV²/Hz"),
    "separators at the ends": rows(F, P, names="freq;power;", separator=";", row_end=";"),
    "separators at the ends of numbers": rows(F, P, names="freq,power", row_end=","),
    "comments": "# Subject 1\n\n" + rows(F, P, names="freq,power\n# 250 Hz"),
    "names in a comment": rows(F, P, names="# freq,power"),
    "spaces": rows(F, P, separator="  ", number=lambda x: f"{x:.18e}"),
    "R": rows(F, P, names='"freq" "power"', separator=" ", index=True),
    "R with commas": rows(F, P, names='"","freq","power"', index=True),
    "what the file is about": "Subject;S01;;\nRate;250;;\n\n" + rows(F, P, names="freq;power", separator=";"),
    "empty lines, carriage returns": rows(F, P, names="freq|power", separator="|", end="\r\r"),
    "French": rows(F, P, names="Fréquence [Hz];DSP", **COMMA),
    "whole numbers that are named": rows(WHOLE, 10 / WHOLE, names="freq,power"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_rightly(form, tmp_path):
    data = FORMS[form]
    (tmp_path / "a.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_spectrum(tmp_path / "a.csv")
    freqs, power = (WHOLE, 10 / WHOLE) if "whole" in form else (F, np.sort(P) if form == "power first" else P)
    np.testing.assert_allclose(found.freqs, freqs)
    np.testing.assert_allclose(found.power, power[None])


LONG = "".join(f"{f},{c},{p}\n" for c in ("O1", "O2") for f, p in zip(F, P))
REFUSED = {
    "row numbers and power": (rows(P, names=",power", index=True), "column 1 holds whole numbers, 0 to 88"),
    "row numbers by name": (rows(P, names="index,power", index=True), "column 'index' holds whole numbers, 0 to 88"),
    "row numbers without names": (rows(F, P, index=True), "column 1 holds whole numbers, 0 to 88"),
    "rows from the fifth": (rows(np.arange(4, 90), P[3:], names=",power"), "column 1 holds whole numbers, 4 to 89"),
    "row numbers as decimals": (rows(np.arange(89), P, number="{:.6e}".format), "column 1 holds whole numbers"),
    "two columns that rise": (rows(np.sort(P), F), "column 1 and column 2 both rise as frequencies do"),
    "time": (rows(F, P, names="time,power"), "no column is named as frequencies in Hz, only 'time', 'power'"),
    "time beside": (rows(F / 7, F, P, names="time,freq,power"), "column 'time' is no power by its name"),
    "kilohertz": (rows(F / 1e3, P, names="freq (kHz),power"), r"only 'freq \(kHz\)', 'power'; name the column"),
    "spreads": (rows(F, P, Q, names="freq,power,sd"), "column 'sd' is no power by its name; name in 'channel'"),
    "decibels": (rows(F, P, names="freq,Power (dB)"), r"column 'Power \(dB\)' is a logarithm"),
    "logarithms": (rows(F, P, names="freq,log_power"), "column 'log_power' is a logarithm"),
    "two of frequencies": (rows(F, F, P, names="freq,Hz,power"), "column 'freq' and column 'Hz' are both named"),
    "one mark for two things": (
        rows(F, P, names="freq,power", mark=","),
        r"2 names \(freq, power\) for 4 columns; is a",
    ),
    "two decimal marks": (rows(F, P, names="f;p", **COMMA).replace(",5;", ".5;"), "'1.5' in line 3 a point"),
    "thousands": (
        "freq;power\n" + "".join(f"{f};{x}\n" for f, x in zip(WHOLE, ["1,234", "987"] * 20)),
        "one of thousands",
    ),
    "a long table": ("freq,channel,value\n" + LONG, r"line 2: 'O1' is not a number \(column 'channel'\)"),
    "a gap": (rows(F, P, names="freq,power").replace("5.0,", "5.0,,"), r"line \d+: 3 columns, and 2"),
    "no value": ("freq,power\n" + "".join(f"{f},{'' if f == 5 else 1.0}\n" for f in F), r"line 10: '' is .*'power'"),
    "an empty column": (rows(F, P, names="freq,power,notes", row_end=","), "column 'notes' is empty"),
    "names in two lines": (rows(F, P, Q, names=",mean,sd\nfreq,,"), "line 1 names more columns than line 2"),
    "text above": (rows(F, P, names="my spectrum\nx,y"), "lines 1 to 2 hold no numbers"),
    "a footer": (rows(F, P, names="freq,power") + "mean,3\n", "line 91: 'mean' is not a number"),
    "no text": (bytes(range(256)) * 9, "cannot be read as text in utf-16"),
    "on its side": ("channel," + ",".join(map(str, F)) + "\nO1," + ",".join(map(str, P)), "'channel' is not a number"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_with_its_column(form, tmp_path):
    data, said = REFUSED[form]
    (tmp_path / "odd.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=f"odd.csv.*({said})"):
        load_spectrum(tmp_path / "odd.csv")


def test_channels_are_chosen_by_name(tmp_path):
    (tmp_path / "a.tsv").write_text(rows(F, P, Q, P + Q, names="\tfreq\tO1\tO2\tOz", separator="\t", index=True))
    assert len(load_spectrum(tmp_path / "a.tsv")) == 3
    found = load_spectrum(tmp_path / "a.tsv", ["Oz", "O1"])
    np.testing.assert_allclose(found.power, [P + Q, P])
    assert found.name == "a.tsv"
    assert load_spectrum(tmp_path / "a.tsv", "O2").name == "a.tsv, O2"
    # What else a table holds does not matter to who names a column.
    (tmp_path / "b.csv").write_text("note,freq,sd,O1,O1,p\n" + "".join(f"x,{f},,1,1,{p}\n" for f, p in zip(F, P)))
    np.testing.assert_allclose(load_spectrum(tmp_path / "b.csv", "p").power, [P])
    for channel, said in (
        ("O3", "unknown channel of .*did you mean"),
        ("freq", "unknown channel"),
        ([], "takes a name"),
    ):
        with pytest.raises(ValueError, match=said):
            load_spectrum(tmp_path / "a.tsv", channel)
    with pytest.raises(ValueError, match=r"'channel' got 'O1', but .*b\.csv has 2 columns of that name"):
        load_spectrum(tmp_path / "b.csv", "O1")
    (tmp_path / "c.csv").write_text(rows(F, P))
    with pytest.raises(ValueError, match=r"'channel' got 'O1', but .*c\.csv has no line of names"):
        load_spectrum(tmp_path / "c.csv", "O1")


def test_an_encoding_is_taken(tmp_path):
    (tmp_path / "a.csv").write_bytes(rows(F, P, names="Hz,Чз").encode("koi8-r"))
    np.testing.assert_allclose(load_spectrum(tmp_path / "a.csv", "Чз", encoding="koi8-r").power, [P])
    with pytest.raises(
        ValueError, match=r"a\.csv: cannot be read as text in ascii .*'encoding' takes another"
    ) as caught:
        load_spectrum(tmp_path / "a.csv", encoding="ascii")
    assert isinstance(caught.value.__cause__, UnicodeError)
    for unknown in ("latin-17", "hex"):
        with pytest.raises(ValueError, match=f"'encoding' got '{unknown}', but takes one that Python has"):
            load_spectrum(tmp_path / "a.csv", encoding=unknown)
    np.savez(tmp_path / "a.npz", freqs=F, power=P)
    with pytest.raises(ValueError, match=r"'encoding' got 'utf8', but a\.npz is a spectrum"):
        load_spectrum(tmp_path / "a.npz", encoding="utf8")


@pytest.mark.parametrize("damage", ["cut", "flipped", "an array alone"])
def test_a_damaged_npz_is_one_error(damage, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, freqs=F, power=P)
    data = bytearray(path.read_bytes())
    data[150] ^= 0xFF
    path.write_bytes(bytes(data) if damage == "flipped" else bytes(data[: len(data) // 2]))
    if damage == "an array alone":
        with open(path, "wb") as file:
            np.save(file, P)
    with pytest.raises(ValueError, match=r"bad\.npz: cannot be read as \.npz") as caught:
        load_spectrum(path)
    assert caught.value.__cause__ is not None


def test_the_command_line_takes_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text(rows(F, P, Q, names=",freq,O1,O2", index=True))
    assert cli.main(["fit", "--target", "a.csv", "--channel", "O1", "--channel", "O7", "--quiet"]) == 2
    assert "unknown channel of a.csv 'O7'; did you mean 'O2'" in capsys.readouterr().err
