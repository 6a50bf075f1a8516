"""Names the layers and variables of a Keras model by their position in it.

A variable's own `path` is not unique: Keras sets it when the layer is built, so two submodels built alike have the same
paths inside. Here a name is the chain of layer names from the model down, such as `encoder/block1/dense/kernel`. A
layer that is used in two places has the name of the first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

_NUMBERED = re.compile(r"variable_\d+")


def named_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Every layer of a model at any depth, each once, depth first.

    Names that would be equal get a number, as in `dense~1`.
    """
    found: dict[str, keras.layers.Layer] = {}
    seen: set[int] = {id(model)}

    def walk(owner: Any, prefix: str) -> None:
        used: Counter[str] = Counter()
        for layer in _sublayers(owner):
            name = f"{prefix}{layer.name}"
            used[name] += 1
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            name = name if used[name] == 1 else f"{name}~{used[name] - 1}"
            found[name] = layer
            walk(layer, f"{name}/")

    walk(model, "")
    return found


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Every weight of a model, each once, in Keras's own order. The state of random generators is not a weight."""
    names: dict[int, str] = {}
    used: Counter[str] = Counter()
    for prefix, layer in (("", model), *((f"{name}/", layer) for name, layer in named_layers(model).items())):
        for variable in _own_variables(layer):
            if id(variable) not in names:
                # Keras numbers unnamed variables across the process, so the number says nothing about the model.
                name = prefix + ("variable" if _NUMBERED.fullmatch(variable.name) else variable.name)
                used[name] += 1
                names[id(variable)] = name if used[name] == 1 else f"{name}~{used[name] - 1}"
    return {names.get(id(variable), variable.path): variable for variable in model.weights}


def variable_names(model: keras.Model) -> dict[int, str]:
    """The name of every variable, by its id: Keras's variables cannot be hashed."""
    return {id(variable): name for name, variable in named_variables(model).items()}


def owned_variables(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """The variables that each layer holds directly, not through a sublayer. The key "" has the model's own."""
    return {"": _own_variables(model)} | {name: _own_variables(layer) for name, layer in named_layers(model).items()}


def owned_names(model: keras.Model) -> dict[str, list[str]]:
    """The names of the variables that each layer holds directly, as in `owned_variables`."""
    names = variable_names(model)
    return {
        layer: [names[id(each)] for each in own if id(each) in names] for layer, own in owned_variables(model).items()
    }


def _sublayers(owner: Any) -> Iterator[keras.layers.Layer]:
    """Yield the layers directly inside a model or layer: those in its `layers` first, then those in attributes."""
    import keras

    layer_class = keras.layers.Layer
    listed = list(getattr(owner, "layers", ())) if hasattr(owner, "layers") else []
    # Keras has no public list of a layer's sublayers; its own summary uses `_layers` too.
    for layer in (*listed, *getattr(owner, "_layers", ())):
        if isinstance(layer, layer_class):
            yield layer


def _own_variables(layer: Any) -> list[keras.Variable]:
    return [*getattr(layer, "_trainable_variables", ()), *getattr(layer, "_non_trainable_variables", ())]
