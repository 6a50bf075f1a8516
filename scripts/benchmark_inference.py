"""Measure inference on a CPU: PyTorch, our Keras model and its exports, and alternatives, side by side.

\b
    pip install '.[bench]'
    python scripts/benchmark_inference.py b0 b1
    python scripts/benchmark_inference.py b0 --trials
    python scripts/benchmark_inference.py nano b0 --exports
    pip install litert-torch && python scripts/benchmark_inference.py b0 --converters

Each contender is a separate process with as many threads as there are cores. They take turns, so that other load on the
machine affects all of them, and run twice per turn. In the first run, the caches hold the data of the other contenders,
as in a program that also does other work. In the second run ("again"), they hold the contender's own data, as in
consecutive inferences. The table contains medians, and ratios to the faster of PyTorch's eager memory formats. ONNX
Runtime and OpenVINO run the ONNX file that `van-port export` writes; LiteRT and TensorFlow without Keras run the files
that it writes for them.

`--trials` measures each optimisation separately, and others that were tried without benefit. `--exports` prints a table
of every format and precision: size, operations, parity with PyTorch on the images of the check, and the speed of first
runs. `--converters` compares our LiteRT file with that of litert-torch: size, operations, the largest distance from
PyTorch in float64 on four images, and speed. nano has its trained weights; the others have synthetic ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

if TYPE_CHECKING:
    from rich.status import Status
    from rich.table import Table

ON, OFF = {"TF_ENABLE_ONEDNN_OPTS": "1"}, {"TF_ENABLE_ONEDNN_OPTS": "0"}
# The name, the environment, and what to run: a kind, or "kind=file" for exported files.
Contender = tuple[str, dict[str, str], str]
PYTORCH: tuple[Contender, ...] = (("PyTorch", {}, "torch"), ("PyTorch, channels last", {}, "torch_last"))
CONTENDERS: tuple[Contender, ...] = (
    *PYTORCH,
    ("PyTorch, torch.compile", {}, "torch_compile"),
    ("ONNX Runtime", {}, "onnx=x.onnx"),
    ("OpenVINO", {}, "openvino=x.onnx"),
    ("Keras, oneDNN off", OFF, "keras"),
    ("Keras, oneDNN on", ON, "keras"),
    ("Keras fused, oneDNN off", OFF, "fused"),
    ("Keras fused, oneDNN on", ON, "fused"),
    ("SavedModel, oneDNN off", OFF, "saved_model=x"),
    ("SavedModel, oneDNN on", ON, "saved_model=x"),
    ("LiteRT", {}, "litert=x.tflite"),
)
TRIALS: tuple[Contender, ...] = (
    *PYTORCH,
    ("Keras fused", ON, "fused"),
    ("... GELU not folded", ON, "unfolded"),
    ("... GELU by erfc, Keras's own", ON, "erfc"),
    ("... 1x1 convolutions as matrix products", ON, "products"),
    ("... dilated convolutions not by SpaceToBatch", ON, "dilated"),
    ("... kernels cropped to the last stage's map", ON, "cropped"),
    ("... compiled by XLA", ON, "xla"),
    ("... weights as constants: SavedModel", ON, "saved_model=x"),
    ("LiteRT", {}, "litert=x.tflite"),
    ("... kernels not split", {}, "litert=whole.tflite"),
    ("... one thread", {}, "litert_one=x.tflite"),
)
CORES = len(os.sched_getaffinity(0))
SIZES = {"nano": 64}
_NOT = [math.nan, math.nan]  # the times of contenders that do not run


def images_of(variant: str, batch: int) -> np.ndarray:
    size = SIZES.get(variant, 224)
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def make_torch(variant: str, file: Path, batch: int, kind: str) -> Callable[[], Any]:
    import torch

    from porting.models.synthetic import fill_with_synthetic_weights
    from porting.references.van import build_van

    torch.set_num_threads(CORES)
    model = build_van(variant)
    fill_with_synthetic_weights(model, 0)
    model.eval()
    images = torch.from_numpy(images_of(variant, batch).transpose(0, 3, 1, 2).copy())
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


def make_keras(variant: str, file: Path, batch: int, kind: str) -> Callable[[], Any]:
    import tensorflow as tf

    import van_tf

    tf.config.threading.set_intra_op_parallelism_threads(CORES)
    model = getattr(van_tf, f"van_{variant}")(weights=file)
    if kind != "keras":
        model = van_tf.fuse(model, fold_gelu=kind not in {"unfolded", "erfc"})
    if kind in {"erfc", "products", "dilated", "cropped"}:
        model = changed(model, kind)
    run = tf.function(lambda x: model(x, training=False), jit_compile=kind == "xla")
    images = tf.constant(images_of(variant, batch))
    return lambda: run(images).numpy()


def changed(model: Any, kind: str) -> Any:
    """Rebuild the model with some layers computed in another way."""
    import keras
    import tensorflow as tf

    class Product(keras.layers.Conv2D):  # type: ignore[misc]
        """A 1x1 convolution as a matrix product."""

        def call(self, inputs: Any) -> Any:
            positions = tf.reshape(inputs, (-1, inputs.shape[-1]))
            found = tf.nn.bias_add(tf.matmul(positions, self.kernel[0, 0]), self.bias)
            return tf.reshape(found, tf.concat([tf.shape(inputs)[:-1], [self.filters]], 0))

    class Dilated(keras.layers.DepthwiseConv2D):  # type: ignore[misc]
        """A dilated depthwise convolution as one operation, which only oneDNN's kernel supports."""

        def call(self, inputs: Any) -> Any:
            found = tf.raw_ops.DepthwiseConv2dNative(
                input=inputs, filter=self.kernel, strides=[1] * 4, padding="SAME", dilations=[1, *self.dilation_rate, 1]
            )
            return tf.nn.bias_add(found, self.bias)

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if kind == "erfc" and isinstance(layer, keras.layers.Activation):
            return keras.layers.Activation("gelu", name=layer.name)
        if kind == "products" and type(layer) is keras.layers.Conv2D and layer.kernel_size == (1, 1):
            return Product.from_config(config)
        if kind == "dilated" and layer.name.endswith("conv_spatial"):
            return Dilated.from_config(config)
        if kind == "cropped" and layer.name.startswith("block4.") and layer.name.endswith("conv_spatial"):
            return keras.layers.DepthwiseConv2D.from_config({**config, "kernel_size": (5, 5)})
        return type(layer).from_config(config)

    made = keras.models.clone_model(model, clone_function=clone)
    weights = [
        # The last stage's map is 7x7, so a tap that is 9 positions away sees only padding.
        values if values.shape == tuple(variable.shape) else values[1:-1, 1:-1]
        for values, variable in zip(model.get_weights(), made.weights, strict=True)
    ]
    made.set_weights(weights)
    return made


def make_saved_model(variant: str, file: Path, batch: int, kind: str) -> Callable[[], Any]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(CORES)
    model = tf.saved_model.load(str(file))
    images = tf.constant(images_of(variant, batch))
    run = model.signatures["serving_default"]
    return lambda: run(images=images)["output_0"].numpy()


def make_onnx(variant: str, file: Path, batch: int, kind: str) -> Callable[[], Any]:
    images = images_of(variant, batch)
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"images": images})
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    model.reshape(list(images.shape))
    settings = {"INFERENCE_NUM_THREADS": CORES, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    return lambda: compiled([images])


def make_litert(variant: str, file: Path, batch: int, kind: str) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=1 if kind == "litert_one" else CORES)
    images = images_of(variant, batch)
    given, taken = (get()[0]["index"] for get in (interpreter.get_input_details, interpreter.get_output_details))
    interpreter.resize_tensor_input(given, images.shape)
    interpreter.allocate_tensors()

    def infer() -> Any:
        interpreter.set_tensor(given, images)
        interpreter.invoke()
        return interpreter.get_tensor(taken)

    return infer


MAKERS = {
    **dict.fromkeys(("torch", "torch_last", "torch_compile"), make_torch),
    **dict.fromkeys(("keras", "fused", "unfolded", "erfc", "products", "dilated", "cropped", "xla"), make_keras),
    **dict.fromkeys(("onnx", "openvino"), make_onnx),
    **dict.fromkeys(("litert", "litert_one"), make_litert),
    "saved_model": make_saved_model,
}


def convert_by_litert_torch(variant: str, file: Path) -> None:
    """Convert the PyTorch model with litert-torch, with channels last as in our file."""
    from porting.models.frameworks import load_triton

    load_triton()
    import litert_torch
    import torch
    from torch import nn

    class ChannelsLast(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> Any:
            return self.model(images.permute(0, 3, 1, 2))

    model = ChannelsLast(reference_of(variant, file.parent)).eval()
    litert_torch.convert(model, (torch.from_numpy(images_of(variant, 1)),)).export(str(file))


def reference_of(variant: str, folder: Path) -> Any:
    from porting.families.registry import get_family
    from porting.tasks.case import open_case

    return open_case(get_family("van"), variant, None if variant == "nano" else folder / "x.pth.tar").load_reference()


def work(variant: str, folder: Path, batch: int, kind: str) -> None:
    """Run a contender: print its first logits; then, for each line on standard input, run twice and print the times."""
    kind, _, file = kind.partition("=")
    if kind == "convert":
        convert_by_litert_torch(variant, folder / file)
        return
    infer = MAKERS[kind](variant, folder / (file or "x.h5"), batch, kind)
    for _ in range(3):
        result = infer()
    while isinstance(result, (list, tuple)):
        result = result[0]
    print(
        json.dumps(np.asarray(result if kind != "openvino" else next(iter(result.values())))[0, :5].tolist()),
        flush=True,
    )
    for _ in sys.stdin:
        began = [time.perf_counter()]
        for _ in range(2):
            infer()
            began.append(time.perf_counter())
        print(*np.diff(began), flush=True)


def prepare(variant: str, folder: Path, exports: Iterable[tuple[str, list[str]]], samples: int = 1) -> list[str]:
    """Write the checkpoint, the ported file and the exports, given by name and options. Return the refused exports."""
    make = Path(__file__).with_name("make_checkpoint.py")
    port = [sys.executable, "-c", "import sys; from porting.cli.main import main; sys.argv[0] = 'van-port'; main()"]
    same, weights = ["--variant", variant], str(folder / "x.h5")
    commands = []
    if variant != "nano":  # nano's trained checkpoint is embedded
        same += ["--checkpoint", str(folder / "x.pth.tar")]
        commands.append([sys.executable, str(make), variant, same[-1]])
    commands.append([*port, *same, "--out", weights, "--no-check"])
    for command in commands:
        if failure := failure_of(command):
            raise click.ClickException(f"{' '.join(command[2:])}: {failure}")
    refused = []
    for name, how in exports:
        out = ["--out", str(folder / name), "--samples", str(samples)]
        if failure := failure_of([*port, "export", *same, "--weights", weights, *out, *how]):
            click.echo(f"{variant}, {name}: {failure}", err=True)
            refused.append(name)
    return refused


def failure_of(command: list[str]) -> str:
    """Run a command. Return "" if it succeeds, else its exit code and the end of its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    return f"exit code {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}" if done.returncode else ""


def measure(
    contenders: Iterable[Contender], variant: str, folder: Path, batch: int, rounds: int, same: bool = True
) -> dict[str, list[float]]:
    """The median seconds of each contender that starts, first and again. With `same`, all logits must agree."""
    with contextlib.ExitStack() as stack:
        processes: dict[str, subprocess.Popen[str]] = {}
        results: dict[str, list[float]] = {}
        for number, (name, environment, kind) in enumerate(contenders):
            said = stack.enter_context((folder / f"stderr{number}").open("w+"))
            command = [sys.executable, __file__, variant, "--worker", kind, "--folder", str(folder)]
            process = subprocess.Popen(
                [*command, "--batch", str(batch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
            )
            stack.callback(process.communicate)
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait()
                said.seek(0)
                lines = said.read().strip().splitlines()
                click.echo(f"{name} does not run: {lines[-1] if lines else 'no message'}", err=True)
                continue
            processes[name], results[name] = process, json.loads(line)
        if not results:
            raise click.ClickException("nothing runs")
        reference = np.array(next(iter(results.values())))
        for name, found in results.items():
            if same and not np.allclose(found, reference, atol=1e-4 * float(np.abs(reference).max()) + 1e-5):
                raise click.ClickException(
                    f"{name} computes a different result: {found} instead of {reference.tolist()}"
                )
        taken: dict[str, list[list[float]]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                assert process.stdout is not None
                if process.poll() is None:
                    process.stdin.write("\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    raise click.ClickException(f"{name} stopped; is there enough memory?")
                taken[name].append([float(seconds) for seconds in answer.split()])
    return {name: [statistics.median(times) for times in zip(*turns, strict=True)] for name, turns in taken.items()}


@click.command(help=__doc__)
@click.argument("variants", nargs=-1, required=True)
@click.option("--rounds", default=15, show_default=True, help="Number of inferences of each, whose median is used.")
@click.option("--trials", is_flag=True, help="Measure other ways to compute the same instead.")
@click.option("--exports", is_flag=True, help="Print a table of every format and precision instead.")
@click.option("--converters", is_flag=True, help="Compare our LiteRT file with litert-torch's instead.")
@click.option("--worker", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--batch", type=int, hidden=True)
def main(
    variants: tuple[str, ...],
    rounds: int,
    trials: bool,
    exports: bool,
    converters: bool,
    worker: str | None,
    folder: Path | None,
    batch: int | None,
) -> None:
    if worker is not None and folder is not None and batch is not None:
        work(variants[0], folder, batch, worker)
        return
    if trials + exports + converters > 1:
        raise click.UsageError("give only one of --trials, --exports and --converters")
    if "nano" in variants and not exports:
        raise click.UsageError("nano works only with --exports: all else compares with PyTorch on synthetic weights")
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    for variant in variants:
        with tempfile.TemporaryDirectory() as place, Console(stderr=True).status(variant) as status:
            if converters:
                console.print(converters_table(variant, Path(place), rounds))
            elif exports:
                console.print(exports_table(variant, Path(place), rounds))
            else:
                console.print(speed_table(variant, Path(place), rounds, TRIALS if trials else CONTENDERS, status))


def speed_table(variant: str, folder: Path, rounds: int, contenders: tuple[Contender, ...], status: Status) -> Table:
    from rich.table import Table

    files = sorted({kind.partition("=")[2] for _, _, kind in contenders} - {""})
    how = {"x": ["--format", "saved_model"], "whole.tflite": ["--no-split-kernels"]}
    status.update(f"{variant}: preparing")
    if prepare(variant, folder, [(name, how.get(name, [])) for name in files]):
        raise click.ClickException("without these files there is nothing to compare")
    found = {}
    for count in (1, 8):
        status.update(f"{variant}: batch {count}")
        found[count] = measure(contenders, variant, folder, count, rounds)
    table = Table(variant, *(heading for n in found for heading in (f"ms, batch {n}", "ratio", "again", "ratio")))
    both = {n: [times.get(name, _NOT) for name, _, _ in PYTORCH] for n, times in found.items()}
    eager = {n: [min(turn) for turn in zip(*formats, strict=True)] for n, formats in both.items()}
    for name, _, _ in contenders:
        row = [name]
        for n, times in found.items():
            for seconds, quicker in zip(times.get(name, _NOT), eager[n], strict=True):
                row += ["-", "-"] if math.isnan(seconds) else [f"{1000 * seconds:.1f}", f"{seconds / quicker:.2f}"]
        table.add_row(*row)
    return table


def exports_table(variant: str, folder: Path, rounds: int) -> Table:
    from rich.table import Table

    from porting.exporting import FORMATS
    from porting.models.precision import PRECISIONS
    from porting.reports.document import read_report

    made = {(form, precision): f"{precision}{suffix}" for form, suffix in FORMATS.items() for precision in PRECISIONS}
    hows = [(file, ["--format", form, "--precision", precision]) for (form, precision), file in made.items()]
    refused = prepare(variant, folder, hows, samples=40 if variant == "nano" else 4)
    contenders = [(file, ON, f"{form}={file}") for (form, _), file in made.items() if file not in refused]
    times = measure(contenders, variant, folder, 1, rounds, same=False)  # each export has its own report
    table = Table(variant, "MiB", "operations", "layers", "worst ratio", "same class", "ms, batch 1")
    for (form, precision), file in made.items():
        if file in refused:
            table.add_row(f"{form} {precision}", "refused")
            continue
        report = read_report(folder / f"{file}.parity.json")
        assert report.logits is not None
        path = folder / file
        size = sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())
        table.add_row(
            f"{form} {precision}",
            f"{size / 2**20:.1f}",
            str(sum(report.context["export"]["operators"].values())),
            str(len(report.layers)),
            f"{report.worst.ratio:.2f}",
            f"{report.logits.top1_agreement} of {report.logits.samples}",
            f"{1000 * times.get(file, _NOT)[0]:.1f}",
        )
    return table


CONVERTERS = {
    "ours": "x.tflite",
    "ours, kernels not split": "whole.tflite",
    "litert-torch": "theirs.tflite",
}


def converters_table(variant: str, folder: Path, rounds: int) -> Table:
    import torch
    from ai_edge_litert.interpreter import Interpreter
    from rich.table import Table

    if prepare(variant, folder, [("x.tflite", []), ("whole.tflite", ["--no-split-kernels"])]):
        raise click.ClickException("without our files there is nothing to compare")
    command = [sys.executable, __file__, variant, "--worker", "convert=theirs.tflite", "--folder", str(folder)]
    if failure := failure_of([*command, "--batch", "1"]):
        raise click.ClickException(f"litert-torch: {failure}")
    images = images_of(variant, 4)
    with torch.inference_mode():
        moved = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).double()
        truth = reference_of(variant, folder).double()(moved).numpy()
    times = measure([(name, {}, f"litert={file}") for name, file in CONVERTERS.items()], variant, folder, 1, rounds)
    table = Table(variant, "MiB", "operations", "kinds", "worst error, of RMS", "ms, batch 1", "again")
    for name, file in CONVERTERS.items():
        interpreter = Interpreter(str(folder / file))
        interpreter.allocate_tensors()
        plain = Interpreter(str(folder / file), experimental_op_resolver_type=_without_delegates())
        plain.allocate_tensors()
        kinds = Counter(each["op_name"] for each in plain._get_ops_details())
        given, taken = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
        worst = 0.0
        for image, expected in zip(images, truth, strict=True):
            interpreter.set_tensor(given, image[None])
            interpreter.invoke()
            difference = interpreter.get_tensor(taken)[0] - expected
            worst = max(worst, float(np.abs(difference).max() / np.sqrt(np.square(expected).mean())))
        table.add_row(
            name,
            f"{(folder / file).stat().st_size / 2**20:.1f}",
            str(sum(kinds.values())),
            ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6)),
            f"{worst:.1e}",
            *(f"{1000 * seconds:.1f}" for seconds in times[name]),
        )
    return table


def _without_delegates() -> Any:
    from ai_edge_litert.interpreter import OpResolverType

    return OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


if __name__ == "__main__":
    main()
