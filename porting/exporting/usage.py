"""How to use an exported file: its inputs, outputs and preprocessing, for people and for the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porting.exporting.base import Exportable
from porting.models.images import Preprocessing
from porting.models.inputs import leaves_by_key
from porting.wording import listed

# The file of the labels, inside or beside an exported one.
LABELS_FILE = "labels.txt"
# The mean and the standard deviation, for values from 0 to 1, that leave images from 0 to 255 as they are.
AS_THEY_ARE = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)

# What the result of a classifier holds.
PROBABILITIES, LOGITS = "probabilities", "logits"

# How open axes after that of the samples are shown, by the number of axes.
_OPEN = {2: ("L",), 3: ("L",), 4: ("H", "W")}


@dataclass(frozen=True)
class Tensor:
    """An input or a result: its name in the file, its shape (None for an open axis), and its type."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        # Samples first; then the length of a sequence, or the sides of an image.
        open_sides = ("N", *_OPEN.get(len(self.shape), ()))
        letters = [*open_sides, *["?"] * (len(self.shape) - len(open_sides))]
        shown = (letter if side is None else str(side) for side, letter in zip(self.shape, letters, strict=False))
        return f"{self.name} {'x'.join(shown)} {self.dtype}"


@dataclass(frozen=True)
class Usage:
    """The inputs and results in order, the preprocessing of images, and the origin of the model.

    `mean` and `std` hold one number per RGB channel, for values from 0 to 1. They are None if the inputs are not
    images. `labels` are the names of a classifier's classes, if they are known, and `gives` is what its result holds:
    "logits", "probabilities", or "" if it is no classifier. `facts` holds the family, the variant, the checkpoint's
    sha256 and so on.
    """

    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    facts: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    gives: str = ""

    def lines(self) -> list[str]:
        """Lines for the terminal, such as `input images 1x64x64x3 float32, RGB from 0 to 255, x / 127.5 - 1`."""
        how = f", RGB from 0 to 255, {self.formula()}" if self.mean is not None else ""
        what = f", {self.gives}" if self.gives else ""
        lines = [f"input {each}{how}" for each in self.inputs] + [f"output {each}{what}" for each in self.results]
        if self.labels:
            lines.append(f"labels {listed(self.labels, 5)}")
        elif self.gives:
            lines.append("labels not known: --labels FILE names the classes")
        return lines

    def formula(self) -> str:
        """The normalisation of values from 0 to 255, as a formula."""
        assert self.mean is not None
        assert self.std is not None
        if self.normalizes:
            return "x as it is: the graph normalises it"
        if set(self.mean) == {0.5} == set(self.std):
            return "x / 127.5 - 1"
        mean, std = ([f"{number:g}" for number in numbers] for numbers in (self.mean, self.std))
        return f"(x / 255 - [{', '.join(mean)}]) / [{', '.join(std)}]"

    @property
    def labels_text(self) -> str:
        """The content of the file of labels: one per line, in order."""
        return "".join(f"{label}\n" for label in self.labels)

    @property
    def normalizes(self) -> bool:
        """Whether the file takes images from 0 to 255 as they are."""
        return self.mean == AS_THEY_ARE[0] and self.std == AS_THEY_ARE[1]

    def properties(self) -> dict[str, str]:
        """Pairs of text for formats that store them, such as ONNX's metadata_props."""
        found = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.facts.items()}
        found["inputs"] = "; ".join(map(str, self.inputs))
        found["outputs"] = "; ".join(map(str, self.results))
        if self.mean is not None:
            found |= {"image_mean": json.dumps(self.mean), "image_std": json.dumps(self.std), "image_channels": "RGB"}
            found["preprocessing"] = self.formula()
        if self.gives:
            found["output"] = self.gives
        if self.labels:
            found["labels"] = json.dumps(self.labels)
        return found


def usage_of(
    given: Exportable,
    *,
    fixed: bool,
    preprocessing: Preprocessing | None,
    facts: Mapping[str, Any],
    labels: Sequence[str] = (),
    classifies: bool = False,
) -> Usage:
    """The usage of an exported model, which takes one sample if `fixed`. `preprocessing` is None without images."""
    inputs = [Tensor(spec.name, _sides(spec.shape), spec.dtype.name) for spec in given.specs(fixed=fixed).values()]
    leaves = leaves_by_key(_fixed_output(given) if fixed else given.model.output)
    results = [
        Tensor(name, (1 if fixed else None, *_sides(leaves[key].shape)[1:]), "float32")
        for key, name in given.result_names().items()
    ]
    mean, std = (preprocessing.mean, preprocessing.std) if preprocessing is not None else (None, None)
    if given.ends.normalization is not None:
        mean, std = AS_THEY_ARE
    gives = (PROBABILITIES if given.ends.softmax else LOGITS) if classifies else ""
    return Usage(tuple(inputs), tuple(results), mean, std, facts, tuple(labels), gives)


def _fixed_output(given: Exportable) -> Any:
    """The results of the model for inputs of fixed shapes, as symbols; with open sides if they cannot be inferred."""
    import keras

    try:
        fixed = [keras.KerasTensor(spec.shape, spec.dtype.name) for spec in given.specs(fixed=True).values()]
        return given.model.compute_output_spec(given.inputs.structured(given.model, fixed))
    except Exception:  # the code of a layer may need numbers
        return given.model.output


def _sides(shape: Iterable[int | None]) -> tuple[int | None, ...]:
    return tuple(None if side is None else int(side) for side in shape)
