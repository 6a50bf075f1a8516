"""Export formats: one file per format, which writes it and runs it in its runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from porting.exporting.base import Exportable, Runtime, plain_activations
from porting.exporting.usage import Usage
from porting.files.exported_file import FORMATS

__all__ = ["FORMATS", "NEEDED", "open_runtime", "write"]

# The packages that each format needs in addition to the regular dependencies.
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
    """Write a model to `path`, for inputs of the size in `given`, on which int8 also calibrates.

    `usage` is stored in the file's metadata, or in a SavedModel's folder `assets.extra`.

    `split_kernels` is for LiteRT: large depthwise kernels become sums of smaller ones. In int8, XNNPACK accepts only
    summands with similar quantisation steps. Errors of the converters are passed through.
    """
    settings = {"split_kernels": split_kernels} if form == "litert" else {}
    module = import_module(f"{__name__}.{form}")
    with plain_activations():
        module.write(given, path, precision, **settings)
    if usage is not None:
        module.write_usage(path, usage)


@contextlib.contextmanager
def open_runtime(form: str, path: Path, layers: Sequence[str]) -> Iterator[Runtime]:
    """Open the runtime of a format. `layers` are the names of the Keras layers to return. Raises ExportError."""
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
