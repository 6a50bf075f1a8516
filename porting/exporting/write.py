"""Writing a Keras model in the format of another runtime, so that this runtime computes it quickly."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.parity.settings import layers_by_path

if TYPE_CHECKING:
    import keras

# What the artifact's name ends in, by format.
FORMATS = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
# The packages that it takes, besides those of every installation.
NEEDED = {
    "litert": ("ai_edge_litert",),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "tf2onnx"),
    "saved_model": (),
}
# What tf2onnx writes at most, and the first that has Gelu.
_OPSET_WRITTEN, _OPSET = 18, 20
# XNNPACK computes a depthwise convolution of up to so many taps in one pass; with more, each tap takes it five times as
# long (measured for 25 and 49 taps on x86).
_TAPS_AT_ONCE = 25


def write(
    form: str, model: keras.Model, path: Path, precision: str, images: Array, *, split_kernels: bool = False
) -> None:
    """Writes `model` to `path`, for images of the size of `images`, `(N, H, W, C)`, to which int8 is fitted.

    `split_kernels` is for LiteRT: large depthwise kernels become sums of smaller ones. In int8 XNNPACK takes only
    summands whose steps are of about one size. What the converters raise comes through as it is.
    """
    if form == "saved_model":
        _write_saved_model(model, path, precision, images)
    elif form == "litert":
        _write_litert(model, path, precision, images, split_kernels)
    else:
        _write_onnx(model, path, precision, images)


def _write_saved_model(model: keras.Model, path: Path, precision: str, images: Array) -> None:
    """Weights are constants of the graph, so that TensorFlow can bring them into the order that its kernels like."""
    import keras
    import tensorflow as tf

    depthwise = {
        id(layer.kernel) for layer in layers_by_path(model).values() if isinstance(layer, keras.layers.DepthwiseConv2D)
    }
    constants = {
        id(variable): stored(np.asarray(variable), precision, depthwise=id(variable) in depthwise)
        for variable in model.variables
    }

    def serve(images: Any) -> dict[str, Any]:
        def of(variables: list[Any]) -> list[Any]:
            return [_restored(*constants[id(variable)]) for variable in variables]

        trained, others = of(model.trainable_variables), of(model.non_trainable_variables)
        output, _ = model.stateless_call(trained, others, images, training=False)
        return {"output_0": output}

    path.unlink(missing_ok=True)
    # As a signature alone: as a method too, all weights would be in the file twice.
    signature = tf.TensorSpec((None, *images.shape[1:]), tf.float32, name="images")
    run = tf.function(serve).get_concrete_function(signature)
    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": run})


def stored(values: Array, precision: str, *, depthwise: bool) -> tuple[Array, Array | None]:
    """A kernel in `precision`, and what it is to be multiplied by: in int8 it has 255 steps a channel.

    What has one axis or none, such as a bias, stays in float32.
    """
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


def _write_litert(model: keras.Model, path: Path, precision: str, images: Array, split_kernels: bool) -> None:
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    with kernels_in_parts(model) if split_kernels else nullcontext():
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
def kernels_in_parts(model: keras.Model) -> Iterator[None]:
    """While the model is traced, its large depthwise kernels are sums of smaller ones, over the same positions.

    Rows in the middle make one of them, and every two rows above and below that are as far away another, with so much
    dilation that it reaches both. Each is padded alike on both sides, so nothing has to be cut or moved. Where a map is
    so small that a part would only see padding, the kernel is left whole.
    """
    import keras

    plain = keras.layers.DepthwiseConv2D
    found = [
        layer
        for layer in layers_by_path(model).values()
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
    # Two rows must be quick as well.
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


def _write_onnx(model: keras.Model, path: Path, precision: str, images: Array) -> None:
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec((None, *images.shape[1:]), tf.float32, name="images")]
    run = tf.function(lambda x: model(x, training=False), input_signature=signature)
    with _gelu_by_erf(model):
        converted, _ = tf2onnx.convert.from_function(run, signature, opset=_OPSET_WRITTEN)
    converted = _polished(converted)
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


def _polished(model: Any) -> Any:
    """One Gelu for the five operations on the way through Erf, and the layers' names where tf2onnx has lost them.

    Gelu makes the whole of a VAN a third quicker in ONNX Runtime.
    """
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

    polished = onnx_ir.from_proto(model)
    version_converter.convert_version(polished, _OPSET)
    pattern.RewriteRuleSet([pattern.RewriteRule(by_erf, gelu, is_gelu)], commute=True).apply_to_model(polished)
    for node in polished.graph:
        # A convolution that has taken in a bias or a padding is called Conv__ and a number. The bias knows its layer,
        # unless several layers share it because theirs are alike.
        if node.op_type == "Conv" and node.outputs[0].name.startswith("Conv__") and len(node.inputs) == 3:
            bias = node.inputs[2]
            layer, _, _ = bias.name.rpartition("/")
            if layer and len(bias.uses()) == 1:
                node.name, node.outputs[0].name = f"{layer}/BiasAdd", f"{layer}/BiasAdd:0"
    return onnx_ir.to_proto(polished)


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
