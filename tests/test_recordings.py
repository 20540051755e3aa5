"""Recordings: windows within unbroken pieces, channels that are of the brain, and what is said of the rest."""

import re
import struct
import warnings

import brainunit as u
import jax
import numpy as np
import pytest
import scipy.io
import scipy.signal

import brainmass_kernels as bk
from brainmass_kernels import cli
from brainmass_kernels.fitting import targets
from brainmass_kernels.spectra import load_spectrum

mne = pytest.importorskip("mne")
mne.set_log_level("error")

RATE, WINDOW = 100, 200


def brain(seconds: float, seed: int = 0) -> np.ndarray:
    """Alpha of 20 microvolts in noise of 5."""
    ts = np.arange(round(seconds * RATE)) / RATE
    return 20 * np.sin(2 * np.pi * 10.2 * ts) + np.random.default_rng(seed).normal(0, 5, len(ts))


def in_memory(signals: dict[str, np.ndarray], kinds="eeg", notes=()):
    """An MNE Raw of signals in microvolts; notes are (onset, duration, text)."""
    raw = mne.io.RawArray(
        np.stack([*signals.values()]) * 1e-6, mne.create_info([*signals], RATE, kinds), verbose="error"
    )
    return raw.set_annotations(mne.Annotations(*zip(*notes))) if notes else raw


def power_of(*pieces) -> np.ndarray:
    """Welch's estimate over all windows that lie in a piece, each piece as scipy cuts it."""
    each = [scipy.signal.welch(x, RATE, nperseg=WINDOW)[1][1:] for x in pieces]
    return np.average(each, axis=0, weights=[(len(x) - WINDOW) // (WINDOW // 2) + 1 for x in pieces])


def write_edf(path, signals, *, units=None, notes=(), begins=None, encoding="utf-8"):
    """EDF+ in records of a second; notes are (onset, duration, text), begins are of the records, with gaps in EDF+D."""
    seconds, units = len(next(iter(signals.values()))) // RATE, units or {}
    gaps, begins = begins is not None, range(seconds) if begins is None else begins
    labels, count, room = [*signals, "EDF Annotations"], len(signals) + 1, 100
    tops = [np.abs(x).max() + 1.0 for x in signals.values()]

    def fields(width, values):
        return "".join(f"{value!s:<{width}.{width}}" for value in values)

    head = fields(8, ["0"]) + fields(80, ["X X X X", "Startdate 02-MAR-2021 X X X"])
    head += fields(8, ["02.03.21", "00.00.00", 256 * (count + 1)]) + fields(44, ["EDF+D" if gaps else "EDF+C"])
    head += fields(8, [seconds, 1]) + fields(4, [count]) + fields(16, labels) + fields(80, [""] * count)
    head += fields(8, [*(units.get(name, "uV") for name in signals), ""])
    for limits in ([-x for x in [*tops, 1]], [*tops, 1], [-32768] * count, [32767] * count):
        head += fields(8, [f"{x:.7g}" for x in limits])
    head += fields(80, [""] * count) + fields(8, [RATE] * (count - 1) + [room]) + fields(32, [""] * count)
    data = head.encode("latin-1")
    for k, begin in enumerate(begins):
        for x, top in zip(signals.values(), tops):
            scaled = (x[k * RATE :][:RATE] + top) / (2 * top) * 65535 - 32768
            data += np.round(scaled).astype("<i2").tobytes()
        lists = f"+{begin}\x14\x14\0"
        lists += "".join(f"+{b}\x15{d}\x14{text}\x14\0" for b, d, text in notes if begin <= b < begin + 1)
        data += lists.encode(encoding).ljust(2 * room, b"\0")
    path.write_bytes(data)
    return path


# --- pieces ---


def test_no_window_crosses_what_was_cut_out():
    """Steps at the seams would leak into all low frequencies."""
    clean, steps = brain(60), np.repeat([0.0, 300.0, -200.0, 500.0], 1500)
    disturbed = clean + steps
    for at in (1500, 3000, 4500):
        disturbed[at : at + 50] = 4000.0
    raw = in_memory({"O1": disturbed}, notes=[(15, 0.5, "BAD blink"), (30, 0.5, "bad"), (45, 0.5, "EDGE filter")])
    found = load_spectrum(raw)
    want = power_of(clean[:1500], *(clean[at + 50 : at + 1500] for at in (1500, 3000, 4500)))
    np.testing.assert_allclose(found.power[0], want, rtol=1e-3)
    low = found.freqs < 8
    np.testing.assert_allclose(found.power[0][low].mean(), power_of(clean)[low].mean(), rtol=0.15)


@pytest.mark.parametrize("note", ["BAD boundary", "EDGE boundary", "boundary", "New Segment/"])
def test_a_joint_without_length_ends_a_window(note, tmp_path):
    clean = brain(40)
    raw = in_memory({"O1": clean + 500.0 * (np.arange(4000) >= 2050)}, notes=[(20.5, 0.0, note)])
    want = power_of(clean[:2050], clean[2050:])
    np.testing.assert_allclose(load_spectrum(raw).power[0], want, rtol=1e-3)
    raw.save(tmp_path / "joint_raw.fif", verbose="error")
    np.testing.assert_allclose(load_spectrum(tmp_path / "joint_raw.fif").power[0], want, rtol=1e-3)


def test_recordings_that_were_joined_or_cropped():
    a, b = brain(20, 1), brain(20, 2) + 700.0
    raw = mne.concatenate_raws([in_memory({"O1": a}), in_memory({"O1": b})], verbose="error")
    np.testing.assert_allclose(load_spectrum(raw).power[0], power_of(a, b), rtol=1e-3)
    raw.crop(5.0, None)
    np.testing.assert_allclose(load_spectrum(raw).power[0], power_of(a[500:], b), rtol=1e-3)


def test_short_pieces_are_left_out_with_a_word():
    clean = brain(40)
    raw = in_memory({"O1": clean}, notes=[(20, 1, "BAD"), (22.5, 1, "BAD"), (24, 1, "BAD")])
    with pytest.warns(UserWarning, match=r"2 pieces are shorter than 2 s and left out, 2 s in all"):
        found = load_spectrum(raw)
    np.testing.assert_allclose(found.power[0], power_of(clean[:2000], clean[2500:]), rtol=1e-3)
    raw = in_memory({"O1": clean}, notes=[(x, 0.5, "BAD") for x in range(40)])
    with pytest.raises(ValueError, match=r"recording: 0\.5 s are the longest unbroken piece.*at least 2 s"):
        load_spectrum(raw)
    with pytest.raises(ValueError, match="0 s are the longest unbroken piece"):
        load_spectrum(in_memory({"O1": clean}, notes=[(0, 40, "BAD")]))


def test_a_rate_that_gives_no_spectrum_is_said():
    raw = mne.io.RawArray(brain(4)[None] * 1e-6, mne.create_info(["O1"], 5.0, "eeg"), verbose="error")
    with pytest.raises(ValueError, match="5 samples a second are too few, 8 are needed"):
        load_spectrum(raw)


def test_a_stretch_without_numbers_is_a_gap_of_its_channel():
    clean, other = brain(40), brain(40, 1)
    broken = clean.copy()
    broken[1000:1500] = np.nan
    with pytest.warns(UserWarning, match=r"5 s are no numbers and left out of O1"):
        found = load_spectrum(in_memory({"O1": broken, "O2": other}))
    np.testing.assert_allclose(found.power, [power_of(clean[:1000], clean[1500:]), power_of(other)], rtol=1e-3)


def test_what_is_bad_in_one_channel_is_good_in_another():
    signals = {"O1": brain(40), "O2": brain(40, 1)}
    raw = in_memory(signals)
    raw.set_annotations(mne.Annotations([20], [1], ["BAD pop"], ch_names=[["O2"]]))
    want = [power_of(signals["O1"]), power_of(signals["O2"][:2000], signals["O2"][2100:])]
    np.testing.assert_allclose(load_spectrum(raw).power, want, rtol=1e-3)


def test_epochs_are_pieces_and_are_taken_as_their_file_is(tmp_path):
    pieces = [brain(4, seed) + 400.0 * seed for seed in range(5)]
    info = mne.create_info(["O1"], RATE, "eeg")
    epochs = mne.EpochsArray(np.stack(pieces)[:, None] * 1e-6, info, verbose="error")
    np.testing.assert_allclose(load_spectrum(epochs).power[0], power_of(*pieces), rtol=1e-3)
    epochs.save(tmp_path / "rest-epo.fif", verbose="error")
    saved = load_spectrum(tmp_path / "rest-epo.fif")
    np.testing.assert_allclose(targets.as_target(epochs).power, saved.power, rtol=1e-3)
    with pytest.raises(ValueError, match="1 s are the longest unbroken piece"):
        load_spectrum(epochs.copy().crop(0, 0.99, verbose="error"))


def test_an_annotation_within_an_epoch_cuts_it():
    clean = brain(40)
    raw = in_memory({"O1": clean}, notes=[(25, 0.5, "BAD")])
    epochs = mne.make_fixed_length_epochs(raw, 10.0, reject_by_annotation=False, preload=True, verbose="error")
    want = power_of(clean[:1000], clean[1000:2000], clean[2000:2500], clean[2550:3000], clean[3000:])
    np.testing.assert_allclose(load_spectrum(epochs).power[0], want, rtol=1e-3)


def test_a_file_with_gaps(tmp_path):
    """EDF+D: ten seconds, a gap of 100 s, and what is bad is told by the clock."""
    clean = brain(40)
    shifted = clean + 300.0 * (np.arange(4000) >= 1000)
    begins = [*range(10), *range(110, 140)]
    path = write_edf(tmp_path / "gap.edf", {"O1": shifted}, begins=begins, notes=[(120, 2, "BAD"), (5, 0, "eyes open")])
    want = power_of(clean[:1000], clean[1000:2000], clean[2200:])
    np.testing.assert_allclose(load_spectrum(path).power[0], want, rtol=1e-2)
    raw = mne.io.read_raw(path, verbose="error")
    np.testing.assert_allclose(load_spectrum(raw).power[0], want, rtol=1e-2)
    raw.crop(4.0, None)
    want = power_of(clean[400:1000], clean[1000:2000], clean[2200:])
    np.testing.assert_allclose(load_spectrum(raw).power[0], want, rtol=1e-2)
    path.rename(tmp_path / "moved.edf")
    path.write_bytes(b"overwritten" * 99)
    with pytest.raises(
        ValueError, match=r"'target' came from .*gap\.edf, whose units and gaps cannot be read any more"
    ):
        load_spectrum(raw)
    (tmp_path / "moved.edf").rename(path)
    joined = mne.concatenate_raws([raw, raw.copy()], verbose="error")
    with pytest.raises(ValueError, match=r"gap\.edf joined, of which one has gaps"):
        load_spectrum(joined)


def write_set(path, data, **more):
    """EEGLAB's structure; data (channels, K) or (channels, K, epochs)."""
    points, trials = data.shape[1], data.shape[2] if data.ndim == 3 else 1
    locations = np.array([(f"O{i + 1}",) for i in range(len(data))], dtype=[("labels", object)])
    eeg = {"setname": "x", "nbchan": len(data), "pnts": points, "trials": trials, "srate": float(RATE), "xmin": 0.0,
           "xmax": (points - 1) / RATE, "data": data, "chanlocs": locations, "event": [], "epoch": [], "icawinv": [],
           "icaweights": [], "icasphere": [], "ref": "common", **more}  # fmt: skip
    scipy.io.savemat(path, {"EEG": eeg}, appendmat=False)
    return path


def test_eeglabs_boundaries_and_epochs(tmp_path):
    """A boundary stands half a sample before it, and lasts as long as what is no longer there."""
    clean = brain(40)
    events = np.array([("boundary", 1000.5, 700.0)], dtype=[("type", object), ("latency", float), ("duration", float)])
    shifted = clean + 300.0 * (np.arange(4000) >= 1000)
    path = write_set(tmp_path / "cut.set", np.stack([shifted, clean]), event=events)
    found = load_spectrum(path, "O1")
    np.testing.assert_allclose(found.power[0], power_of(clean[:1000], clean[1000:]), rtol=1e-3)
    np.testing.assert_array_equal(load_spectrum(path, "O1", encoding="latin1").power, found.power)
    epochs = np.stack([[brain(4, seed) + 100 * seed, brain(4, seed + 9)] for seed in range(3)], -1)
    fields = [("type", object), ("latency", float), ("epoch", int)]
    events = np.array([("go", 1.0 + 400 * k, k + 1) for k in range(3)], dtype=fields)
    of = np.array([(k + 1, "go", 0.0) for k in range(3)],
                  dtype=[("event", int), ("eventtype", object), ("eventlatency", float)])  # fmt: skip
    found = load_spectrum(write_set(tmp_path / "epochs.set", epochs, event=events, epoch=of), "O1")
    np.testing.assert_allclose(found.power[0], power_of(*epochs[0].T), rtol=1e-3)


# --- channels ---


NIGHT = ["EEG Fpz-Cz", "EEG O1-A2", "EOG horizontal", "EMG submental", "ECG", "Resp oro-nasal", "Event marker", "SaO2"]


def test_channels_of_the_body_are_not_taken_for_eeg(tmp_path):
    signals = {name: brain(10, i) for i, name in enumerate([*NIGHT, "X"])}
    path = write_edf(tmp_path / "night.edf", signals, units={"X": "DegC", "SaO2": "%"})
    with pytest.warns(
        UserWarning, match=r"night\.edf: left out as no EEG or MEG: EOG.*SaO2 \(%\), X \(DegC\); name in"
    ):
        found = load_spectrum(path)
    assert len(found) == 2
    with pytest.warns(UserWarning, match="left out"):
        in_hand = load_spectrum(mne.io.read_raw(path, verbose="error"))
    np.testing.assert_array_equal(in_hand.power, found.power)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_spectrum(path, ["ECG", "X", "ECG"])) == 2
    only = write_edf(tmp_path / "only.edf", {"ECG": brain(10)})
    with pytest.raises(ValueError, match=r"only\.edf: holds no channel of EEG or MEG, only ECG; name one in 'channel'"):
        load_spectrum(only)


BODY = """EOGv HEOGL VEO ROC E1-M2 LOC-A2 EMG1 LegEMG/L Chin1-Chin2 ECG1-ECG2 EKG PLM Tib_R SpO2 O2Sat OSAT CO2 EtCO2
Temp rectal Temperature Flow Airflow Nasal THOR ABDO-R Thorax RespRate Snore PULSE Pleth HR HeartRate STI014 Trigger
STATUS MARKER Event DC1-DC AUX2 EXG3 GSR AccX GYROX CQ_AF3 Light POS BodyPosition Photic Battery TIMESTAMP""".split()
BRAIN = """Fp1 EEG_Fp2-REF O2 PO2 A1 M2 T3-T4 Cz-LE EEG001 POz P3 Oz Iz TP10 CP5 Fpz FT10 AFz F3-C3 EEG-O1 MEG0113
ECoG12 LA1 HIP3 EEG_20-REF Sp1 T1 C3' O1-O2 SO3 LAT5 AMYG1""".split()


def test_names_tell_body_from_brain():
    signals = {name: brain(4, i) for i, name in enumerate([*BODY, *BRAIN])}
    with pytest.warns(UserWarning, match="left out") as said:
        load_spectrum(in_memory(signals))
    left_out = re.search("no EEG or MEG: (.*); name in", str(said[0].message))
    assert left_out
    assert left_out[1].split(", ") == BODY


def test_numbered_electrodes_are_no_eyes_and_legs():
    """E1 and E2 are of the eyes beside no E3, and two of 128 otherwise; LOC and LAT are shafts as well."""
    signals = {f"{word}{i}": brain(4, i) for word in ("E", "LOC", "LAT") for i in (1, 2, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_spectrum(in_memory(signals))) == 9


def test_types_of_channels_count():
    kinds = ["eeg", "mag", "grad", "seeg", "ecog", "dbs", "eog", "emg", "ecg", "resp", "temperature", "stim", "misc"]
    signals = {f"ch{i}": brain(4, i) for i in range(len(kinds))}
    signals["ch1"] = signals["ch1"] * 1e-9
    raw = in_memory(signals, kinds)
    found = load_spectrum(raw)
    assert len(found) == 6
    np.testing.assert_allclose(found.power[0], power_of(signals["ch0"]), rtol=1e-3)
    # Of magnetometers, in femtotesla.
    np.testing.assert_allclose(found.power[1], power_of(signals["ch1"] * 1e9), rtol=1e-3)
    # An electrode that someone called by a name of the body was typed on purpose.
    raw.rename_channels({"ch4": "LEG1", "ch3": "TEMP2"})
    assert len(load_spectrum(raw)) == 6
    assert len(load_spectrum(raw, ["ch7", "ch12"])) == 2


def test_bad_and_flat_channels_are_named_and_left_out(tmp_path):
    signals = {"O1": brain(10), "O2": np.zeros(1000), "P3": brain(10, 1), "P4": np.full(1000, 37.0)}
    with pytest.warns(UserWarning, match=r"flat\.edf: left out, as flat.*: O2, P4$"):
        found = load_spectrum(write_edf(tmp_path / "flat.edf", signals))
    np.testing.assert_allclose(found.power, [power_of(signals["O1"]), power_of(signals["P3"])], rtol=1e-2)
    raw = in_memory(signals)
    with pytest.raises(ValueError, match=r"recording: channels O2, P4 cannot be fitted: flat"):
        load_spectrum(raw, ["O2", "P4"])
    # What a filter leaves of a constant.
    with pytest.warns(UserWarning, match=r"as flat.*: O2, P4$"):
        assert len(load_spectrum(raw.filter(1.0, None, picks="all", verbose="error"))) == 2
    raw = in_memory({"O1": brain(10), "P3": brain(10, 1)})
    raw.info["bads"] = ["O1"]
    with pytest.warns(UserWarning, match=r"O1 \(marked as bad\)"):
        assert len(load_spectrum(raw)) == 1
    assert len(load_spectrum(raw, ["O1", "P3"])) == 2


def test_an_offset_does_not_hide_a_signal():
    found = load_spectrum(in_memory({"O1": brain(10) + 3e5}))
    np.testing.assert_allclose(found.power[0], power_of(brain(10)), rtol=1e-3)


def test_a_recording_in_memory_is_taken_as_its_file_is(tmp_path):
    kinds = ["eeg", "eeg", "stim"]
    raw = in_memory({"O1": brain(20), "ECG": brain(20), "STI": brain(20)}, kinds, [(8, 1, "BAD")])
    raw.save(tmp_path / "rest_raw.fif.gz", verbose="error")
    with pytest.warns(UserWarning, match="ECG"):
        saved = load_spectrum(tmp_path / "rest_raw.fif.gz")
    for source in (raw, mne.io.read_raw(tmp_path / "rest_raw.fif.gz", verbose="error")):
        with pytest.warns(UserWarning, match="ECG"):
            found = targets.as_target(source)
        np.testing.assert_allclose(found.power, saved.power, rtol=1e-4)
    assert found.name == saved.name == "rest_raw.fif.gz, O1"
    assert load_spectrum(raw, "ECG").name == "recording, ECG"
    with pytest.raises(ValueError, match="'encoding' got 'latin1', but 'target' is read already"):
        load_spectrum(raw, encoding="latin1")
    with pytest.raises(TypeError, match="'target' got int, but takes a path, or an MNE Raw or Epochs or a Spectrum"):
        load_spectrum(3)


def test_a_spectrum_in_memory_is_taken_as_it_is():
    raw = in_memory({"O1": brain(20), "O2": brain(20, 1), "EOG": brain(20, 2)}, ["eeg", "eeg", "eog"])
    psd = raw.compute_psd(picks=["eeg", "eog"], verbose="error")
    found = targets.as_target(psd)
    data, freqs = psd.get_data(picks=["O1", "O2"], return_freqs=True)
    np.testing.assert_array_equal(found.freqs, freqs[freqs > 0])
    np.testing.assert_allclose(found.power, 1e12 * data[:, freqs > 0])
    assert load_spectrum(psd, "O2").name == "spectrum, O2"
    epochs = mne.make_fixed_length_epochs(raw, duration=4.0, verbose="error").compute_psd(picks=["O1"], verbose="error")
    np.testing.assert_allclose(load_spectrum(epochs).power, 1e12 * epochs.get_data().mean(0)[:, epochs.freqs > 0])
    with pytest.raises(ValueError, match="unknown channel of spectrum 'O3'"):
        load_spectrum(psd, "O3")
    with pytest.raises(ValueError, match="a Spectrum of Fourier coefficients"):
        load_spectrum(raw.compute_psd(output="complex", verbose="error"), "O1")


@pytest.mark.slow
def test_a_recording_in_memory_is_fitted_as_its_file_is(tmp_path):
    raw = in_memory({"O1": brain(20), "O2": brain(20, 1)}, notes=[(8, 1, "BAD")])
    raw.save(tmp_path / "rest_raw.fif", fmt="double", verbose="error")
    how = {"inputs": {"E_inp": 220 * u.Hz}, "noise": {"E_inp": 2 * u.Hz * u.second**0.5}, "key": jax.random.key(0),
           "duration": 3 * u.second, "starts": 1, "screen": 0, "steps": 1, "realisations": 1}  # fmt: skip
    fits = [bk.fit(bk.JansenRit(), x, {"be": (60.0, 150.0)}, **how) for x in (raw, tmp_path / "rest_raw.fif")]
    assert len(fits[0].rms) == 2
    np.testing.assert_allclose(fits[0].rms, fits[1].rms, rtol=1e-4)


# --- errors ---


def test_annotations_in_another_encoding(tmp_path):
    x = {"O1": brain(10)}
    notes = [(3, 1, "yeux fermés"), (6, 1, "bad électrode")]
    path = write_edf(tmp_path / "old.edf", x, notes=notes, encoding="latin-1")
    want = load_spectrum(write_edf(tmp_path / "new.edf", x, notes=notes)).power
    with pytest.warns(UserWarning, match=r"old\.edf: its annotations are not in UTF-8.*'encoding' takes another"):
        np.testing.assert_array_equal(load_spectrum(path).power, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_spectrum(path, encoding="latin1").power, want)
    with pytest.raises(
        ValueError, match=r"old\.edf: cannot be read as a recording.*'encoding'.*\(it was 'ascii'\)"
    ) as no:
        load_spectrum(path, encoding="ascii")
    assert no.value.__cause__ is not None
    with pytest.raises(ValueError, match="'encoding' got 'latin-17', but takes one that Python has"):
        load_spectrum(path, encoding="latin-17")


def test_what_a_reader_raises_becomes_one_error(tmp_path):
    good = write_edf(tmp_path / "good.edf", {"O1": brain(4)}).read_bytes()
    header = good[: 256 * 3]
    broken = {
        "empty.edf": b"", "cut.edf": header[:300], "text.edf": b"no recording" * 100,
        "x.bdf": b"\xffBIOSEMI" + b" " * 40, "x.gdf": b"GDF 2.20" + b"\0" * 300,
        "x.fif": struct.pack(">4i", 100, 31, 20, 0) * 9, "x_raw.fif.gz": b"\x1f\x8bno",
        "x.vhdr": b"Brain Vision Data Exchange Header File Version 1.0\n",
        "x.set": b"MATLAB 5.0 MAT-file" + b"\0" * 200,
        "rate.edf": header[:244] + b"many    " + good[252:],
    }  # fmt: skip
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as caught:
            load_spectrum(tmp_path / name)
        assert caught.value.__cause__ is not None
        assert "'target' takes .edf, .bdf" in str(caught.value)
    (tmp_path / "x_raw.fif").write_bytes(broken["x.fif"])
    with pytest.raises(ValueError, match=r"'encoding' got 'latin1', but .*x_raw\.fif needs none: \.edf, \.bdf, \.set"):
        load_spectrum(tmp_path / "x_raw.fif", encoding="latin1")
    with pytest.raises(ValueError, match="'channel' got 3, but takes a name, or several"):
        load_spectrum(tmp_path / "good.edf", 3)


def test_data_that_cannot_be_read_name_the_channel(tmp_path):
    raw = in_memory({"O1": brain(10), "O2": brain(10)})
    raw.save(tmp_path / "gone_raw.fif", verbose="error")
    raw = mne.io.read_raw(tmp_path / "gone_raw.fif", verbose="error")
    (tmp_path / "gone_raw.fif").unlink()
    with pytest.raises(ValueError, match=r"gone_raw\.fif: channel O2 cannot be read \(.*'channel' takes"):
        load_spectrum(raw, "O2")


@pytest.mark.filterwarnings("default")
def test_the_command_line_takes_the_encoding(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_edf(tmp_path / "old.edf", {"O1": brain(10)}, notes=[(3, 1, "fermés")], encoding="latin-1")
    assert cli.main(["fit", "--target", "old.edf", "--encoding", "ascii", "--quiet"]) == 2
    assert "old.edf: cannot be read as a recording" in capsys.readouterr().err
    assert cli.main(["fit", "--target", "old.edf", "--channel", "O2", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("brainmass-kernels: warning: old.edf: its annotations are not in UTF-8")
    assert cli.main(["fit", "--encoding", "latin1", "--quiet"]) == 2
    assert "'--encoding' got latin1, but there is no --target" in capsys.readouterr().err
