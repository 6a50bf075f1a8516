"""A result and its report: two files that appear together or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from porting.files.atomic import (
    interrupt_later,
    move_into_place,
    output_errors,
    refuse_clashes,
    remove_leftovers,
    report_path_of,
    require_writable,
    sha256_of,
    temporary_file,
)


class PendingResult:
    """A result without its final name. Write it to `path`, a file or a folder.

    An existing result stays until `commit`. A report contains the hash of its file, so a report of an earlier run never
    applies to another file, even between the two moves.
    """

    def __init__(self, out: Path, path: Path) -> None:
        self.out = out
        self.path = path

    def identity(self) -> dict[str, Any]:
        """The name and hash that the report stores. Call this once the file is complete."""
        with output_errors(self.out):
            return {"name": self.out.name, "sha256": sha256_of(self.path)}

    def commit(self, report: str | None) -> Path | None:
        """Move the result and its report to their final names. Return the report's path. Raises OutputError.

        Without a report, the report of an earlier run is deleted. If anything fails, both files are restored.
        """
        report_path = report_path_of(self.out)
        with (
            temporary_file(report_path, ".old") as earlier,
            temporary_file(report_path) as written,
            output_errors(self.out),
        ):
            if report is not None:
                written.write_text(report, encoding="utf-8")
            if report_path.exists():
                shutil.copyfile(report_path, earlier)
            with interrupt_later():
                try:
                    if report is None:
                        report_path.unlink(missing_ok=True)
                    else:
                        move_into_place(written, report_path)
                    self._give_name()
                except BaseException:
                    with contextlib.suppress(OSError):
                        if earlier.exists():
                            earlier.replace(report_path)
                        else:
                            report_path.unlink(missing_ok=True)
                    raise
        return report_path if report is not None else None

    def _give_name(self) -> None:
        if not self.path.is_dir():
            move_into_place(self.path, self.out)
            return
        # A folder cannot replace another atomically, so the old one is moved aside first.
        aside = _aside_of(self.out)
        shutil.rmtree(aside, ignore_errors=True)
        there = self.out.exists()
        if there:
            self.out.replace(aside)
        try:
            self.path.replace(self.out)
        except OSError:
            if there:
                aside.replace(self.out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def pending_result(
    out: Path,
    suffix: str,
    *,
    inputs: Mapping[str, Iterable[Path]],
    outputs: Mapping[str, Iterable[Path]] | None = None,
    folder: bool = False,
) -> Iterator[PendingResult]:
    """Open a result to be written to `out`. Its temporary name ends in `suffix`.

    `inputs` and further `outputs` map options to paths. Before any work, this raises ClashError if two of these are the
    same file, and OutputError if one cannot be written.
    """
    refuse_result_clashes(out, inputs, outputs)
    if out.parent.is_dir():
        remove_leftovers(out.parent)
    if folder:
        aside = _aside_of(out)
        if aside.exists() and not out.exists():  # a run was killed between two steps
            with output_errors(out):
                aside.replace(out)
    else:
        require_writable(out)
    require_writable(report_path_of(out))
    for path in (each for paths in (outputs or {}).values() for each in paths):
        require_writable(path)
    with temporary_file(out, suffix) as temporary:
        yield PendingResult(out, temporary)


def refuse_result_clashes(
    out: Path, inputs: Mapping[str, Iterable[Path]], outputs: Mapping[str, Iterable[Path]] | None = None
) -> None:
    """Raise ClashError if `out`, its report or another output is the same file as an input or another output."""
    refuse_clashes({"--out": [out], "the report of --out": [report_path_of(out)], **(outputs or {})}, inputs)


def _aside_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")
