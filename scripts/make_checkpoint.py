"""Write a checkpoint of any variant in the official format, with synthetic weights.

    python scripts/make_checkpoint.py b1 van_b1.pth.tar

Use it to try a port if the official file cannot be downloaded. The weights are untrained, but none is trivial.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import click
import torch

from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import VARIANTS, build_van


@click.command(help=__doc__)
@click.argument("variant", type=click.Choice(list(VARIANTS)))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--classes", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(variant: str, out: Path, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_van(variant, classes)
    fill_with_synthetic_weights(model, seed)
    # The official files store their training arguments as an argparse.Namespace.
    contents = {
        "epoch": 0,
        "arch": f"van_{variant}",
        "args": argparse.Namespace(seed=seed),
        "state_dict": model.state_dict(),
    }
    temporary = out.with_name(out.name + ".part")
    torch.save(contents, temporary)
    temporary.replace(out)
    click.echo(f"wrote {out} ({out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
