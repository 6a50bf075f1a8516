"""The errors a user can cause. Each has a message, a hint on what to do next and an exit code of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porting.parity.report import ParityReport

# The exit code of a command that Ctrl-C ends.
INTERRUPTED = 130


class PortingError(Exception):
    """Base of all errors that are the input's or the user's, not the program's.

    `message` says what is wrong, where, and what was expected; `hint` says what to do next.
    """

    exit_code = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


class ParityError(PortingError):
    """The ported model does not compute what the original computes."""

    exit_code = 1


class FailedParityError(ParityError):
    """A result that was refused its name, with the report that says why."""

    def __init__(self, message: str, report: ParityReport, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.report = report


class CheckpointError(PortingError):
    """A checkpoint file cannot be read, or holds something other than weights."""

    exit_code = 3


class KeyMapError(PortingError):
    """The tensors of a checkpoint are not those of the model."""

    exit_code = 4


class SourceError(PortingError):
    """A checkpoint cannot be found or fetched."""

    exit_code = 5


class FamilyError(PortingError):
    """A family of models is not there, or the package that offers it cannot be imported."""

    exit_code = 2


class OutputError(PortingError):
    """A result cannot be written."""

    exit_code = 6


class ClashError(OutputError):
    """A file that a command would write is one that it reads, or writes already."""

    exit_code = 2


class WeightsFileError(PortingError):
    """A file of Keras weights cannot be read."""

    exit_code = 7


class ReportError(PortingError):
    """A parity report cannot be read."""

    exit_code = 8


class ExportError(PortingError):
    """A model cannot be brought into another format, or its runtime cannot run what came out."""

    exit_code = 9


class EngineError(PortingError):
    """What an evaluation runs on is missing, cannot be reached, or fails."""

    exit_code = 10
