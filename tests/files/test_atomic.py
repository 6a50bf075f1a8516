from __future__ import annotations

import os
from pathlib import Path

import pytest

from porting.errors import OutputError
from porting.files.atomic import (
    move_into_place,
    output_errors,
    require_writable,
    reserve,
    temporary_file,
    write_text,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_text_replaces_the_whole_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x.json", "old")
    write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"
    assert names_in(tmp_path) == ["x.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "Ctrl-C"])
def test_what_is_interrupted_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "x.h5"
    final.write_text("old")

    def write() -> None:
        with temporary_file(final, ".h5") as temporary:
            temporary.write_text("half")
            assert temporary.name.endswith(".h5")
            assert temporary.parent == tmp_path
            raise error

    with pytest.raises(error):
        write()
    assert final.read_text() == "old"
    assert names_in(tmp_path) == ["x.h5"]


def test_moving_takes_the_temporary_name_away(tmp_path: Path) -> None:
    with temporary_file(tmp_path / "x") as temporary:
        temporary.write_text("whole")
        move_into_place(temporary, tmp_path / "x")
    assert names_in(tmp_path) == ["x"]


def test_a_folder_that_does_not_exist_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder .*missing does not exist") as caught:
        require_writable(tmp_path / "missing" / "x.h5")
    assert caught.value.hint == f"mkdir -p {tmp_path / 'missing'}"


def test_a_folder_as_the_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        require_writable(tmp_path)


def test_require_writable_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "x.h5")
    assert names_in(tmp_path) == []


def test_what_the_system_says_becomes_the_message(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with output_errors(tmp_path / "x.h5"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="x.h5: cannot be written: No space left on device"):
        fill_the_disk()


def test_room_is_asked_for_where_it_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate macOS and Windows."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    reserve(tmp_path / "x", 1000)
    with pytest.raises(OSError, match="No space left"):
        reserve(tmp_path / "x", 1 << 60)
    assert list(tmp_path.iterdir()) == []
