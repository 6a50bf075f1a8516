"""Evaluations in four formats: JSON, which is the evaluation, and terminal, HTML and Markdown, made from it.

schema_version   1; readers refuse other versions
kind             "evaluation"
samples, labelled, classes, tokens
arms             pytorch, keras (the same tensors), keras_own: {name, top1, top5, calibration_error, bins, not_finite,
                 perplexity, seconds}; top1 and top5 are {right, total, rate, low, high}, with Wilson's 95% interval
steps            model, preprocessing: {name, arms, answers, flips, ties, lost, won, p_value, points, kl,
                 largest_change, distance, exchanged}
flips            by step, the first 200 samples whose answer changes: {sample, label, answers, margin, tie, kl,
                 probability_change, pictures}; margin is in units of float32's noise
worst            by step, the samples whose probabilities change most
per_class        {number, samples, right}, right by arm; class_names names all classes, if known
label_advice     {plain, permuted, mapping}, or null
refused, remarks counts by cause; refused_samples, remarked, outside and duplicate_samples name the first samples
context          provenance
"""

from __future__ import annotations

import html
import json
import re
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from porting.errors import ReportError
from porting.evaluation.result import SCHEMA_VERSION, TITLES, ArmResult, Evaluation, Share, StepResult, explained
from porting.files.atomic import open_regular
from porting.reports import format_among, write_rendered
from porting.reports.document import decoded, encoded, report_text
from porting.reports.terminal import model_named_in

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = {".json": "json", ".html": "html", ".md": "markdown"}
KIND = "evaluation"
_SHOWN = 10
_ROUNDING = 1e-5
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")


def format_of(path: Path) -> str:
    """The format of a file's suffix; raises OutputError if there is none."""
    return format_among(FORMATS, path, "what to write")


def render(found: Evaluation, form: str) -> str:
    """Render the evaluation as text, in one of the values of `FORMATS`."""
    if form == "json":
        return to_json(found)
    return to_html(found) if form == "html" else to_markdown(found)


def write_evaluation(found: Evaluation, path: Path, form: str | None = None) -> None:
    """Write the evaluation to a file, in the format of its suffix, or to standard output; raises OutputError."""
    write_rendered(partial(render, found), path, form, format_of)


def to_json(found: Evaluation) -> str:
    """Convert the whole evaluation to JSON. `from_json` restores it."""
    document = {"schema_version": SCHEMA_VERSION, "kind": KIND, "blame": found.blame, **msgspec.to_builtins(found)}
    return json.dumps(encoded(document), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Evaluation:
    """Restore an evaluation that `to_json` wrote; raises ReportError for anything else."""
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ReportError("not an evaluation", hint="Give the JSON that van-port evaluate wrote.")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ReportError(
                f"an evaluation of schema {document.get('schema_version')}; this version reads {SCHEMA_VERSION}"
            )
        found = msgspec.convert(decoded(document), Evaluation)
        _refuse_unsound(found)
        return found
    except (ValueError, TypeError, RecursionError) as error:
        raise ReportError(f"not an evaluation: {type(error).__name__}: {error}") from None


def _refuse_unsound(found: Evaluation) -> None:
    """Raise ReportError for invalid records, which cannot be rendered."""
    try:
        to_html(found)
        to_markdown(found)
    except Exception as error:  # a value of the wrong type can cause anything
        raise ReportError(f"not an evaluation: {type(error).__name__}: {error}") from None


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation from a JSON file; raises SourceError if it is missing, and ReportError if it is not one."""
    with report_text(path, "`van-port evaluate --report FILE.json` writes it.") as text:
        return from_json(text)


def is_evaluation(path: Path) -> bool:
    """Whether a JSON file is an evaluation rather than a parity report."""
    try:
        with open_regular(path) as file:
            return f'"kind": "{KIND}"'.encode() in file.read(200)
    except OSError:
        return False


def title(found: Evaluation) -> str:
    """The title: which model was evaluated, and on which data."""
    model = model_named_in(found.context)
    return f"Evaluation of {model or 'a port'} on {found.context.get('data', 'a data set')}"


def conclusion(found: Evaluation) -> str:
    """The verdict in one line."""
    tokens = f"{found.tokens:,} tokens of " if found.tokens else ""
    where = f"{tokens}{found.samples:,} samples"
    if not found.samples:
        return "No sample could be read."
    if found.blame == "nothing":
        return f"{where}: the port changes no answer beyond float32's ties"
    return f"{where}: answers change because of {found.blame}"


def print_evaluation(found: Evaluation, console: Console) -> None:
    """Print a table of the arms, the findings, and the first changed answers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(_headings(found)):
        table.add_column(heading, justify="left" if not number else "right")
    for arm in found.arms:
        table.add_row(*_cells(arm, found))
    console.print(table)
    for line in (*explained(found), *found.notes):
        console.print(line)
    for step in found.steps:
        flips = found.flips.get(step.name, [])
        for flip in flips[:_SHOWN]:
            console.print(f"  {_flip_text(flip, step, found)}", style="dim")
        if len(flips) > _SHOWN:
            console.print(f"  and {step.flips - _SHOWN:,} more; --report FILE.html shows them", style="dim")
    console.print(conclusion(found), style="bold green" if found.blame == "nothing" else "bold yellow")


def _headings(found: Evaluation) -> list[str]:
    if found.tokens:
        return ["", "perplexity", "seconds"]
    return ["", "top-1", "95% interval", "top-5", "calibration error", "samples/s"]


def _cells(arm: ArmResult, found: Evaluation) -> list[str]:
    if found.tokens:
        return [TITLES[arm.name], "-" if arm.perplexity is None else f"{arm.perplexity:.6g}", f"{arm.seconds:.1f}"]
    speed = f"{found.samples / arm.seconds:,.0f}" if arm.seconds else "-"
    error = "-" if arm.calibration_error is None else f"{arm.calibration_error:.4f}"
    return [TITLES[arm.name], _rate(arm.top1), _interval(arm.top1), _rate(arm.top5), error, speed]


def _rate(share: Share) -> str:
    return "-" if share.rate is None else f"{100 * share.rate:.2f}%"


def _interval(share: Share) -> str:
    return "-" if share.low is None or share.high is None else f"{100 * share.low:.2f} to {100 * share.high:.2f}"


def _flip_text(flip: dict[str, Any], step: StepResult, found: Evaluation) -> str:
    name = found.class_name
    one, other = (flip.get("answers", {}).get(arm) for arm in step.arms)
    label = flip.get("label")
    tie = ", a tie" if flip.get("tie") else ""
    answers = f"{name(one)} becomes {name(other)}"
    right = "" if label is None else f", labelled {name(label)}"
    return f"{flip.get('sample')}: {answers}{right}; margin {flip.get('margin', 0.0):.3g} times the noise{tie}"


def to_markdown(found: Evaluation) -> str:
    """Render a heading, the table of the arms, the findings, and the first changed answers."""
    headings = _headings(found)
    lines = [f"## {_escaped(title(found))}", "", _escaped(conclusion(found)), ""]
    lines += [f"| {' | '.join(headings)} |", f"|{'|'.join(['---', *['---:'] * (len(headings) - 1)])}|"]
    lines += [f"| {' | '.join(_cells(arm, found))} |" for arm in found.arms]
    lines += ["", *(f"- {_escaped(line)}" for line in (*explained(found), *found.notes))]
    for step in found.steps:
        if flips := found.flips.get(step.name):
            lines += ["", f"Answers that the {step.name} changes (the first {min(len(flips), _SHOWN)}):", ""]
            lines += [f"- {_escaped(_flip_text(flip, step, found))}" for flip in flips[:_SHOWN]]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    plain = "".join(each if each.isprintable() else " " for each in text)
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(plain, quote=False))


def to_html(found: Evaluation) -> str:
    """Render porting/reports/evaluation.html, which loads nothing from the network."""
    import jinja2

    template = resources.files("porting.reports").joinpath("evaluation.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=title(found),
        conclusion=conclusion(found),
        good=found.blame == "nothing",
        headings=_headings(found),
        arms=[_cells(arm, found) for arm in found.arms],
        lines=[*explained(found), *found.notes],
        steps=[_step_cells(step, found) for step in found.steps],
        classes=[_class_cells(each, found) for each in found.per_class],
        class_headings=["class", "samples", *(TITLES[arm.name] for arm in found.arms)],
        calibration=[(TITLES[arm.name], arm.bins) for arm in found.arms if arm.bins],
        left_out=[(each.get("sample"), each.get("cause"), each.get("detail")) for each in found.refused_samples],
        remarked=list(found.remarked.items()),
        duplicates=found.duplicate_samples,
        facts=_facts(found),
    )


def _step_cells(step: StepResult, found: Evaluation) -> dict[str, Any]:
    flips, worst = found.flips.get(step.name, []), found.worst.get(step.name, [])
    return {
        "name": step.name,
        "flips": [_picture_cells(flip, step, found) for flip in flips],
        "more": step.flips - len(flips),
        "worst": [_picture_cells(each, step, found) for each in worst if _shows(each)],
    }


def _shows(record: dict[str, Any]) -> bool:
    """Whether a sample's results differ by more than float32's usual rounding error."""
    return max(record.get("probability_change") or 0.0, record.get("distance") or 0.0) > _ROUNDING


def _picture_cells(record: dict[str, Any], step: StepResult, found: Evaluation) -> dict[str, Any]:
    pictures = record.get("pictures", {})
    shown = [
        (TITLES.get(arm, arm), picture)
        for arm, picture in (pictures.items() if isinstance(pictures, dict) else ())
        if isinstance(picture, str) and _PICTURE.fullmatch(picture)
    ]
    change = record.get("probability_change")
    text = _flip_text(record, step, found) if "margin" in record else str(record.get("sample"))
    if isinstance(change, float):
        text += f"; a probability changes by {change:.2g}"
    if isinstance(record.get("distance"), float):
        text += f"; features differ by {record['distance']:.1e}"
    return {"pictures": shown, "text": text}


def _class_cells(each: Any, found: Evaluation) -> dict[str, Any]:
    rates = [each.right.get(arm.name, 0) for arm in found.arms]
    differs = len(set(rates)) > 1
    return {
        "cells": [
            found.class_name(each.number),
            f"{each.samples:,}",
            *(f"{100 * r / each.samples:.2f}%" for r in rates),
        ],
        "off": differs,
    }


def _facts(found: Evaluation) -> list[tuple[str, str]]:
    facts = {**found.context, "float32 noise of the logits": f"{found.noise:.2e} of their RMS"}
    seconds = {f"seconds {name}": f"{value:.1f}" for name, value in found.seconds.items()}
    return [(str(name), str(value)) for name, value in {**facts, **seconds}.items()]
