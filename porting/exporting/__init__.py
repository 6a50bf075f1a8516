"""Other runtimes: each format in a file of its own, which writes it and runs it, and what their precision costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from porting.exporting.base import Exportable, Runtime, gelu_by_erf
from porting.exporting.usage import Usage

# What the artifact's name ends in, by format.
FORMATS = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
# The packages that it takes, besides those of every installation.
NEEDED = {
    "litert": ("ai_edge_litert", "flatbuffers"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "tf2onnx"),
    "saved_model": (),
}


def write(
    form: str,
    given: Exportable,
    path: Path,
    precision: str,
    *,
    usage: Usage | None = None,
    split_kernels: bool = False,
) -> None:
    """Writes a model to `path`, for inputs of the size of those given with it, to which int8 is fitted.

    `usage` goes into the file's own metadata, where its format has any; a SavedModel has its signature alone.

    `split_kernels` is for LiteRT: large depthwise kernels become sums of smaller ones. In int8 XNNPACK takes only
    summands whose steps are of about one size. What the converters raise comes through as it is.
    """
    settings = {"split_kernels": split_kernels} if form == "litert" else {}
    module = import_module(f"{__name__}.{form}")
    with gelu_by_erf():
        module.write(given, path, precision, **settings)
    if usage is not None and form != "saved_model":
        module.write_usage(path, usage)


@contextlib.contextmanager
def open_runtime(form: str, path: Path, layers: Sequence[str]) -> Iterator[Runtime]:
    """The runtime of a format; `layers` are the names of the Keras layers to show. Raises ExportError."""
    if form == "saved_model":
        from porting.exporting.saved_model import SavedModelRuntime

        with SavedModelRuntime(path, layers) as runtime:
            yield runtime
    elif form == "litert":
        from porting.exporting.litert import LiteRTRuntime

        yield LiteRTRuntime(path, layers)
    else:
        from porting.exporting.onnx import OnnxRuntime

        yield OnnxRuntime(path, layers)
