"""Connectomes from a package that may be missing, and from files that the tests make."""

import bz2
import importlib.util
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


@packaged
def test_an_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="tvb-data has 66, 68, 76, 96, 192 regions"):
        bk.load_connectome(77)


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
