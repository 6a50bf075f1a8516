"""Measures inference on a CPU: PyTorch, our Keras model and its exports, and their rivals, side by side.

    pip install '.[bench]'
    python scripts/benchmark_inference.py b0 b1

Each contender is a process of its own, with as many threads as there are cores. They take turns, one inference each, so
that what else the machine does meets all of them; the table has medians, and ratios to the quicker of PyTorch's eager
memory formats. Weights are synthetic. ONNX Runtime and OpenVINO run the ONNX file that `van-port export` writes.
"""

from __future__ import annotations

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
import numpy as np

# Name, environment, what it runs.
CONTENDERS: tuple[tuple[str, dict[str, str], str], ...] = (
    ("PyTorch", {}, "torch"),
    ("PyTorch, channels last", {}, "torch_last"),
    ("PyTorch, torch.compile", {}, "torch_compile"),
    ("ONNX Runtime", {}, "onnx"),
    ("OpenVINO", {}, "openvino"),
    ("Keras, oneDNN off", {"TF_ENABLE_ONEDNN_OPTS": "0"}, "keras"),
    ("Keras, oneDNN on", {"TF_ENABLE_ONEDNN_OPTS": "1"}, "keras"),
    ("Keras fused, oneDNN off", {"TF_ENABLE_ONEDNN_OPTS": "0"}, "fused"),
    ("Keras fused, oneDNN on", {"TF_ENABLE_ONEDNN_OPTS": "1"}, "fused"),
    ("LiteRT", {}, "litert"),
)
CORES = len(os.sched_getaffinity(0))
SIZE = 224


def images_of(batch: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)


def make_torch(variant: str, folder: Path, batch: int, kind: str) -> Callable[[], Any]:
    import torch

    from porting.references.synthetic import fill_with_synthetic_weights
    from porting.references.van import build_van

    torch.set_num_threads(CORES)
    model = build_van(variant)
    fill_with_synthetic_weights(model, 0)
    model.eval()
    images = torch.from_numpy(images_of(batch).transpose(0, 3, 1, 2).copy())
    if kind == "torch_last":
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    run = torch.compile(model) if kind == "torch_compile" else model

    def infer() -> Any:
        with torch.inference_mode():
            return run(images)

    return infer


def make_keras(variant: str, folder: Path, batch: int, kind: str) -> Callable[[], Any]:
    import tensorflow as tf

    import van_tf

    tf.config.threading.set_intra_op_parallelism_threads(CORES)
    model = getattr(van_tf, f"van_{variant}")(weights=folder / "x.h5")
    if kind == "fused":
        model = van_tf.fuse(model)
    run = tf.function(lambda x: model(x, training=False))
    images = tf.constant(images_of(batch))
    return lambda: run(images).numpy()


def make_onnx(variant: str, folder: Path, batch: int, kind: str) -> Callable[[], Any]:
    images = images_of(batch)
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(folder / "x.onnx", options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"images": images})
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "x.onnx")
    model.reshape([batch, SIZE, SIZE, 3])
    settings = {"INFERENCE_NUM_THREADS": CORES, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    return lambda: compiled([images])


def make_litert(variant: str, folder: Path, batch: int, kind: str) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(folder / "x.tflite"), num_threads=CORES)
    given = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(given, [batch, SIZE, SIZE, 3])
    interpreter.allocate_tensors()
    images, taken = images_of(batch), interpreter.get_output_details()[0]["index"]

    def infer() -> Any:
        interpreter.set_tensor(given, images)
        interpreter.invoke()
        return interpreter.get_tensor(taken)

    return infer


MAKERS = {
    **dict.fromkeys(("torch", "torch_last", "torch_compile"), make_torch),
    **dict.fromkeys(("keras", "fused"), make_keras),
    **dict.fromkeys(("onnx", "openvino"), make_onnx),
    "litert": make_litert,
}


def work(variant: str, folder: Path, batch: int, kind: str) -> None:
    """A contender: says "ready" with its result, then runs once for each line that it reads."""
    infer = MAKERS[kind](variant, folder, batch, kind)
    for _ in range(3):
        result = infer()
    while isinstance(result, (list, tuple)):
        result = result[0]
    print(
        json.dumps(np.asarray(result if kind != "openvino" else next(iter(result.values())))[0, :5].tolist()),
        flush=True,
    )
    for _ in sys.stdin:
        begin = time.perf_counter()
        infer()
        print(time.perf_counter() - begin, flush=True)


def prepare(variant: str, folder: Path) -> None:
    """The checkpoint, the ported file and the exports."""
    make = Path(__file__).with_name("make_checkpoint.py")
    port = [sys.executable, "-c", "import sys; from porting.cli.main import main; sys.argv[0] = 'van-port'; main()"]
    checkpoint, weights = folder / "x.pth.tar", folder / "x.h5"
    same = ["--variant", variant, "--checkpoint", str(checkpoint)]
    commands = [
        [sys.executable, str(make), variant, str(checkpoint)],
        [*port, *same, "--out", str(weights), "--no-check"],
        *(
            [*port, "export", *same, "--weights", str(weights), "--out", str(folder / name), "--samples", "1"]
            for name in ("x.onnx", "x.tflite")
        ),
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command[2:])}: {done.stderr[-500:]}")


def measure(variant: str, folder: Path, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of each contender that starts; they all must give the same logits."""
    processes: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, list[float]] = {}
    for name, environment, kind in CONTENDERS:
        command = [sys.executable, __file__, variant, "--worker", kind, "--folder", str(folder), "--batch", str(batch)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("w"),
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            said = (folder / "stderr").read_text().strip().splitlines()
            click.echo(f"{name} does not run: {said[-1] if said else 'no word'}", err=True)
            continue
        processes[name], results[name] = process, json.loads(line)
    reference = np.array(next(iter(results.values())))
    for name, found in results.items():
        if not np.allclose(found, reference, atol=1e-4 * float(np.abs(reference).max()) + 1e-5):
            raise click.ClickException(f"{name} computes something else: {found} instead of {reference.tolist()}")
    taken: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            taken[name].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return {name: statistics.median(times) for name, times in taken.items()}


@click.command(help=__doc__)
@click.argument("variants", nargs=-1, required=True)
@click.option("--rounds", default=15, show_default=True, help="Inferences of each, of which the median counts.")
@click.option("--worker", type=click.Choice(list(MAKERS)), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--batch", type=int, hidden=True)
def main(variants: tuple[str, ...], rounds: int, worker: str | None, folder: Path | None, batch: int | None) -> None:
    if worker is not None and folder is not None and batch is not None:
        work(variants[0], folder, batch, worker)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for variant in variants:
        with tempfile.TemporaryDirectory() as place, Console(stderr=True).status(f"{variant}: preparing") as status:
            prepare(variant, Path(place))
            found = {}
            for count in (1, 8):
                status.update(f"{variant}: batch {count}")
                found[count] = measure(variant, Path(place), count, rounds)
        table = Table(variant, "ms, batch 1", "of PyTorch", "ms, batch 8", "of PyTorch")
        eager = {
            count: min(times[name] for name in ("PyTorch", "PyTorch, channels last")) for count, times in found.items()
        }
        for name, _, _ in CONTENDERS:
            row = [name]
            for count, times in found.items():
                seconds = times.get(name)
                row += ["-", "-"] if seconds is None else [f"{1000 * seconds:.0f}", f"{seconds / eager[count]:.2f}"]
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
