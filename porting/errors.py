"""Errors that a user can cause. Each has a message, a hint on what to do next, and its own exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porting.parity.report import ParityReport

# The exit code of a command interrupted with Ctrl-C.
INTERRUPTED = 130


class PortingError(Exception):
    """Base class of all errors caused by the input or the user, not by a bug in the program.

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
    """A result failed its check and was not written. `report` says why."""

    def __init__(self, message: str, report: ParityReport, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.report = report


class NotComparedError(FailedParityError):
    """The two models could not be compared: one does not run, or the inputs fit neither. `report.problem` says why."""

    exit_code = 11


def failed_parity(message: str, report: ParityReport, *, hint: str = "") -> FailedParityError:
    """The error for a report that has not passed."""
    kind = NotComparedError if report.problem else FailedParityError
    return kind(message, report, hint=hint)


class CheckpointError(PortingError):
    """A checkpoint file cannot be read, or holds something other than weights."""

    exit_code = 3


class KeyMapError(PortingError):
    """The tensors of a checkpoint do not match those of the model."""

    exit_code = 4


class SourceError(PortingError):
    """A checkpoint cannot be found or fetched."""

    exit_code = 5


class OptionError(PortingError):
    """An option names something that the models do not have."""

    exit_code = 2


class FamilyError(PortingError):
    """A model family does not exist, or the package that provides it cannot be imported."""

    exit_code = 2


class OutputError(PortingError):
    """A result cannot be written."""

    exit_code = 6


class ClashError(OutputError):
    """A command would write a file that it also reads or writes elsewhere."""

    exit_code = 2


class WeightsFileError(PortingError):
    """A file of Keras weights cannot be read."""

    exit_code = 7


class ReportError(PortingError):
    """A parity report cannot be read, or is one of another model."""

    exit_code = 8


class ExportError(PortingError):
    """A model cannot be converted to another format, or the runtime cannot run the result."""

    exit_code = 9


class EngineError(PortingError):
    """The engine of an evaluation is missing, cannot be reached, or fails."""

    exit_code = 10
