"""Writes the Python file of a family from a proposal. It works as it is, for one variant, and a person extends it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from porting.errors import FamilyError
from porting.mapping.rules import KeyRule

_LIBRARIES = ("timm", "torchvision", "transformers")
_LINE = 116

_FILE = '''"""{source} to {target}.

`van-port map` wrote this file. Complete the lines marked FINISH, and offer the family in a pyproject.toml:

    [project.entry-points."porting.families"]
    {name} = "{name}:{class_name}"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porting.families.base import Spec
from porting.families.given import keras_model, pytorch_model, random_inputs
from porting.families.library import LibraryFamily
from porting.mapping.rules import KeyRule

if TYPE_CHECKING:
    import keras
    from torch import nn


class {class_name}(LibraryFamily):
    """FINISH: what these models are, and the paper or page that publishes them."""

    name = "{name}"
    publisher = {publisher}
    # FINISH: more variants. The key is the publisher's name, the value what `build_model` takes for the Keras model.
    models = {{{variant}: {target_spec}}}
    # FINISH: the PyTorch name of the classifier, such as "fc", if its number of classes may differ.
    head = ""
    rows = (
{rows}
    )
{extra}
    def build_reference(self, spec: Spec) -> nn.Module:
        return pytorch_model({source_spec}, {source_arguments})

    def make_candidate(self, spec: Spec) -> keras.Model:
        return keras_model(self.models[spec.variant], {target_arguments})

    def check_inputs(self, spec: Spec) -> Any:
        # FINISH: inputs like those of real use. A family of image models may leave this method out.
        return random_inputs(self.make_candidate(spec).inputs)
'''


def family_text(
    name: str,
    source: str,
    target: str,
    rules: Sequence[KeyRule],
    *,
    zeros: Sequence[str] = (),
    source_arguments: Mapping[str, Any] | None = None,
    target_arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text of a family's file. `source` and `target` are as `build_model` takes them.

    `zeros` are tensors that the Keras model lacks and that must be zero. Raises FamilyError for a name that cannot be
    that of a Python module.
    """
    if not name.isidentifier() or name != name.lower():
        raise FamilyError(
            f"{name!r} cannot name a family", hint="Use lower-case letters, digits and underscores, such as my_resnet."
        )
    library, _, rest = source.partition(":")
    known = library in _LIBRARIES and library != "transformers"
    extra = f"    zeros = {_tuple(zeros)}\n" if zeros else ""
    return _FILE.format(
        source=_in_docstring(source),
        target=_in_docstring(target),
        name=name,
        class_name="".join(part.capitalize() for part in name.split("_")) + "Family",
        publisher=json.dumps(library if library in _LIBRARIES else name),
        variant=json.dumps(rest.partition(":")[0] if known else "default"),
        target_spec=json.dumps(target),
        rows="\n".join(_row(rule) for rule in rules),
        extra=extra,
        source_spec=f'f"{library}:{{spec.variant}}"' if known else json.dumps(source),
        source_arguments=repr(dict(source_arguments or {})),
        target_arguments=repr(dict(target_arguments or {})),
    )


def _row(rule: KeyRule) -> str:
    parts = [json.dumps(each) for each in (rule.source, rule.target, rule.kind)]
    line = f"        KeyRule({', '.join(parts)}),"
    if len(line) <= _LINE:
        return line
    return "\n".join(["        KeyRule(", *(f"            {part}," for part in parts), "        ),"])


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(json.dumps(name) for name in names)},)"


def _in_docstring(text: str) -> str:
    return json.dumps(text)[1:-1]
