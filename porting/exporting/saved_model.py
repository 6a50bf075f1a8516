"""SavedModel, written by TensorFlow and run in a separate TensorFlow process without Keras."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from porting.errors import ExportError
from porting.exporting.base import Exportable, last_of_each_layer
from porting.exporting.usage import LABELS_FILE, Usage
from porting.files.exported_file import EXTRA_FOLDER, USAGE_FILE
from porting.kinds.transforms import Array
from porting.models.traverse import named_layers

# The script prints the tensors that depend on the input, in the order in which they are computed, and then reads which
# of them to return.
_RUN_SAVED_MODEL = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # other output must not mix with the answers
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

path, taken = sys.argv[1:]
model = tf.saved_model.load(path)
run = model.signatures["serving_default"]
names_of_inputs = sorted(run.structured_input_signature[1])
inlined = convert_variables_to_constants_v2(run)
reached, names = {each.op for each in inlined.inputs}, []
for each in inlined.graph.get_operations():  # in an imported graph, operations follow their inputs
    if any(given.op in reached for given in each.inputs):
        reached.add(each)
        if len(each.outputs) == 1 and each.outputs[0].dtype == tf.float32 and each.outputs[0].shape.rank:
            names.append(each.outputs[0].name)
print(json.dumps(names), file=answers, flush=True)
wanted = [inlined.graph.get_tensor_by_name(each) for each in json.loads(sys.stdin.readline())]
show = inlined.prune(inlined.inputs, wanted) if wanted else lambda *given: []
for line in sys.stdin:
    with np.load(line.strip()) as file:
        given = {name: tf.constant(file[name]) for name in names_of_inputs}
    results = {f"result/{name}": result.numpy() for name, result in run(**given).items()}
    shown = [each.numpy() for each in show(*given.values())]
    np.savez(taken, **results, **{f"layer/{place}": each for place, each in enumerate(shown)})
    print("done", file=answers, flush=True)
"""


def write(given: Exportable, path: Path, precision: str) -> None:
    """Write the model with its weights as constants, so that TensorFlow can reorder them once for its kernels."""
    import keras
    import tensorflow as tf

    depthwise = {
        id(layer.kernel)
        for layer in named_layers(given.model).values()
        if isinstance(layer, keras.layers.DepthwiseConv2D)
    }
    constants = {
        id(variable): stored(np.asarray(variable), precision, depthwise=id(variable) in depthwise)
        for variable in given.model.variables
    }

    def serve(**inputs: Any) -> dict[str, Any]:
        def of(variables: list[Any]) -> list[Any]:
            return [_restored(*constants[id(variable)]) for variable in variables]

        trained, others = of(given.model.trainable_variables), of(given.model.non_trainable_variables)
        output, _ = given.model.stateless_call(trained, others, given.structured(inputs), training=False)
        return given.named(output)

    path.unlink(missing_ok=True)
    # Only a signature: as a method, too, the file would contain all weights twice.
    run = tf.function(serve).get_concrete_function(**given.specs(fixed=False))
    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": run})


def write_usage(path: Path, usage: Usage) -> None:
    """Store the usage in the folder that TensorFlow leaves to the writers of a SavedModel."""
    extra = path / EXTRA_FOLDER
    extra.mkdir()
    (extra / USAGE_FILE).write_text(json.dumps(usage.properties(), indent=1) + "\n", encoding="utf-8")
    if usage.labels:
        (extra / LABELS_FILE).write_text(usage.labels_text, encoding="utf-8")


def stored(values: Array, precision: str, *, depthwise: bool) -> tuple[Array, Array | None]:
    """Round a kernel to `precision`. Return it and its scale, which int8 has per channel, with 255 steps.

    Weights with fewer than two axes, such as biases, stay in float32.
    """
    if precision == "float32" or values.ndim < 2 or values.dtype.kind != "f":
        return values, None
    if precision == "float16":
        return values.astype(np.float16), None
    # A depthwise kernel is (height, width, channels, multiplier). In others, the last axis is the output channels.
    others = tuple(range(values.ndim - (2 if depthwise else 1)))
    scale = np.abs(values).max(axis=others, keepdims=True).clip(1e-12) / 127
    return np.rint(values / scale).astype(np.int8), scale.astype(np.float32)


def _restored(values: Array, scale: Array | None) -> Any:
    import tensorflow as tf

    tensor = tf.constant(values)
    if values.dtype == np.float16 or scale is not None:
        tensor = tf.cast(tensor, tf.float32)
    return tensor if scale is None else tensor * tf.constant(scale)


class SavedModelRuntime:
    """TensorFlow in a separate process, which uses neither Keras nor this package."""

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        self._path, self._wanted = path, layers

    def __enter__(self) -> SavedModelRuntime:
        self._folder = tempfile.TemporaryDirectory()
        self._given, self._taken = Path(self._folder.name, "in.npz"), Path(self._folder.name, "out.npz")
        command = [sys.executable, "-P", "-c", _RUN_SAVED_MODEL, str(self._path), str(self._taken)]
        self._said = Path(self._folder.name, "stderr").open("w+")  # a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        try:
            tensors = json.loads(self._answer())
            self._layers = {
                layer: tensors[position] for layer, position in last_of_each_layer(tensors, self._wanted).items()
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

    def run(self, sample: Mapping[str, Array]) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        np.savez(self._given, **sample)  # type: ignore[arg-type]
        self._say(str(self._given))
        self._answer()
        with np.load(self._taken) as found:
            results = {name.partition("/")[2]: found[name] for name in found.files if name.startswith("result/")}
            layers = {layer: found[f"layer/{place}"] for place, layer in enumerate(self._layers)}
        return results, layers

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
