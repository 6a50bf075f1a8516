"""Groups of options that commands share. Each group passes one object to the command instead of many parameters."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import cloup

from porting.errors import PortingError
from porting.families.registry import family_names, get_family
from porting.wording import counted

if TYPE_CHECKING:
    from porting.families.base import Family
    from porting.parity.report import ParityReport
    from porting.progress import Progress
    from porting.tasks.options import CheckOptions

DEFAULT_FAMILY = "van"
FILE = click.Path(path_type=Path)
Paths = Mapping[str, Iterable[Path | None]]
Command = TypeVar("Command", bound=Callable[..., Any])


def titled(title: str, *options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """A decorator that adds these options to a command and lists them under a title in its help."""

    def decorate(command: Command) -> Command:
        earlier = list(getattr(command, "__click_params__", ()))
        own = len(earlier)
        for option in reversed(options):
            command = option(command)
        groups = (getattr(parameter, "group", None) for parameter in earlier)
        group = next((each for each in groups if each is not None and each.title == title), None)
        for parameter in command.__click_params__[own:]:  # type: ignore[attr-defined]
            if getattr(parameter, "group", None) is None:
                parameter.group = group if group is not None else cloup.OptionGroup(title)
                group = parameter.group
        return command

    return decorate


def option_group(
    title: str, argument: str, make: Callable[..., Any], *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    """A decorator that adds options, under a title, to a command, which gets them as `argument=make(**options)`."""

    def decorate(command: Command) -> Command:
        def probe() -> None:
            pass

        for option in options:
            option(probe)  # type: ignore[arg-type]
        parameters = probe.__click_params__  # type: ignore[attr-defined]
        names = {parameter.name for parameter in parameters if parameter.expose_value}

        @functools.wraps(command)
        def collecting(*args: Any, **values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return command(*args, **values, **{argument: make(**own)})

        decorate_all: Any = titled(title, *options)
        return decorate_all(collecting)  # type: ignore[no-any-return]

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

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return completions(family_names(), incomplete)


def completions(names: Iterable[str], incomplete: str) -> list[Any]:
    """What a shell offers for a name that is typed in part."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def family_of(ctx: click.Context | None) -> Family:
    """The family given on the command line, VAN by default. `--family` is eager, so click parses it first."""
    family = ctx.params.get("family") if ctx is not None else None
    return family if family is not None else get_family(DEFAULT_FAMILY)


class OfFamily(click.ParamType):  # type: ignore[type-arg]
    """A name that the family given on the command line has, such as a variant or a layout."""

    def __init__(self, name: str, choices: Callable[[Family], tuple[str, ...]]) -> None:
        self.name = name
        self._choices = choices

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._choices(family_of(ctx)))}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if ctx is not None and ctx.get_parameter_source("source") is click.core.ParameterSource.COMMANDLINE:
            self.fail("this belongs to a family and cannot be combined with --source", param, ctx)
        family = family_of(ctx)
        choices = self._choices(family)
        if value not in choices:
            self.fail(f"the family {family.name} has no {value!r}; it has {', '.join(choices)}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return completions(self._choices(family_of(ctx)), incomplete)


SOURCE_ARGUMENTS = click.option(
    "--source-arg", "source_arguments", multiple=True, metavar="NAME=VALUE", help="Argument of the PyTorch model."
)
TARGET_ARGUMENTS = click.option(
    "--target-arg", "target_arguments", multiple=True, metavar="NAME=VALUE", help="Argument of the Keras model."
)
VARIANT = OfFamily("variant", lambda family: family.variants)
LAYOUT = OfFamily("layout", lambda family: tuple(naming.name for naming in family.namings))


class LayerLimit(click.ParamType):  # type: ignore[type-arg]
    """A layer and its limit, as `name:ratio`."""

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
    """A SHA-256 hash: 64 hexadecimal digits."""

    name = "HEX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", str(value)):
            self.fail(f"{value!r} is not a sha256: 64 hexadecimal digits", param, ctx)
        return str(value).lower()


@dataclass(frozen=True)
class Model:
    """`--family` and `--variant`; `variant` is None if it was omitted and is optional."""

    family: Family
    variant: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for the functions in `porting.tasks`."""
        return {"family": self.family, "variant": self.variant}

    def of_file(self, weights: Path) -> tuple[Family, str]:
        """The family and variant. Without `--variant`, read both from what the file says of itself.

        Raises SourceError if there is no such file, UsageError if it names no variant, and WeightsFileError if it
        cannot be read. Call this before a task is imported, which loads PyTorch.
        """
        from porting.files.exported_file import exported_form, require_reader
        from porting.files.survey import survey_file
        from porting.files.weights_file import require_file

        form = exported_form(weights)
        if form is None or not weights.exists():
            require_file(weights)
        if self.variant is not None:
            return self.family, self.variant
        if form is not None:
            require_reader(form)
        facts: Mapping[str, Any] = survey_file(weights).provenance or {}
        family, variant = facts.get("family"), facts.get("variant")
        with contextlib.suppress(PortingError):
            found = get_family(family) if isinstance(family, str) else None
            if found is not None and variant in found.variants and self.family.name in {DEFAULT_FAMILY, found.name}:
                return found, str(variant)
        if isinstance(family, str) and " -> " in family:
            raise click.UsageError(f"{weights} was ported with --source, --target and --map: give them here too")
        raise click.UsageError(
            f"Missing option '--variant', or --source, --target and --map: {weights} does not name its model."
        )


def family_option(command: Command) -> Command:
    """Add `--family`, which defaults to VAN."""
    return click.option(
        "--family",
        type=FamilyType(),
        default=DEFAULT_FAMILY,
        show_default=True,
        is_eager=True,
        help="Model family; `van-port families` lists them.",
    )(command)


def model_options(*, required: bool = True) -> Callable[[Command], Command]:
    """Add `--family` and `--variant`, or `--source`, `--target` and `--map`, passed on as `model`."""
    return option_group(
        "Model",
        "model",
        functools.partial(_model, required),
        family_option,
        click.option("--variant", type=VARIANT, help="Variant of the family; those of VAN are shown."),
        click.option(
            "--config", type=FILE, help="Settings of a VAN, .json or .toml, or its config.json; replaces --variant."
        ),
        click.option("--source", is_eager=True, help="PyTorch model, such as FILE.py:make; replaces --family."),
        click.option("--target", help="Keras model, such as FILE.py:make; `van-port map --help` lists all forms."),
        click.option(
            "--map", "rows_file", type=FILE, help="Key map between the two, .toml, as written by `van-port map`."
        ),
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
            raise click.UsageError("--source-arg, --target-arg and --inputs need --source and --target")
        if config is not None:
            return _configured(family, variant, config)
        if required and variant is None:
            raise click.UsageError("Missing option '--variant'.")
        return Model(family, variant)
    if missing := [option for option, value in given.items() if not value]:
        hint = ""
        if missing == ["--map"]:
            hint = f". `van-port map {source} {target} --out rows.toml` finds one"
        raise click.UsageError(
            f"--source, --target and --map must be given together: {', '.join(missing)} is missing{hint}"
        )
    if config is not None:
        raise click.UsageError("--config belongs to a family and cannot be combined with --source")
    if click.get_current_context().get_parameter_source("family") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--source replaces --family: give one of them")
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
        rows_file=rows_file,
        source_arguments=parse_arguments(source_arguments),
        target_arguments=parse_arguments(target_arguments),
        inputs=inputs,
    )
    return Model(made, OWN)


def _configured(family: Family, variant: str | None, config: Path) -> Model:
    if variant is not None:
        raise click.UsageError("--config replaces --variant: give one of them")
    if family.name != DEFAULT_FAMILY:
        raise click.UsageError(f"--config works only with the family {DEFAULT_FAMILY}; {family.name} has only variants")
    from porting.families.van_config import ConfiguredVanFamily

    made = ConfiguredVanFamily(config)
    return Model(made, made.variant)


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint and how to read it. `arguments` holds the values of the options that the command has."""

    arguments: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that a checkpoint given by path is read from; empty for an address."""
        from porting.tasks.case import files_of

        return files_of(self.arguments["checkpoint"])


EMA = click.option(
    "--ema/--no-ema", default=False, show_default=True, help="Use the moving-average weights if the file has both."
)
KEY = click.option("--key", help="Entry of the file that holds the weights, such as model or ema.module.")
PREFIX = click.option("--prefix", help="Use only tensors whose names start with this, and strip it.")
checkpoint_options = option_group(
    "Checkpoint",
    "checkpoint",
    lambda **arguments: CheckpointChoice(arguments),
    click.option(
        "--checkpoint",
        metavar="FILE|URL",
        help="PyTorch checkpoint: a path, https://... or hf://owner/repo/file[@revision].  "
        "[default: the variant's official file]",
    ),
    click.option("--sha256", type=Sha256(), help="Required hash of the checkpoint."),
    click.option(
        "--layout",
        type=LAYOUT,
        help="Publisher whose tensor names the checkpoint uses.  [default: recognised from the names]",
    ),
    EMA,
    KEY,
    PREFIX,
)

CHECK = click.option(
    "--check/--no-check", default=True, show_default=True, help="Write the file only if it passes the parity check."
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
    """Return a function that makes the CheckOptions. Making them needs an import, which would slow down `--help`."""

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
    "Parity check",
    "make_options",
    _lazy_options,
    click.option("--images", type=FILE, help="Folder of images for the check.  [default: embedded ones]"),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        help="Number of inputs.  [default: 2; one image in a port or a check, or all of up to 64 pixels]",
    ),
    click.option(
        "--locate/--no-locate", default=True, show_default=True, help="Find the layers where the two models diverge."
    ),
    click.option(
        "--stress", is_flag=True, help="Also check with other weights and shapes, which make mistakes more visible."
    ),
    click.option("--train", is_flag=True, help="Also compare ten training steps: gradients, statistics and weights."),
    click.option(
        "--max-ratio",
        type=click.FloatRange(min=0, min_open=True),
        help="Limit in float32, in units of PyTorch's own rounding error.  [default: 64]",
    ),
    click.option(
        "--max-exact-ratio",
        type=click.FloatRange(min=0, min_open=True),
        help="Limit of the outputs in float64, in units of float64's rounding error.  [default: 256]",
    ),
    click.option("--atol", type=click.FloatRange(min=0), help="Also limit the largest absolute difference."),
    click.option(
        "--rtol",
        type=click.FloatRange(min=0),
        help="Also limit the largest difference relative to the layer's largest value.",
    ),
    click.option(
        "--allow-non-finite",
        is_flag=True,
        help="Port NaN and infinite weights unchanged; the check replaces them with zeros.",
    ),
    click.option(
        "--strict-settings",
        is_flag=True,
        help="Also fail on settings that matter only in training, such as a momentum.",
    ),
    click.option("--waive", multiple=True, metavar="MODULE[:SETTING]", help="Accept a difference in this setting."),
    click.option(
        "--limit", "layer_limits", type=LayerLimit(), multiple=True, help="Limit of one layer, in place of --max-ratio."
    ),
)


@dataclass(frozen=True)
class ReportChoice:
    """How to print a report, and the files to write it to."""

    all_layers: bool
    report_files: tuple[Path, ...]

    def require_writable(self, outputs: Paths | None = None, inputs: Paths | None = None) -> None:
        """Raise OutputError if a report file cannot be written or clashes with another file of the command.

        Call this before the work starts. `outputs` and `inputs` map options to paths. If a report goes to standard
        output, everything else is printed to standard error.
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

    def show(self, report: ParityReport | None, *, without: str = "Not checked, as requested.") -> None:
        """Print a report and write it to the requested files, or print `without` if there is no report."""
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
        """Where to find details of a failed report."""
        files = [str(path) for path in self.report_files if path.suffix in {".html", ".json"}]
        return f"{files[0]} shows every layer." if files else "--report parity.html shows every layer."

    @contextlib.contextmanager
    def showing_refusal(self) -> Iterator[Progress]:
        """Show progress; if the work ends in a failed check, show its report and raise the error again."""
        from porting.cli.terminal import ProgressBar
        from porting.errors import FailedParityError

        try:
            with ProgressBar() as progress:
                yield progress
        except FailedParityError as error:
            self.show(error.report)
            raise


def report_files_option(help: str) -> Callable[[Command], Command]:
    """`--report`, as often as there are files to write."""
    return click.option("--report", "report_files", type=FILE, multiple=True, help=help)


def with_stream(report_files: tuple[Path, ...], as_json: bool) -> tuple[Path, ...]:
    """The files of `--report`, and standard output once if `--json` asks for it."""
    stream = Path("-")
    return (*report_files, stream) if as_json and stream not in report_files else report_files


def _report_choice(all_layers: bool, as_json: bool, report_files: tuple[Path, ...]) -> ReportChoice:
    return ReportChoice(all_layers, with_stream(report_files, as_json))


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON to standard output, and nothing else there.")
QUIET = click.option(
    "--quiet",
    "-q",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, _, value: _be_quiet(ctx) if value else None,
    help="Print only errors, and no progress.",
)


def _be_quiet(ctx: click.Context) -> None:
    from porting.cli.terminal import be_quiet

    be_quiet()
    ctx.call_on_close(functools.partial(be_quiet, quiet=False))


def all_option(*names: str, help: str) -> Callable[[Command], Command]:
    """`--verbose`, under the names that say what more a command prints with it."""
    return click.option("--verbose", "-v", *names, is_flag=True, help=help)


def output_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options of what a command prints; `--quiet` is always among them."""
    return titled("Output", *options, QUIET)


report_options = option_group(
    "Output",
    "reporting",
    _report_choice,
    all_option("--all-layers", "all_layers", help="Print every layer, not only the top level and failures."),
    JSON,
    report_files_option(
        "Also write the report, even if the check fails: .html, .md, .xml (JUnit) or .json; - writes JSON to "
        "standard output."
    ),
    QUIET,
)


def show_non_finite(facts: Mapping[str, Any]) -> None:
    """Print the names of the tensors that hold NaN or infinity, if any."""
    from porting.cli.terminal import make_console

    if names := facts.get("non_finite"):
        line = f"NaN or infinity in {counted(len(names), 'tensor')}: {', '.join(names)}"
        make_console().print(line, style="yellow", soft_wrap=True)


def show_written(path: Path, report_path: Path | None) -> None:
    """Print which files were written."""
    from porting.cli.terminal import say

    written = [path] if report_path is None else [path, report_path]
    say("Wrote " + " and ".join(map(str, written)))


def result_paths(out: Path) -> dict[str, list[Path]]:
    """The files that a command with `--out` writes, by option."""
    from porting.files.atomic import report_path_of

    return {"--out": [out], "the report of --out": [report_path_of(out)]}
