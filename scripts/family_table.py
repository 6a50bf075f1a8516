"""Port the smallest variant of every family with synthetic weights, check the port and the revert, and print a table.

    python scripts/family_table.py                       # every family whose packages are installed
    python scripts/family_table.py --family vit --all    # every variant of one family

Nothing is downloaded. Each port runs in a separate process, so that its memory can be measured.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from porting.errors import PortingError
from porting.families.library import LibraryFamily
from porting.families.registry import family_names, get_family

FOLDER = Path(__file__).parents[1] / "porting" / "families"


def smallest(family: LibraryFamily) -> str:
    """The variant with the fewest weights."""
    return min(family.variants, key=lambda variant: _size(family, variant))


def _size(family: LibraryFamily, variant: str) -> int:
    return sum(math.prod(shape) for shape in family.tensor_shapes(family.spec(variant)).values())


def measure(name: str, variant: str, classes: int) -> dict[str, object]:
    """Run one port and its revert, and return the measurements."""
    import torch

    from porting.models.frameworks import start_tensorflow
    from porting.tasks.port import port
    from porting.tasks.revert import revert

    start_tensorflow()
    family = get_family(name)
    assert isinstance(family, LibraryFamily)
    spec = family.spec(variant, classes)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder, "own.pth"), Path(folder, "own.h5")
        torch.save(family.synthetic_reference(spec).state_dict(), checkpoint)
        size = checkpoint.stat().st_size
        begin = time.perf_counter()
        result = port(family, variant, out, checkpoint=checkpoint)
        there = time.perf_counter() - begin
        back = revert(family, variant, out, Path(folder, "back.pth"), num_classes=classes)
    assert result.report is not None
    assert back.report is not None
    exact = result.report.worst_exact
    return {
        "megabytes": size / 2**20,
        "tensors": len(result.conversion.weights),
        "exact": exact.relative_error if exact is not None else None,
        "back": back.report.passed,
        "seconds": there,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


@click.command(help=__doc__)
@click.option("--family", "wanted", multiple=True, help="Name of a family.  [default: all]")
@click.option("--all", "every", is_flag=True, help="Port every variant, not only the smallest.")
@click.option("--one", nargs=3, hidden=True)
def main(wanted: tuple[str, ...], every: bool, one: tuple[str, str, str] | None) -> None:
    if one:
        try:
            found = measure(one[0], one[1], int(one[2]))
        except PortingError as error:
            found = {"error": error.message.partition("\n")[0]}
        print(json.dumps(found))
        return
    click.echo("| family | variant | classes | file, MB | exact error | back | s | peak, GiB | lines of the family |")
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for name in wanted or family_names():
        family = get_family(name)
        if not isinstance(family, LibraryFamily):
            continue
        lines = len((FOLDER / f"{name}.py").read_text().splitlines())
        for variant in family.variants if every else [smallest(family)]:
            for classes in (family.usual_classes(variant), 0) if family.head else (0,):
                command = [sys.executable, __file__, "--one", name, variant, str(classes)]
                run = subprocess.run(command, capture_output=True, text=True)
                last = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else '{"error": "the process ended"}'
                found = json.loads(last)
                if "error" in found:
                    click.echo(
                        f"| {name} | {variant} | {classes or '-'} | - | {found['error']} | - | - | - | {lines} |"
                    )
                    continue
                click.echo(
                    f"| {name} | {variant} | {classes or '-'} | {found['megabytes']:.0f} | {found['exact']:.1e} "
                    f"| {'passed' if found['back'] else 'FAILED'} | {found['seconds']:.0f} "
                    f"| {found['peak']:.1f} | {lines} |"
                )


if __name__ == "__main__":
    main()
