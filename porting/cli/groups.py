"""Groups of options that commands share; each hands a command one object instead of many parameters."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from porting.errors import PortingError
from porting.families.registry import get_family

if TYPE_CHECKING:
    from porting.families.base import Family
    from porting.parity.report import ParityReport
    from porting.progress import Progress
    from porting.tasks.options import CheckOptions

DEFAULT_FAMILY = "van"
FILE = click.Path(path_type=Path)
Paths = Mapping[str, Iterable[Path | None]]
Command = TypeVar("Command", bound=Callable[..., Any])


def option_group(
    argument: str, make: Callable[..., Any], *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    """A decorator that gives a command these options, and hands them on as `argument=make(**options)`."""

    def decorate(command: Command) -> Command:
        def probe() -> None:
            pass

        for option in options:
            option(probe)  # type: ignore[arg-type]
        names = {parameter.name for parameter in probe.__click_params__}  # type: ignore[attr-defined]

        @functools.wraps(command)
        def collecting(*args: Any, **values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return command(*args, **values, **{argument: make(**own)})

        decorated: Any = collecting
        for option in reversed(options):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


class FamilyType(click.ParamType):  # type: ignore[type-arg]
    """The name of a registered family; the value is the family itself."""

    name = "FAMILY"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Family:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            return get_family(value)
        except PortingError as error:
            self.fail(f"{error.message}. {error.hint}", param, ctx)


def family_of(ctx: click.Context | None) -> Family:
    """The family that a command line names, by default VAN; `--family` is eager, so it is known before all others."""
    family = ctx.params.get("family") if ctx is not None else None
    return family if family is not None else get_family(DEFAULT_FAMILY)


class OfFamily(click.ParamType):  # type: ignore[type-arg]
    """One of the names that the family of the command line has."""

    def __init__(self, name: str, choices: Callable[[Family], tuple[str, ...]]) -> None:
        self.name = name
        self._choices = choices

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._choices(family_of(ctx)))}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        family = family_of(ctx)
        choices = self._choices(family)
        if value not in choices:
            self.fail(f"the family {family.name} has no {value!r}; it has {', '.join(choices)}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self._choices(family_of(ctx)) if name.startswith(incomplete)]


SOURCE_ARGUMENTS = click.option(
    "--source-arg", "source_arguments", multiple=True, metavar="NAME=VALUE", help="Argument for the PyTorch model."
)
TARGET_ARGUMENTS = click.option(
    "--target-arg", "target_arguments", multiple=True, metavar="NAME=VALUE", help="Argument for the Keras model."
)
VARIANT = OfFamily("variant", lambda family: family.variants)
LAYOUT = OfFamily("layout", lambda family: tuple(naming.name for naming in family.namings))


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


@dataclass(frozen=True)
class Model:
    """`--family` and `--variant`; `variant` is None where it was not given and need not be."""

    family: Family
    variant: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """For the functions in porting.tasks."""
        return {"family": self.family, "variant": self.variant}

    def of_file(self, weights: Path) -> tuple[Family, str]:
        """Its family and variant, where none was given those that the file of weights says it is of.

        Raises UsageError where the file says none, and WeightsFileError where it cannot be read.
        """
        if self.variant is not None:
            return self.family, self.variant
        facts: Mapping[str, Any] = {}
        if weights.is_file() and weights.suffix in {".h5", ".keras"}:
            from porting.files.survey import survey_file

            facts = survey_file(weights).provenance or {}
        family, variant = facts.get("family"), facts.get("variant")
        with contextlib.suppress(PortingError):
            found = get_family(family) if isinstance(family, str) else None
            if found is not None and variant in found.variants and self.family.name in {DEFAULT_FAMILY, found.name}:
                return found, str(variant)
        raise click.UsageError(f"Missing option '--variant': {weights} does not say which model it is of.")


def family_option(command: Command) -> Command:
    """`--family`, with VAN as default."""
    return click.option(
        "--family",
        type=FamilyType(),
        default=DEFAULT_FAMILY,
        show_default=True,
        is_eager=True,
        help="Model family; `van-port families` lists them.",
    )(command)


def model_options(*, required: bool = True) -> Callable[[Command], Command]:
    """`--family` and `--variant`, or `--source`, `--target` and `--map`, handed on as `model`."""
    return option_group(
        "model",
        functools.partial(_model, required),
        family_option,
        click.option("--variant", type=VARIANT, help="Variant of the family."),
        click.option(
            "--config", type=FILE, help="Instead of a variant: a VAN's settings, .json or .toml; or its config.json."
        ),
        click.option("--source", help="Instead of a family: the PyTorch model, such as FILE.py:make."),
        click.option("--target", help="The Keras model, such as FILE.py:make; forms as of `van-port map`."),
        click.option("--map", "rows_file", type=FILE, help="The rows between them, .toml; `van-port map` writes it."),
        SOURCE_ARGUMENTS,
        TARGET_ARGUMENTS,
        click.option("--inputs", type=FILE, help="Inputs of --target for the check, .npz.  [default: random]"),
    )


def _model(
    required: bool,
    family: Family,
    variant: str | None,
    config: Path | None,
    source: str | None,
    target: str | None,
    rows_file: Path | None,
    source_arguments: tuple[str, ...],
    target_arguments: tuple[str, ...],
    inputs: Path | None,
) -> Model:
    given = {"--source": source, "--target": target, "--map": rows_file}
    if not any(given.values()):
        if source_arguments or target_arguments or inputs:
            raise click.UsageError("--source-arg, --target-arg and --inputs go with --source and --target")
        if config is not None:
            return _configured(family, variant, config)
        if required and variant is None:
            raise click.UsageError("Missing option '--variant'.")
        return Model(family, variant)
    if missing := [option for option, value in given.items() if not value]:
        raise click.UsageError(f"--source, --target and --map go together: {', '.join(missing)} is missing")
    if variant is not None or config is not None:
        raise click.UsageError("--variant and --config are of a family: they do not go with --source")
    from porting.families.given import VARIANT as OWN
    from porting.families.given import GivenFamily
    from porting.families.specs import parse_arguments
    from porting.mapping.rows_file import read_rows

    assert source is not None  # as seen above
    assert target is not None
    assert rows_file is not None
    made = GivenFamily(
        source,
        target,
        read_rows(rows_file),
        source_arguments=parse_arguments(source_arguments),
        target_arguments=parse_arguments(target_arguments),
        inputs=inputs,
    )
    return Model(made, OWN)


def _configured(family: Family, variant: str | None, config: Path) -> Model:
    if variant is not None:
        raise click.UsageError("--config takes the place of --variant")
    if family.name != DEFAULT_FAMILY:
        raise click.UsageError(f"--config is for the family {DEFAULT_FAMILY}: {family.name} has variants alone")
    from porting.families.van_config import ConfiguredVanFamily

    made = ConfiguredVanFamily(config)
    return Model(made, made.variant)


@dataclass(frozen=True)
class CheckpointChoice:
    """Which checkpoint, and how to read it; the arguments are those of the options that a command has."""

    arguments: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read, where that is given by path."""
        from porting.tasks.case import files_of

        return files_of(self.arguments["checkpoint"])


CHECKPOINT = click.option(
    "--checkpoint",
    metavar="FILE|URL",
    help="PyTorch checkpoint: a path, https://... or hf://owner/repo/file[@revision].  "
    "[default: the variant's official file]",
)
LAYOUT_OF_CHECKPOINT = click.option(
    "--layout", type=LAYOUT, help="Publisher whose tensor names the checkpoint has.  [default: recognised]"
)
EMA = click.option(
    "--ema/--no-ema", default=False, show_default=True, help="Take moving averages where the file has both."
)
KEY = click.option("--key", help="Entry of the file that holds the weights, such as model or ema.module.")
PREFIX = click.option("--prefix", help="Take the tensors whose names begin so, without it; drop all others.")
checkpoint_options = option_group(
    "checkpoint",
    lambda **arguments: CheckpointChoice(arguments),
    CHECKPOINT,
    click.option("--sha256", type=Sha256(), help="Required hash of the checkpoint."),
    LAYOUT_OF_CHECKPOINT,
    EMA,
    KEY,
    PREFIX,
)
plain_checkpoint_options = option_group(
    "checkpoint", lambda **arguments: CheckpointChoice(arguments), CHECKPOINT, LAYOUT_OF_CHECKPOINT
)

CHECK = click.option(
    "--check/--no-check", default=True, show_default=True, help="Prove parity before the file gets its name."
)
WEIGHTS_HELP = "File of Keras weights: .h5, .weights.h5 or .keras."


def _lazy_options(
    layer_limits: tuple[tuple[str, float], ...],
    max_ratio: float | None,
    atol: float | None,
    rtol: float | None,
    max_exact_ratio: float | None,
    **others: Any,
) -> Callable[[], CheckOptions]:
    """Not made at once, because that takes an import that `--help` must not wait for."""

    def make() -> CheckOptions:
        from porting.parity.report import DEFAULT_MAX_EXACT_RATIO, DEFAULT_MAX_RATIO, Limits
        from porting.tasks.options import CheckOptions

        limits = Limits(
            DEFAULT_MAX_RATIO if max_ratio is None else max_ratio,
            atol,
            rtol,
            dict(layer_limits),
            DEFAULT_MAX_EXACT_RATIO if max_exact_ratio is None else max_exact_ratio,
        )
        return CheckOptions(limits, **others)

    return make


thoroughness_options = option_group(
    "make_options",
    _lazy_options,
    click.option("--images", type=FILE, help="Folder of images for the check.  [default: embedded ones]"),
    click.option("--samples", type=click.IntRange(min=1), help="Images to use.  [default: 4; all up to 64 pixels]"),
    click.option(
        "--locate/--no-locate", default=True, show_default=True, help="Look for the layers where the models part."
    ),
    click.option("--stress", is_flag=True, help="Check on other weights and shapes too, on which mistakes are loud."),
    click.option("--train", is_flag=True, help="Also compare ten training steps: gradients, statistics, weights."),
    click.option(
        "--max-ratio",
        type=click.FloatRange(min=0, min_open=True),
        help="Limit of parity in float32, in units of PyTorch's own rounding.  [default: 64]",
    ),
    click.option(
        "--max-exact-ratio",
        type=click.FloatRange(min=0, min_open=True),
        help="Limit for the outputs in float64, in units of float64's rounding.  [default: 256]",
    ),
    click.option("--atol", type=click.FloatRange(min=0), help="Also bound the greatest difference."),
    click.option("--rtol", type=click.FloatRange(min=0), help="Also bound it relative to the layer's greatest value."),
    click.option(
        "--allow-non-finite", is_flag=True, help="Port NaN and infinite weights unchanged; the check uses zeros there."
    ),
    click.option(
        "--strict-settings", is_flag=True, help="Settings that matter only in training, such as a momentum, count too."
    ),
    click.option("--waive", multiple=True, metavar="MODULE[:SETTING]", help="Accept a setting that differs."),
    click.option("--limit", "layer_limits", type=LayerLimit(), multiple=True, help="Limit of one layer."),
)


@dataclass(frozen=True)
class ReportChoice:
    """How a report is shown, and the files that it is also written to."""

    all_layers: bool
    report_files: tuple[Path, ...]

    def require_writable(self, outputs: Paths | None = None, inputs: Paths | None = None) -> None:
        """Raises OutputError, before the work, for a report that could not be written, or is another file in use.

        `outputs` and `inputs` are by option. A report to standard output sends results for people elsewhere.
        """
        from porting.cli.terminal import route_results
        from porting.files.atomic import refuse_clashes, require_writable
        from porting.reports import format_of, is_stream

        files = [path for path in self.report_files if not is_stream(path)]
        route_results(to_stderr=len(files) < len(self.report_files))
        for path in files:
            format_of(path)
        chosen = {
            label: [path for path in paths if path is not None]
            for label, paths in {**(outputs or {}), "--report": files}.items()
        }
        refuse_clashes(
            chosen,
            {label: [path for path in paths if path is not None] for label, paths in (inputs or {}).items()},
        )
        for path in files:
            require_writable(path)

    def show(self, report: ParityReport | None, *, without: str = "Not checked, as asked.") -> None:
        """Prints a report and writes it to every file that was asked for, or says that there is none."""
        from porting.cli.terminal import make_console, say
        from porting.reports import is_stream, write_report
        from porting.reports.terminal import print_report

        console = make_console()
        if report is None:
            console.print(without, style="yellow")
            return
        print_report(report, console, all_layers=self.all_layers)
        show_non_finite(report.context)
        for path in self.report_files:
            write_report(report, path)
        if files := [path for path in self.report_files if not is_stream(path)]:
            say(f"Wrote {', '.join(map(str, files))}")

    @property
    def hint(self) -> str:
        """Where a report that failed shows more."""
        files = [str(path) for path in self.report_files if path.suffix in {".html", ".json"}]
        return f"{files[0]} shows every layer." if files else "--report parity.html shows every layer."

    @contextlib.contextmanager
    def showing_refusal(self) -> Iterator[Progress]:
        """Progress for work that may end in a failed check, whose report is then shown before the error goes on."""
        from porting.cli.terminal import ProgressBar
        from porting.errors import FailedParityError

        try:
            with ProgressBar() as progress:
                yield progress
        except FailedParityError as error:
            self.show(error.report)
            raise


report_options = option_group(
    "reporting",
    ReportChoice,
    click.option("--all-layers", is_flag=True, help="Print every layer, not only the top level and failures."),
    click.option(
        "--report",
        "report_files",
        type=FILE,
        multiple=True,
        help="Also write the report: .html, .md, .xml (JUnit) or .json; - for JSON on standard output. Written when "
        "the check fails, too.",
    ),
)


def show_non_finite(facts: Mapping[str, Any]) -> None:
    """Names the tensors that hold NaN or infinity, if any."""
    from porting.cli.terminal import make_console

    if names := facts.get("non_finite"):
        line = f"{len(names)} tensors hold NaN or infinity: {', '.join(names)}"
        make_console().print(line, style="yellow", soft_wrap=True)


def show_written(path: Path, report_path: Path | None) -> None:
    """Says which files were written."""
    from porting.cli.terminal import say

    written = [path] if report_path is None else [path, report_path]
    say("Wrote " + " and ".join(map(str, written)))


def result_paths(out: Path) -> dict[str, list[Path]]:
    """What a command with `--out` writes."""
    from porting.files.atomic import report_path_of

    return {"--out": [out], "the report of --out": [report_path_of(out)]}
