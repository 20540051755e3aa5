"""Connectomes from a package that may be missing, and from files that the tests make."""

import bz2
import importlib.util
import sys
import zipfile

import brainunit as u
import numpy as np
import pytest

import brainmass_kernels as bk

WEIGHTS = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.5], [0.0, 4.0, 0.0]])
LENGTHS = np.array([[0.0, 30.0, 10.0], [25.0, 0.0, 40.0], [10.0, 45.0, 0.0]])
packaged = pytest.mark.skipif(importlib.util.find_spec("tvb_data") is None, reason="tvb-data is not installed")


def text(matrix) -> bytes:
    return "\n".join(" ".join(map(str, row)) for row in matrix).encode()


FILES = {
    "weights.txt": text(WEIGHTS),
    "tract_lengths.txt": text(LENGTHS),
    "centres.txt": b"A 1 2 3\nB 4.5 5 6\nC -7 8 9\n",
}


def archive(path, files):
    with zipfile.ZipFile(path, "w") as made:
        for name, held in files.items():
            made.writestr(name, held)
    return path


def test_each_form_of_a_file(tmp_path):
    for name, held in FILES.items():
        (tmp_path / name).write_bytes(held)
    np.savez(tmp_path / "c.npz", weights=WEIGHTS, lengths=LENGTHS, labels=["A", "B", "C"])
    packed = {f"inside/{name}.bz2": bz2.compress(held) for name, held in FILES.items()}
    for source in (
        archive(tmp_path / "c.zip", FILES), archive(tmp_path / "packed.zip", packed), tmp_path, tmp_path / "c.npz"
    ):  # fmt: skip
        found = bk.load_connectome(source)
        np.testing.assert_array_equal(found.weights, WEIGHTS)
        np.testing.assert_array_equal(found.lengths.to_decimal(u.mm), LENGTHS)
        assert found.labels == ("A", "B", "C")
        assert str(source).endswith("npz") or found.centres[1].tolist() == [4.5, 5.0, 6.0]
    assert repr(found) == "Connectome(3 regions, 4 connections, tracts to 45 mm)"


def test_normalized_and_cut():
    connectome = bk.Connectome(WEIGHTS + 9 * np.eye(3), LENGTHS * u.mm, ("A", "B", "C"))
    np.testing.assert_array_equal(connectome.normalized().weights, WEIGHTS / 4.0)
    np.testing.assert_allclose(connectome.normalized("rows").weights.sum(axis=1), 1.0)
    part = connectome.subset(["C", 1])
    assert part.labels == ("C", "B")
    assert part.weights[0, 1] == 4.0
    assert part.lengths[1, 0] == 40 * u.mm


def test_a_network_of_one():
    connectome = bk.Connectome(WEIGHTS, LENGTHS / 10 * u.cm)
    network = bk.Network(
        bk.Hopf(), connectome.weights, distances=connectome.lengths, speed=5 * u.meter / u.second, source="x", k=0.1
    )
    np.testing.assert_array_equal(network.delay_steps(1e-3), np.ceil(LENGTHS / 5))


@packaged
@pytest.mark.parametrize("regions", [66, 68, 76, 96, 192])
def test_those_of_the_virtual_brain(regions):
    found = bk.load_connectome(regions)
    assert found.regions == len(found.labels) == len(found.centres) == regions
    assert 100 < found.lengths.to_decimal(u.mm).max() < 300


def test_an_unknown_size_lists_the_known(monkeypatch):
    for _ in range(2):
        with pytest.raises(ValueError, match="'source' got 90, but tvb-data has 66, 68, 76, 96, 192 regions"):
            bk.load_connectome(np.int64(90))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source in (True, 76.0, None):
        with pytest.raises(ValueError, match=f"'source' got {source}, but takes a number of regions, a zip"):
            bk.load_connectome(source)


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'weights' got shape \(3, 2\)"):
        bk.Connectome(WEIGHTS[:, :2], LENGTHS * u.mm)
    with pytest.raises(ValueError, match=r"'lengths' got shape \(2, 2\), but takes \(3, 3\)"):
        bk.Connectome(WEIGHTS, LENGTHS[:2, :2] * u.mm)
    with pytest.raises(ValueError, match="'lengths' got a plain"):
        bk.Connectome(WEIGHTS, LENGTHS)
    with pytest.raises(ValueError, match="'lengths' got negative"):
        bk.Connectome(WEIGHTS, -LENGTHS * u.mm)
    with pytest.raises(ValueError, match="'weights' got NaN"):
        bk.Connectome(WEIGHTS * np.nan, LENGTHS * u.mm)
    with pytest.raises(ValueError, match="no such file"):
        bk.load_connectome(tmp_path / "none.zip")
    with pytest.raises(ValueError, match=r"has no tract_lengths.txt"):
        bk.load_connectome(archive(tmp_path / "c.zip", {"weights.txt": text(WEIGHTS)}))
    with pytest.raises(ValueError, match=r"unknown region 'D'\. Known: A, B"):
        bk.Connectome(WEIGHTS[:2, :2], LENGTHS[:2, :2] * u.mm, ("A", "B")).subset(["D"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'brainmass-kernels\[connectomes\]'"):
        bk.load_connectome(76)


# Files as people have them ------------------------------------------------------------------------------------------


def test_numbers_are_read_however_they_are_set_apart(tmp_path):
    lines = FILES["weights.txt"].decode().splitlines()
    for k, held in enumerate(
        ["\n".join(lines).replace(" ", sign) for sign in (",", ", ", ";", "\t", "  ")]
        + ["\ufeff" + "\r\n".join(lines), "# a comment\n\n" + "\n".join(lines) + "\n\n"]
    ):
        found = bk.load_connectome(archive(tmp_path / f"{k}.zip", {**FILES, "weights.txt": held.encode()}))
        np.testing.assert_array_equal(found.weights, WEIGHTS)
    found = bk.load_connectome(
        archive(tmp_path / "wide.zip", {**FILES, "weights.txt": "\n".join(lines).encode("utf-16")})
    )
    np.testing.assert_array_equal(found.weights, WEIGHTS)


@pytest.mark.parametrize(
    ("lines", "labels"),
    [
        (["V1 (hOc1, left) 1 2 3", "Area 44 4.5 5 6", "V2 -7 8 9e0"], ("V1 (hOc1, left)", "Area 44", "V2")),
        (["Area 4\t1\t2\t3", "Area 6\t4.5\t5\t6", "Area 44\t-7\t8\t9"], ("Area 4", "Area 6", "Area 44")),
        (['"V1, left",1,2,3', "V2,4.5,5,6", "V3,-7,8,9"], ("V1, left", "V2", "V3")),
        (["a 1 2 3 None", "b 4.5 5 6 left", "c -7 8 9"], ("a", "b", "c")),
        (["1 2 3", "4.5 5 6", "-7 8 9"], ()),
    ],
)
def test_labels_have_spaces_numbers_and_signs(tmp_path, lines, labels):
    files = {**FILES, "centres.txt": "\n".join(lines).encode()}
    found = bk.load_connectome(archive(tmp_path / "c.zip", files))
    assert found.labels == labels
    np.testing.assert_array_equal(found.centres, [[1, 2, 3], [4.5, 5, 6], [-7, 8, 9]])


def test_an_npz_keeps_its_centres_and_decodes_its_labels(tmp_path):
    places = np.arange(9.0).reshape(3, 3)
    given = {"weights": WEIGHTS, "tract_lengths": LENGTHS, "labels": np.array([b"A", b"B", b"C"]), "centers": places}
    np.savez(tmp_path / "c.npz", **given)
    found = bk.load_connectome(tmp_path / "c.npz")
    assert found.labels == ("A", "B", "C")
    np.testing.assert_array_equal(found.centres, places)
    np.testing.assert_array_equal(found.lengths.to_decimal(u.mm), LENGTHS)


def test_what_surrounds_the_files_of_one_connectome_is_left_out(tmp_path):
    inside = {f"one/{name}": held for name, held in FILES.items()}
    more = {"one/info.txt": b"\xff", "__MACOSX/one/._weights.txt": b"\0", "one/._weights.txt": b"\0", "read.me": b""}
    assert bk.load_connectome(archive(tmp_path / "c.zip", {**inside, **more})).labels == ("A", "B", "C")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for name, held in FILES.items():
        (tmp_path / "outer" / "inner" / name).write_bytes(held)
    assert bk.load_connectome(tmp_path / "outer").regions == 3
    found = bk.load_connectome(archive(tmp_path / "labels.zip", {**FILES, "labels.txt": b"A\nB\nC\n"}))
    assert found.labels == ("A", "B", "C")


def other(name, held):
    return {**FILES, name: held}


TWO = {f"{subject}/{name}": held for subject in ("sub-1", "sub-2") for name, held in FILES.items()}
DAMAGED = {
    "two subjects": (TWO, "several connectomes, in sub-1, sub-2"),
    "apart": (
        {"a/weights.txt": text(WEIGHTS), "b/tract_lengths.txt": text(LENGTHS)},
        r"no tract_lengths.txt; it has w",
    ),
    "other labels": (other("labels.txt", b"A\nC\nB\n"), r"labels and its names in centres differ: region 1 is 'C' and"),
    "fewer labels": (
        other("region_labels.txt", b"A\nB\n"),
        "region_labels and its names in centres differ: 2 and 3 names",
    ),
    "two centres": (other("centers.txt", b"A 0 0 0\nB 0 0 0\nC 0 0 0\n"), "its centres and its centers differ"),
    "packed twice": (other("weights.txt.bz2", bz2.compress(b"0")), "it has weights.txt twice"),
    "damaged bz2": ({"weights.txt.bz2": b"BZh9 and more"}, "Invalid data stream"),
    "cut bz2": ({"weights.txt.bz2": bz2.compress(text(WEIGHTS))[:-9]}, "ended before"),
    "empty": (other("tract_lengths.txt", b""), "it has no tract_lengths.txt"),
    "ragged": (other("weights.txt", b"0 1\n1 0 2\n"), "weights.txt, line 2 has 3 numbers, but the first row has 2"),
    "decimal commas": (other("weights.txt", b"0,5;1\n1;0\n"), "weights.txt, line 1: '0,5;1' is no row of numbers"),
    "words": (other("weights.txt", b"# w\n0 a\n"), "weights.txt, line 2: '0 a' is no row of numbers"),
    "not square": (other("weights.txt", b"0 1 2\n1 0 3\n"), r"'weights' got shape \(2, 3\)"),
    "other size": (other("tract_lengths.txt", b"0 1\n1 0\n"), r"'lengths' got shape \(2, 2\), but takes \(3, 3\)"),
    "infinite": (other("weights.txt", b"0 1 inf\n1 0 1\n1 1 0\n"), "'weights' got NaN or infinite"),
    "negative": (other("tract_lengths.txt", text(-LENGTHS)), "'lengths' got negative"),
    "few centres": (other("centres.txt", b"A 1 2 3\n"), "'labels' got 1 names, but there are 3"),
    "no centre": (other("centres.txt", b"A 1 2 3\nB 4 5\nC 6 7 8\n"), "centres.txt, line 2: 'B 4 5' is no label with"),
    "one label": (other("centres.txt", b"A 1 2 3\n4 5 6\n7 8 9\n"), "centres.txt, line 2 has no label, but others"),
    "NaN centre": (other("centres.txt", b"A 1 2 3\nB 4 nan 6\nC 7 8 9\n"), "'centres' got NaN"),
    "four numbers": (
        other("centres.txt", b"A 1 2 3 4\nB 1 2 3 4\nC 1 2 3 4\n"),
        "centres.txt, line 1: .* is not clear",
    ),
    "latin-1": (other("centres.txt", "\xe9 1 2 3\n".encode("latin-1")), "centres.txt is not text in UTF-8"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_zip_that_is_not_clear_is_refused_by_name(tmp_path, kind):
    files, message = DAMAGED[kind]
    with pytest.raises(ValueError, match=rf"c\.zip.*{message}"):
        bk.load_connectome(archive(tmp_path / "c.zip", files))


def test_files_of_another_kind_are_refused_by_name(tmp_path):
    whole = archive(tmp_path / "whole.zip", FILES).read_bytes()
    for name, held, message in (
        ("c.mat", b"MATLAB 5.0 MAT-file" + bytes(99), "a MATLAB file"),
        ("w.dat", b"0,1\n1,0\n", "a text file .a table of weights is taken if its name ends in .csv"),
        ("w.csv", b"0;0,5\n1,5;0\n", "line 1: '0;0,5' is no row of numbers, with points as decimal marks"),
        ("z.csv", whole, "it is no text"),
        ("e.csv", b"# nothing\n", "it holds no numbers"),
        ("odd.csv", b"A,B\n0,1\n1\n", "line 3 has 1 numbers, but the first row has 2"),
        ("wide.csv", b"0,1,2\n1,0,3\n", r"'weights' got shape .2, 3., but takes .N, N."),
        ("two.csv", b",A,B\nA,0,1\nC,1,0\n", "its first row and its first column differ: region 1 is 'B' and 'C'"),
        ("cut.zip", whole[:200], "cut short"),
        ("c.bin", bytes(9), "of an unknown kind"),
        ("cut.npz", whole[:200], "no npz, or one that was cut short"),
        ("flipped.zip", whole[:45] + bytes([whole[45] ^ 1]) + whole[46:], "cannot be read: Bad CRC-32"),
    ):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(ValueError, match=rf"{name}\b.*{message}"):
            bk.load_connectome(tmp_path / name)
    np.savez(tmp_path / "keys.npz", weights=WEIGHTS, distances=LENGTHS)
    with pytest.raises(ValueError, match=r"keys\.npz: it has no tract_lengths; it has weights"):
        bk.load_connectome(tmp_path / "keys.npz")
    np.savez(tmp_path / "objects.npz", weights=WEIGHTS, lengths=LENGTHS, labels=np.array(["A", None, "C"], object))
    with pytest.raises(ValueError, match=r"objects\.npz: Object arrays cannot be loaded"):
        bk.load_connectome(tmp_path / "objects.npz")
    for subject in ("sub-1", "sub-2"):
        (tmp_path / "study" / subject).mkdir(parents=True)
        (tmp_path / "study" / subject / "weights.txt").write_bytes(text(WEIGHTS))
    with pytest.raises(ValueError, match="study: it has several connectomes, in sub-1, sub-2"):
        bk.load_connectome(tmp_path / "study")


# Tables and arrays --------------------------------------------------------------------------------------------------

ROWS = ["0,2,0", "1,0,0.5", "0,4,0"]


@pytest.mark.parametrize(
    ("name", "lines", "labels"),
    [
        ("plain.csv", ROWS, ()),
        ("spaces.txt", [row.replace(",", "  ") for row in ROWS], ()),
        ("head.csv", ["A,B b,C", *ROWS], ("A", "B b", "C")),
        ("both.csv", [",A,B,C", *(f"{n},{row}" for n, row in zip("ABC", ROWS))], ("A", "B", "C")),
        ("quoted.csv", ['"ctx, left","B","C"', *ROWS], ("ctx, left", "B", "C")),
        ("side.csv", [f"{n},{row}" for n, row in zip("ABC", ROWS)], ("A", "B", "C")),
        ("pandas.csv", [",0,1,2", *(f"{n},{row}" for n, row in enumerate(ROWS))], ()),
        ("columns.csv", ["0,1,2", *ROWS], ()),
        ("r.tsv", ["A\tB\tC", *(f"{n}\t" + row.replace(",", "\t") for n, row in zip("ABC", ROWS))], ("A", "B", "C")),
        ("excel.csv", ["A;B;C", *(row.replace(",", ";") for row in ROWS)], ("A", "B", "C")),
    ],
)
def test_a_table_of_weights(tmp_path, name, lines, labels):
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = bk.load_connectome(tmp_path / name)
    np.testing.assert_array_equal(found.weights, WEIGHTS)
    assert found.labels == labels
    assert found.lengths is None


def test_lengths_in_a_second_table(tmp_path):
    np.savetxt(tmp_path / "lengths.csv", LENGTHS, delimiter=",")
    (tmp_path / "weights.csv").write_text("\n".join(["A,B,C", *ROWS]))
    found = bk.load_connectome(tmp_path / "weights.csv", tmp_path / "lengths.csv")
    np.testing.assert_array_equal(found.lengths / u.mm, LENGTHS)
    assert found.labels == ("A", "B", "C")
    (tmp_path / "lengths.csv").write_text("\n".join(["A,B,D", *ROWS]))
    with pytest.raises(ValueError, match="'lengths' has other labels than the weights: region 2 is 'C' and 'D'"):
        bk.load_connectome(tmp_path / "weights.csv", tmp_path / "lengths.csv")
    with pytest.raises(ValueError, match=r"'lengths' got 'absent\.csv', but there is no such file"):
        bk.load_connectome(tmp_path / "weights.csv", "absent.csv")


def test_arrays():
    frame = pytest.importorskip("pandas").DataFrame(WEIGHTS, columns=["A", "B", "C"])
    for source, lengths, labels in (
        (WEIGHTS, LENGTHS, ()), (WEIGHTS.tolist(), LENGTHS / 10 * u.cm, ()), (frame, LENGTHS, ("A", "B", "C")),
        ({"weights": WEIGHTS, "tract_lengths": LENGTHS * u.mm, "labels": ["A", "B", "C"]}, None, ("A", "B", "C")),
    ):  # fmt: skip
        found = bk.load_connectome(source, lengths)
        np.testing.assert_array_equal(found.weights, WEIGHTS)
        np.testing.assert_allclose(found.lengths / u.mm, LENGTHS)
        assert found.labels == labels


def test_a_connectome_without_lengths():
    found = bk.load_connectome(WEIGHTS)
    assert repr(found) == "Connectome(3 regions, 4 connections, no lengths)"
    assert found.subset([0, 2]).lengths is None
    assert found.normalized().lengths is None
    drive = {"source": "x", "k": 0.1}
    assert bk.Network(bk.Hopf(), found.weights, **drive).regions == 3
    with pytest.raises(ValueError, match="'distances' is needed"):
        bk.Network(bk.Hopf(), found.weights, distances=found.lengths, speed=5 * u.meter / u.second, **drive)


def test_an_hdf5_file(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is in the extra `connectomes`")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        group = file.create_group("connectivity")
        group["weights"], group["tract_lengths"] = WEIGHTS, LENGTHS
        group["region_labels"] = np.array([b"A", b"B", b"C"])
        file["hemispheres"] = np.zeros(3)
    found = bk.load_connectome(tmp_path / "c.h5")
    np.testing.assert_array_equal(found.weights, WEIGHTS)
    np.testing.assert_array_equal(found.lengths / u.mm, LENGTHS)
    assert found.labels == ("A", "B", "C")
    whole = (tmp_path / "c.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.h5: it is an HDF5 file that cannot be read"):
        bk.load_connectome(tmp_path / "cut.h5")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a/weights"], file["b/weights"] = WEIGHTS, WEIGHTS
    with pytest.raises(ValueError, match=r"two\.h5: it has several tables named weights"):
        bk.load_connectome(tmp_path / "two.h5")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "c.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    with pytest.raises(ImportError, match=r"needs h5py.* pip install 'brainmass-kernels\[connectomes\]'"):
        bk.load_connectome(tmp_path / "c.h5")


@pytest.mark.parametrize(
    ("source", "lengths", "error", "message"),
    [
        ({"weights": WEIGHTS}, None, ValueError, "it has no tract_lengths; it has weights"),
        ({"weights": WEIGHTS, "lengths": LENGTHS}, LENGTHS, ValueError, "'lengths' is for a table or an array"),
        (WEIGHTS, {"lengths": LENGTHS}, TypeError, "'lengths' got dict, but takes a table or an array"),
        (WEIGHTS, LENGTHS[:2], ValueError, r"'lengths' got shape \(2, 3\)"),
        (WEIGHTS[0], None, ValueError, r"'weights' got shape \(3,\)"),
        (WEIGHTS, LENGTHS * u.ms, ValueError, "'lengths' got ms, but takes mm"),
        (None, None, ValueError, "'source' got None, but takes a number of regions"),
    ],
)
def test_arrays_that_are_none_of_a_connectome(source, lengths, error, message):
    with pytest.raises(error, match=message):
        bk.load_connectome(source, lengths)


# Some of the regions ------------------------------------------------------------------------------------------------

PLACES = np.arange(9.0).reshape(3, 3)
NAMED = bk.Connectome(WEIGHTS, LENGTHS * u.mm, ("A", "B", "A"), PLACES * u.mm)


@pytest.mark.parametrize("which", [[True, False, True], np.array([True, False, True]), [0, 2], np.array([0, -1])])
def test_a_mask_selects_and_numbers_may_count_from_the_end(which):
    part = NAMED.subset(which)
    np.testing.assert_array_equal(part.weights, WEIGHTS[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(part.centres, PLACES[[0, 2]])
    assert part.labels == ("A", "A")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([True, False], "a mask of 2, but takes one of the 3 regions"),
        ([True, 1], "got True, but takes whole numbers, labels, or a mask"),
        ([1.0], "got 1.0, but takes whole numbers"),
        (np.array([0.5]), "but takes whole numbers"),
        ([3], "got region 3, but there are 3, from 0 to 2"),
        ([-4], "got region -4"),
        ([1, "B"], r"more than once \(B\)"),
        ([0, -3], r"more than once \(A\)"),
        (["A"], "got 'A', but 2 regions have this label"),
        ("B", "got 'B', but takes a list"),
        (1, "got 1, but takes a list"),
        ({"A", "B"}, "but takes a list"),
        ([], "got no region"),
        ([False] * 3, "got no region"),
    ],
)
def test_what_names_no_regions_is_refused(which, message):
    with pytest.raises(ValueError, match=message):
        NAMED.subset(which)


def test_labels_and_centres_are_those_of_the_regions():
    of_bytes = bk.Connectome(WEIGHTS, LENGTHS * u.mm, np.array([b"A", b"B", b"C"]), PLACES / 10 * u.cm)
    assert of_bytes.labels == ("A", "B", "C")
    np.testing.assert_allclose(of_bytes.centres, PLACES)
    for labels, centres, message in (
        ("ABC", None, "'labels' got 'ABC', but takes one name for each of the 3 regions"),
        (("A",), None, "'labels' got 1 names"),
        (np.array([["A", "B", "C"]]), None, r"'labels' got shape \(1, 3\)"),
        ((), PLACES[:2], r"'centres' got shape \(2, 3\), but takes \(3, 3\)"),
        ((), PLACES * np.nan, "'centres' got NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            bk.Connectome(WEIGHTS, LENGTHS * u.mm, labels, centres)
