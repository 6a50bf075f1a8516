"""Inspect the provenance and the tensors of a checkpoint, a file of Keras weights, or an exported file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import OptionError, SourceError
from porting.files.atomic import sha256_of
from porting.files.checkpoint import read_checkpoint
from porting.files.exported_file import TITLES, exported_form, require_reader
from porting.files.survey import survey_file
from porting.files.weights_file import is_weights_file


@dataclass(frozen=True)
class Inspection:
    """Facts about the file, its provenance if it has one, and `(name, shape, type)` of each tensor."""

    facts: dict[str, Any]
    provenance: dict[str, Any] | None
    tensors: list[tuple[str, tuple[int, ...], str]]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.tensors)


def inspect_file(path: Path, *, ema: bool = False, key: str | None = None, prefix: str | None = None) -> Inspection:
    """Inspect a checkpoint (a folder of transformers too), a weights file, or a result of `van-port export`.

    The content tells a checkpoint from a weights file.

    Raises SourceError if there is no such file, CheckpointError or WeightsFileError if it is incomplete or another kind
    of file, and ExportError if a package is missing that reads it.
    """
    if not path.is_file() and not path.is_dir():
        what = "not a file" if path.exists() else "no such file"
        raise SourceError(f"{path}: {what}", hint="Give a checkpoint, a file of Keras weights or an exported file.")
    is_weights, form = path.is_file() and is_weights_file(path), exported_form(path)
    if (is_weights or form is not None) and (ema or key or prefix):
        what = "a file of Keras weights" if is_weights else "an exported file"
        raise OptionError(f"{path}: {what} has no --ema, --key or --prefix", hint="These are for checkpoints.")
    if is_weights:
        survey = survey_file(path)
        return Inspection({"format": "Keras weights"}, survey.provenance, survey.tensors)
    if form is not None:
        require_reader(form)
        survey = survey_file(path)
        return Inspection({"format": TITLES[form], "sha256": sha256_of(path)}, survey.provenance, survey.tensors)
    checkpoint = read_checkpoint(path, ema=ema, key=key, prefix=prefix)
    facts = {
        "format": checkpoint.format,
        "sha256": checkpoint.sha256,
        "wrapper": checkpoint.wrapper or "none",
        "prefixes taken off": ", ".join(checkpoint.prefixes) or "none",
        "moving averages": ("taken" if checkpoint.is_ema else "also there: --ema") if checkpoint.has_ema else "none",
    }
    tensors = [(name, array.shape, str(array.dtype)) for name, array in checkpoint.state_dict.items()]
    return Inspection(facts, None, tensors)
