"""A result and the report that vouches for it: two files that become visible together, or not at all."""

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
    """A result that has no name yet; `path` is where to write it, a file or a folder.

    What was there before stays until `commit`. A report names the hash of the file that it is of, so at no instant
    does a report of an earlier run vouch for another file, whichever of the two is in place.
    """

    def __init__(self, out: Path, path: Path) -> None:
        self.out = out
        self.path = path

    def identity(self) -> dict[str, Any]:
        """What a report says of the file that it is of; ask when it is written to the end."""
        with output_errors(self.out):
            return {"name": self.out.name, "sha256": sha256_of(self.path)}

    def commit(self, report: str | None) -> Path | None:
        """Gives the result and its report their names, and returns the report's; raises OutputError.

        Without a report, that of an earlier run goes. When anything fails, both are as they were.
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
        # A folder cannot take another's place at once: the old one steps aside first.
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
    """A result to be written to `out`, whose temporary name ends in `suffix`, and the files that go with it.

    `inputs` and further `outputs` are by their options. Raises ClashError where one file would be two of these, and
    OutputError where one cannot be written, both before any work.
    """
    refuse_result_clashes(out, inputs, outputs)
    if out.parent.is_dir():
        remove_leftovers(out.parent)
    if folder:
        aside = _aside_of(out)
        if aside.exists() and not out.exists():  # of a run that was killed between two steps
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
    """Raises ClashError where `out`, its report or one of the further outputs is one of the others or an input."""
    refuse_clashes({"--out": [out], "the report of --out": [report_path_of(out)], **(outputs or {})}, inputs)


def _aside_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")
