"""Port the smallest variant of every family with synthetic weights, check the port and the revert, and print a table.

\b
    python scripts/family_table.py                       # every family whose packages are installed
    python scripts/family_table.py --family vit --all    # every variant of one family
    python scripts/family_table.py --more                # exports with their proof, and planted faults, as well

Nothing is downloaded. Each port runs in a separate process, so that its memory can be measured. The faults are one
number of a kernel that is a thousandth too large, a kernel that is scaled by 1.0001, and a bias of zeros, in layers
drawn by chance. A fault is named if the first culprit is its module.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


def export_ratios(family: LibraryFamily, variant: str, weights: Path, checkpoint: Path) -> dict[str, object]:
    """Export to LiteRT and ONNX, and return the worst ratio of each, or why there is none."""
    from porting.tasks.export import export

    found: dict[str, object] = {}
    for form, suffix in (("litert", ".tflite"), ("onnx", ".onnx")):
        try:
            out = weights.with_suffix(suffix)
            result = export(family, variant, weights, out, form=form, checkpoint=checkpoint)
        except PortingError as error:
            found[form] = error.message.partition("\n")[0]
        else:
            assert result.report is not None
            found[form] = f"{result.report.worst.ratio:.2f}"
    return found


def planted(family: LibraryFamily, variant: str, weights: Path, checkpoint: Path) -> dict[str, int]:
    """Plant faults into the port, one at a time, and count those that are found, and those that are named."""
    import numpy as np

    from porting.models.traverse import named_variables
    from porting.tasks.case import open_case
    from porting.tasks.check import compare_models
    from porting.tasks.options import CheckOptions

    case = open_case(family, variant, checkpoint)
    candidate = case.load_candidate(weights)
    variables = named_variables(candidate)
    module_of = {
        entry.targets[0]: entry.sources[0].rpartition(".")[0]
        for entry in case.key_map.entries
        if len(entry.sources) == len(entry.targets) == 1
    }
    rng = np.random.default_rng(0)
    kernels = [name for name in module_of if name.endswith("kernel")]
    biases = [name for name in module_of if name.endswith("bias") and np.asarray(variables[name]).any()]

    def number(values: np.ndarray) -> None:
        values.reshape(-1)[int(np.abs(values).argmax())] *= np.float32(1.001)

    def factor(values: np.ndarray) -> None:
        values *= np.float32(1.0001)

    def zeros(values: np.ndarray) -> None:
        values[...] = 0.0

    counts = {"planted": 0, "found": 0, "named": 0}
    for names, change in ((kernels, number), (kernels, factor), (biases, zeros)):
        if not names:
            continue
        name = names[int(rng.integers(len(names)))]
        own = np.array(variables[name])
        wrong = own.copy()
        change(wrong)
        variables[name].assign(wrong)
        report = compare_models(case, candidate, CheckOptions(samples=1))
        variables[name].assign(own)
        named = bool(report.culprits) and report.culprits[0].layer.partition("#")[0] == module_of[name]
        counts["planted"] += 1
        counts["found"] += not report.passed
        counts["named"] += named
        if not named:
            said = [culprit.layer for culprit in report.culprits]
            click.echo(f"{variant}: {change.__name__} in {module_of[name]}: named {said}", err=True)
    return counts


def measure(name: str, variant: str, classes: int, more: bool) -> dict[str, object]:
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        back = revert(family, variant, out, Path(folder, "back.pth"), num_classes=classes)
        others: dict[str, object] = {}
        if more:
            others |= export_ratios(family, variant, out, checkpoint)
            counts = planted(family, variant, out, checkpoint)
            others["faults"] = f"{counts['found']}, {counts['named']} of {counts['planted']}"
    assert result.report is not None
    assert back.report is not None
    exact = result.report.worst_exact
    return {
        "megabytes": size / 2**20,
        "tensors": len(result.conversion.weights),
        "exact": exact.relative_error if exact is not None else None,
        "back": back.report.passed,
        "seconds": there,
        "peak": peak,
        **others,
    }


@click.command(help=__doc__)
@click.option("--family", "wanted", multiple=True, help="Name of a family.  [default: all]")
@click.option("--all", "every", is_flag=True, help="Port every variant, not only the smallest.")
@click.option("--more", is_flag=True, help="Also export with proof, and plant faults.")
@click.option("--one", nargs=3, hidden=True)
def main(wanted: tuple[str, ...], every: bool, more: bool, one: tuple[str, str, str] | None) -> None:
    if one:
        try:
            found = measure(one[0], one[1], int(one[2]), more)
        except PortingError as error:
            found = {"error": error.message.partition("\n")[0]}
        print(json.dumps(found))
        return
    headings = ["family", "variant", "classes", "file, MB", "exact error", "back", "s", "peak, GiB", "lines"]
    headings += ["LiteRT, worst ratio", "ONNX, worst ratio", "faults found, named"] if more else []
    _row(headings)
    _row(["---"] * len(headings))
    for name in wanted or family_names():
        family = get_family(name)
        if not isinstance(family, LibraryFamily):
            continue
        lines = len((FOLDER / f"{name}.py").read_text().splitlines())
        for variant in family.variants if every else [smallest(family)]:
            for classes in (family.usual_classes(variant), 0) if family.head else (0,):
                also = ["--more"] if more else []
                command = [sys.executable, __file__, *also, "--one", name, variant, str(classes)]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                lines_of_run = run.stdout.strip().splitlines()
                found = json.loads(lines_of_run[-1]) if lines_of_run else {"error": f"it ended with {run.returncode}"}
                first = [name, variant, classes or "-"]
                if "error" in found:
                    _row([*first, "-", found["error"], "-", "-", "-", lines])
                    continue
                back = "passed" if found["back"] else "FAILED"
                others = [found[key] for key in ("litert", "onnx", "faults") if key in found]
                numbers = f"{found['seconds']:.0f}", f"{found['peak']:.1f}", lines
                _row([*first, f"{found['megabytes']:.0f}", f"{found['exact']:.1e}", back, *numbers, *others])


def _row(cells: Sequence[object]) -> None:
    click.echo(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
