"""What the formats share: a model with named inputs and results, and the protocol of a runtime."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from porting.exporting.ends import Ends
from porting.kinds.transforms import Array
from porting.models.frameworks import convolving, replaced
from porting.models.inputs import Inputs, leaves_by_key

if TYPE_CHECKING:
    import keras

# Operations that converters also apply to weights. On activations, they do not change the values.
OF_WEIGHTS = {"DEQUANTIZE", "DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape"}


@dataclass(frozen=True)
class Exportable:
    """A Keras model as a function of named inputs with named results, and inputs to run it on.

    A single image input is called `images`; other inputs have Keras's names. Results are called `output_0`, `output_1`
    and so on, or by the keys of the model's output. `ends` are what the file has before and behind the model.
    """

    model: keras.Model
    inputs: Inputs
    ends: Ends = field(default_factory=Ends)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs, in order. Each is a valid name of a Python argument."""
        if self.inputs.names is not None:
            found: Sequence[str] = self.inputs.names
        elif len(self.inputs.candidate) == 1 and self.inputs.candidate[0].ndim == 4:
            found = ["images"]
        else:
            found = [tensor.name for tensor in self.model.inputs]
        return tuple(re.sub(r"\W", "_", name) for name in found)

    def specs(self, *, fixed: bool) -> dict[str, Any]:
        """A tf.TensorSpec per input: for one sample if `fixed`, else for any number, with sequences of any length."""
        import tensorflow as tf

        found = {}
        for name, array, stated in zip(self.names, self.inputs.candidate, self._stated_sides(), strict=True):
            sides = array.shape if fixed or array.ndim > 2 else stated
            found[name] = tf.TensorSpec((1 if fixed else None, *sides[1:]), tf.as_dtype(array.dtype), name=name)
        return found

    def _stated_sides(self) -> list[tuple[int | None, ...]]:
        """The shape that Keras states for each input, in the order of `inputs`, which may differ from Keras's."""
        tensors = self.model.inputs
        if self.inputs.names is None:
            return [tuple(tensor.shape) for tensor in tensors]
        stated = {tensor.name: tuple(tensor.shape) for tensor in tensors}
        given = zip(self.inputs.names, self.inputs.candidate, strict=True)
        return [stated.get(name, array.shape) for name, array in given]

    def __call__(self, **given: Any) -> dict[str, Any]:
        return self.named(self.model(self.structured(given), training=False))

    def structured(self, given: Mapping[str, Any]) -> Any:
        """Convert inputs by name to the structure that the model takes, prepared for it."""
        return self.inputs.structured(self.model, [self.ends.before(given[name]) for name in self.names])

    def named(self, result: Any) -> dict[str, Any]:
        """The model's output by the names that the results have in the file."""
        leaves = leaves_by_key(result)
        results = map(self.ends.behind, leaves.values())
        return dict(zip(self.result_names(list(leaves)).values(), results, strict=True))

    def result_names(self, keys: Sequence[str] | None = None) -> dict[str, str]:
        """The name of each result by its key in the model's output."""
        if keys is None:
            keys = list(leaves_by_key(self.model.output))
        digits = len(str(len(keys) - 1))  # runtimes sort by name
        return {
            key: f"output_{place:0{digits}}" if not key or key.startswith("[") else re.sub(r"\W", "_", key)
            for place, key in enumerate(keys)
        }

    def samples(self) -> Iterator[dict[str, Array]]:
        """Yield each sample as a batch of one, by input name."""
        for index in range(len(self.inputs)):
            batch = self.inputs.batch(index, index + 1)
            yield dict(zip(self.names, batch.candidate, strict=True))


@contextmanager
def plain_activations() -> Iterator[None]:
    """Compute GELU with Erf and SiLU with a sigmoid while a model is traced.

    ONNX lacks Erfc, with which Keras computes GELU. TensorFlow's SiLU has a gradient of its own, which cannot be saved
    with a traced function: its LiteRT file would have no signature. This replaces the backend functions, which all
    activations, functions and keras.ops call.
    """
    from keras.src import backend

    own = backend.nn.gelu, backend.nn.silu

    def gelu(x: Any, approximate: bool = True) -> Any:
        import tensorflow as tf

        if approximate:
            return own[0](x, approximate=True)
        x = tf.convert_to_tensor(x)
        return 0.5 * x * (1.0 + tf.math.erf(x * math.sqrt(0.5)))

    def silu(x: Any) -> Any:
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        return x * tf.sigmoid(x)

    with replaced(backend.nn, gelu=gelu, silu=silu):
        yield


@contextmanager
def grouped_convolutions_inline() -> Iterator[None]:
    """Let a traced model have grouped convolutions as operations of its own graph, as ONNX needs them.

    Keras calls a function compiled by XLA for them, because TensorFlow cannot run them on a CPU without it.
    """

    def conv(
        inputs: Any, kernel: Any, strides: Any, padding: str, data_format: str | None, dilation_rate: Any
    ) -> Any | None:
        import tensorflow as tf
        from keras import config

        if (data_format or config.image_data_format()) != "channels_last" or inputs.shape[-1] == kernel.shape[-2]:
            return None
        return tf.nn.convolution(inputs, kernel, strides, padding.upper(), dilations=dilation_rate)

    with convolving(conv):
        yield


class Runtime(Protocol):
    """A loaded artifact."""

    def run(self, sample: Mapping[str, Array]) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        """Run a batch of one, by input name. Return the results by name, and the layers' results by Keras name."""
        ...

    def operators(self) -> Counter[str]:
        """The number of operations of each kind in the file."""
        ...


def last_of_each_layer(names: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
    """The index in `names` of each layer's last tensor. The names are paths that contain the layer's name.

    Keras numbers the calls of a layer: `model_1/head_1/Add` belongs to `head`. A sublayer's tensor counts as that of
    the outermost layer.
    """
    wanted = set(layers)
    found: dict[str, int] = {}
    for position, name in enumerate(names):
        parts = [layer for part in name.split("/")[:-1] for layer in (part, re.sub(r"_\d+$", "", part))]
        outermost = next((layer for layer in parts if layer in wanted), None)
        if outermost is not None:
            found[outermost] = position
    return found
