"""How an exported file is to be used: what it takes and gives, said to people and written into the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from porting.exporting.base import Exportable
from porting.models.images import Preprocessing
from porting.models.inputs import leaves_by_key


@dataclass(frozen=True)
class Tensor:
    """An input or a result: its name in the file, its sides, None for one that is open, and its type."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {'x'.join('N' if side is None else str(side) for side in self.shape)} {self.dtype}"


@dataclass(frozen=True)
class Usage:
    """Inputs and results in order; how the images among them are prepared; and where the model comes from.

    `mean` and `std`, a number a channel of red, green and blue, are for values from 0 to 1; None where the inputs are
    no images. `facts` are the family, the variant, the checkpoint's sha256 and the like.
    """

    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    facts: Mapping[str, Any]

    def lines(self) -> list[str]:
        """For a terminal: `input images 1x64x64x3 float32, RGB, x / 127.5 - 1`."""
        how = f", RGB from 0 to 255, {self.formula()}" if self.mean is not None else ""
        return [f"input {each}{how}" for each in self.inputs] + [f"output {each}" for each in self.results]

    def formula(self) -> str:
        """How values from 0 to 255 are prepared."""
        assert self.mean is not None
        assert self.std is not None
        if set(self.mean) == {0.5} == set(self.std):
            return "x / 127.5 - 1"
        mean, std = ([f"{number:g}" for number in numbers] for numbers in (self.mean, self.std))
        return f"(x / 255 - [{', '.join(mean)}]) / [{', '.join(std)}]"

    def properties(self) -> dict[str, str]:
        """For formats that keep pairs of text, such as ONNX's metadata_props."""
        found = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.facts.items()}
        found["inputs"] = "; ".join(map(str, self.inputs))
        found["outputs"] = "; ".join(map(str, self.results))
        if self.mean is not None:
            found |= {"image_mean": json.dumps(self.mean), "image_std": json.dumps(self.std), "image_channels": "RGB"}
            found["preprocessing"] = self.formula()
        return found


def usage_of(given: Exportable, *, fixed: bool, preprocessing: Preprocessing | None, facts: Mapping[str, Any]) -> Usage:
    """Of a model that is written for one sample when `fixed`; `preprocessing` is that of its images, if it has any."""
    inputs = [Tensor(spec.name, _sides(spec.shape), spec.dtype.name) for spec in given.specs(fixed=fixed).values()]
    leaves = leaves_by_key(given.model.output)
    results = [
        Tensor(name, (1 if fixed else None, *_sides(leaves[key].shape)[1:]), "float32")
        for key, name in given.result_names().items()
    ]
    mean, std = (preprocessing.mean, preprocessing.std) if preprocessing is not None else (None, None)
    return Usage(tuple(inputs), tuple(results), mean, std, facts)


def _sides(shape: Iterable[int | None]) -> tuple[int | None, ...]:
    return tuple(None if side is None else int(side) for side in shape)
