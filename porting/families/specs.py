"""Models named on the command line: by their library, or by the code that builds them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from porting.errors import FamilyError, SourceError
from porting.models.frameworks import import_library
from porting.wording import nearest, typed_reason_of

FORMS = (
    "timm:NAME, torchvision:NAME, transformers:CLASS[:config.json], keras.applications:NAME, "
    "keras_hub:CLASS[:config.json], package.module:callable or file.py:callable"
)


def parse_arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse `name=value` pairs as keyword arguments. A value is a Python literal, else text. Raises FamilyError."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise FamilyError(f"{pair!r} is not an argument", hint="Use the form name=value, such as num_classes=10.")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def build_model(spec: str, arguments: Mapping[str, Any]) -> Any:
    """Build the model that `spec` names, with random weights; raises FamilyError if there is none.

    `FORMS` lists the forms of `spec`. `file.py:callable` runs that file.
    """
    library, _, rest = spec.partition(":")
    name, _, config = rest.partition(":")
    if not rest:
        raise FamilyError(f"{spec!r} does not name a model", hint=f"Use one of the forms {FORMS}.")
    try:
        return _build(library, name, config, dict(arguments))
    except (FamilyError, SourceError):
        raise
    except ImportError as error:
        raise FamilyError(
            f"{spec}: the package {error.name} is not installed, or cannot be imported",
            hint="Install it in the environment of van-port, or mend the import.",
        ) from None
    except Exception as error:  # the code that builds the model may raise anything
        raise FamilyError(f"{spec}: cannot be built: {typed_reason_of(error)}") from None


def require_its_file(spec: str) -> None:
    """Raise SourceError if a model is named as `file.py:function` and there is no such file."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py") and not Path(place).is_file():
        raise SourceError(f"{place}: no such file", hint="FILE.py is a path, from the current folder on.")


def load_function(spec: str) -> Callable[..., Any]:
    """Load the function that `file.py:function` or `package.module:function` names, running the file if needed.

    Raises SourceError if there is no such file, and FamilyError if it cannot be loaded.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise FamilyError(f"{spec!r} does not name a function", hint="Use the form FILE.py:FUNCTION.")
    try:
        found = _callable(place, name)
    except (FamilyError, SourceError):
        raise
    except Exception as error:  # that code may raise anything
        raise FamilyError(f"{spec}: cannot be loaded: {typed_reason_of(error)}") from None
    if not callable(found):
        raise FamilyError(f"{spec} is not a function")
    return found


def _build(library: str, name: str, config: str, arguments: dict[str, Any]) -> Any:
    if library == "timm":
        return import_library("timm").create_model(name, **arguments)
    if library == "torchvision":
        return import_library("torchvision.models").get_model(name, **arguments)
    if library == "transformers":
        owner = _attribute(import_library("transformers"), name, library)
        return owner(owner.config_class(**_config(config), **arguments))
    if library == "keras.applications":
        owner = _attribute(importlib.import_module("keras").applications, name, library)
        return owner(**{"weights": None, "classifier_activation": None, **arguments})
    if library in {"keras_hub", "keras-hub"}:
        owner = _attribute(importlib.import_module("keras_hub").models, name, library)
        return owner(**_config(config), **arguments)
    return _callable(library, name)(**arguments)


def _callable(place: str, name: str) -> Callable[..., Any]:
    require_its_file(f"{place}:{name}")
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise FamilyError(f"{place}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found: Callable[..., Any] = _attribute(module, name, place)
    return found


def _attribute(owner: Any, name: str, place: str) -> Any:
    if not hasattr(owner, name):
        guess = nearest(name, (each for each in dir(owner) if not each.startswith("_")))
        raise FamilyError(f"{place} has no {name!r}", hint=guess.rstrip() or f"Use one of the forms {FORMS}.")
    return getattr(owner, name)


def _config(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        raise FamilyError(f"{path}: not a configuration: {error}") from None
    return found
