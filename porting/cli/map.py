"""`van-port map`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import cloup

from porting.cli.groups import FILE, JSON, SOURCE_ARGUMENTS, TARGET_ARGUMENTS, all_option, output_options, titled
from porting.cli.overwriting import PortCommand


@cloup.command("map", cls=PortCommand, short_help="Find the key map between any two models.")
@click.argument("source")
@click.argument("target")
@titled(
    "Models",
    SOURCE_ARGUMENTS,
    TARGET_ARGUMENTS,
    click.option("--inputs", type=FILE, help="Inputs of the Keras model by name, .npz.  [default: random]"),
)
@titled(
    "Map",
    click.option(
        "--pair", "pairs", multiple=True, metavar="TORCH.NAME=KERAS/PATH", help="A row that you already know."
    ),
    click.option("--map", "known", type=FILE, help="A half-finished file of rows to complete, .toml."),
    click.option(
        "--absorb-epsilon", is_flag=True, help="Where batch norm epsilons differ, add the difference to the variances."
    ),
)
@output_options(
    click.option("--out", type=FILE, help="Write the rows to this file, .toml."),
    click.option("--family", metavar="NAME", help="Also write NAME.py, a family file to complete."),
    all_option("--all-rows", "all_rows", help="Print each row with its confidence, instead of the short rules."),
    JSON,
)
def map_command(
    source: str,
    target: str,
    out: Path | None,
    source_arguments: tuple[str, ...],
    target_arguments: tuple[str, ...],
    inputs: Path | None,
    pairs: tuple[str, ...],
    known: Path | None,
    family: str | None,
    absorb_epsilon: bool,
    all_rows: bool,
    as_json: bool,
) -> None:
    """Propose a key map from SOURCE, a PyTorch model, to TARGET, a Keras model, and prove it by running both.

    \b
      van-port map timm:resnet18 my_models.py:make_resnet --out rows.toml
      van-port map torchvision:vgg16 keras.applications:VGG16
      van-port map timm:tf_mobilenetv3_large_100 keras.applications:MobileNetV3Large \\
          --target-arg include_preprocessing=False --absorb-epsilon

    A model is timm:NAME, torchvision:NAME, transformers:CLASS[:config.json], keras.applications:NAME,
    keras_hub:CLASS[:config.json], package.module:callable or file.py:callable, which runs that file. The exit code is
    0 if the map is complete and its outputs are exact, else 4.
    """
    from dataclasses import asdict

    from porting.families.specs import parse_arguments, require_its_file

    for spec in (source, target):
        require_its_file(spec)  # before PyTorch is loaded

    from porting.cli.terminal import ProgressBar, say, say_json
    from porting.errors import KeyMapError, OutputError
    from porting.files.atomic import refuse_clashes, refuse_existing, require_writable, write_text
    from porting.mapping.rows_file import read_rows, rows_text
    from porting.proposing.family_file import family_text
    from porting.tasks.map import map_models

    stated = {name: path for name, _, path in (pair.partition("=") for pair in pairs)}
    if broken := [pair for pair in pairs if "=" not in pair]:
        raise click.UsageError(f"--pair {broken[0]!r} must have the form torch.name=keras/path")
    outputs = {} if out is None else {"--out": [out]}
    family_file = None
    if family is not None:
        family_text(family, source, target, ())  # refuses a bad name before the search
        family_file = Path(f"{family}.py")
        refuse_existing(family_file)
        outputs["--family"] = [family_file]
    if out is not None and out.suffix != ".toml":
        raise OutputError(f"{out}: rows are written as .toml", hint=f"Use {out.with_suffix('.toml')}.")
    refuse_clashes(outputs, {})
    for path in (path for paths in outputs.values() for path in paths):
        require_writable(path)
    rows = [] if known is None else read_rows(known)
    for_source, for_target = parse_arguments(source_arguments), parse_arguments(target_arguments)
    with ProgressBar() as progress:
        proposal = map_models(
            source,
            target,
            source_arguments=for_source,
            target_arguments=for_target,
            inputs=inputs,
            pairs=stated,
            rows=rows,
            absorb_epsilon=absorb_epsilon,
            progress=progress,
        )
    if as_json:
        found = [asdict(row) for row in proposal.rows]
        lists = {name: getattr(proposal, name) for name in ("unused_sources", "unfilled_targets", "differences")}
        say_json({"complete": proposal.complete, "rows": found, **lists})
    else:
        say("\n".join([*map(str, proposal.rows), proposal.summary]) if all_rows else str(proposal))
    if out is not None:
        verdict = "complete, outputs exact in float64" if proposal.complete else "not complete"
        write_text(out, rows_text(proposal.short_rules, [f"{source} -> {target}: {verdict}"]))
        say(f"Wrote {out}", err=as_json)
    if family_file is not None and family is not None:
        text = family_text(
            family,
            source,
            target,
            proposal.short_rules,
            zeros=proposal.zeros,
            source_arguments=for_source,
            target_arguments=for_target,
        )
        write_text(family_file, text)
        say(f"Wrote {family_file}", err=as_json)
    if not proposal.complete:
        sys.exit(KeyMapError.exit_code)
