"""ONNX, written by tf2onnx and run by ONNX Runtime."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from porting.errors import ExportError
from porting.exporting.base import OF_WEIGHTS, Exportable, grouped_convolutions_inline, last_of_each_layer
from porting.exporting.usage import Usage
from porting.kinds.transforms import Array
from porting.models.frameworks import replaced
from porting.wording import reason_of

# The latest opset that tf2onnx writes, and the first that has Gelu.
_OPSET_WRITTEN, _OPSET = 18, 20
# Weights of more bytes are kept out of TensorFlow's graph, which would hold them fifteen times. TensorFlow does not
# optimise such a graph.
_LARGE = 2**28
# Nodes that tf2onnx inserts between two layers have the name of one of them and a number.
_INSERTED = re.compile(r"__\d+(:\d+)?$")


def write(given: Exportable, path: Path, precision: str) -> None:
    import onnx
    import tensorflow as tf
    import tf2onnx

    specs = given.specs(fixed=False)
    run = tf.function(lambda *values: given(**dict(zip(specs, values, strict=True))))
    with grouped_convolutions_inline(), _few_copies():
        converted, storage = tf2onnx.convert.from_function(
            run, list(specs.values()), opset=_OPSET_WRITTEN, large_model=_is_large(given)
        )
    if storage is not None:
        _fill(converted, storage.name_to_tensor_data)
    converted = _polished(converted, list(specs))
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        converted = convert_float_to_float16(converted, keep_io_types=True)
    onnx.save(converted, path)
    if precision == "int8":
        _quantize_onnx(path, given.samples())


def write_usage(path: Path, usage: Usage) -> None:
    """Store the usage in the file's metadata_props."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, usage.properties())
    onnx.save(model, path)


def _is_large(given: Exportable) -> bool:
    size: int = sum(4 * math.prod(variable.shape) for variable in given.model.variables)
    return size > _LARGE


def _fill(model: Any, tensors: dict[str, bytes]) -> None:
    """Put the numbers that tf2onnx has left out of a model back into it, and out of `tensors`."""
    import onnx

    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.raw_data = tensors.pop(tensor.external_data[0].value)
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT


class _Numpy:
    """NumPy with a function that NumPy 2 has dropped, and that tf2onnx uses for large models."""

    product = staticmethod(np.prod)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _few_copies() -> Iterator[None]:
    """Keep tf2onnx from copying all weights in each of its optimisations, which takes fifty times the model's memory.

    It copies the graph so that an optimisation that fails can be undone, and the attributes of constants, of which only
    the originals are written. Here an optimisation that fails ends the export.
    """
    from tf2onnx import graph, optimizer

    update, optimize = graph.Node.update_proto, optimizer.optimize_graph

    def update_others(node: Any, storage: Any = None) -> None:
        if not node.is_const():
            update(node, storage)

    def optimize_in_place(given: Any, catch_errors: bool = True, optimizers: Any = None) -> Any:
        return optimize(given, False, optimizers)

    with (
        replaced(graph.Node, update_proto=update_others),
        replaced(graph, np=_Numpy()),
        replaced(optimizer, optimize_graph=optimize_in_place),
    ):
        yield


def _polished(model: Any, inputs: Sequence[str]) -> Any:
    """Replace the five operations of GELU by Erf with one Gelu, and restore layer names that tf2onnx loses.

    Gelu makes a whole VAN a third faster in ONNX Runtime.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript import version_converter
    from onnxscript.optimizer import fold_constants
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
    # tf2onnx lists constants among the inputs. Unused ones would become inputs without values.
    polished.graph.inputs[:] = [value for value in polished.graph.inputs if value.name in inputs]
    version_converter.convert_version(polished, _OPSET)
    pattern.RewriteRuleSet([pattern.RewriteRule(by_erf, gelu, is_gelu)], commute=True).apply_to_model(polished)
    fold_constants(polished)  # tf2onnx keeps kernels of which only the shape is read
    RemoveUnusedNodesPass()(polished)  # ONNX Runtime would print a warning for each constant of a replaced GELU
    for node in polished.graph:
        # A convolution with a fused bias or padding is called Conv__ and a number. The bias has its layer's name,
        # unless several layers with equal biases share it.
        if node.op_type == "Conv" and node.outputs[0].name.startswith("Conv__") and len(node.inputs) == 3:
            bias = node.inputs[2]
            layer, _, _ = bias.name.rpartition("/")
            if layer and len(bias.uses()) == 1:
                node.name, node.outputs[0].name = f"{layer}/BiasAdd", f"{layer}/BiasAdd:0"
    return onnx_ir.to_proto(polished)


def _quantize_onnx(path: Path, samples: Iterator[dict[str, Array]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Array] | None:
            return next(samples, None)

    quantize_static(
        path, path, Samples(), per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8
    )


class OnnxRuntime:
    """ONNX Runtime, with a second session of the same file that returns the layers' results."""

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        import onnx
        import onnxruntime

        try:
            self._model = onnx.load(path)
            self._fast = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            nodes = [node for node in self._model.graph.node if node.output and node.op_type not in OF_WEIGHTS]
            outputs = [node.output[0] for node in nodes if not _INSERTED.search(node.output[0])]
            names = last_of_each_layer(outputs, layers)
            self._layers = {layer: outputs[position] for layer, position in names.items()}
            shown = onnx.ModelProto()
            shown.CopyFrom(self._model)
            known = {output.name for output in shown.graph.output}
            more = [onnx.ValueInfoProto(name=name) for name in self._layers.values() if name not in known]
            shown.graph.output.extend(more)
            self._open = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception as error:  # both libraries raise many types
            raise ExportError(f"ONNX Runtime cannot load the file: {reason_of(error)}") from None

    def run(self, sample: Mapping[str, Array]) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        given = {each.name: sample[each.name] for each in self._fast.get_inputs()}  # unused inputs are not in this list
        results = [each.name for each in self._fast.get_outputs()]
        layers = self._open.run(list(self._layers.values()), given) if self._layers else []
        return _by_name(results, self._fast.run(results, given)), _by_name(self._layers, layers)

    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self._model.graph.node)


def _by_name(names: Iterable[str], arrays: Sequence[Any]) -> dict[str, Array]:
    return {name: np.asarray(array, np.float32) for name, array in zip(names, arrays, strict=True)}
