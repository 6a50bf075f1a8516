"""Two models that a command line names, with a file of rows, as a family of one variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError, SourceError
from porting.families.base import Spec
from porting.families.library import LibraryFamily
from porting.families.specs import build_model
from porting.files.checkpoint import Checkpoint
from porting.kinds.transforms import Array
from porting.mapping.rules import KeyRule
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import keras
    from torch import nn

VARIANT = "given"
# Sides of inputs that a model leaves open.
_IMAGE_SIDE, _LENGTH = 224, 16
_TOKENS = 64


class GivenFamily(LibraryFamily):
    """A PyTorch model and a Keras model, each by what makes it, and the rows between them.

    `source` and `target` are as `build_model` takes them, with `source_arguments` and `target_arguments`. A check runs
    on the `inputs` of an `.npz`, by the Keras model's names, by default on random ones of the shapes that it takes.
    """

    name = "given"
    publisher = "its own"

    def __init__(
        self,
        source: str,
        target: str,
        rows: Sequence[KeyRule],
        *,
        source_arguments: Mapping[str, Any] | None = None,
        target_arguments: Mapping[str, Any] | None = None,
        inputs: Path | None = None,
    ) -> None:
        self._source, self._target, self.rows = source, target, tuple(rows)
        self._source_arguments, self._target_arguments = source_arguments or {}, target_arguments or {}
        self._inputs = None if inputs is None else read_inputs(inputs)
        self.models = {VARIANT: (source, target)}

    @property
    def described(self) -> str:
        """Both models, in the words that name them."""
        return f"{self._source} -> {self._target}"

    def how_to_build(self, spec: Spec) -> str:
        return self._target

    def build_reference(self, spec: Spec) -> nn.Module:
        return pytorch_model(self._source, self._source_arguments)

    def make_candidate(self, spec: Spec) -> keras.Model:
        candidate = keras_model(self._target, self._target_arguments)
        if self._inputs is None:
            self._inputs = random_inputs(candidate)
        return candidate

    def check_inputs(self, spec: Spec) -> Any:
        if self._inputs is None:
            self._bound(spec)
        return self._inputs

    def published(self, variant: str, progress: Progress = SILENT) -> Checkpoint:
        raise SourceError(
            f"{self._source}: its weights are not known", hint="Give them with --checkpoint FILE, a PyTorch checkpoint."
        )


def pytorch_model(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The PyTorch model that `spec` names, for inference; raises FamilyError where it names another thing."""
    from torch import nn

    from porting.models.frameworks import load_triton

    load_triton()
    model = build_model(spec, arguments)
    if not isinstance(model, nn.Module):
        raise FamilyError(f"{spec} makes a {type(model).__name__}, not a PyTorch model")
    return model.eval()


def keras_model(spec: str, arguments: Mapping[str, Any]) -> keras.Model:
    """The Keras model that `spec` names; raises FamilyError where it names another thing."""
    from porting.models.frameworks import start_tensorflow

    start_tensorflow()
    import keras

    model = build_model(spec, arguments)
    if not isinstance(model, keras.Model):
        raise FamilyError(f"{spec} makes a {type(model).__name__}, not a Keras model")
    return model


def random_inputs(candidate: keras.Model) -> Any:
    """Inputs of the shapes and types that a Keras model takes, one sample for images and two for all else."""
    tensors = candidate.inputs
    if not tensors:
        raise FamilyError("the Keras model does not say what it takes", hint="Give --inputs FILE.npz.")
    rng = np.random.default_rng(0)
    found = {tensor.name: _drawn(rng, tuple(tensor.shape), str(tensor.dtype), tensor.name) for tensor in tensors}
    return next(iter(found.values())) if len(found) == 1 else found


def _drawn(rng: np.random.Generator, shape: tuple[int | None, ...], dtype: str, name: str) -> Array:
    usual = _IMAGE_SIDE if len(shape) == 4 else _LENGTH
    sides = [2 if len(shape) < 4 else 1, *(usual if side is None else side for side in shape[1:])]
    if dtype.startswith(("int", "uint")):
        if "mask" in name:
            return np.ones(sides, dtype)
        return rng.integers(0, 2 if "segment" in name or "type" in name else _TOKENS, sides).astype(dtype)
    return rng.normal(size=sides).astype(np.float32)


def read_inputs(path: Path) -> Any:
    """The inputs in an `.npz`: by name, or the one array that it holds; raises SourceError where it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise SourceError(f"{path}: not an .npz of inputs: {error}", hint="np.savez(FILE, name=array).") from None
    return next(iter(found.values())) if len(found) == 1 else found
