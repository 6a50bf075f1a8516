"""Running an exported file in its own runtime, and looking at what it computes on the way.

A runtime gives, for one image, the tensors that it can show by the name of the Keras layer that makes them: all of them
where the file keeps the layers' names, else the result alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from porting.errors import ExportError
from porting.kinds.transforms import Array
from porting.parity.report import OUTPUT

# Says which tensors depend on the input, in the order in which they are computed; is told which to show.
_RUN_SAVED_MODEL = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever else is printed is no answer
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

path, taken = sys.argv[1:]
model = tf.saved_model.load(path)
run = model.signatures["serving_default"]
(name,) = run.structured_input_signature[1]
inlined = convert_variables_to_constants_v2(run)
reached, names = {inlined.inputs[0].op}, []
for each in inlined.graph.get_operations():  # an imported graph has every operation behind those that it takes from
    if any(given.op in reached for given in each.inputs):
        reached.add(each)
        if len(each.outputs) == 1 and each.outputs[0].dtype == tf.float32 and each.outputs[0].shape.rank:
            names.append(each.outputs[0].name)
print(json.dumps(names), file=answers, flush=True)
wanted = [inlined.graph.get_tensor_by_name(each) for each in json.loads(sys.stdin.readline())]
show = inlined.prune(inlined.inputs, wanted) if wanted else lambda image: []
for line in sys.stdin:
    image = tf.constant(np.load(line.strip()))
    (result,) = run(**{name: image}).values()
    np.savez(taken, result.numpy(), *(each.numpy() for each in show(image)))
    print("done", file=answers, flush=True)
"""


# Operations that are also made of weights, and that change nothing where they are not.
_OF_WEIGHTS = {"DEQUANTIZE", "DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape"}
# What tf2onnx puts between two layers has the name of one of them and a number.
_INSERTED = re.compile(r"__\d+(:\d+)?$")


class Runtime(Protocol):
    """One loaded artifact."""

    def run(self, image: Array) -> Mapping[str, Array]:
        """`(1, H, W, 3)` to the result, under `OUTPUT`, and to the layers' results by the Keras layers' names."""
        ...

    def operators(self) -> Counter[str]:
        """How many operations of each kind the file has."""
        ...


@contextlib.contextmanager
def open_runtime(form: str, path: Path, layers: Sequence[str]) -> Iterator[Runtime]:
    """The runtime of a format; `layers` are the names of the Keras layers to show. Raises ExportError."""
    if form == "saved_model":
        with _SavedModel(path, layers) as runtime:
            yield runtime
    elif form == "litert":
        yield _LiteRT(path, layers)
    else:
        yield _Onnx(path, layers)


class _SavedModel:
    """TensorFlow in a process of its own, which knows nothing of Keras or of this package."""

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        self._path, self._wanted = path, layers

    def __enter__(self) -> _SavedModel:
        self._folder = tempfile.TemporaryDirectory()
        self._given, self._taken = Path(self._folder.name, "in.npy"), Path(self._folder.name, "out.npz")
        command = [sys.executable, "-P", "-c", _RUN_SAVED_MODEL, str(self._path), str(self._taken)]
        self._said = Path(self._folder.name, "stderr").open("w+")  # a pipe that nobody empties would fill up
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        try:
            tensors = json.loads(self._answer())
            self._layers = {
                layer: tensors[position] for layer, position in _last_of_each_layer(tensors, self._wanted).items()
            }
            self._say(json.dumps(list(self._layers.values())))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._said.close()
        self._folder.cleanup()

    def run(self, image: Array) -> Mapping[str, Array]:
        np.save(self._given, image)
        self._say(str(self._given))
        self._answer()
        with np.load(self._taken) as found:
            output, *layers = found.values()
        return {**dict(zip(self._layers, layers, strict=True)), OUTPUT: output}

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            raise ExportError(f"TensorFlow cannot run the SavedModel: {said[-1] if said else 'the process ended'}")
        return answer

    def operators(self) -> Counter[str]:
        from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

        saved = SavedModel()
        saved.ParseFromString((self._path / "saved_model.pb").read_bytes())
        functions = saved.meta_graphs[0].graph_def.library.function
        operators = [Counter(node.op for node in function.node_def) for function in functions]
        return max(operators, key=lambda found: found["Conv2D"], default=Counter())


class _LiteRT:
    """LiteRT's interpreter with XNNPACK for the result, and without it, keeping all tensors, for the layers."""

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        try:
            self._fast = Interpreter(str(path))
            self._open = Interpreter(
                str(path),
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                experimental_preserve_all_tensors=True,
            )
            for interpreter in (self._fast, self._open):
                interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            said = str(error).partition("\n")[0]
            hint = "In int8, --no-split-kernels leaves out sums that XNNPACK refuses." if "XNNPACK" in said else ""
            raise ExportError(f"LiteRT cannot load the file: {said}", hint=hint) from None
        details = [each for each in self._open.get_tensor_details() if each["name"] and each["shape"].size > 1]
        operations = [each for each in self._open._get_ops_details() if each["op_name"] not in _OF_WEIGHTS]
        made = {int(index) for each in operations for index in each["outputs"]}
        details = [each for each in details if each["index"] in made]
        names = _last_of_each_layer([each["name"].partition(";")[0] for each in details], layers)
        self._layers = {layer: details[position] for layer, position in names.items()}

    def run(self, image: Array) -> Mapping[str, Array]:
        found = {layer: _dequantized(self._open, detail) for layer, detail in self._invoke(self._open, image)}
        (output,) = self._fast.get_output_details()
        self._invoke(self._fast, image)
        return {**found, OUTPUT: _dequantized(self._fast, output)}

    def _invoke(self, interpreter: Any, image: Array) -> list[tuple[str, Any]]:
        (given,) = interpreter.get_input_details()
        interpreter.set_tensor(given["index"], image.astype(given["dtype"]))
        interpreter.invoke()
        return list(self._layers.items())

    def operators(self) -> Counter[str]:
        return Counter(each["op_name"] for each in self._open._get_ops_details())


def _dequantized(interpreter: Any, detail: Any) -> Array:
    array: Array = interpreter.get_tensor(detail["index"])
    scale, zero = detail["quantization"]
    return (array.astype(np.float32) - zero) * scale if scale else array.astype(np.float32)


class _Onnx:
    """ONNX Runtime; a second session of the same file shows the layers' results."""

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        import onnx
        import onnxruntime

        try:
            self._model = onnx.load(path)
            self._fast = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            nodes = [node for node in self._model.graph.node if node.output and node.op_type not in _OF_WEIGHTS]
            outputs = [node.output[0] for node in nodes if not _INSERTED.search(node.output[0])]
            names = _last_of_each_layer(outputs, layers)
            self._layers = {layer: outputs[position] for layer, position in names.items()}
            shown = onnx.ModelProto()
            shown.CopyFrom(self._model)
            known = {output.name for output in shown.graph.output}
            more = [onnx.ValueInfoProto(name=name) for name in self._layers.values() if name not in known]
            shown.graph.output.extend(more)
            self._open = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception as error:  # both libraries have many kinds
            raise ExportError(f"ONNX Runtime cannot load the file: {str(error).partition(chr(10))[0]}") from None

    def run(self, image: Array) -> Mapping[str, Array]:
        (given,) = self._fast.get_inputs()
        (output,) = self._fast.run(None, {given.name: image})
        found = self._open.run(list(self._layers.values()), {given.name: image}) if self._layers else []
        layers = {layer: np.asarray(array, np.float32) for layer, array in zip(self._layers, found, strict=True)}
        return {**layers, OUTPUT: np.asarray(output, np.float32)}

    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self._model.graph.node)


def _last_of_each_layer(names: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
    """Where the last tensor of each layer is among `names`, which are paths with the layer's own somewhere in them.

    Keras numbers the calls of a layer: `model_1/head_1/Add` is of `head`. A sublayer's tensor is the outer layer's.
    """
    wanted = set(layers)
    found: dict[str, int] = {}
    for position, name in enumerate(names):
        parts = [layer for part in name.split("/")[:-1] for layer in (part, re.sub(r"_\d+$", "", part))]
        outermost = next((layer for layer in parts if layer in wanted), None)
        if outermost is not None:
            found[outermost] = position
    return found
