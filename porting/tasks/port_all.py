"""Port many variants one after the other; a failure does not stop the run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from porting.errors import PortingError
from porting.families.base import Family
from porting.files.atomic import refuse_clashes, report_path_of
from porting.models.frameworks import return_free_memory
from porting.progress import SILENT, Progress
from porting.tasks.case import files_of
from porting.tasks.options import CheckOptions
from porting.tasks.port import PortResult, port


@dataclass(frozen=True)
class Outcome:
    """The outcome of one variant: a result or an error. `seconds` is wall time."""

    variant: str
    path: Path
    seconds: float
    result: PortResult | None = None
    error: PortingError | None = None


class _Prefixed(Progress):
    """A progress callback that prefixes each step with the variant."""

    def __init__(self, progress: Progress, variant: str) -> None:
        self._progress, self._variant = progress, variant

    def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
        self._progress(f"{self._variant}: {description}", done, total)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        with self._progress.paused():
            yield


def port_all(
    family: Family,
    checkpoints: Mapping[str, str | None],
    folder: Path,
    *,
    suffix: str = ".h5",
    check: bool = True,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
) -> Iterator[Outcome]:
    """Port each variant to `folder`/FAMILY_VARIANT`suffix`, and yield each outcome as soon as it is known.

    `checkpoints` maps each variant to a path or address, or to None for its official file. A PortingError ends one
    variant, not the run. Raises ClashError before any work if one variant's file is another's checkpoint.
    """
    outs = {variant: folder / f"{family.name}_{variant}{suffix}" for variant in checkpoints}
    written = [path for out in outs.values() for path in (out, report_path_of(out))]
    read = [path for checkpoint in checkpoints.values() for path in files_of(checkpoint)]
    refuse_clashes({"--out-dir": written}, {"--checkpoint": read})
    for variant, checkpoint in checkpoints.items():
        out = outs[variant]
        begin = time.perf_counter()
        try:
            result = port(
                family,
                variant,
                out,
                checkpoint=checkpoint,
                check=check,
                options=options,
                progress=_Prefixed(progress, variant),
            )
            yield Outcome(variant, out, time.perf_counter() - begin, result)
            del result
        except PortingError as error:
            yield Outcome(variant, out, time.perf_counter() - begin, error=error)
        return_free_memory()  # free the models of a large variant before building the next
