"""`van-port evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import cloup

from porting.cli.groups import (
    FILE,
    JSON,
    CheckpointChoice,
    Model,
    checkpoint_options,
    model_options,
    output_options,
    report_files_option,
    titled,
    with_stream,
)
from porting.cli.overwriting import PortCommand
from porting.errors import INTERRUPTED


@cloup.command(cls=PortCommand, short_help="Compare the original and its port on a data set.")
@model_options(required=False)
@titled(
    "Files",
    click.option(
        "--weights", type=FILE, required=True, help="Keras weights, or an exported .tflite, .onnx or SavedModel."
    ),
)
@checkpoint_options
@titled(
    "Data",
    click.option("--data", required=True, metavar="SPEC", help="Data set, in one of the forms listed above."),
    click.option("--labels", type=FILE, help="The model's classes in order, one per line.  [default: the family's]"),
    click.option(
        "--samples", type=click.IntRange(min=1), help="Use only this many samples, from the start.  [default: all]"
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Samples per batch."),
    click.option("--tokenizer", default="", metavar="FOLDER", help="Tokenizer for texts, as saved by transformers."),
    click.option(
        "--tokens",
        type=click.IntRange(min=2),
        default=128,
        show_default=True,
        help="Truncate texts to this many tokens.",
    ),
)
@titled(
    "Preprocessing",
    click.option(
        "--keras-preprocessing",
        default="own",
        show_default=True,
        metavar="own|tensorflow|none|FILE.py:FUNCTION",
        help="Preprocessing of the third arm: the family's, TensorFlow's defaults or your own; none skips that arm.",
    ),
    click.option(
        "--pytorch-preprocessing",
        default="",
        metavar="FILE.py:FUNCTION",
        help="Preprocessing that both models share.  [default: that of the checkpoint's publisher]",
    ),
)
@titled(
    "Engine",
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True),
    click.option("--threads", type=click.IntRange(min=1), help="Threads per model.  [default: half the cores]"),
    click.option(
        "--workers",
        type=(click.IntRange(min=1), click.IntRange(min=1)),
        default=(1, 1),
        show_default=True,
        help="Maximum number of Ray processes for PyTorch and for Keras.",
    ),
    click.option("--ray-address", default="", help="Ray cluster to run on.  [default: start one on this machine]"),
    click.option("--resume", type=FILE, help="Save progress in this file, and resume from it."),
)
@titled(
    "Limits",
    click.option(
        "--max-flips", type=click.IntRange(min=0), help="Fail if the model itself changes more answers than this."
    ),
    click.option(
        "--max-drop", type=click.FloatRange(min=0), help="Fail if Keras's top-1 is lower by more than this many points."
    ),
    click.option("--baseline", type=FILE, help="Fail if this evaluation is worse than this earlier JSON one."),
)
@output_options(
    JSON,
    report_files_option("Also write the report: .html, .md or .json; - writes JSON to standard output."),
)
def evaluate(
    model: Model,
    weights: Path,
    checkpoint: CheckpointChoice,
    data: str,
    labels: Path | None,
    batch_size: int,
    samples: int | None,
    keras_preprocessing: str,
    pytorch_preprocessing: str,
    tokenizer: str,
    tokens: int,
    threads: int | None,
    engine: str,
    ray_address: str,
    workers: tuple[int, int],
    resume: Path | None,
    max_flips: int | None,
    max_drop: float | None,
    baseline: Path | None,
    as_json: bool,
    report_files: tuple[Path, ...],
) -> None:
    """Run the original and its port side by side on a data set, and report which answers change and why.

    \b
      van-port evaluate --variant b1 --weights van_b1.h5 --data imagenet/val --report evaluation.html
      van-port evaluate --variant nano --weights van_nano.tflite --data test.csv --max-flips 0

    Three arms see each sample: PyTorch with its own preprocessing, Keras on the same tensors, and Keras with its own
    preprocessing. The data set is one of:

    \b
      FOLDER                   class folders, named by class, number or synset; or images without labels
      FILE.csv, FILE.jsonl     columns image and label; or, for language models, text or token_ids
      FILE.parquet             columns image and label
      SHARDS{000..009}.tar     WebDataset
      tfds:NAME[/CONFIG][:SPLIT], hf:NAME[:SPLIT], or a folder saved by datasets

    Files may be at any address that fsspec supports, such as s3://bucket/folder. The exit code is 1 if a gate
    (--max-flips, --max-drop, --baseline) fails.
    """
    from porting.cli.terminal import ProgressBar, make_console, route_results, say
    from porting.errors import ParityError
    from porting.evaluation.result import objections
    from porting.files.atomic import refuse_clashes, require_writable
    from porting.reports import is_stream
    from porting.reports.evaluation import format_of, print_evaluation, read_evaluation, write_evaluation
    from porting.tasks.evaluate import EvaluateOptions
    from porting.tasks.evaluate import evaluate as run

    if ray_address and engine != "ray":
        raise click.UsageError("--ray-address needs --engine ray")
    report_files = with_stream(report_files, as_json)
    files = [path for path in report_files if not is_stream(path)]
    route_results(to_stderr=len(files) < len(report_files))
    for path in files:
        format_of(path)
    kept = [] if resume is None else [resume]
    refuse_clashes({"--report": files, "--resume": kept}, {})
    for path in (*files, *kept):
        require_writable(path)
    earlier = None if baseline is None else read_evaluation(baseline)
    arguments = dict(checkpoint.arguments)
    options = EvaluateOptions(
        batch_size=batch_size,
        limit=samples,
        labels=labels,
        own=keras_preprocessing,
        shared=pytorch_preprocessing,
        tokenizer=tokenizer,
        longest=tokens,
        threads=threads,
        engine=engine,
        ray_address=ray_address,
        workers=workers,
        resume=resume,
    )
    family, variant = model.of_file(weights)
    try:
        with ProgressBar() as progress:
            found = run(
                family,
                variant,
                weights,
                data,
                checkpoint={"location": arguments.pop("checkpoint"), **arguments},
                options=options,
                progress=progress,
            )
    except KeyboardInterrupt:
        if resume is None or not resume.exists():
            raise
        say(f"Interrupted. Run the same command again to resume from {resume}.", err=True)
        sys.exit(INTERRUPTED)
    print_evaluation(found, make_console())
    for path in report_files:
        write_evaluation(found, path)
    if files:
        say(f"Wrote {', '.join(map(str, files))}")
    if failed := objections(found, max_flips=max_flips, max_drop=max_drop, earlier=earlier):
        raise ParityError("; ".join(failed), hint="--report FILE.html shows every sample that changes.")
