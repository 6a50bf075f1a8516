"""A result and its report are written together or not at all, and no report belongs to another file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from porting.errors import ClashError, OutputError, ReportError
from porting.files.atomic import refuse_clashes, remove_leftovers, require_writable, temporary_file
from porting.files.result import pending_result


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, content: str, report: str | None) -> None:
    with pending_result(out, ".h5", inputs={}) as pending:
        pending.path.write_text(content)
        pending.commit(report)


def test_both_appear_and_both_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    for content in ("one", "two"):
        write(out, content, f"report of {content}")
        assert out.read_text() == content
        assert (tmp_path / "x.h5.parity.json").read_text() == f"report of {content}"
    write(out, "three", None)
    assert names_in(tmp_path) == ["x.h5"]


def test_a_result_whose_report_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    (tmp_path / "x.h5.parity.json").mkdir()
    out.write_text("old")
    with pytest.raises(OutputError, match=r"x\.h5\.parity\.json: is a folder"):
        write(out, "new", "report")
    assert out.read_text() == "old"
    assert names_in(tmp_path) == ["x.h5", "x.h5.parity.json"]


@pytest.mark.parametrize("report", ["new report", None], ids=["with report", "without"])
def test_a_report_comes_back_where_its_result_cannot_be_replaced(tmp_path: Path, report: str | None) -> None:
    out = tmp_path / "x.h5"
    write(out, "old", "old report")
    with pytest.raises(OutputError), pending_result(out, ".h5", inputs={}) as pending:  # noqa: PT012
        pending.path.write_text("new")
        out.unlink()
        out.mkdir()  # another process was faster
        pending.commit(report)
    assert (tmp_path / "x.h5.parity.json").read_text() == "old report"
    assert names_in(tmp_path) == ["x.h5", "x.h5.parity.json"]


def test_an_identity_is_that_of_the_final_file(tmp_path: Path) -> None:
    from porting.files.atomic import sha256_of

    out = tmp_path / "x.h5"
    with pending_result(out, ".h5", inputs={}) as pending:
        pending.path.write_text("content")
        identity = pending.identity()
        pending.commit(json.dumps(identity))
    assert identity == {"name": "x.h5", "sha256": sha256_of(out)}


def test_a_folder_is_a_result_too(tmp_path: Path) -> None:
    out = tmp_path / "saved"
    for content in ("one", "two"):
        with pending_result(out, "", inputs={}, folder=True) as pending:
            pending.path.mkdir()
            (pending.path / "a").write_text(content)
            assert len(pending.identity()["sha256"]) == 64
            pending.commit(content)
    assert (out / "a").read_text() == "two"
    assert names_in(tmp_path) == ["saved", "saved.parity.json"]


def spellings(path: Path) -> dict[str, Path]:
    """The same file under other names."""
    folder = path.parent
    (folder / "link").symlink_to(path)
    os.link(path, folder / "hard")
    (folder / "sub").mkdir()
    return {
        "itself": path,
        "a symbolic link": folder / "link",
        "a hard link": folder / "hard",
        "another spelling": folder / "sub" / ".." / path.name,
    }


def test_an_output_is_never_an_input_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_text("weights")
    for name, spelled in spellings(path).items():
        with pytest.raises(ClashError, match="--out .* is also the file that --checkpoint reads") as caught:
            refuse_clashes({"--out": [spelled]}, {"--checkpoint": [path]})
        assert caught.value.exit_code == 2, name
        with pytest.raises(ClashError, match="--report .* is also the file that --out writes"):
            refuse_clashes({"--out": [path], "--report": [spelled]}, {})


def test_outputs_that_are_not_there_yet_are_compared_too(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ClashError):
        refuse_clashes({"--out": [tmp_path / "x"], "--report": [tmp_path / "sub" / ".." / "x"]}, {})
    refuse_clashes({"--out": [tmp_path / "x"], "--report": [tmp_path / "y"]}, {"--weights": [tmp_path / "z"]})


def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for path in (tmp_path / "pipe", tmp_path / "link", Path(os.devnull)):
        with pytest.raises(OutputError, match="a device, a pipe or a socket, not a regular file"):
            require_writable(path)
    assert (tmp_path / "link").is_symlink()


def test_leftovers_of_killed_runs_go_and_files_in_use_stay(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from porting.files.atomic import temporary_file\n"
        f"with temporary_file(Path({str(tmp_path / 'm.h5')!r}), '.h5') as path:\n"
        "    path.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
    assert len(names_in(tmp_path)) == 4
    killed, alive = processes
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        remove_leftovers(tmp_path)
        left = names_in(tmp_path)
        assert len(left) == 2
        assert sorted(Path(name).suffix for name in left) == [".h5", ".lock"]
    finally:
        alive.kill()
        alive.wait()
    write(tmp_path / "m.h5", "whole", None)
    assert names_in(tmp_path) == ["m.h5"]


def test_nothing_of_other_programs_is_removed(tmp_path: Path) -> None:
    for name in (".x.lock", "x.0123abcd.lock", ".x.0123abcd", ".x.0123abcg.lock", "x.h5"):
        (tmp_path / name).write_text("mine")
    before = names_in(tmp_path)
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == before


def test_names_of_any_length_have_temporary_ones(tmp_path: Path) -> None:
    for name in ("x" * 243, "ä" * 120):
        with temporary_file(tmp_path / name, ".weights.h5") as temporary:
            temporary.write_text("")
    assert names_in(tmp_path) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    write(tmp_path / "x.h5", "content", None)
    assert names_in(tmp_path) == ["x.h5"]


def test_a_report_is_compared_with_the_file_beside_it(tmp_path: Path) -> None:
    from dataclasses import replace

    from porting.files.atomic import sha256_of
    from porting.reports.document import file_beside
    from tests.reports.test_reports import PASSED

    weights, path = tmp_path / "x.h5", tmp_path / "x.h5.parity.json"
    weights.write_text("weights")
    own = replace(PASSED, context={"file": {"name": "x.h5", "sha256": sha256_of(weights)}})
    assert file_beside(own, path) == ""
    assert "does not name its file" in file_beside(replace(PASSED, context={}), path)
    weights.write_text("others")
    with pytest.raises(ReportError, match="belongs to a file other than"):
        file_beside(own, path)
    weights.unlink()
    assert "is not beside it" in file_beside(own, path)
    for name in ("../x.h5", "/etc/passwd", "", "..", "a\0b"):
        hostile = replace(PASSED, context={"file": {"name": name, "sha256": "0"}})
        assert "is not beside it" in file_beside(hostile, path)


def test_waiting_for_nothing(tmp_path: Path) -> None:
    """A lock that another program holds does not block a run."""
    stem = ".m.h5.0123abcd"
    (tmp_path / f"{stem}.h5").write_text("half")
    with filelock.FileLock(tmp_path / f"{stem}.lock"):
        begin = time.perf_counter()
        remove_leftovers(tmp_path)
        assert time.perf_counter() - begin < 5
    assert (tmp_path / f"{stem}.h5").exists()
