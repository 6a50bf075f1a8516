"""Options that several commands share."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from porting.parity.report import ParityReport
    from porting.progress import Progress
    from porting.tasks.check import CheckOptions

FILE = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


class LayerLimit(click.ParamType):  # type: ignore[type-arg]
    """`name:ratio`."""

    name = "NAME:RATIO"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        layer, _, ratio = str(value).rpartition(":")
        try:
            limit = float(ratio)
        except ValueError:
            limit = -1.0
        if not layer or not limit > 0:
            self.fail(f"{value!r} is not a layer's name, a colon and a positive number, such as head:20", param, ctx)
        return layer, limit


class Sha256(click.ParamType):  # type: ignore[type-arg]
    """64 hexadecimal digits."""

    name = "HEX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", str(value)):
            self.fail(f"{value!r} is not a sha256: 64 hexadecimal digits", param, ctx)
        return str(value).lower()


class VariantCheckpoint(click.ParamType):  # type: ignore[type-arg]
    """`variant=location`."""

    name = "VARIANT=FILE|URL"

    def __init__(self, variants: tuple[str, ...]) -> None:
        self._variants = variants

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        variant, _, location = str(value).partition("=")
        if variant not in self._variants or not location:
            self.fail(f"{value!r} is not a variant, an equals sign and a checkpoint, such as b1=my.pth", param, ctx)
        return variant, location


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_OPTIONS_OF_A_CHECK = _all(
    click.option("--images", type=FILE, help="Folder of images for the check.  [default: embedded ones]"),
    click.option("--samples", type=click.IntRange(min=1), help="Images to use.  [default: 4; all up to 64 pixels]"),
    click.option(
        "--isolated/--no-isolated", default=True, show_default=True, help="Also feed each layer PyTorch's own input."
    ),
    click.option("--stress", is_flag=True, help="Check on other weights and shapes too, on which mistakes are loud."),
    click.option("--train", is_flag=True, help="Also compare ten training steps: gradients, statistics, weights."),
    click.option("--max-ratio", type=click.FloatRange(min=0, min_open=True), help="Limit of parity.  [default: 8]"),
    click.option("--atol", type=click.FloatRange(min=0), help="Also bound the greatest difference."),
    click.option("--rtol", type=click.FloatRange(min=0), help="Also bound it relative to the layer's greatest value."),
    click.option(
        "--allow-non-finite", is_flag=True, help="Have NaN and infinite weights as they are; checked with zeros there."
    ),
    click.option("--limit", "layer_limits", type=LayerLimit(), multiple=True, help="A layer's own --max-ratio."),
)


def check_options(command: Command) -> Command:
    """Gives a command the options of a check, and hands them on together as `make_options`, which makes them.

    Not made at once, because that takes an import that `--help` must not wait for.
    """

    @functools.wraps(command)
    def collecting(
        *args: Any,
        images: Path | None,
        samples: int | None,
        isolated: bool,
        stress: bool,
        train: bool,
        max_ratio: float | None,
        atol: float | None,
        rtol: float | None,
        layer_limits: tuple[tuple[str, float], ...],
        allow_non_finite: bool,
        **others: Any,
    ) -> Any:
        def make_options() -> CheckOptions:
            from porting.parity.report import DEFAULT_MAX_RATIO, Limits
            from porting.tasks.check import CheckOptions

            limits = Limits(DEFAULT_MAX_RATIO if max_ratio is None else max_ratio, atol, rtol, dict(layer_limits))
            return CheckOptions(limits, images, samples, isolated, stress, train, allow_non_finite)

        return command(*args, make_options=make_options, **others)

    return _OPTIONS_OF_A_CHECK(collecting)  # type: ignore[return-value]


REPORT = _all(
    click.option("--all-layers", is_flag=True, help="Print every layer, not only the top level and failures."),
    click.option(
        "--report",
        "report_files",
        type=FILE,
        multiple=True,
        help="Also write the report: .html, .md, .xml (JUnit) or .json. Written when the check fails, too.",
    ),
)


def check_report_files(paths: tuple[Path, ...]) -> None:
    """Raises OutputError for a report that could not be written, before the work."""
    from porting.files.atomic import check_writable
    from porting.reports import format_of

    for path in paths:
        format_of(path)
        check_writable(path)


def show_report(report: ParityReport, console: Console, all_layers: bool, paths: tuple[Path, ...]) -> None:
    """Prints a report and writes it to every file that was asked for."""
    from porting.files.atomic import write_text
    from porting.reports import format_of, render
    from porting.reports.terminal import print_report

    print_report(report, console, all_layers=all_layers)
    show_non_finite(report.context, console)
    for path in paths:
        write_text(path, render(report, format_of(path)))


def show_check(
    report: ParityReport | None,
    console: Console,
    all_layers: bool,
    paths: tuple[Path, ...],
    without: str = "Not checked, as asked.",
) -> None:
    """Shows a report, or says that there is none."""
    if report is None:
        console.print(without, style="yellow")
    else:
        show_report(report, console, all_layers, paths)


@contextlib.contextmanager
def showing_refusal(console: Console, all_layers: bool, paths: tuple[Path, ...]) -> Iterator[Progress]:
    """Progress for work that may end in a failed check, whose report is then shown before the error goes on."""
    from porting.cli.terminal import ProgressBar
    from porting.errors import FailedParityError

    try:
        with ProgressBar() as progress:
            yield progress
    except FailedParityError as error:
        show_report(error.report, console, all_layers, paths)
        raise


def show_non_finite(facts: Mapping[str, Any], console: Console) -> None:
    if names := facts.get("non_finite"):
        console.print(f"{len(names)} tensors hold NaN or infinity: {', '.join(names)}", style="yellow", soft_wrap=True)


def show_written(path: Path, report_path: Path | None, console: Console) -> None:
    written = [path] if report_path is None else [path, report_path]
    console.print("Wrote " + " and ".join(map(str, written)), soft_wrap=True)
