"""Measure the cost of an evaluation per sample, relative to the work that it contains, and its memory.

\b
    van-port --variant nano
    python scripts/benchmark_evaluate.py --weights van_nano.h5 --data FOLDER_OF_CLASS_FOLDERS

Each of our figures is the slope between runs of two numbers of samples, each in a separate process, so that the start
of the frameworks does not count. The bare passes run in this process, on batches in memory, with all threads; decoding
and both preprocessings run with as many threads as there are cores. --ray also measures Ray, with one and with two
workers per model. The samples are the folder's files, repeated, listed in a CSV file.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from porting.evaluation.engines import Arm
from porting.evaluation.items import Block, Item
from porting.evaluation.judge import PYTORCH, SAME
from porting.evaluation.samples import Batch
from porting.families.registry import get_family
from porting.models.frameworks import start_tensorflow
from porting.tasks.plan import Plan


def write_table(folder: Path, count: int, path: Path) -> None:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    numbers = {name: number for number, name in enumerate(sorted({each.parent.name for each in files}))}
    rows = (f"{each},{numbers[each.parent.name]}" for each in itertools.islice(itertools.cycle(files), count))
    path.write_text("\n".join(["image,label", *rows]))


def run_ours(arguments: list[str], data: Path, report: Path) -> tuple[float, float]:
    """The seconds without the start, and the peak memory in MiB, of one evaluation in a separate process."""
    command = [sys.executable, "-m", "porting.cli.main", "evaluate", *arguments, "--data", str(data)]
    process = subprocess.Popen([*command, "--report", str(report)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the evaluation failed: {' '.join(command)}")
    return float(json.loads(report.read_text())["seconds"]["in all"]), usage.ru_maxrss / 1024


def a_sample(run: Callable[[], object], samples: int) -> float:
    """Milliseconds per sample, the best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) / samples * 1e3


def bare_costs(plan: Plan, files: list[Path], batch_size: int) -> dict[str, float]:
    """Milliseconds per sample of each step of an evaluation, one at a time."""
    items = tuple(Item(str(each), 0, str(each)) for each in itertools.islice(itertools.cycle(files), 4 * batch_size))
    blocks = [Block(n, n * batch_size, items[n * batch_size : (n + 1) * batch_size]) for n in range(4)]
    batches: list[Batch] = []
    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, plan.arm(PYTORCH) as pytorch, plan.arm(SAME) as keras:

        def prepare() -> None:
            batches[:] = [plan.load(block, pool) for block in blocks]
            for batch in batches:
                keras.prepare(batch, pool)

        prepare()
        found["decoding and preparing"] = a_sample(prepare, len(items))
        for batch in batches:  # so that every arm runs in full
            batch.own = np.array(batch.same) if batch.own is None else batch.own
        for name, arm in (("PyTorch", pytorch), ("Keras, two arms", keras)):

            def run(arm: Arm = arm) -> None:
                for batch in batches:
                    arm(batch)

            found[name] = a_sample(run, len(items))
    return found


@click.command(help=__doc__)
@click.option("--variant", default="nano", show_default=True)
@click.option("--weights", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--checkpoint", default=None)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--samples",
    type=(int, int),
    default=(2000, 10_000),
    show_default=True,
    help="The two numbers of samples of a slope.",
)
@click.option("--many", default=0, show_default=True, help="Also run this many samples, to measure the memory.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--ray", "with_ray", is_flag=True)
def main(
    variant: str,
    weights: Path,
    checkpoint: str | None,
    data: Path,
    samples: tuple[int, int],
    many: int,
    batch_size: int,
    with_ray: bool,
) -> None:
    start_tensorflow()
    files = sorted(each for each in data.rglob("*") if each.is_file())
    plan = Plan(get_family("van"), variant, weights, {"location": checkpoint}, threads=os.cpu_count() or 1)
    plan = plan.fitted([Block(0, 0, (Item("first", 0, str(files[0])),))])
    costs = bare_costs(plan, files, batch_size)
    console = Console()
    table = Table("", "ms a sample", box=None)
    for name, cost in costs.items():
        table.add_row(name, f"{cost:.2f}")
    together = sum(costs.values())
    table.add_row("together", f"{together:.2f}")
    arguments = ["--variant", variant, "--weights", str(weights), "--batch-size", str(batch_size)]
    arguments += ["--checkpoint", checkpoint] if checkpoint else []
    ways = {"ours, local": arguments}
    if with_ray:
        ways["ours, Ray, one worker each"] = [*arguments, "--engine", "ray", "--threads", "1"]
        ways["ours, Ray, two workers each"] = [*ways["ours, Ray, one worker each"], "--workers", "2", "2"]
    with tempfile.TemporaryDirectory() as folder:
        path, report = Path(folder) / "data.csv", Path(folder) / "report.json"
        memory = {}
        for name, way in ways.items():
            seconds = []
            for count in samples:
                write_table(data, count, path)
                elapsed, memory[name, count] = run_ours(way, path, report)
                seconds.append(elapsed)
            cost = (seconds[1] - seconds[0]) / (samples[1] - samples[0]) * 1e3
            table.add_row(name, f"{cost:.2f}", f"{cost / together:.2f} times the bare work")
        if many:
            write_table(data, many, path)
            _, memory["ours, local", many] = run_ours(arguments, path, report)
    console.print(table)
    for (name, count), peak in memory.items():
        console.print(f"{name}, {count:,} samples: peak memory of its process {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
