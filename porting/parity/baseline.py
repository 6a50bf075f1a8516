"""Compares a report with an earlier one, to find layers that got worse."""

from __future__ import annotations

from porting.errors import ReportError
from porting.parity.report import LayerComparison, ParityReport, View
from porting.wording import counted

DEFAULT_FACTOR = 2.0


def regressions(report: ParityReport, baseline: ParityReport, factor: float = DEFAULT_FACTOR) -> list[str]:
    """Describe every layer whose error has grown by more than `factor`, or that is no longer compared.

    The error is Keras's RMS distance to the truth relative to the layer's scale, in every view that both reports have.
    An error below one rounding of the computed type counts as one rounding. Raises ReportError if the two have no layer
    in common.
    """
    now = {layer.source: layer for layer in report.layers}
    known = [layer.source for layer in baseline.layers if not layer.is_output]
    if known and not any(name in now for name in known):
        raise ReportError(
            f"the baseline is of another model: none of its {counted(len(known), 'layer')} is in the report",
            hint="Give a report of the same model.",
        )
    found = []
    for old in baseline.layers:
        new = now.get(old.source)
        if new is None:
            found.append(f"{old.source} is in the baseline and is no longer compared")
            continue
        found += _worse_views(old, new, factor)
    return found


def _worse_views(old: LayerComparison, new: LayerComparison, factor: float) -> list[str]:
    found = []
    for name, before in old.views.items():
        after = new.views.get(name)
        if after is None:
            continue  # a check with fewer views says nothing about the others
        if after.problem and not before.problem:
            found.append(f"{new.source} ({name}): {after.problem}")
        elif not _relative(after) <= factor * _relative(before):
            found.append(
                f"{new.source} ({name}): relative error {_relative(after):.2g}, {_relative(before):.2g} in the baseline"
            )
    return found


def _relative(view: View) -> float:
    if not view.scale.rms:
        return view.roundoff if not view.actual_error.rms else float("inf")
    return max(view.actual_error.rms / view.scale.rms, view.roundoff)
