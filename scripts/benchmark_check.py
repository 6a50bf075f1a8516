"""Measure the cost of the parity check relative to the forward passes that it contains.

    python scripts/benchmark_check.py b0 b1
    python scripts/benchmark_check.py b1 --images 4

The passes are PyTorch and Keras in float32 and in float64, on one image, as in a port, or on several, one by one. The
passes and the check, with and without loud weights, take turns in one process. The table contains medians and ratios.
The peak memory is that of a whole `van-port` process for the same variant, including its check on one image.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROUNDS = 5
_PASSES = ("PyTorch, float32", "PyTorch, float64", "Keras, float32", "Keras, float64")


def time_of(run: Callable[[], Any]) -> float:
    gc.collect()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure_times(variant: str, rounds: int, count: int) -> dict[str, float]:
    """The median seconds of each pass and of the check. Call this in a separate process."""
    from porting.models.frameworks import start_tensorflow

    start_tensorflow()
    import numpy as np
    import torch

    from porting.families.van import VanFamily
    from porting.files.weights_file import assign_weights, variable_shapes
    from porting.mapping.convert import convert
    from porting.models.keras_float64 import Float64Model
    from porting.models.synthetic import fill_with_synthetic_weights
    from porting.parity.compare import check_parity
    from porting.references.van import build_van

    family = VanFamily()
    torch.manual_seed(0)
    reference = build_van(variant, 1000)
    fill_with_synthetic_weights(reference, 0)
    reference.eval()
    exact = copy.deepcopy(reference).double()
    candidate = family.build(variant, 1000)
    state_dict = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    key_map = family.key_map(family.spec(variant))
    assign_weights(candidate, convert(state_dict, key_map, variable_shapes(candidate)).weights)
    # The loud weights have an image of their own, as in a port.
    images, other = np.split(np.random.default_rng(0).normal(size=(count + 1, 224, 224, 3)).astype(np.float32), [count])
    tensors = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    float64 = Float64Model(candidate)

    def in_pytorch(model: torch.nn.Module, given: torch.Tensor) -> None:
        with torch.no_grad():
            for image in given:
                model(image[None])

    def in_keras() -> None:
        for image in images:
            candidate(image[None], training=False)

    def in_keras_float64() -> None:
        with float64.active():
            in_keras()

    def check(**arguments: Any) -> None:
        axes = [(0, 2, 3, 1)]
        report = check_parity(
            reference, candidate, images, batch_size=1, input_axes=axes, loud_inputs=other, **arguments
        )
        assert report.passed, report.objections

    runs: dict[str, Callable[[], Any]] = {
        "PyTorch, float32": lambda: in_pytorch(reference, tensors),
        "PyTorch, float64": lambda: in_pytorch(exact, tensors.double()),
        "Keras, float32": in_keras,
        "Keras, float64": in_keras_float64,
        "check": lambda: check(key_map=key_map, loud=False),
        "check with loud weights": lambda: check(key_map=key_map),
    }
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(time_of(run))
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_memory(variant: str, folder: Path) -> float:
    """The peak memory, in GiB, of a whole port with its check."""
    make = Path(__file__).with_name("make_checkpoint.py")
    checkpoint = folder / f"{variant}.pth.tar"
    subprocess.run([sys.executable, str(make), variant, str(checkpoint)], check=True, stdout=subprocess.DEVNULL)
    program = "import sys; from porting.cli.main import main; sys.argv[0] = 'van-port'; main()"
    arguments = ["--variant", variant, "--checkpoint", str(checkpoint), "--out", str(folder / f"{variant}.h5")]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--samples", "1"], stdout=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"van-port of {variant} exited {process.returncode}")
    checkpoint.unlink()
    return usage.ru_maxrss / 2**20  # in KiB on Linux


@click.command(help=__doc__)
@click.argument("variants", nargs=-1, required=True)
@click.option(
    "--rounds", default=ROUNDS, show_default=True, help="Number of measurements of each, whose median is used."
)
@click.option("--images", default=1, show_default=True, help="Number of images.")
@click.option("--times-of", is_flag=True, hidden=True, help="Print the times of one variant as JSON.")
def main(variants: tuple[str, ...], rounds: int, images: int, times_of: bool) -> None:
    if times_of:
        click.echo(json.dumps(measure_times(variants[0], rounds, images)))
        return
    table = Table("variant", *_PASSES, "four passes", "check", "ratio", "with loud weights", "ratio", "peak memory")
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for variant in variants:
            status.update(f"{variant}: times")
            child = [sys.executable, __file__, variant, "--times-of", "--rounds", str(rounds), "--images", str(images)]
            times = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            status.update(f"{variant}: memory")
            memory = measure_memory(variant, Path(folder))
            bare = sum(times[name] for name in _PASSES)
            row = [variant, *(f"{times[name]:.2f}" for name in _PASSES), f"{bare:.2f} s"]
            for name in ("check", "check with loud weights"):
                row += [f"{times[name]:.2f} s", f"{times[name] / bare:.2f}"]
            table.add_row(*row, f"{memory:.1f} GiB")
    console.print(table)


if __name__ == "__main__":
    main()
