"""Run the original and its port side by side on a data set."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from porting.errors import FamilyError, OptionError
from porting.evaluation.engines import ENGINES, require_ray, run_local, run_on_ray
from porting.evaluation.items import Block, blocks_of
from porting.evaluation.labels import Labels, read_labels, usual_labels
from porting.evaluation.progress_file import ProgressFile
from porting.evaluation.readers import Dataset, hugging_face_tokenizer, is_local, open_data
from porting.evaluation.result import Evaluation, duplicates, evaluation_of
from porting.exporting.usage import AS_THEY_ARE, PROBABILITIES
from porting.families.base import Family
from porting.files import weights_file
from porting.files.atomic import sha256_of
from porting.files.exported_file import exported_form, require_reader
from porting.files.survey import survey_file
from porting.models.frameworks import start_tensorflow
from porting.progress import SILENT, Progress
from porting.run import describe_run
from porting.tasks.case import refuse_another, refuse_without_checkpoint
from porting.tasks.plan import Plan

_NAMED_DUPLICATES = 20


@dataclass(frozen=True)
class EvaluateOptions:
    """How a data set is read and run.

    `batch_size` samples form a block, which each model takes at once. `limit` uses only that many samples, from the
    start. `labels` is a file with the model's classes in order. `own` and `shared` choose the preprocessing of images,
    as `Plan` explains. `tokenizer` encodes texts, which are truncated to `longest` tokens. `threads` is the number of
    threads per model, by default half the number of cores. `engine` is "local" or "ray". `ray_address` is the address
    of a running cluster, and `workers` is the maximum number of processes there for PyTorch and for Keras. `resume` is
    a file that stores the progress of the run.
    """

    batch_size: int = 64
    limit: int | None = None
    labels: Path | None = None
    own: str = "own"
    shared: str = ""
    tokenizer: str = ""
    longest: int = 128
    threads: int | None = None
    engine: str = "local"
    ray_address: str = ""
    workers: tuple[int, int] = (1, 1)
    resume: Path | None = None


def evaluate(
    family: Family,
    variant: str,
    weights: Path,
    data: str,
    *,
    checkpoint: Mapping[str, Any] | None = None,
    options: EvaluateOptions | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Run PyTorch with its own preprocessing, Keras on the same tensors, and Keras with its own preprocessing.

    `weights` is a file of Keras weights, or a file or folder from `van-port export`. `checkpoint` holds arguments of
    `open_case`: `location`, `layout` and so on. `open_data` lists the forms of `data`.

    Raises SourceError, CheckpointError, KeyMapError, WeightsFileError, FamilyError, EngineError, or ReportError if the
    progress file belongs to another evaluation.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        return _evaluate(family, variant, weights, data, checkpoint or {}, options or EvaluateOptions(), progress)
    finally:
        torch.set_num_threads(threads)


def _refuse_ends(exported: Path, facts: Mapping[str, Any]) -> None:
    """Raise OptionError for an export that takes other images than the model, or gives probabilities, as it says."""
    ends = {
        "--with-preprocessing": facts.get("image_std") == json.dumps(AS_THEY_ARE[1]),
        "--with-softmax": facts.get("output") == PROBABILITIES,
    }
    if found := [option for option, is_so in ends.items() if is_so]:
        raise OptionError(
            f"{exported} was exported with {', '.join(found)}, and evaluate compares logits of prepared images",
            hint="Export it once more without, and evaluate that file.",
        )


def _evaluate(
    family: Family,
    variant: str,
    weights: Path,
    data: str,
    checkpoint: Mapping[str, Any],
    options: EvaluateOptions,
    progress: Progress,
) -> Evaluation:
    if options.engine not in ENGINES:
        raise FamilyError(f"unknown engine {options.engine!r}", hint=f"Choose from {', '.join(ENGINES)}.")
    if options.engine == "ray":
        require_ray()
    form = exported_form(weights)
    if form is None or not weights.exists():
        weights_file.require_file(weights)
    else:
        require_reader(form)
    survey = survey_file(weights)
    refuse_another(family, variant, survey, weights)
    if form is not None:
        _refuse_ends(weights, survey.provenance or {})
    if checkpoint.get("location") is None:
        refuse_without_checkpoint(family, variant, survey, weights)
    if options.labels is not None:
        read_labels(options.labels)
    # What is wrong in local files shows before the frameworks load, which takes long.
    early = is_local(data) and not options.tokenizer
    unlabelled = open_data(data, Labels(0, ignored=True)) if early else None
    # Both models run at the same time, so each gets half the cores.
    threads = options.threads or max(1, (os.cpu_count() or 1) // 2)
    plan = Plan(
        family,
        variant,
        weights.absolute(),
        {"location": None, **checkpoint},
        own=options.own,
        shared=options.shared,
        longest=options.longest,
        threads=threads,
    )
    plan.require_functions()
    progress("reading the checkpoint")
    case = plan.case
    progress("starting TensorFlow")
    start_tensorflow(threads)
    tokenizer = hugging_face_tokenizer(options.tokenizer) if options.tokenizer else None
    progress("looking at the data set")
    if unlabelled is None:
        unlabelled = open_data(data, Labels(0, ignored=True), tokenizer=tokenizer)
    progress("running PyTorch in float64 on some samples")
    plan = plan.fitted(blocks_of(unlabelled.items(), options.batch_size))
    labels = _labels(plan, options)
    dataset = open_data(data, labels, tokenizer=tokenizer)
    total = min(filter(None, (dataset.total, options.limit)), default=0)
    weights_hash = sha256_of(weights)
    started = time.perf_counter()
    # Hashing a data set can take long, and only --resume needs it.
    identity = {} if options.resume is None else _identity(plan, data, dataset, weights_hash, options)
    kept = ProgressFile(options.resume, identity)
    blocks = _but(blocks_of(dataset.items(), options.batch_size, limit=options.limit), kept.done)
    if options.engine == "ray":
        progress("starting Ray")
        results = run_on_ray(plan, blocks, address=options.ray_address, workers=options.workers, threads=plan.threads)
    else:
        results = run_local(plan, blocks)
    before = kept.tally.counts["samples"]
    progress("evaluating", before, total)
    try:
        for number, tally in results:
            kept.add(number, tally)
            done = kept.tally.counts["samples"]
            rate = (done - before) / (time.perf_counter() - started)
            progress(f"evaluating, {rate:,.0f} samples a second", done, total)
    finally:
        kept.write()
    elapsed = time.perf_counter() - started
    found = evaluation_of(
        kept.tally,
        classes=plan.classes,
        names=tuple(map(labels.name, range(len(labels.names)))),
        noise=plan.noise,
    )
    context = {
        **describe_run(),
        **case.describe(),
        "weights": weights.name,
        "data": dataset.described,
        "engine": options.engine,
        "batch_size": options.batch_size,
        "preprocessing": {"shared": options.shared or "the family's", "keras": options.own},
        "file": {"name": weights.name, "sha256": weights_hash},
    }
    groups = duplicates(kept.tally.hashes)[:_NAMED_DUPLICATES]
    found = replace(
        found,
        context=context,
        notes=dataset.notes,
        seconds={**found.seconds, "in all": elapsed},
        duplicate_samples=_names_of(groups, dataset),
    )
    kept.remove()
    return found


def _identity(plan: Plan, data: str, dataset: Dataset, weights_hash: str, options: EvaluateOptions) -> dict[str, Any]:
    """Everything that must be unchanged for a run to resume."""
    checkpoint = plan.case.checkpoint
    return {
        "data": dataset.described,
        "number of samples": dataset.total,
        "content of the data": _content_of(data),
        "list of labels": _content_of(str(options.labels or "")),
        "tokenizer": f"{options.tokenizer}, {options.longest} tokens",
        "weights": weights_hash,
        "checkpoint": checkpoint.sha256 if checkpoint is not None else "",
        "model": f"{plan.family.described} {plan.variant}",
        "preprocessing": [options.shared, options.own, *map(_content_of, _files(options.shared, options.own))],
        "batch size": options.batch_size,
        "limit": options.limit,
        "number of threads": plan.threads,
    }


def _content_of(path: str) -> str:
    """The SHA-256 of a local file; "" for anything else."""
    return sha256_of(Path(path)) if path and "://" not in path and Path(path).is_file() else ""


def _files(*functions: str) -> list[str]:
    """The file of each FILE.py:FUNCTION."""
    return [function.rpartition(":")[0] for function in functions]


def _labels(plan: Plan, options: EvaluateOptions) -> Labels:
    if plan.vocabulary:
        return Labels(0, ignored=True)
    if options.labels is not None:
        return read_labels(options.labels, plan.classes)
    return usual_labels(plan.classes, plan.family.class_names(plan.case.spec))


def _but(blocks: Iterator[Block], done: set[int]) -> Iterator[Block]:
    return (block for block in blocks if block.number not in done)


def _names_of(groups: list[list[int]], dataset: Dataset) -> list[list[str]]:
    """The names and labels of the first two samples of each group, looked up by sample number."""
    wanted = {number for group in groups for number in group[:2]}
    if not wanted:
        return []
    names = {
        number: item.name if item.label is None else f"{item.name} (label {item.label})"
        for number, item in enumerate(itertools.islice(dataset.items(), max(wanted) + 1))
        if number in wanted
    }
    return [[names.get(number, str(number)) for number in group[:2]] for group in groups]
