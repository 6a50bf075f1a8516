"""LiteRT, written by TensorFlow's converter and run by LiteRT's interpreter."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import ExportError
from porting.exporting.base import OF_WEIGHTS, Exportable, last_of_each_layer
from porting.exporting.usage import Usage
from porting.kinds.transforms import Array
from porting.models.frameworks import holding_back_stderr
from porting.models.traverse import named_layers
from porting.wording import reason_of

if TYPE_CHECKING:
    import keras

# XNNPACK computes a depthwise convolution of up to this many taps in one pass. With more, each tap takes five times as
# long (measured for 25 and 49 taps on x86).
_TAPS_AT_ONCE = 25


def write(given: Exportable, path: Path, precision: str, split_kernels: bool) -> None:
    import tensorflow as tf

    with kernels_in_parts(given.model) if split_kernels else nullcontext():
        run = tf.function(given.__call__).get_concrete_function(**given.specs(fixed=True))
    # A Keras model in place of the module may fail to be saved, and the file would then have no signature. Freezing the
    # variables first would take six times the memory, since a function may hold a constant many times.
    module = tf.Module()
    module.held = list(run.variables)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([run], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]  # no Flex
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        converter.representative_dataset = given.samples
    path.write_bytes(converter.convert())


def write_usage(path: Path, usage: Usage) -> None:
    """Store the usage as TFLite metadata, which MediaPipe's and ML Kit's image pipelines read."""
    from porting.exporting.tflite_metadata import with_metadata

    path.write_bytes(with_metadata(path.read_bytes(), usage))


@contextmanager
def kernels_in_parts(model: keras.Model) -> Iterator[None]:
    """Split large depthwise kernels into sums of smaller ones while the model is traced.

    The middle rows form one part. Each pair of rows at equal distance above and below forms another, with a dilation
    that reaches both. The padding of each part is symmetric, so no result needs to be cropped or shifted. If a map is
    so small that a part would see only padding, the kernel stays whole.
    """
    import keras

    plain = keras.layers.DepthwiseConv2D
    found = [
        layer
        for layer in named_layers(model).values()
        if isinstance(layer, plain) and type(layer).call is plain.call and _can_split(layer)
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
    aligned = layer.padding == "same" and layer.data_format == "channels_last" and set(layer.strides) == {1}
    # A part of two rows must also fit into one pass.
    return aligned and rows % 2 == 1 and columns % 2 == 1 and rows * columns > _TAPS_AT_ONCE >= 2 * columns


def _call_in_parts(layer: keras.layers.DepthwiseConv2D, inputs: Any) -> Any:
    from keras import ops

    rows, columns = layer.kernel_size
    down, right = layer.dilation_rate
    if inputs.shape[1] is not None and inputs.shape[1] <= rows // 2 * down:
        return type(layer).call(layer, inputs)
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


class LiteRTRuntime:
    """LiteRT's interpreter: one with XNNPACK for the results, and one without, which keeps all tensors, for layers."""

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        try:
            with holding_back_stderr():  # it says which delegate it uses
                self._fast = Interpreter(str(path))
                self._open = Interpreter(
                    str(path),
                    experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                    experimental_preserve_all_tensors=True,
                )
                for interpreter in (self._fast, self._open):
                    interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            said = reason_of(error)
            hint = "In int8, --no-split-kernels avoids sums that XNNPACK rejects." if "XNNPACK" in said else ""
            raise ExportError(f"LiteRT cannot load the file: {said}", hint=hint) from None
        details = [each for each in self._open.get_tensor_details() if each["name"] and each["shape"].size > 1]
        operations = [each for each in self._open._get_ops_details() if each["op_name"] not in OF_WEIGHTS]
        made = {int(index) for each in operations for index in each["outputs"]}
        details = [each for each in details if each["index"] in made]
        names = last_of_each_layer([each["name"].partition(";")[0] for each in details], layers)
        self._layers = {layer: details[position] for layer, position in names.items()}

    def run(self, sample: Mapping[str, Array]) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        results = self._fast.get_signature_runner()(**sample)
        self._open.get_signature_runner()(**sample)
        layers = {layer: _dequantized(self._open, detail) for layer, detail in self._layers.items()}
        return {name: array.astype(np.float32) for name, array in results.items()}, layers

    def operators(self) -> Counter[str]:
        return Counter(each["op_name"] for each in self._open._get_ops_details())


def _dequantized(interpreter: Any, detail: Any) -> Array:
    array: Array = interpreter.get_tensor(detail["index"])
    scale, zero = detail["quantization"]
    return (array.astype(np.float32) - zero) * scale if scale else array.astype(np.float32)
