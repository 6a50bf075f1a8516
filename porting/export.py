"""From a file of Keras weights to what other runtimes take, proven in those runtimes before it gets its name."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting import weights_file
from porting.audit import layers_by_path
from porting.check import CheckOptions, load_candidate, open_checkpoint, parity_images
from porting.comparison import check_outputs
from porting.convert import refuse_other_keys
from porting.errors import ExportError, FailedParityError, OutputError, PortingError
from porting.family import Family
from porting.files import check_writable, move_into_place, output_errors, report_path_of, temporary_file, write_text
from porting.frameworks import start_tensorflow
from porting.layout import Array
from porting.parity import ParityReport, refusal
from porting.precision import PRECISIONS, in_precision
from porting.progress import SILENT, Progress
from porting.reports.document import to_json
from porting.runtimes import open_runtime
from porting.survey import survey_file

if TYPE_CHECKING:
    import keras
    from torch import nn

# What the artifact's name ends in, by format.
FORMATS = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
_NEEDED = {
    "litert": ("ai_edge_litert",),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "tf2onnx"),
    "saved_model": (),
}
# What tf2onnx writes at most, and the first that has Gelu.
_OPSET_WRITTEN, _OPSET = 18, 20
# XNNPACK computes a depthwise convolution of up to so many taps in one pass; with more, each tap takes it five times as
# long (measured for 25 and 49 taps on x86).
_TAPS_AT_ONCE = 25
_OF_A_SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}


@dataclass(frozen=True)
class ExportResult:
    """What an export has made: its size in bytes and its operations, and the report that vouches for it."""

    path: Path
    form: str
    precision: str
    size: int
    operators: Counter[str]
    report: ParityReport | None = None
    report_path: Path | None = None


def export(
    family: Family,
    variant: str,
    weights: Path,
    out: Path,
    *,
    form: str,
    precision: str = "float32",
    checkpoint: str | Path | None = None,
    layout: str | None = None,
    input_size: int | None = None,
    fused: bool = True,
    split_kernels: bool = True,
    check: bool = True,
    options: CheckOptions | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Writes a ported file as a SavedModel (a folder), for LiteRT or as ONNX.

    `precision` is float32, float16 or int8, the last with the images of `options` as the representative set; in a
    SavedModel it is that of the stored weights, and all is computed in float32. The model takes
    `(N, input_size, input_size, 3)` (LiteRT: N = 1), by default of the variant's own size, and is `fused` as the family
    can. `split_kernels` writes large depthwise kernels for LiteRT, unless in int8, as sums of smaller ones, which its
    CPU kernels compute sooner. With `check`, the artifact is loaded in its own runtime and compared with the PyTorch
    model of the checkpoint, in units of what its precision costs PyTorch; only then it gets its name, with the report
    beside it.

    Raises SourceError, CheckpointError, KeyMapError, WeightsFileError, OutputError, ExportError for what cannot be
    converted or run, or FailedParityError; then `out` is untouched.
    """
    _check_arguments(form, precision, out)
    weights_file.require_file(weights)
    survey_file(weights)
    options = options or CheckOptions()
    subject = open_checkpoint(family, variant, checkpoint, layout=layout, ema=False, progress=progress)
    refuse_other_keys(subject.checkpoint.state_dict, subject.key_map, subject.shapes)
    progress("starting TensorFlow")
    start_tensorflow()
    progress("reading the weights")
    model = load_candidate(weights, subject.build_candidate, subject.how_to_build)
    if fused:
        progress("fusing")
        with _export_errors("the model cannot be fused"):
            model = family.fuse(model, form)
    preprocessing = family.preprocessing(variant, subject.layout)
    size = input_size or preprocessing.input_size
    images = parity_images(family, variant, options, subject.layout, size)
    with temporary_file(out, FORMATS[form]) as temporary:
        progress(f"exporting to {form}")
        with _quiet(), output_errors(out), _export_errors(f"the model cannot be converted for {form}"):
            if form == "litert" and split_kernels and precision != "int8":
                with _kernels_in_parts(model):
                    _write_litert(model, temporary, precision, images)
            else:
                _WRITERS[form](model, temporary, precision, images)
        report = None
        # The last layer's result is the model's.
        last = {tensor._keras_history.operation.name for tensor in model.outputs}
        layers = [layer.name for layer in model.layers if layer.name not in last]
        with open_runtime(form, temporary, layers) as runtime:
            operators = runtime.operators()
            if check:
                reference = subject.load_reference()

                def run(image: Array) -> Mapping[str, Array]:
                    with _export_errors(f"the {form} runtime cannot run the result"):
                        return runtime.run(image)

                report = check_outputs(
                    reference,
                    run,
                    images,
                    rounded=_in_precision(reference, form, precision, images),
                    limits=options.limits,
                    name=f"{form}, {precision}",
                    progress=progress,
                )
                exported = {"format": form, "precision": precision, "fused": fused, "operators": dict(operators)}
                report = replace(report, context={**subject.describe(), "weights": weights.name, "export": exported})
        if report is not None and not report.passed:
            raise FailedParityError(f"{out} was not written: {refusal(report)}", report)
        with output_errors(out):
            # A report of an earlier export must not vouch for this one, not even for a moment.
            report_path_of(out).unlink(missing_ok=True)
            _give_name(temporary, out)
    result = ExportResult(out, form, precision, _size(out), operators)
    if report is None:
        return result
    write_text(report_path_of(out), to_json(report))
    return replace(result, report=report, report_path=report_path_of(out))


def _check_arguments(form: str, precision: str, out: Path) -> None:
    import importlib.util

    if form not in FORMATS:
        raise ExportError(f"there is no format {form!r}", hint=f"There are {', '.join(FORMATS)}.")
    if precision not in PRECISIONS:
        raise ExportError(f"there is no precision {precision!r}", hint=f"There are {', '.join(PRECISIONS)}.")
    if missing := [name for name in _NEEDED[form] if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"exporting to {form} needs {', '.join(missing)}", hint="Install them: pip install 'van-port[export]'."
        )
    if FORMATS[form] and out.suffix != FORMATS[form]:
        raise OutputError(f"{out}: the name does not say what it is", hint=f"End it in {FORMATS[form]}.")
    if form == "saved_model":
        if not out.name:
            raise OutputError(f"{out} has no name", hint="Give the SavedModel's folder a name.")
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= _OF_A_SAVED_MODEL):
            raise OutputError(f"{out} is there and is no SavedModel", hint="Give the folder another name.")
        check_writable(out.with_name(f"{out.name}.parity.json"))
    else:
        check_writable(out)


def _in_precision(reference: nn.Module, form: str, precision: str, images: Array) -> nn.Module | None:
    """What `form` rounds to `precision`: a SavedModel only its weights, and LiteRT on a CPU in float16 too."""
    if precision == "float32":
        return None
    weights_only = form == "saved_model" or (form == "litert" and precision == "float16")
    return in_precision(reference, precision, images, results=not weights_only)


@contextmanager
def _export_errors(what: str) -> Iterator[None]:
    """Converters and runtimes have errors of many types; each ends in an ExportError."""
    try:
        yield
    except (PortingError, OSError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"{what}: {lines[0][:300] if lines else repr(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters say much that is of no use to who runs them."""
    loggers = [logging.getLogger(name) for name in ("absl", "tf2onnx", "tensorflow", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_saved_model(model: keras.Model, path: Path, precision: str, images: Array) -> None:
    """Weights are constants of the graph, so that TensorFlow can bring them into the order that its kernels like."""
    import keras
    import tensorflow as tf

    depthwise = {
        id(layer.kernel) for layer in layers_by_path(model).values() if isinstance(layer, keras.layers.DepthwiseConv2D)
    }
    stored = {
        id(variable): _stored(np.asarray(variable), precision, depthwise=id(variable) in depthwise)
        for variable in model.variables
    }

    def serve(images: Any) -> dict[str, Any]:
        def of(variables: list[Any]) -> list[Any]:
            return [_restored(*stored[id(variable)]) for variable in variables]

        trained, others = of(model.trainable_variables), of(model.non_trainable_variables)
        output, _ = model.stateless_call(trained, others, images, training=False)
        return {"output_0": output}

    path.unlink(missing_ok=True)
    # As a signature alone: as a method too, all weights would be in the file twice.
    signature = tf.TensorSpec((None, *images.shape[1:]), tf.float32, name="images")
    run = tf.function(serve).get_concrete_function(signature)
    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": run})


def _stored(values: Array, precision: str, *, depthwise: bool) -> tuple[Array, Array | None]:
    """Values in `precision`, and what they are to be multiplied by: in int8 a kernel has 255 steps a channel."""
    if precision == "float32" or values.ndim < 2:
        return values, None
    if precision == "float16":
        return values.astype(np.float16), None
    # A depthwise kernel is (height, width, channels, multiplier), others end in the channels of their output.
    others = tuple(range(values.ndim - (2 if depthwise else 1)))
    scale = np.abs(values).max(axis=others, keepdims=True).clip(1e-12) / 127
    return np.rint(values / scale).astype(np.int8), scale.astype(np.float32)


def _restored(values: Array, scale: Array | None) -> Any:
    import tensorflow as tf

    tensor = tf.constant(values)
    if values.dtype == np.float16 or scale is not None:
        tensor = tf.cast(tensor, tf.float32)
    return tensor if scale is None else tensor * tf.constant(scale)


def _write_litert(model: keras.Model, path: Path, precision: str, images: Array) -> None:
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    run = tf.function(lambda x: model(x, training=False)).get_concrete_function(
        tf.TensorSpec((1, *images.shape[1:]), tf.float32, name="images")
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([convert_variables_to_constants_v2(run)], model)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]  # no Flex
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        converter.representative_dataset = lambda: ([image[None]] for image in images)
    path.write_bytes(converter.convert())


@contextmanager
def _kernels_in_parts(model: keras.Model) -> Iterator[None]:
    """While the model is traced, its large depthwise kernels are sums of smaller ones, over the same positions.

    Rows in the middle make one of them, and every two rows above and below that are as far away another, with so much
    dilation that it reaches both. Each is padded alike on both sides, so nothing has to be cut or moved.
    """
    import keras

    found = [
        layer
        for layer in layers_by_path(model).values()
        if isinstance(layer, keras.layers.DepthwiseConv2D) and _can_split(layer)
    ]
    try:
        for layer in found:
            layer.call = functools.partial(_call_in_parts, layer)
        yield
    finally:
        for layer in found:
            del layer.call


def _can_split(layer: keras.layers.DepthwiseConv2D) -> bool:
    rows, columns = layer.kernel_size
    plain = layer.padding == "same" and layer.data_format == "channels_last" and set(layer.strides) == {1}
    return plain and rows % 2 == 1 and columns % 2 == 1 and rows * columns > _TAPS_AT_ONCE >= 2 * columns


def _call_in_parts(layer: keras.layers.DepthwiseConv2D, inputs: Any) -> Any:
    from keras import ops

    rows, columns = layer.kernel_size
    down, right = layer.dilation_rate
    middle = (_TAPS_AT_ONCE // columns - 1) // 2 * 2 + 1
    first = (rows - middle) // 2
    kernel = ops.convert_to_tensor(layer.kernel)
    parts = [(kernel[first : first + middle], down)]
    for row in range(first):
        apart = rows - 1 - 2 * row
        parts.append((kernel[row : row + apart + 1 : apart], down * apart))
    outputs = [
        ops.depthwise_conv(inputs, part, padding="same", data_format="channels_last", dilation_rate=(dilation, right))
        for part, dilation in parts
    ]
    result = outputs[0] + layer.bias if layer.use_bias else outputs[0]
    return layer.activation(sum(outputs[1:], start=result))


def _write_onnx(model: keras.Model, path: Path, precision: str, images: Array) -> None:
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec((None, *images.shape[1:]), tf.float32, name="images")]
    run = tf.function(lambda x: model(x, training=False), input_signature=signature)
    with _gelu_by_erf(model):
        converted, _ = tf2onnx.convert.from_function(run, signature, opset=_OPSET_WRITTEN)
    converted = _with_gelu(converted)
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        converted = convert_float_to_float16(converted, keep_io_types=True)
    onnx.save(converted, path)
    if precision == "int8":
        _quantize_onnx(path, images)


@contextmanager
def _gelu_by_erf(model: keras.Model) -> Iterator[None]:
    """While the model is traced, Keras's GELU is computed by Erf: its own Erfc is an operation that ONNX lacks."""
    import keras

    def gelu(x: Any) -> Any:
        return 0.5 * x * (1.0 + keras.ops.erf(x * math.sqrt(0.5)))

    found = [
        layer
        for layer in layers_by_path(model).values()
        if getattr(layer, "activation", None) is keras.activations.gelu
    ]
    try:
        for layer in found:
            layer.activation = gelu
        yield
    finally:
        for layer in found:
            layer.activation = keras.activations.gelu


def _with_gelu(model: Any) -> Any:
    """Five operations on the way through Erf are one Gelu: a third quicker in ONNX Runtime for the whole of a VAN."""
    import onnx_ir
    from onnxscript import version_converter
    from onnxscript.rewriter import pattern

    def by_erf(op: Any, x: Any, half: Any, root: Any, one: Any) -> Any:
        return op.Mul(op.Mul(x, half), op.Add(one, op.Erf(op.Mul(x, root))))

    def gelu(op: Any, x: Any, **_: Any) -> Any:
        return op.Gelu(x)

    def is_gelu(_: Any, half: Any, root: Any, one: Any, **__: Any) -> bool:
        constants = (half, 0.5), (root, math.sqrt(0.5)), (one, 1.0)
        return all(
            value.const_value is not None
            and value.const_value.size == 1
            and math.isclose(value.const_value.numpy().item(), expected, rel_tol=1e-6)
            for value, expected in constants
        )

    graph = onnx_ir.from_proto(model)
    version_converter.convert_version(graph, _OPSET)
    pattern.RewriteRuleSet([pattern.RewriteRule(by_erf, gelu, is_gelu)], commute=True).apply_to_model(graph)
    return onnx_ir.to_proto(graph)


def _quantize_onnx(path: Path, images: Array) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, Array] | None:
            image = next(self._left, None)
            return None if image is None else {"images": image[None]}

    quantize_static(
        path, path, Images(), per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8
    )


_WRITERS: dict[str, Callable[[Any, Path, str, Array], None]] = {
    "saved_model": _write_saved_model,
    "litert": _write_litert,
    "onnx": _write_onnx,
}


def _give_name(temporary: Path, out: Path) -> None:
    """A folder cannot take another's place at once: the old one steps aside first."""
    if not temporary.is_dir():
        move_into_place(temporary, out)
        return
    aside = out.with_name(f".{out.name}.old")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    there = out.exists()
    if there:
        out.replace(aside)
    try:
        temporary.replace(out)
    except OSError:
        if there:
            aside.replace(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())
