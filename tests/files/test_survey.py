"""Untrusted files of Keras weights."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from porting.errors import WeightsFileError
from porting.files import survey
from porting.files.survey import survey_file


def make(path: Path) -> Path:
    """Write a small file with provenance, in the format of the suffix."""
    inner = path.with_suffix(".inner.h5")
    with h5py.File(inner, "w") as file:
        file.create_dataset("a/kernel", data=np.arange(60, dtype="f4").reshape(3, 20))
        file.attrs["provenance"] = json.dumps({"variant": "nano"})
    if path.suffix == ".h5":
        return inner.rename(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "model.weights.h5")
        archive.writestr("provenance.json", json.dumps({"variant": "nano"}))
    return path


BOTH = pytest.mark.parametrize("name", ["x.h5", "x.keras"])


@BOTH
def test_what_a_file_holds(tmp_path: Path, name: str) -> None:
    found = survey_file(make(tmp_path / name))
    assert found.provenance == {"variant": "nano"}
    assert found.tensors == [("a/kernel", (3, 20), "float32")]


@BOTH
def test_a_file_cut_off_ends_in_one_message(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsFileError, match="not a whole HDF5 or .keras file"):
        survey_file(path)


def test_reading_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(survey, "_SECONDS", 0.2)
    with pytest.raises(WeightsFileError, match="reading it took more than 0 s"):
        survey_file(make(tmp_path / "x.h5"))


def test_a_crash_of_the_reader_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_CHILD", "import os; os.abort()")
    with pytest.raises(WeightsFileError, match="the process that read it ended with -6"):
        survey_file(make(tmp_path / "x.h5"))


def test_a_shape_without_the_numbers(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file.create_dataset("b", shape=(1 << 20, 1 << 20), dtype="f4", chunks=(1024, 1024))
    with pytest.raises(WeightsFileError, match=r"b says it has the shape \(1048576, 1048576\)"):
        survey_file(path)


def test_numbers_from_another_file_are_refused(tmp_path: Path) -> None:
    """HDF5 can refer to any file of the reader's for the bytes of a dataset."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(240))
    path = make(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file.create_dataset("b", shape=(60,), dtype="f4", external=[(os.fspath(secret), 0, 240)])
    with pytest.raises(WeightsFileError, match="the file has no such data"):
        survey_file(path)


def test_a_damaged_part_beside_the_weights(tmp_path: Path) -> None:
    path = make(tmp_path / "x.keras")
    path.write_bytes(path.read_bytes().replace(b'{"variant": "nano"}', b'{"variant": "nanu"}'))
    with pytest.raises(WeightsFileError, match=r"its part (provenance.json|model.weights.h5) is damaged"):
        survey_file(path)


def test_links_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5")
    for link in (h5py.ExternalLink("other.h5", "a"), h5py.SoftLink("/a/kernel")):
        with h5py.File(path, "r+") as file:
            file["b"] = link
        with pytest.raises(WeightsFileError, match="b is a link to another place"):
            survey_file(path)
        with h5py.File(path, "r+") as file:
            del file["b"]


def test_an_archive_behind_an_hdf5_file_does_not_hide_it(tmp_path: Path) -> None:
    path, archive = make(tmp_path / "x.h5"), make(tmp_path / "y.keras")
    with h5py.File(path, "r+") as file:
        file["hostile"] = np.zeros(3)
    path.write_bytes(path.read_bytes() + archive.read_bytes())
    assert "hostile" in {name for name, _, _ in survey_file(path).tensors}


def test_nothing_in_the_working_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    path = make(tmp_path / "x.h5")
    monkeypatch.chdir(tmp_path)
    assert survey_file(path).tensors


def test_too_much_beside_the_weights(tmp_path: Path) -> None:
    path = make(tmp_path / "x.keras")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes(65 << 20))
    with pytest.raises(WeightsFileError, match="bytes beside the weights"):
        survey_file(path)


@pytest.mark.parametrize("text", ["[]", "{", '"text"'])
def test_provenance_that_is_none(tmp_path: Path, text: str) -> None:
    path = make(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["provenance"] = text
    with pytest.raises(WeightsFileError, match="not a whole HDF5"):
        survey_file(path)
