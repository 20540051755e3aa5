"""Recordings of EEG, MEG and electrodes within the brain, read through MNE: their channels and unbroken pieces.

A piece ends at a cut, a pause or joint of the recording, a stretch annotated as bad, a value that is not a number, and
the end of an epoch. Windows, over which spectra are estimated, lie within pieces.
"""

from __future__ import annotations

import codecs
import itertools
import math
import os
import re
import sys
from typing import Any, NamedTuple

import numpy as np

from .extras import needs
from .models.base import check_name
from .notices import warn
from .tables import MIN_POINTS, listed

#: Recordings that MNE reads, of EEG, MEG and electrodes within the brain.
RECORDINGS = (".edf", ".bdf", ".gdf", ".fif", ".fif.gz", ".vhdr", ".set")
#: MNE's types of channels to which masses are compared.
BRAIN = ("eeg", "mag", "grad", "seeg", "ecog", "dbs")
#: The argument of MNE's reader for the encoding of a file's texts.
_ENCODING = {".edf": "encoding", ".bdf": "encoding", ".set": "uint16_codec"}
#: Beginnings of annotations, in lower case, of bad data, and of a joint.
_BAD = ("bad", "edge")
_JOINT = ("boundary", "new segment", "-99")
#: The largest spread of a constant channel, relative to its largest value, and to the median of the others.
_FLAT, _FLAT_BESIDE = 1e-7, 1e-9

# Words in names of channels of the body and of devices, as EDF and most systems call every channel EEG.
_ELSEWHERE = re.compile(
    r"e[com]g|ekg|erg$|^(v|h|l|r)?eo[ghvlr]?$|^[vh]eo|eye|pupil|gaze|^(exg|erg|ana|aux|dc|adc|misc|bio|din|cq)$"
    r"|^(chin|ment|mental|submental|masseter|deltoid|tibialis?|plm|lleg|rleg|llat|rlat|larm|rarm)"
    r"|^(temp|temperature|rectal|sao|spo|tco|etco|tcco|tcpo|sao2|spo2|osat|o2sat)$|^(oxi|oxy|satur)"
    r"|^(resp|breath|thor|abdo|flow|airflow|nasal|oronasal|snor|cannula|cpap|ptaf|therm|effort|belt|chest|leak|xflow)"
    r"|^(pleth?|puls|heart|ppg|bvp|abp|gsr|eda|scr|hrate|ibi|bursts?$|suppr)"
    r"|^(trig|trg$|sti$|stim|status|mark|mkr|event|sync|clock|timer?$|timestamp|counter|interpolated|annot|button|photo)"
    r"|^(photic|diode|audio|sound|light|lux|position|posture|body|activity|motion|movement|acc[xyz]?$|accel|gyro?[xyz]?$)"
    r"|^(imu|batt|joystick|hypno|stage|artefact|artifact|humidity|impedance)"
)
#: Words that also name an electrode within the brain, if its number is above 2.
_AMBIGUOUS = {"e", "loc", "roc", "io", "lo", "so", "lat", "rat", "leg", "arm", "pr", "hr", "rr", "bp", "sat", "mic",
              "pos", "abd", "tho", "tib", "co"}  # fmt: skip
_VOLTS = re.compile(r"([fpnumµμ]|mc|micro|milli|nano)?-?v(olts?)?|\x83\xcaV|[fp]?t(/c?m)?|", re.IGNORECASE)
#: Units of converters, which do not say what was measured.
_RAW_UNITS = {"n/a", "?", "-", "1", "adu", "lsb", "count", "counts", "raw", "digit", "digits", "unit", "units", "au"}


class Pieces(NamedTuple):
    """Channels of a recording, each as its unbroken pieces ``(K,)`` in volt or tesla.

    Attributes
    ----------
    rate : samples a second
    units : microvolts in a volt, or femtotesla in a tesla
    """

    name: str
    path: str
    rate: float
    channels: list[str]
    units: list[float]
    pieces: list[list[np.ndarray]]


class _Mark(NamedTuple):
    """An annotation, in samples; without channels it is for all."""

    start: float
    stop: float
    text: str
    channels: tuple[str, ...]


def is_recording(source) -> bool:
    """Whether an object is an MNE `Raw` or `Epochs`; does not import MNE."""
    mne = sys.modules.get("mne")
    return mne is not None and isinstance(source, (mne.io.BaseRaw, mne.BaseEpochs))


def is_spectrum(source) -> bool:
    """Whether an object is an MNE `Spectrum`, as `Raw.compute_psd` returns; does not import MNE."""
    mne = sys.modules.get("mne")
    if mne is None:
        return False
    return isinstance(source, (mne.time_frequency.Spectrum, mne.time_frequency.EpochsSpectrum))


class Densities(NamedTuple):
    """Power spectral densities ``(n, F)`` of channels, in square microvolts (of MEG, femtotesla) a Hz."""

    channels: list[str]
    freqs: np.ndarray
    power: np.ndarray


def read_spectrum(source, channel=None) -> Densities:
    """The densities of the named channels of an MNE `Spectrum`, by default those that `read` takes; mean over epochs.

    Raises
    ------
    ValueError : an unknown channel, none of EEG or MEG, or Fourier coefficients in place of powers
    """
    channels = _channels(source, None, channel, "spectrum")
    picks = [source.ch_names.index(c) for c in channels]
    power, freqs = source.get_data(picks=picks, return_freqs=True)
    of_epochs = isinstance(source, needs("mne", "eeg").time_frequency.EpochsSpectrum)
    if np.iscomplexobj(power) or power.ndim != 2 + of_epochs:
        raise ValueError("'target' got a Spectrum of Fourier coefficients, but takes one of powers")
    power = power.mean(0) if of_epochs else power
    scale = np.array([_scale(kind) ** 2 for kind in source.get_channel_types(picks=picks)])
    return Densities(channels, np.asarray(freqs, float), np.asarray(power, float) * scale[:, None])


def _scale(kind: str) -> float:
    """Microvolts in a volt, or femtotesla in a tesla."""
    return 1e15 if kind in ("mag", "grad") else 1e6


def kind_of(path: str) -> str:
    """The ending of a file's name, in lower case."""
    return ".fif.gz" if path.lower().endswith(".fif.gz") else os.path.splitext(path)[1].lower()


def read(source, channel=None, encoding: str | None = None) -> Pieces:
    """The pieces of the named channels, by default of all of EEG, MEG and electrodes within the brain.

    Parameters
    ----------
    source : the path of a recording, or an MNE `Raw` or `Epochs`
    channel : a name, or several
    encoding : of the texts in an ``.edf``, ``.bdf`` or ``.set``, such as ``"latin1"``

    Raises
    ------
    ValueError : naming the file and the channel, which cannot be read, is unknown, or is flat
    ImportError : without MNE
    """
    mne = needs("mne", "eeg")
    if isinstance(source, str):
        recording, header = _open(mne, source, encoding)
        name, path = os.path.basename(source), source
    else:
        recording, header = source, _header_of(source)
        path = name = _name_of(source)
    channels = _channels(recording, header, channel, path)
    picks = [recording.ch_names.index(c) for c in channels]
    try:
        if isinstance(recording, mne.BaseEpochs) and not recording.preload:
            # The rejected epochs are known only after reading.
            recording = recording.copy().drop_bad(verbose="error")
        data = recording.get_data(picks=picks)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: {_named(channels)} cannot be read ({_in_words(error)}); 'channel' takes those that can, and "
            "an MNE Raw or Epochs that is in memory is taken as well"
        ) from error
    units = [_scale(kind) for kind in recording.get_channel_types(picks=picks)]
    if isinstance(recording, mne.BaseEpochs):
        stretches = list(zip(data, _marks_of_epochs(recording)))
    else:
        stretches = [(data, _marks(recording, header))]
    pieces = [[x for values, marks in stretches for x in _pieces(values[i], marks, c)] for i, c in enumerate(channels)]
    rate = float(recording.info["sfreq"])
    _warn_of_nan(channels, data, rate, path)
    return Pieces(name, path, rate, channels, units, pieces)


def windows(recording: Pieces, seconds: float) -> tuple[list[str], list[float], list[np.ndarray]]:
    """Channels that vary, their units, and windows ``(n, samples)`` of each, half overlapping, each within a piece.

    Raises
    ------
    ValueError : no piece is as long as a window, or all channels are flat
    """
    length = round(seconds * recording.rate)
    if length < 2 * MIN_POINTS:
        raise ValueError(
            f"{recording.path}: {recording.rate:g} samples a second are too few, {2 * MIN_POINTS / seconds:g} are "
            "needed"
        )
    cut, left_out = {}, []
    for i, pieces in enumerate(recording.pieces):
        short = [len(x) / recording.rate for x in pieces if len(x) < length]
        long = [np.lib.stride_tricks.sliding_window_view(x, length) for x in pieces if len(x) >= length]
        left_out.append((sum(short), len(short), max(short, default=0.0), recording.channels[i]))
        if long:
            cut[i] = np.concatenate([x[:: length - length // 2] for x in long])
    if not cut:
        longest, count = max((x[2], x[1]) for x in left_out)
        what = "are too short" if count == 1 else "are the longest unbroken piece, which is too short"
        raise ValueError(f"{recording.path}: {longest:.3g} s {what}, at least {seconds:g} s are needed")
    seconds_lost, count, _, name = max(left_out)
    if count:
        pieces = "1 piece is" if count == 1 else f"{count} pieces are"
        of = f" of {name}" if len({x[:2] for x in left_out}) > 1 else ""
        warn(
            f"{recording.path}: {pieces} shorter than {seconds:g} s and left out{of}, {seconds_lost:.3g} s in all",
            UserWarning,
        )
    varying = _varying(recording, cut)
    return [recording.channels[i] for i in varying], [recording.units[i] for i in varying], [cut[i] for i in varying]


def _varying(recording: Pieces, cut: dict[int, np.ndarray]) -> list[int]:
    """The numbers of the channels that vary; a warning names the others."""
    spread = {i: _spread(x) for i, x in cut.items()}
    varying = []
    for i, x in spread.items():
        others = [y for j, y in spread.items() if recording.units[j] == recording.units[i] and y > 0]
        if x > 0 and x > _FLAT_BESIDE * np.median(others):
            varying.append(i)
    flat = [c for i, c in enumerate(recording.channels) if i not in varying]
    if not varying:
        raise ValueError(f"{recording.path}: {_named(flat)} cannot be fitted: flat, the same value throughout")
    if flat:
        warn(f"{recording.path}: left out, as flat or without an unbroken window: {', '.join(flat)}", UserWarning)
    return varying


def _spread(windows: np.ndarray) -> float:
    """The root mean square of windows about their means; 0 if it is as small as rounding."""
    spread = math.sqrt(float(np.mean(np.var(windows, axis=-1))))
    return spread if spread > _FLAT * float(np.abs(windows).max()) else 0.0


# --- files ---


def _open(mne, path: str, encoding: str | None):
    """A recording, and its header where it is an EDF or a BDF."""
    kind = kind_of(path)
    if encoding is not None:
        _check_encoding(encoding, kind, path)
    try:
        try:
            return _reader(mne, path, encoding), _edf_header(path) if kind in (".edf", ".bdf") else None
        except Exception as error:
            if encoding is not None or kind not in (".edf", ".bdf") or not _is_of_encoding(error):
                raise
        # The data do not depend on the encoding, and annotations of bad data are ASCII.
        recording = _reader(mne, path, "latin1"), _edf_header(path)
    except MemoryError:
        raise
    except Exception as error:
        was = "" if encoding is None else f" (it was {encoding!r})"
        more = f", 'encoding' that of its texts, such as 'latin1'{was}" if kind in _ENCODING else ""
        raise ValueError(
            f"{path}: cannot be read as a recording ({_in_words(error)}); 'target' takes {', '.join(RECORDINGS)}, or "
            f"an MNE Raw or Epochs that was read by other means{more}"
        ) from error
    warn(f"{path}: its annotations are not in UTF-8 and are read as Latin-1; 'encoding' takes another", UserWarning)
    return recording


def _check_encoding(encoding: str, kind: str, path: str):
    if kind not in _ENCODING:
        raise ValueError(f"'encoding' got {encoding!r}, but {path} needs none: {', '.join(_ENCODING)} take one")
    try:
        codecs.lookup(encoding)
    except (LookupError, TypeError) as error:
        raise ValueError(f"'encoding' got {encoding!r}, but takes one that Python has, such as 'latin1'") from error


def _is_of_encoding(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, UnicodeError) or _is_of_encoding(error.__cause__))


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _reader(mne, path: str, encoding: str | None):
    kind = kind_of(path)
    options: dict[str, Any] = {"verbose": "error"}
    if encoding is not None:
        options[_ENCODING[kind]] = encoding
    try:
        return mne.io.read_raw(path, **options)
    except Exception as error:
        read_epochs = {".set": mne.read_epochs_eeglab, ".fif": mne.read_epochs, ".fif.gz": mne.read_epochs}.get(kind)
        if read_epochs is None:
            raise
        try:
            return read_epochs(path, **options)
        except Exception:
            raise error from None


class _Header(NamedTuple):
    """What MNE drops of an EDF or a BDF: the units as written, when its records begin, and its annotations.

    Kemp & Olivan 2003, Clin. Neurophysiol. 114:1755.
    """

    units: dict[str, str]
    seconds: float
    begins: np.ndarray | None
    notes: list[tuple[float, float, str]]


def _edf_header(path: str) -> _Header:
    with open(path, "rb") as file:
        top = file.read(256)
        count = int(top[252:256])
        fields = file.read(256 * count)

        def column(begin: int, width: int) -> list[str]:
            values = (fields[begin * count + i * width :][:width] for i in range(count))
            return [value.decode("latin-1").strip(" \0") for value in values]

        labels, units = column(0, 16), column(96, 8)
        seconds, texts = float(top[244:252]), [i for i, x in enumerate(labels) if x.endswith(" Annotations")]
        if top[192:197] not in (b"EDF+D", b"BDF+D") or not texts or not seconds > 0:
            return _Header(dict(zip(labels, units)), seconds, None, [])
        sizes = np.array(column(216, 8), int) * (3 if top[0] == 0xFF else 2)
        ends, begins, notes = np.cumsum(sizes), [], []
        file.seek(int(top[184:192]))
        while len(record := file.read(int(ends[-1]))) == ends[-1]:
            lists = [_notes(record[ends[i] - sizes[i] : ends[i]]) for i in texts]
            begins.append(lists[0][0][0])
            notes += [note for notes in lists for note in notes if note[2]]
    zero = begins[0]
    notes = [(begin - zero, duration, text) for begin, duration, text in notes]
    return _Header(dict(zip(labels, units)), seconds, np.array(begins) - zero, notes)


def _notes(data: bytes) -> list[tuple[float, float, str]]:
    """Begin, duration and text of annotations; the first of a record has no text: it dates the record."""
    notes = []
    for begin, duration, texts in re.findall(rb"([+-][\d.]+)(?:\x15([\d.]+))?\x14([^\0]*)\x14\0", data + b"\0"):
        notes += [(float(begin), float(duration or 0), text.decode("latin-1")) for text in texts.split(b"\x14")]
    return notes


def _header_of(raw) -> _Header | None:
    """The header of the EDF or BDF that a recording in memory came from, if the file still exists."""
    paths = [os.fspath(x) for x in getattr(raw, "filenames", ()) if x is not None]
    try:
        headers = [_edf_header(x) for x in paths if kind_of(x) in (".edf", ".bdf") and os.path.isfile(x)]
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(
            f"'target' came from {', '.join(paths)}, whose units and gaps cannot be read any more "
            f"({_in_words(error)}): save it anew and give that path"
        ) from error
    if len(paths) > 1 and any(header.begins is not None for header in headers):
        raise ValueError(f"'target' got {', '.join(paths)} joined, of which one has gaps: give each by its path")
    return headers[0] if headers else None


def _name_of(source) -> str:
    names = [*getattr(source, "filenames", ()), getattr(source, "filename", None)]
    named = next((x for x in names if x is not None), None)
    return "recording" if named is None else os.path.basename(named)


# --- channels ---


def _channels(recording, header: _Header | None, channel, path: str) -> list[str]:
    names, kinds = list(recording.ch_names), recording.get_channel_types()
    if channel is not None:
        for name in (wanted := listed(channel)):
            check_name(name, names, f"channel of {path}")
        return wanted
    bad, numbers = set(recording.info["bads"]), _numbers(names)
    taken, left_out = [], []
    for name, kind in zip(names, kinds):
        if kind not in BRAIN:
            continue
        unit = "" if header is None else header.units.get(name, header.units.get(re.sub(r"-\d+$", "", name), ""))
        if name in bad:
            left_out.append(f"{name} (marked as bad)")
        elif kind == "eeg" and not _is_voltage(unit):
            left_out.append(f"{name} ({unit})")
        elif kind == "eeg" and _is_elsewhere(name, numbers):
            left_out.append(name)
        else:
            taken.append(name)
    if not taken:
        raise ValueError(f"{path}: holds no channel of EEG or MEG, only {', '.join(names)}; name one in 'channel'")
    if left_out:
        warn(
            f"{path}: left out as no EEG or MEG: {', '.join(left_out)}; name in 'channel' what is to be taken",
            UserWarning,
        )
    return taken


def _is_voltage(unit: str) -> bool:
    return _VOLTS.fullmatch(unit) is not None or unit.lower() in _RAW_UNITS


def _parts(name: str) -> list[tuple[str, int]]:
    """The words of a channel's name with their numbers, 0 for none, without an initial "EEG"."""
    name = re.sub(r"^s?eeg", "", name.lower())
    words = (re.fullmatch(r"(.*?)(\d*)", word) for word in re.findall(r"[a-z0-9]+", name))
    return [(word[1], int(word[2] or 0)) for word in words if word]


def _numbers(names: list[str]) -> dict[str, int]:
    """The largest number of each word in the names."""
    largest: dict[str, int] = {}
    for name in names:
        for word, number in _parts(name):
            largest[word] = max(largest.get(word, 0), number)
    return largest


def _is_elsewhere(name: str, numbers: dict[str, int]) -> bool:
    """Whether a channel's name says that it is of eyes, muscles, heart, breath, body or a device."""
    for word, number in _parts(name):
        if _ELSEWHERE.search(word):
            return True
        if word in _AMBIGUOUS and numbers[word] <= 2 and (number or word != "e"):
            return True
    return False


def _named(channels: list[str]) -> str:
    return f"channel{'s' * (len(channels) > 1)} {', '.join(channels)}"


# --- pieces ---


def _marks(raw, header: _Header | None) -> list[_Mark]:
    rate, zero = float(raw.info["sfreq"]), raw.first_time
    notes = raw.annotations
    channels = getattr(notes, "ch_names", None)
    channels = [()] * len(notes) if channels is None else channels
    each = zip(notes.onset, notes.duration, notes.description, channels)
    times = [(float(begin) - zero, float(duration), str(text), tuple(c)) for begin, duration, text, c in each]
    marks: list[_Mark] = []
    if header is not None and header.begins is not None:
        # MNE places the annotations of such a file as if it had no gaps.
        written = {(round(b - zero, 3), _for(t)[0]) for b, _, t in header.notes}
        times = [x for x in times if (round(x[0], 3), x[2]) not in written]
        for begin, duration, text in header.notes:
            start, stop = (_stored(header, x, zero, rate) for x in (begin, begin + duration))
            marks.append(_Mark(start, stop, *_for(text)))
        late = np.flatnonzero(np.abs(np.diff(header.begins) - header.seconds) > 0.5 / rate) + 1
        joints = [(k * header.seconds - zero) * rate for k in late]
        marks += [_Mark(joint, joint, _JOINT[0], ()) for joint in joints]
    # An empty duration is read as NaN.
    return marks + [_Mark(b * rate, (b + (d if d > 0 else 0)) * rate, t, c) for b, d, t, c in times]


def _for(text: str) -> tuple[str, tuple[str, ...]]:
    """An annotation's text, and its channel."""
    text, _, channel = text.partition("@@")
    return text, (channel,) if channel else ()


def _stored(header: _Header, time: float, zero: float, rate: float) -> float:
    """The position among the stored samples of a time by the clock of a file with gaps."""
    begins = np.zeros(1) if header.begins is None else header.begins
    at = max(int(np.searchsorted(begins, time + 1e-9, "right")) - 1, 0)
    within = min(max(time - begins[at], 0.0), header.seconds)
    return (at * header.seconds + within - zero) * rate


def _marks_of_epochs(epochs) -> list[list[_Mark]]:
    rate = float(epochs.info["sfreq"])

    def mark(note) -> _Mark:
        begin, duration = float(note[0]) - epochs.tmin, float(note[1])
        return _Mark(begin * rate, (begin + (duration if duration > 0 else 0)) * rate, str(note[2]), ())

    return [[mark(note) for note in notes] for notes in epochs.get_annotations_per_epoch()]


def _pieces(values: np.ndarray, marks: list[_Mark], channel: str) -> list[np.ndarray]:
    """The unbroken pieces of one channel, ``(K,)``."""
    keep, joints = np.isfinite(values), {0, len(values)}
    for mark in marks:
        if mark.channels and channel not in mark.channels:
            continue
        text, (start, stop) = mark.text.lower(), (_sample(x, len(values)) for x in (mark.start, mark.stop))
        if text.startswith(_BAD):
            keep[start:stop] = False
        if text.startswith(_BAD + _JOINT):
            joints.add(start)
    edges = sorted(joints | set((np.flatnonzero(np.diff(keep)) + 1).tolist()))
    return [values[a:b] for a, b in itertools.pairwise(edges) if keep[a]]


def _sample(at: float, count: int) -> int:
    """The first sample after a joint; EEGLAB writes joints half a sample before it."""
    return min(max(math.floor(at + 0.501), 0), count)


def _warn_of_nan(channels, data, rate: float, path: str):
    lost = np.moveaxis(~np.isfinite(data), -2, 0).reshape(len(channels), -1).sum(-1)
    if lost.any():
        of = ", ".join(c for c, n in zip(channels, lost) if n)
        warn(f"{path}: up to {lost.max() / rate:.3g} s are no numbers and left out of {of}", UserWarning)
