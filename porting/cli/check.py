"""`van-port check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from porting.call_names import without_number
from porting.cli.groups import (
    FILE,
    WEIGHTS_HELP,
    CheckpointChoice,
    Model,
    ReportChoice,
    checkpoint_options,
    model_options,
    report_options,
    thoroughness_options,
    titled,
)
from porting.cli.overwriting import PortCommand

if TYPE_CHECKING:
    from porting.tasks.options import CheckOptions


# Options that matter only when the models run.
_OF_A_RUN = (
    "images",
    "samples",
    "stress",
    "train",
    "allow_non_finite",
    "strict_settings",
    "waive",
    "checkpoint",
    "sha256",
    "layout",
    "ema",
    "key",
    "prefix",
    "family",
    "config",
    "source",
    "target",
    "rows_file",
    "inputs",
)


@cloup.command(cls=PortCommand, short_help="Compare a file of Keras weights with its checkpoint.")
@model_options(required=False)
@titled("Files", click.option("--weights", type=FILE, help=WEIGHTS_HELP))
@checkpoint_options
@titled(
    "Earlier reports",
    click.option("--from", "from_report", type=FILE, help="Judge this JSON report again without running a model."),
    click.option("--baseline", type=FILE, help="Fail if a layer is worse than in this earlier JSON report."),
    click.option(
        "--factor", default=2.0, show_default=True, help="Factor by which an error may exceed the baseline's."
    ),
)
@thoroughness_options
@report_options
def check(
    model: Model,
    weights: Path | None,
    checkpoint: CheckpointChoice,
    from_report: Path | None,
    baseline: Path | None,
    factor: float,
    make_options: Callable[[], CheckOptions],
    reporting: ReportChoice,
) -> None:
    """Compare a file of Keras weights with the checkpoint that it should match. Exit code: 0 at parity, 1 if not.

    \b
      van-port check --weights van_b1.h5 --checkpoint van_small_811.pth.tar --report parity.html
      van-port check --from van_b1.h5.parity.json --max-ratio 4
    """
    from porting.cli.terminal import ProgressBar, say
    from porting.errors import ParityError, failed_parity
    from porting.parity.baseline import regressions
    from porting.reports.document import file_beside, read_report
    from porting.reports.terminal import verdict

    inputs = {
        "--weights": [weights],
        "--checkpoint": checkpoint.files,
        "--from": [from_report],
        "--baseline": [baseline],
    }
    reporting.require_writable({}, inputs)
    options = make_options()
    earlier = None if baseline is None else read_report(baseline)
    if from_report is not None:
        if weights is not None or model.variant is not None:
            extra = [option for option, given in (("--weights", weights), ("--variant", model.variant)) if given]
            raise click.UsageError(f"--from judges an existing report: omit {' and '.join(extra)}")
        context = click.get_current_context()
        if idle := [
            f"--{name.replace('_', '-')}"
            for name in _OF_A_RUN
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        ]:
            raise click.UsageError(f"--from judges an existing report, where {', '.join(idle)} can change nothing")
        report = read_report(from_report)
        if remark := file_beside(report, from_report):
            say(remark)
        layers = {without_number(layer.source) for layer in report.layers}
        if unknown := [name for name in options.limits.per_layer if without_number(name) not in layers]:
            raise click.UsageError(f"--limit: the report has no layer {unknown[0]!r}")
        stress = tuple(replace(run, limits=options.limits) for run in report.stress)
        report = replace(report, limits=options.limits, stress=stress)
    else:
        if weights is None:
            raise click.UsageError("give --weights, or --from with a JSON report")
        family, variant = model.of_file(weights)
        from porting.tasks.check import check as check_file

        with ProgressBar() as progress:
            report = check_file(family, variant, weights, **checkpoint.arguments, options=options, progress=progress)
    reporting.show(report)
    worse = [] if earlier is None else regressions(report, earlier, factor)
    for line in worse:
        say(f"Worse than the baseline: {line}")
    if not report.passed:
        first = report.first_divergence
        raise failed_parity(str(first) if first else verdict(report), report, hint=reporting.hint)
    if worse:
        raise ParityError(f"{len(worse)} comparisons are worse than {baseline} by more than {factor:g} times")
