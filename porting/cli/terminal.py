"""What the commands share in talking to a terminal: everything that they print goes through here.

Names and messages come from files that a stranger may have made. On a terminal a control character moves the cursor,
changes colours or runs a command, and square brackets are markup to rich: here both are plain text.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import click

from porting.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

# In a pipe there is no width to fit; a table must not be cut there.
_PIPE_WIDTH = 140


_results_on_stdout = True


def route_results(*, to_stderr: bool) -> None:
    """Where results for people go: to standard error when standard output is one report, for a program to read."""
    global _results_on_stdout
    _results_on_stdout = not to_stderr


def printable(text: str) -> str:
    """The text with every character that is not printed as an escape, such as `\\x1b`; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


def say(text: str, *, err: bool = False, colour: str | None = None, end: str = "\n") -> None:
    """Prints a line, of results or of an error."""
    click.secho(printable(text) + end, fg=colour, err=err or not _results_on_stdout, nl=False)


def say_json(value: Any) -> None:
    """Prints a value as JSON, always to standard output."""
    click.echo(json.dumps(value, indent=1))


def make_console(*, stderr: bool = False) -> Console:
    """A console on which markup and control characters of a text are plain text."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    stderr = stderr or not _results_on_stdout
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    return PlainConsole(
        stderr=stderr, width=None if on_terminal else _PIPE_WIDTH, highlight=False, markup=False, emoji=False
    )


class ProgressBar(Progress):
    """A bar with the present step on a terminal's standard error; nothing at all in a pipe."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = make_console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
        left = (TextColumn("left", style="dim"), TimeRemainingColumn(compact=True))
        self._bar = Bar(*columns, *left, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=None)

    def __call__(self, description: str, done: int = 0, total: int = 0) -> None:
        self._bar.update(self._task, description=description, completed=done, total=total or None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._bar.stop()
        yield
        self._bar.start()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
