"""Terminal output of the commands. Everything that they print goes through this module.

Names and messages may come from untrusted files. On a terminal, control characters can move the cursor, change colours
or run a command, and rich reads square brackets as markup. This module prints both as plain text.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import click

from porting.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

# A pipe has no width; a table must not be cut there.
_PIPE_WIDTH = 140


_results_on_stdout = True
_quiet = False


def be_quiet(quiet: bool = True) -> None:
    """Print no results for people, and no progress. Errors and JSON are printed all the same."""
    global _quiet
    _quiet = quiet


def route_results(*, to_stderr: bool) -> None:
    """Choose where results for people go: standard error if standard output carries a report for a program."""
    global _results_on_stdout
    _results_on_stdout = not to_stderr


def printable(text: str) -> str:
    """The text with unprintable characters escaped, such as `\\x1b`; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


def say(text: str, *, err: bool = False, colour: str | None = None, end: str = "\n") -> None:
    """Print a line of results, or of an error with `err`."""
    if _quiet and not err:
        return
    colour = None if os.environ.get("NO_COLOR") else colour  # rich checks NO_COLOR itself, Click does not
    click.secho(printable(text) + end, fg=colour, err=err or not _results_on_stdout, nl=False)


def say_json(value: Any) -> None:
    """Print a value as JSON, always to standard output."""
    click.echo(json.dumps(value, indent=1))


def make_console(*, stderr: bool = False) -> Console:
    """A rich console that prints markup and control characters as plain text."""
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
        quiet=_quiet,
        stderr=stderr,
        width=None if on_terminal else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


class ProgressBar(Progress):
    """A progress bar with the current step on standard error; silent unless that is a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = make_console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
        left = (TextColumn("left", style="dim"), TimeRemainingColumn(compact=True))
        self._bar = Bar(*columns, *left, console=console, transient=True, disable=_quiet or not console.is_terminal)
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
