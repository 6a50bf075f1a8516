"""What the formats share: a model whose inputs and results have names, and the protocol of a runtime."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from porting.kinds.transforms import Array
from porting.models.inputs import Inputs, leaves_by_key

if TYPE_CHECKING:
    import keras

# Operations that are also made of weights, and that change nothing where they are not.
OF_WEIGHTS = {"DEQUANTIZE", "DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape"}


@dataclass(frozen=True)
class Exportable:
    """A Keras model as a function of named inputs with named results, and inputs to run it on.

    One image is called `images`, other inputs as Keras calls them. Results are `output_0`, `output_1` and so on, or
    have the keys under which the model gives them.
    """

    model: keras.Model
    inputs: Inputs

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs, in order; each can be an argument's name."""
        if self.inputs.names is not None:
            found: Sequence[str] = self.inputs.names
        elif len(self.inputs.candidate) == 1 and self.inputs.candidate[0].ndim == 4:
            found = ["images"]
        else:
            found = [tensor.name for tensor in self.model.inputs]
        return tuple(re.sub(r"\W", "_", name) for name in found)

    def specs(self, *, fixed: bool) -> dict[str, Any]:
        """A tf.TensorSpec an input: of one sample when `fixed`, else of any number, and of sequences of any length."""
        import tensorflow as tf

        found = {}
        for name, array, stated in zip(self.names, self.inputs.candidate, self._stated_sides(), strict=True):
            sides = array.shape if fixed or array.ndim > 2 else stated
            found[name] = tf.TensorSpec((1 if fixed else None, *sides[1:]), tf.as_dtype(array.dtype), name=name)
        return found

    def _stated_sides(self) -> list[tuple[int | None, ...]]:
        """What Keras says of each input, in the order of these, which may not be its own."""
        tensors = self.model.inputs
        if self.inputs.names is None:
            return [tuple(tensor.shape) for tensor in tensors]
        stated = {tensor.name: tuple(tensor.shape) for tensor in tensors}
        given = zip(self.inputs.names, self.inputs.candidate, strict=True)
        return [stated.get(name, array.shape) for name, array in given]

    def __call__(self, **given: Any) -> dict[str, Any]:
        return self.named(self.model(self.structured(given), training=False))

    def structured(self, given: Mapping[str, Any]) -> Any:
        """Inputs by name in the structure that the model takes."""
        return self.inputs.structured(self.model, [given[name] for name in self.names])

    def named(self, result: Any) -> dict[str, Any]:
        """What the model gives, by the names that the results have in the file."""
        leaves = leaves_by_key(result)
        return dict(zip(self.result_names(list(leaves)).values(), leaves.values(), strict=True))

    def result_names(self, keys: Sequence[str] | None = None) -> dict[str, str]:
        """Every result's name by its key in what the model gives."""
        if keys is None:
            keys = list(leaves_by_key(self.model.output))
        digits = len(str(len(keys) - 1))  # runtimes sort by name
        return {
            key: f"output_{place:0{digits}}" if not key or key.startswith("[") else re.sub(r"\W", "_", key)
            for place, key in enumerate(keys)
        }

    def samples(self) -> Iterator[dict[str, Array]]:
        """One after the other, each as a batch of one, by the inputs' names."""
        for index in range(len(self.inputs)):
            batch = self.inputs.batch(index, index + 1)
            yield dict(zip(self.names, batch.candidate, strict=True))


@contextmanager
def gelu_by_erf() -> Iterator[None]:
    """While a model is traced, Keras's GELU is computed by Erf: its own Erfc is an operation that ONNX lacks.

    It is what every way to Keras's GELU ends in: layers' activations, functions of their own and keras.ops.
    """
    from keras.src import backend

    own = backend.nn.gelu

    def gelu(x: Any, approximate: bool = True) -> Any:
        import tensorflow as tf

        if approximate:
            return own(x, approximate=True)
        x = tf.convert_to_tensor(x)
        return 0.5 * x * (1.0 + tf.math.erf(x * math.sqrt(0.5)))

    try:
        backend.nn.gelu = gelu
        yield
    finally:
        backend.nn.gelu = own


class Runtime(Protocol):
    """One loaded artifact."""

    def run(self, sample: Mapping[str, Array]) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        """A batch of one, by the inputs' names, to the results by name and the layers' results by Keras's names."""
        ...

    def operators(self) -> Counter[str]:
        """How many operations of each kind the file has."""
        ...


def last_of_each_layer(names: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
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
