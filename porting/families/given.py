"""A family of one variant: two models named on the command line, and a file of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError, KeyMapError, SourceError
from porting.families.base import Spec, by_path
from porting.families.library import LibraryFamily
from porting.families.specs import build_model
from porting.files.checkpoint import Checkpoint
from porting.kinds.transforms import Array
from porting.mapping.convert import diff_keys
from porting.mapping.key_map import KeyMap
from porting.mapping.rules import KeyRule
from porting.progress import SILENT, Progress
from porting.wording import listed

if TYPE_CHECKING:
    import keras
    from torch import nn

VARIANT = "given"
# Sizes for input axes that a model leaves open.
_IMAGE_SIDE, _LENGTH = 224, 16
_TOKENS = 64
_SAMPLES = 2


class GivenFamily(LibraryFamily):
    """A PyTorch model and a Keras model, each given by its constructor, and the rows between them.

    `build_model` lists the forms of `source` and `target`; `source_arguments` and `target_arguments` are passed to
    them. A check uses the arrays of `inputs`, an `.npz` file with the Keras model's input names; the default is random
    inputs of the right shapes.
    """

    name = "given"
    knows_preprocessing = False
    has_published = False
    publisher = "the model's own"

    def __init__(
        self,
        source: str,
        target: str,
        rows: Sequence[KeyRule],
        *,
        source_arguments: Mapping[str, Any] | None = None,
        target_arguments: Mapping[str, Any] | None = None,
        inputs: Path | None = None,
        rows_file: Path | None = None,
    ) -> None:
        self._source, self._target, self.rows = source, target, tuple(rows)
        self._source_arguments, self._target_arguments = source_arguments or {}, target_arguments or {}
        self._inputs = None if inputs is None else read_inputs(inputs)
        self.inputs_are_random = inputs is None
        self.models = {VARIANT: (source, target)}
        self._rows_file = rows_file

    @property
    def described(self) -> str:
        """Both models, as named on the command line. No other family has an arrow in its name."""
        return f"{self._source} -> {self._target}"

    def expected(self, spec: Spec) -> str:
        return (
            f"Expected the weights of {self._source}. If only sizes differ, such as the number of classes, state them "
            "with --source-arg and --target-arg."
        )

    def key_map(self, spec: Spec) -> KeyMap:
        try:
            return super().key_map(spec)
        except KeyMapError as error:
            where = f"{self._rows_file}: " if self._rows_file else ""
            raise KeyMapError(f"{where}{error.message}", hint=error.hint) from None

    def refuse_unfit_rows(self, spec: Spec, state_dict: Mapping[str, Array]) -> None:
        """Raise KeyMapError if a checkpoint fits the PyTorch model, so that only the rows can be at fault."""
        own = self.tensor_shapes(spec)
        if any(name not in state_dict or state_dict[name].shape != shape for name, shape in own.items()):
            return
        diff = diff_keys(state_dict, self.key_map(spec), by_path(self.weight_shapes(spec)))
        lines = [f"  {name}: no row takes this tensor of PyTorch's" for name in diff.unexpected_keys if name in own]
        lines += [f"  {name}: no row writes this variable of Keras's" for name in diff.unwritten]
        lines += [f"  {each.source}: Keras has {each.expected}, PyTorch {each.found}" for each in diff.mismatched]
        if lines:
            raise KeyMapError(
                f"{self._rows_file or 'the rows'}: they do not fit the two models\n{listed(lines, separator=chr(10))}",
                hint="`van-port map SOURCE TARGET --map ROWS --out NEW` completes rows. A tensor that Keras has in its "
                'code needs a row with target = "" and kind = "constant".',
            )

    def facts(self, spec: Spec) -> dict[str, Any]:
        return {"family": self.described, "num_classes": None}  # which layer is a head is not known

    def how_to_build(self, spec: Spec) -> str:
        return self._target

    def build_reference(self, spec: Spec) -> nn.Module:
        return pytorch_model(self._source, self._source_arguments)

    def build_empty_reference(self, spec: Spec) -> nn.Module:
        return self.build_reference(spec)  # its code may use numbers that it has drawn

    def make_candidate(self, spec: Spec) -> keras.Model:
        candidate = keras_model(self._target, self._target_arguments)
        self.cache["inputs"] = getattr(candidate, "inputs", None)  # a subclassed model may state none
        return candidate

    def check_inputs(self, spec: Spec) -> Any:
        return self.inputs_of(spec, None)

    def inputs_of(self, spec: Spec, samples: int | None) -> Any:
        if not self.inputs_are_random:
            return super().inputs_of(spec, samples) if samples else self._inputs
        if "inputs" not in self.cache:
            self._bound(spec)
        return random_inputs(self.cache["inputs"], samples or _SAMPLES)

    def published(self, variant: str, progress: Progress = SILENT) -> Checkpoint:
        raise SourceError(
            f"{self._source}: no published weights are known", hint="Give a PyTorch checkpoint with --checkpoint FILE."
        )


def pytorch_model(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the PyTorch model that `spec` names, in eval mode; raises FamilyError if it is something else."""
    from torch import nn

    from porting.models.frameworks import load_triton

    load_triton()
    model = build_model(spec, arguments)
    if not isinstance(model, nn.Module):
        raise FamilyError(f"{spec} makes a {type(model).__name__}, not a PyTorch model")
    return model.eval()


def keras_model(spec: str, arguments: Mapping[str, Any]) -> keras.Model:
    """Build the Keras model that `spec` names; raises FamilyError if it is something else."""
    from porting.models.frameworks import numbered_afresh, start_tensorflow

    start_tensorflow()
    import keras

    with numbered_afresh():
        model = build_model(spec, arguments)
    if not isinstance(model, keras.Model):
        raise FamilyError(f"{spec} makes a {type(model).__name__}, not a Keras model")
    return model


def random_inputs(tensors: Sequence[keras.KerasTensor] | None, samples: int = _SAMPLES) -> Any:
    """Random inputs of the shapes and types of a Keras model's `inputs`."""
    if not tensors:
        raise FamilyError("the Keras model does not declare its inputs", hint="Give --inputs FILE.npz.")
    rng = np.random.default_rng(0)
    found = {}
    for each in tensors:
        shape = (each.shape[0] or samples, *each.shape[1:])
        found[each.name] = _drawn(rng, shape, str(each.dtype), each.name)
    return next(iter(found.values())) if len(found) == 1 else found


def _drawn(rng: np.random.Generator, shape: tuple[int | None, ...], dtype: str, name: str) -> Array:
    usual = _IMAGE_SIDE if len(shape) == 4 else _LENGTH
    sides = [usual if side is None else side for side in shape]
    if dtype.startswith(("int", "uint")):
        if "mask" in name:
            return np.ones(sides, dtype)
        return rng.integers(0, 2 if "segment" in name or "type" in name else _TOKENS, sides).astype(dtype)
    return rng.normal(size=sides).astype(np.float32)


def read_inputs(path: Path) -> Any:
    """Read the inputs in an `.npz` file: arrays by name, or the only array. Raises SourceError for other files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
            if not all(isinstance(each, np.ndarray) and each.dtype.kind in "fiub" for each in found.values()):
                raise ValueError("it holds something else than arrays of numbers")
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise SourceError(
            f"{path}: not an .npz of inputs: {error}", hint="Write one with np.savez(FILE, name=array)."
        ) from None
    return next(iter(found.values())) if len(found) == 1 else found
