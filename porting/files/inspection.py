"""What is in a file: provenance and tensors of a checkpoint or of Keras weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import SourceError
from porting.files.checkpoint import read_checkpoint
from porting.files.survey import survey_file
from porting.files.weights_file import is_weights_file


@dataclass(frozen=True)
class Inspection:
    """Facts about the file as a whole, provenance where there is any, and `(name, shape, type)` of each tensor."""

    facts: dict[str, Any]
    provenance: dict[str, Any] | None
    tensors: list[tuple[str, tuple[int, ...], str]]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.tensors)


def inspect_file(path: Path, *, ema: bool = False, key: str | None = None, prefix: str | None = None) -> Inspection:
    """Reads any file that the toolkit reads or writes, by its content.

    Raises SourceError when there is none, CheckpointError or WeightsFileError when it is not a whole one.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file", hint="Give a checkpoint or a file of Keras weights.")
    if is_weights_file(path):
        survey = survey_file(path)
        return Inspection({"format": "Keras weights"}, survey.provenance, survey.tensors)
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
