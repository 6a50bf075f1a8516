"""Compare the time and memory of a port with those of a plain porting script.

    python scripts/benchmark_port.py b0 b1 b3

The plain script is what one writes in an hour: build the Keras model, look up each variable in the checkpoint,
transpose, set, save. It checks nothing. All runs are whole processes on the same synthetic checkpoint and take turns;
times are medians. Memory is the peak above that of a process that only imports torch and h5py, and TensorFlow if the
run needs it, as a multiple of the checkpoint's size.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

PLAIN = r"""
import re
import sys
import numpy as np
import torch
from porting.models.frameworks import load_triton

load_triton()
import keras
import van_tf

variant, checkpoint, out = sys.argv[1:]
tensors = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
model = getattr(van_tf, f"van_{variant}")()
leaves = {"kernel": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
          "moving_variance": "running_var"}
for layer in model.layers:
    values = []
    for variable in layer.weights:
        head, _, leaf = variable.path.rpartition("/")
        module = re.sub(r"^(block\d)_", r"\1.", head.replace("/", "."))
        name = f"{module}.{leaves.get(leaf, leaf)}"
        array = tensors[name].numpy()
        if array.ndim == 4:
            array = array.transpose((2, 3, 0, 1) if array.shape[1] == 1 else (2, 3, 1, 0))
        elif array.ndim == 2:
            array = array.T
        values.append(array)
    layer.set_weights(values)
model.save_weights(out)
"""
OURS = "import sys; from porting.cli.main import main; sys.argv[0] = 'van-port'; main()"
WITH_TENSORFLOW = "from porting.models.frameworks import start_tensorflow; start_tensorflow(); import torch, h5py"
WITHOUT = "import torch, h5py"


def run(arguments: list[str]) -> tuple[float, float]:
    """The seconds and the peak memory, in MiB, of one process."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"exited {process.returncode}: {' '.join(arguments)[-200:]}")
    return time.perf_counter() - begin, usage.ru_maxrss / 2**10


@click.command(help=__doc__)
@click.argument("variants", nargs=-1, required=True)
@click.option("--rounds", default=3, show_default=True, help="Number of runs of each, whose median is used.")
def main(variants: tuple[str, ...], rounds: int) -> None:
    table = Table("variant", "checkpoint", "run", "seconds", "relative to the plain script", "memory above imports")
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("") as status:
        imports = {
            with_tensorflow: run([code])[1] for with_tensorflow, code in ((True, WITH_TENSORFLOW), (False, WITHOUT))
        }
        for variant in variants:
            status.update(f"{variant}: making a checkpoint")
            checkpoint, out = Path(folder, "x.pth.tar"), Path(folder, "x.h5")
            make = Path(__file__).with_name("make_checkpoint.py")
            subprocess.run([sys.executable, make, variant, checkpoint], check=True, stdout=subprocess.DEVNULL)
            ours = [OURS, "--variant", variant, "--checkpoint", str(checkpoint), "--out", str(out)]
            runs = {
                "plain script": ([PLAIN, variant, str(checkpoint), str(Path(folder, "x.weights.h5"))], True),
                "van-port --no-check": ([*ours, "--no-check"], False),
                "van-port": (ours, True),
            }
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
            for number in range(rounds):
                for name, (arguments, _) in runs.items():
                    status.update(f"{variant}: {name}, round {number + 1}")
                    found[name].append(run(arguments))
            size = checkpoint.stat().st_size / 2**20
            plain = statistics.median(seconds for seconds, _ in found["plain script"])
            for name, (_, with_tensorflow) in runs.items():
                seconds = statistics.median(seconds for seconds, _ in found[name])
                memory = statistics.median(peak for _, peak in found[name]) - imports[with_tensorflow]
                table.add_row(
                    variant,
                    f"{size:.0f} MiB",
                    name,
                    f"{seconds:.1f}",
                    f"{seconds / plain:.2f}",
                    f"{memory / size:.2f} x",
                )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
